"""The desk's rounds with everything that may be carried over, on a real trainer rank; the judge is an oracle."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import torch

from sae_ray.config import RunConfig
from sae_ray.reward import desk as desk_module
from sae_ray.reward.carried import CarriedOver
from sae_ray.reward.credit import RewardBatch
from sae_ray.reward.desk import RewardDesk
from sae_ray.reward.evidence import ContextScan, LatentPlan
from sae_ray.reward.rounds import Candidate
from sae_ray.storage import LocalStorage
from sae_ray.trainer.rank import TrainerRank

D_IN, HOOK, SIZE = 16, "blocks.0.hook_resid_post", 8
RLAIF: dict[str, Any] = {
    "latents": 6, "positives": 6, "near_misses": 4, "siblings": 2, "randoms": 4, "explainer_examples": 4,
    "max_context_share": 0.9, "gamma": 0.3,
}  # fmt: skip


class EvidenceBlock(dict):
    """A block that can be awaited, as a reference to it could."""

    def __await__(self):
        return self
        yield


def block(number: int) -> EvidenceBlock:
    rng = np.random.default_rng(number)
    basis = np.random.default_rng(99).normal(size=(12, D_IN))
    hidden = np.where(rng.random((512, 12)) < 0.1, rng.random((512, 12)) + 1, 0)
    place = np.arange(512, dtype=np.int32)
    return EvidenceBlock(
        block_id=number, tokens_SL=np.zeros((8, 64), dtype=np.int32), seq_T=place // 64, pos_T=place % 64,
        acts=(hidden @ basis + 0.05 * rng.normal(size=(512, D_IN))).astype(np.float32), columns={HOOK: (0, D_IN)},
    )  # fmt: skip


TRAINING, EVIDENCE = [block(i) for i in range(2)], [block(100 + i) for i in range(4)]


class Texts:
    """A context's text is its number."""

    def __init__(self, config: RunConfig, blocks: list[Any]):
        self.n_contexts = sum(b["tokens_SL"].size for b in blocks) // config.judge.context_tokens

    def __getitem__(self, context: int) -> str:
        return str(context)


class Oracle:
    """A `PoolJudge` that names each latent, and holds that a context shows it where it was active at the start."""

    rates = (0.02, 0.02)
    last_error = None
    on_file = True

    def __init__(self, scan: ContextScan):
        self.judge, self._scan = self, scan
        self.explained: list[int] = []

    async def check_drift(self) -> None:
        return None

    def usage(self) -> dict[str, float]:
        return {"failed": 0, "done": 1}

    def about(self) -> dict[str, str]:
        return {"judge": "oracle", "judge_identity": "oracle", "prompt_version": "0", "mode": "likelihood"}

    def bind(self, texts: Texts, scan: ContextScan) -> None:
        self.bound = scan.latents.tolist()

    async def explain(self, plan: LatentPlan) -> list[Candidate]:
        self.explained.append(plan.latent)
        return [Candidate(f"latent {plan.latent}", "llm")]

    async def score(self, pairs: list[tuple[str, str]]) -> list[float | None]:
        return [self._says(int(text), int(explanation.split()[1])) for text, explanation in pairs]

    def _says(self, context: int, latent: int) -> float:
        noise = np.random.default_rng([context, latent]).normal()
        return 2.0 * (self._scan.act_CN[context, latent] > 0) + 0.7 * float(noise) - 1

    def probability(self, explanation: str, raw: float) -> float:
        return float(1 / (1 + np.exp(-4 * raw)))


class Remote:
    """A rank's handle: `handle.method.remote(...)` can be awaited."""

    def __init__(self, rank: TrainerRank):
        self._rank = rank

    def __getattr__(self, name: str) -> Any:
        async def answer(*args: Any) -> Any:
            return getattr(self._rank, name)(*args)

        return type("Method", (), {"remote": staticmethod(answer)})


def config_of(folder, **rlaif: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "desk", "runs_dir": str(folder), "hook": {"layer": 0}, "corpus": {"context_length": 64},
            "sae": {"d_sae": 24, "k": 2, "aux_k": 0}, "judge": {"context_tokens": SIZE},
            "trainer": {"tp": 1, "batch_tokens": 128, "steps": 40, "warmup_steps": 2, "log_every": 4, "lr": 3e-3},
            "rlaif": {**RLAIF, "alarms": {"enabled": False}, **rlaif},
        }
    )  # fmt: skip


def rank_of(config: RunConfig) -> TrainerRank:
    threads = torch.get_num_threads()
    rank = TrainerRank(config.model_dump_json(), {HOOK: D_IN})
    torch.set_num_threads(threads)
    rank.join("127.0.0.1", 0, 0, 1, 0)
    rank.build(TRAINING)
    for window in range(8):
        rank.train_window(window, 0, TRAINING)
    return rank


class Run:
    """Rounds, and windows of training between them."""

    def __init__(self, config: RunConfig, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(desk_module, "ContextTexts", Texts)
        monkeypatch.setattr(desk_module.ray, "put", lambda value: value)
        self.config, self.rank = config, rank_of(config)
        self.oracle = Oracle(self.rank.scan(EVIDENCE, SIZE, list(range(24))))
        self.desk = self.new_desk()

    def new_desk(self) -> RewardDesk:
        desk = RewardDesk(self.config.model_dump_json())
        desk.judge = self.oracle
        return desk

    def round(self, number: int) -> tuple[dict[str, Any], RewardBatch]:
        self.oracle.explained.clear()
        step = self.rank.copies["main"].steps_done
        return asyncio.run(self.desk.judge_round(number, step, [Remote(self.rank)], EVIDENCE))

    def learn(self, batch: RewardBatch, windows: int = 2) -> None:
        self.rank.apply_rewards([batch], EVIDENCE)
        for window in range(windows):
            self.rank.train_window(100 + window, 0, TRAINING)


def judged(batch: RewardBatch) -> list[int]:
    return sorted(set(batch.row_latent.tolist()))


def test_by_default_nothing_is_carried_over_and_nothing_is_written(tmp_path, monkeypatch):
    run = Run(config_of(tmp_path), monkeypatch)
    _, first = run.round(0)
    run.learn(first)
    summary, second = run.round(1)
    assert judged(second) == judged(first)
    assert sorted(run.oracle.explained) == judged(first)
    assert not {"explanations_kept", "rows_kept", "latents_kept", "new_latents"} & set(summary)
    assert not LocalStorage(run.config.run_dir).list("loop")
    carried = CarriedOver(run.config.rlaif, LocalStorage(run.config.run_dir))
    assert carried.explainer(run.oracle) is run.oracle
    assert carried.finish(second, [], run.oracle._scan) is second


@pytest.mark.parametrize("keep_rounds", [0, 1])
def test_the_trust_region_is_about_the_directions_that_were_judged_though_latents_moved_on(
    tmp_path, monkeypatch, keep_rounds
):
    run = Run(config_of(tmp_path, keep_rounds=keep_rounds), monkeypatch)
    main = run.rank.copies["main"]
    for number in range(2):
        then_MD = main.W_enc_mD.clone()
        _, batch = run.round(number)
        moved_MD = torch.randn(main.W_enc_mD.shape, generator=torch.Generator().manual_seed(number))
        main.W_enc_mD += 0.03 * moved_MD  # as if by what was trained while judges judged
        run.rank.apply_rewards([batch], EVIDENCE)
        assert run.rank.credit is not None
        state = run.rank.credit.state_dict()
        rows, judged_ND = state["latents"], state["W_judged_ND"]
        cosine_N = torch.nn.functional.cosine_similarity(judged_ND, then_MD[rows])
        assert cosine_N.min() > 1 - 1e-6
        assert torch.nn.functional.cosine_similarity(judged_ND, main.W_enc_mD[rows]).min() < 1 - 1e-4
        torch.testing.assert_close(judged_ND.norm(dim=1), main.W_enc_mD[rows].norm(dim=1))


def test_explanations_of_latents_that_stay_where_they_are_are_not_asked_for_again(tmp_path, monkeypatch):
    run = Run(config_of(tmp_path, reexplain_cosine=0.97), monkeypatch)
    _, first = run.round(0)
    summary, second = run.round(1)
    trusted = first.latents[first.credit_weight > 0].tolist()
    assert len(trusted) > 2
    assert summary["explanations_kept"] == len(trusted)
    assert sorted(run.oracle.explained) == [latent for latent in judged(first) if latent not in trusted]
    assert judged(second) == judged(first)  # they are judged as ever
    trusted = second.latents[second.credit_weight > 0].tolist()
    main, turned = run.rank.copies["main"], trusted[0]
    main.W_dec_mD[turned] = torch.nn.functional.normalize(torch.randn(D_IN), dim=0)
    summary, _ = run.round(2)
    assert turned in run.oracle.explained
    assert summary["explanations_kept"] == len(trusted) - 1


def test_verdicts_of_earlier_rounds_teach_again_and_a_new_desk_knows_them(tmp_path, monkeypatch):
    run = Run(config_of(tmp_path, keep_rounds=1), monkeypatch)
    _, first = run.round(0)
    run.learn(first)
    summary, second = run.round(1)
    own = len(second.row_latent) - summary["rows_kept"]
    assert summary["rows_kept"] > 0.4 * own
    assert {*zip(second.row_latent.tolist(), second.row_context.tolist(), strict=True)} >= {
        *zip(first.row_latent.tolist(), first.row_context.tolist(), strict=True)
    }
    run.learn(second)
    assert run.rank.credit is not None
    run.desk = run.new_desk()  # the first one's process is gone
    again_summary, again = run.round(1)
    assert np.array_equal(np.isin(first.row_context, again.row_context), np.ones(len(first.row_context), dtype=bool))
    assert again_summary["latents_kept"] == summary["latents_kept"] == 0
    third_summary, third = run.round(2)
    assert not {*first.row_context.tolist()} <= {*third.row_context.tolist()}  # only one round is kept
    assert third_summary["rows_kept"] > 0


def test_by_value_other_latents_are_judged_and_those_judged_before_go_on_teaching(tmp_path, monkeypatch):
    run = Run(config_of(tmp_path, choose="value", keep_rounds=2, latents=4), monkeypatch)
    seen: set[int] = set()
    for number in range(3):
        summary, batch = run.round(number)
        if number == 1:
            assert summary["new_latents"] > 0
            assert summary["latents_kept"] > 0
        assert set(batch.latents.tolist()) >= seen
        seen |= set(batch.latents.tolist())
        run.learn(batch)
    assert len(seen) > 5
    assert run.rank.credit is not None


def test_a_round_that_is_judged_again_judges_the_same_latents_on_the_same_texts(tmp_path, monkeypatch):
    run = Run(config_of(tmp_path, choose="value", keep_rounds=1, reexplain_cosine=0.9), monkeypatch)
    run.round(0)
    _, before = run.round(1)
    run.desk = run.new_desk()
    _, after = run.round(1)
    for name in ("latents", "row_latent", "row_context", "row_verdict", "row_weight", "credit_weight"):
        assert np.array_equal(getattr(before, name), getattr(after, name)), name


def test_a_round_far_behind_the_newest_is_judged_again_as_it_was_until_it_is_committed(tmp_path, monkeypatch):
    run = Run(config_of(tmp_path, choose="value", keep_rounds=1, reexplain_cosine=0.9, latents=4), monkeypatch)
    storage, batches = LocalStorage(run.config.run_dir), []
    for number in range(5):
        batches.append(run.round(number)[1])
        run.desk.keep(number, number, committed_rounds=2)
    assert {key[-16:-12] for key in storage.list("loop")} == {"0001", "0002", "0003", "0004"}
    run.desk = run.new_desk()  # a crash: back to the commit, three rounds behind
    _, again = run.round(2)
    for name in ("latents", "row_latent", "row_context", "row_verdict", "row_weight", "credit_weight"):
        assert np.array_equal(getattr(batches[2], name), getattr(again, name)), name
    run.desk.keep(2, 2, committed_rounds=5)
    assert {key[-16:-12] for key in storage.list("loop")} == {"0004"}


def test_at_random_latents_are_drawn_anew(tmp_path, monkeypatch):
    run = Run(config_of(tmp_path, choose="random", latents=4), monkeypatch)
    drawn = [tuple(run.round(number)[1].latents.tolist()) for number in range(3)]
    assert len(set(drawn)) > 1
