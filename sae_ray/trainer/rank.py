"""One process of the trainer group: gathers blocks, calls `ShardedTrainer`, reports what it did.

`TrainerRank` is a plain class; `group.py` makes it an actor. A rank holds one copy for each of
`RunConfig.specs()`, "main" first, and, once forked, "control": main, trained on without a credit. All copies
train on the same batches.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from sae_ray import logs
from sae_ray.activations.block import Block
from sae_ray.config import RunConfig
from sae_ray.errors import UserError
from sae_ray.network import interface_of
from sae_ray.reward.evidence import ContextLayout, ContextScan
from sae_ray.sae.formats import check_fits, import_sae
from sae_ray.trainer import checkpoint, gamma_hold, responses
from sae_ray.trainer.collectives import Collectives
from sae_ray.trainer.credit_state import reshard
from sae_ray.trainer.mesh import Mesh
from sae_ray.trainer.mixing import Cursor, next_cursor, window_batches
from sae_ray.trainer.responses import activations, fetch, own_latents
from sae_ray.trainer.saving import ShardWriter
from sae_ray.trainer.sharded_sae import CreditLoss, ShardedTrainer
from sae_ray.variants import SAESpec

RNG = checkpoint.OF_A_RANK + "torch"
FACTOR = "factor"  # beside the state of a credit that alarms have cooled

if TYPE_CHECKING:
    from sae_ray.reward.credit import CreditSettings


@dataclass(frozen=True)
class WindowResult:
    """What one rank did in one `train_window` call. Metrics are the same on every rank."""

    window: int
    first_step: int  # steps done before the call
    last_step: int  # steps done after it
    next_cursor: Cursor
    finished_window: bool  # the window's blocks are no longer needed
    tokens: int
    seconds: float
    block_wait_seconds: float
    generation: int
    metrics: list[dict[str, float]] = field(default_factory=list)
    collective_bytes: dict[str, int] = field(default_factory=dict)  # since the group started


class TrainerRank:
    def __init__(self, config_json: str, widths: dict[str, int]):
        cfg = RunConfig.model_validate_json(config_json)
        logs.start_actor(cfg, "rank")
        torch.set_num_threads(cfg.trainer.threads)
        torch.manual_seed(cfg.seed)  # a process's own seed is random, and the generator's state is saved
        self.cfg, self.widths, self.specs = cfg, widths, cfg.specs()
        self._hooks = [hook.name for hook in cfg.hooks]
        self.generation = -1
        self.credit: CreditLoss | None = None
        self.credit_factor = 1.0  # of the round that the credit is of: below 1 where alarms have cooled it
        self._hold: gamma_hold.GammaHold | None = None
        self.copies: dict[str, ShardedTrainer] = {}
        self._writer = ShardWriter()
        self._device = "cuda" if cfg.trainer.gpus and torch.cuda.is_available() else "cpu"

    # ----------------------------------------------------------------------------- joining

    def node_address(self) -> tuple[str, str]:
        """(IP address, node id) of the node this rank runs on."""
        import ray

        return ray.util.get_node_ip_address(), ray.get_runtime_context().get_node_id()

    def open_store(self, address: str, world: int) -> int:
        """Rank 0 opens the rendezvous at a port that the system picks; returns the port."""
        self._store = dist.TCPStore(address, 0, world, is_master=True, timeout=self._timeout(), wait_for_workers=False)
        return self._store.port

    def join(self, address: str, port: int, rank: int, world: int, generation: int) -> int:
        """Enters the process group of `world` ranks; returns when all have."""
        self.generation = generation
        logs.bind(generation=generation, rank=rank)
        if world == 1:
            mesh = Mesh.alone(self._device)
        else:
            # By itself gloo announces the address of the host's name, which is often the loopback's or leads nowhere.
            own = address if address.startswith("127.") else self.node_address()[0]
            if (interface := interface_of(own)) is not None:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            store = getattr(self, "_store", None) or dist.TCPStore(
                address, port, world, is_master=False, timeout=self._timeout()
            )
            backend = "nccl" if self._device == "cuda" else "gloo"
            dist.init_process_group(
                backend,
                store=dist.PrefixStore(f"generation-{generation}", store),
                rank=rank,
                world_size=world,
                timeout=self._timeout(),
            )
            mesh = Mesh.connect(self.cfg.trainer.dp, self.cfg.trainer.tp, self._device)
        self.mesh, self.collectives = mesh, Collectives(mesh)
        self._hold = gamma_hold.hold_of(self.cfg.rlaif, mesh.device)
        return os.getpid()

    def build(self, first_window_blocks: list[Any]) -> dict[str, float]:
        """New SAEs, their scales and b_dec taken from these blocks. Returns {"input_scale"} of main.

        Raises:
            UserError: a block holds a number that is not finite, or an SAE to start from does not fit.
        """
        acts = activations(fetch(first_window_blocks), self._hooks)
        self.copies = {name: self._new_trainer(name) for name in self.specs}
        for name, trainer in self.copies.items():
            spec = self.specs[name]
            target_TO = None if spec.hook_out is None else acts[spec.hook_out.name]
            if spec.sae.init_from is None:
                trainer.initialise(acts[spec.hook.name], target_TO)
            else:
                d_out = None if spec.hook_out is None else trainer.d_out
                start = check_fits(import_sae(spec.sae.init_from), spec.sae, trainer.d_in, d_out)
                trainer.load_weights(start, acts[spec.hook.name], target_TO)
        return {"input_scale": self.copies["main"].input_scale}

    # ----------------------------------------------------------------------------- training

    def train_window(
        self, window: int, start_batch: int, blocks: list[Any], max_steps: int | None = None
    ) -> WindowResult:
        """Trains the batches of a window from `start_batch` on, at most `max_steps` of them.

        Args:
            blocks: object references of the window's blocks, in id order.
        Raises:
            UserError: a block holds a number that is not finite (it is named; nothing was trained).
        """
        began = time.perf_counter()
        fetched = fetch(blocks)
        waited = time.perf_counter() - began
        acts = activations(fetched, self._hooks)
        n_tokens = sum(block.n_tokens for block in fetched)
        batches = window_batches(window, n_tokens, self.cfg.trainer.batch_tokens, self.cfg.seed)
        todo = batches[start_batch : None if max_steps is None else start_batch + max_steps]
        first_step = self.copies["main"].steps_done
        logs.bind(step=first_step)
        main_credit = self.credit if self.credit is None or self._hold is None else self._hold.held(self.credit)
        for index_B in todo:
            low, high = self.mesh.rows(len(index_B))
            index_b = index_B[low:high]
            # One gather for each hook point, shared by all copies that read it.
            raw = {hook: acts_TD[index_b].to(self.mesh.device) for hook, acts_TD in acts.items()}
            for name, trainer in self.copies.items():
                spec, credit = self._spec(name), main_credit if name == "main" else None
                target_bO = None if spec.hook_out is None else raw[spec.hook_out.name]
                trainer.step(raw[spec.hook.name], len(index_B), credit, target_bO)
            if self._hold is not None:
                self._hold.observe(*self.copies["main"].levels)
        cursor = next_cursor(window, start_batch + len(todo), len(batches))
        return WindowResult(
            window,
            first_step,
            self.copies["main"].steps_done,
            cursor,
            cursor.window > window,
            sum(len(index_B) for index_B in todo),
            time.perf_counter() - began,
            waited,
            self.generation,
            self._read_metrics(),
            dict(self.collectives.bytes),
        )

    def apply_rewards(self, batch: list[Any], evidence: list[Any]) -> dict[str, Any]:
        """Fits the credit of a round to this shard's judged latents; it replaces the one before.

        Args:
            batch: one reference to a `reward.credit.RewardBatch`.
            evidence: references of the evidence blocks that its context ids refer to.
        """
        from sae_ray.reward.credit import ESTIMATORS

        main = self.copies["main"]
        own = fetch(batch)[0].for_shard(main.first_latent, main.last_latent)
        self.credit = None  # replaced also where no latent of this shard earns a gradient any more
        self.credit_factor = own.gamma_factor
        if self._hold is not None:
            self._hold.begin()
        if len(own.latents) and self._credit_gamma() * self.credit_factor > 0:
            blocks = fetch(evidence)
            layout = responses.layout_of(blocks, self.cfg.judge.context_tokens)
            x_TD = responses.scaled_inputs(main, blocks, self.specs["main"].hook.name)
            state = responses.latent_state(main, own.latents, x_TD)
            self.credit = ESTIMATORS[self.cfg.rlaif.estimator].fit(self._credit_settings(), own, state, x_TD, layout)
        return {"latents": len(own.latents), "installed": self.credit is not None, "step": main.steps_done}

    def fork_control(self) -> None:
        """Starts the control copy from main as it is now, optimiser state included."""
        self.copies["control"] = self.copies["main"].fork()

    # ----------------------------------------------------------------------------- evidence

    def count_contexts(self, blocks: list[Any], context_tokens: int, which: str = "main") -> np.ndarray:
        """In how many contexts each latent of this shard is active: int64 [m]."""
        trainer = self._copy(which)
        total_m = torch.zeros(len(trainer.b_enc_m), dtype=torch.int64)
        for block in fetch(blocks):
            total_m += responses.contexts_active(trainer, *self._with_layout([block], context_tokens))
        return total_m.numpy()

    @torch.no_grad()
    def scan(self, blocks: list[Any], context_tokens: int, latents: list[int], which: str = "main") -> ContextScan:
        """Responses of those of `latents` that this shard holds, to every context of `blocks`."""
        trainer = self._copy(which)
        hook = self.specs["main"].hook.name
        return responses.scan(trainer, fetch(blocks), hook, context_tokens, own_latents(trainer, latents))

    def firing(self, blocks: list[Any], context_tokens: int, latents: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Ids int64 [n] of those of `latents` that this shard holds, and bits uint8 [n, C / 8 rounded up]: in which
        contexts of `blocks` they are active."""
        main, hook = self.copies["main"], self.specs["main"].hook.name
        own_n = own_latents(main, latents)
        return own_n, responses.firing(main, fetch(blocks), hook, context_tokens, own_n)

    def nearest_latents(self, latents: list[int], rows_ND: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids int64, cosines float32), [N, n] each: of this shard, the n latents closest by decoder row to each of
        `latents`, whose rows are given; id -1 and cosine -inf where there are fewer."""
        return responses.nearest_latents(self.copies["main"], latents, rows_ND, n)

    def decoder_rows(self, latents: list[int], which: str = "main") -> tuple[np.ndarray, np.ndarray]:
        """(ids int64 [n], rows [n, D]) of those of `latents` that this shard holds."""
        trainer = self._copy(which)
        own_n = own_latents(trainer, latents)
        return own_n, responses.decoder_rows(trainer, own_n)

    def unit_rows(self, latents: list[int], which: str = "main") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids int64 [n] of those of `latents` that this shard holds, and their unit encoder and decoder rows, float16
        [n, D]."""
        trainer = self._copy(which)
        own_n = own_latents(trainer, latents)
        return own_n, *responses.unit_rows(trainer, own_n)

    # ----------------------------------------------------------------------------- checkpoints

    def save(self, folder: str, save: str = "") -> dict[str, Any]:
        """Snapshots this shard (all copies) and begins to write its files, named for the save; training may go on at
        once.

        Returns {"copies", "latents", "tp_rank", "snapshot_seconds"}; the rest is asked of `written`.
        """
        states: dict[str, dict[str, torch.Tensor]] = {}
        if self.mesh.dp_rank == 0:
            for name, trainer in self.copies.items():
                state = states[name] = trainer.state()
                if name == "main":
                    state[RNG] = torch.get_rng_state()
                    if self._hold is not None:
                        state[gamma_hold.STATE] = self._hold.state
                    credit = self.credit.state_dict() if self.credit is not None else {}
                    if credit and self.credit_factor != 1:
                        credit = credit | {FACTOR: torch.tensor(self.credit_factor, dtype=torch.float64)}
                    state |= {checkpoint.CREDIT + key: tensor for key, tensor in credit.items()}
        return {
            "copies": {name: self._about(name) for name in self.copies},
            "latents": {name: (trainer.first_latent, trainer.last_latent) for name, trainer in self.copies.items()},
            "tp_rank": self.mesh.tp_rank,
            "snapshot_seconds": self._writer.start(folder, self.mesh.tp_rank, states, save),
        }

    def written(self, patience_s: float) -> dict[str, Any] | None:
        """{"files", "write_seconds"} of the last `save`, or None if it is still writing after `patience_s`.

        Raises:
            UserError: the files could not be written.
        """
        return self._writer.report(patience_s)

    def load(self, folder: str) -> dict[str, Any]:
        """Restores all copies and the credit from a committed checkpoint of any mesh. Returns its manifest.

        Raises:
            UserError: a file is missing or corrupt, or the checkpoint's SAE is not the configured one.
        """
        manifest = checkpoint.read_manifest(folder)
        self._check_copies(folder, manifest)
        self.copies = {}
        for name in [name for name in (*self.specs, "control") if name in manifest["copies"]]:
            meta, trainer = manifest["copies"][name], self._new_trainer(name)
            rows = checkpoint.read_rows(folder, manifest, name, trainer.first_latent, trainer.last_latent)
            trainer.load_state(rows, meta)
            self.copies[name] = trainer
            if RNG in rows:
                torch.set_rng_state(rows[RNG])
            if self._hold is not None and gamma_hold.STATE in rows:
                self._hold.load(rows[gamma_hold.STATE])
        self.credit = self._restored_credit(folder, manifest)
        return manifest

    def _about(self, name: str) -> dict[str, Any]:
        """What the manifest says of a copy: with `meta()`, all that is needed to use it without this run's config."""
        trainer, spec = self.copies[name], self._spec(name)
        return {
            **self._identity(name),
            "hook": spec.hook.name,
            "hook_out": spec.hook_out and spec.hook_out.name,
            "k": spec.sae.k,
            "input_norm": spec.sae.input_norm,
            **trainer.meta(),
        }

    def _identity(self, name: str) -> dict[str, Any]:
        spec = self._spec(name)
        return {
            "d_in": self.widths[spec.hook.name],
            "d_out": self.widths[spec.target.name],
            "d_sae": spec.sae.d_sae,
            "architecture": spec.sae.architecture,
        }

    def _check_copies(self, folder: str, manifest: dict[str, Any]) -> None:
        """A checkpoint holds the SAEs that the run asks for, or it is another run's."""
        held = set(manifest["copies"]) - {"control"}
        if held != set(self.specs):
            raise UserError(
                f"{folder}: holds the SAEs {', '.join(sorted(held))}, this run trains {', '.join(sorted(self.specs))}"
            )
        for name in manifest["copies"]:
            about = {**manifest, **manifest["copies"][name]}
            for key, value in self._identity(name).items():
                if about.get(key, value) != value:
                    of = "" if name == "main" else f" of {name}"
                    raise UserError(f"{folder}: its {key}{of} is {about[key]}, this run's is {value}")

    def _restored_credit(self, folder: str, manifest: dict[str, Any]) -> CreditLoss | None:
        """The credit that was installed when the checkpoint was written."""
        main = self.copies["main"]
        states = checkpoint.read_credit(folder, manifest)
        # On the same mesh this gives back what this rank saved, bit for bit.
        own = reshard(states, main.first_latent, main.last_latent)
        if not own:
            return None
        from sae_ray.reward.credit import restore_credit

        self.credit_factor = float(own.pop(FACTOR, 1.0))
        own = {name: tensor.to(self.mesh.device) for name, tensor in own.items()}
        return restore_credit(self.cfg.rlaif.estimator, self._credit_settings(), own)

    def _credit_gamma(self) -> float:
        """The largest weight of any part of the credit."""
        from sae_ray.reward.credit import ESTIMATORS

        rlaif = self.cfg.rlaif
        of_rollouts = rlaif.rollout_gamma if ESTIMATORS[rlaif.estimator].uses_rollouts else None
        return max(rlaif.gamma, of_rollouts or 0.0)

    def _credit_settings(self) -> CreditSettings:
        from sae_ray.reward.credit import CreditSettings

        rlaif = self.cfg.rlaif
        return CreditSettings(
            rlaif.gamma,
            rlaif.slope,
            rlaif.shrink,
            rlaif.half_life_steps,
            rlaif.max_turn,
            rlaif.bonus,
            self.credit_factor,
            rlaif.gate_threshold == "fitted",
            rlaif.rollout_gamma,
        )

    # ----------------------------------------------------------------------------- small parts

    def _spec(self, name: str) -> SAESpec:
        return self.specs["main" if name == "control" else name]

    def _new_trainer(self, name: str) -> ShardedTrainer:
        spec = self._spec(name)
        d_in = self.widths[spec.hook.name]
        d_out = None if spec.hook_out is None else self.widths[spec.hook_out.name]
        return ShardedTrainer(spec.sae, spec.trainer, d_in, self.cfg.seed, self.collectives, d_out)

    def _copy(self, which: str) -> ShardedTrainer:
        if which not in self.copies:
            raise UserError(f"the trainer holds no {which!r} copy, only {', '.join(self.copies) or 'none'}")
        return self.copies[which]

    def _with_layout(self, blocks: list[Block], context_tokens: int) -> tuple[torch.Tensor, ContextLayout]:
        hook = self.specs["main"].hook.name
        return activations(blocks, [hook])[hook], responses.layout_of(blocks, context_tokens)

    def _read_metrics(self) -> list[dict[str, float]]:
        rows = self.copies["main"].read_metrics()
        if self._hold is not None:
            rows = [row | {"gamma_weight": float(self._hold.weight)} for row in rows]
        for name, trainer in self.copies.items():
            if name != "main":
                for row, other in zip(rows, trainer.read_metrics(), strict=True):
                    row |= {f"{name}/{key}": value for key, value in other.items() if key != "step"}
        return rows

    def _timeout(self) -> timedelta:
        return timedelta(seconds=self.cfg.trainer.step_timeout_s)
