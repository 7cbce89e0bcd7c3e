"""Our files in the libraries they are for, and their files in ours: the largest differences, per architecture.

    .venv/bin/python benchmarks/peer_envs.py                  # once: the libraries, each in its environment
    .venv/bin/python benchmarks/format_check.py [saelens sparsify dictionary_learning] [--dir DIR]

`ours -> theirs`: we export, the library's own loader reads. `theirs -> ours`: the library saves an SAE that it made
with random parameters, we import. Both then run on the same raw activations, and the table shows the largest
difference of an activation and of a reconstruction, as shares of the largest value. Gemma Scope has no library: its
reader is SAELens's. Tokens with a pre-activation within 1e-4 of the gate's cut are left out: rounding decides there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from sae_ray.sae.formats import Provenance, export_sae, import_sae
from sae_ray.sae.inference import TrainedSAE

PEERS = ("saelens", "sparsify", "dictionary_learning")
TOLERANCE = 1e-5
D, M, OUT, K, TOKENS = 64, 512, 48, 16, 512
BORDERLINE = 1e-4
MODEL, HOOK = "smollm2-135m-instruct", "blocks.12.hook_resid_post"

Coder = tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]
Row = tuple[str, str, float, float, int]


def random_sae(architecture: str, d_out: int | None = None, subtract_b_dec: bool = True) -> TrainedSAE:
    threshold = torch.zeros(())
    if architecture in ("topk", "batchtopk", "matryoshka"):
        threshold = torch.tensor(1.3)
    if architecture == "jumprelu":
        threshold = 2 * torch.rand(M)
    gated = architecture == "gated"
    return TrainedSAE(
        torch.nn.functional.normalize(torch.randn(M, D), dim=1),
        torch.nn.functional.normalize(torch.randn(M, d_out or D), dim=1),
        torch.randn(M) / 9,
        torch.randn(d_out or D),
        threshold,
        architecture,
        K,
        0.23,
        None if d_out is None else 0.71,
        subtract_b_dec and d_out is None,
        torch.randn(M) / 3 if gated else None,
        torch.randn(M) / 9 if gated else None,
        0.0,
        "sqrt_d",
    )


def raw_activations() -> torch.Tensor:
    return 5 * torch.randn(TOKENS, D) + 3 * torch.randn(D)


def clear_tokens(sae: TrainedSAE, raw_TD: torch.Tensor) -> torch.Tensor:
    """The tokens on which no gate is a matter of rounding."""
    pre_TM = sae.pre_activations(raw_TD)
    cut = sae.threshold.expand(sae.d_sae)
    if sae.architecture == "topk":
        cut = pre_TM.topk(sae.k + 1, dim=1).values[:, -2:].mean(1, keepdim=True)
    near = BORDERLINE * pre_TM.abs().max()
    return raw_TD[((pre_TM - cut).abs() > near).all(1) & (pre_TM.abs() > near).all(1)]


def compared(way: str, name: str, sae: TrainedSAE, theirs: Coder, factor: float) -> Row:
    """Largest differences of activations and of reconstructions; theirs are `factor` times ours."""
    raw_TD = clear_tokens(sae, raw_activations())
    assert len(raw_TD) > 32, f"{name}: {len(raw_TD)} clear tokens"
    encode, decode = theirs
    with torch.no_grad():
        f_TM, ours_TM = encode(raw_TD), sae.encode(raw_TD) * factor
        back_TO, ours_TO = decode(f_TM), sae.reconstruct(raw_TD)
    assert 0 < ours_TM.count_nonzero() < ours_TM.numel(), name
    return way, name, share(f_TM, ours_TM), share(back_TO, ours_TO), len(raw_TD)


def share(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def exported(sae: TrainedSAE, format: str, folder: Path) -> Path:
    hook_out = "blocks.12.hook_mlp_out" if sae.d_out != sae.d_in or sae.output_scale is not None else None
    return export_sae(sae, folder, format, Provenance(MODEL, HOOK, 128, "some-corpus", hook_out))


def shaken(module: torch.nn.Module) -> torch.nn.Module:
    """Random values in every parameter, so that a bias or threshold that is lost shows."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.rand_like(parameter) if "threshold" in name else torch.randn_like(parameter) / 3)
    return module


# ---------------------------------------------------------------- SAELens, and its reader of Gemma Scope


def saelens(scratch: Path) -> Iterator[Row]:
    import sae_lens
    from sae_lens import SAE
    from sae_lens.loading import pretrained_sae_loaders as loaders

    names = ("relu_l1", "topk", "batchtopk", "matryoshka", "jumprelu", "gated")
    cases = [(name, random_sae(name)) for name in names]
    cases += [(f"{name}, not centred", random_sae(name, subtract_b_dec=False)) for name in ("topk", "batchtopk")]
    jumping = ("relu_l1", "batchtopk", "matryoshka", "jumprelu")
    cases += [(f"{name} transcoder", random_sae(name, OUT)) for name in jumping]
    for name, sae in cases:
        theirs: Any = SAE.load_from_disk(exported(sae, "saelens", scratch / name))
        assert theirs.cfg.metadata.hook_name == HOOK, "metadata was lost"
        yield compared("ours -> theirs", name, sae, (theirs.encode, theirs.decode), 1.0)

    for name in jumping:
        sae = random_sae(name)
        # The folder's name is where its loader reads layer and width; only the download is replaced.
        folder = exported(sae, "gemma_scope", scratch / "gemma" / name / "layer_12" / "width_16k" / "average_l0_16")
        loaders.hf_hub_download = lambda folder=folder, **asked: folder / asked["filename"]
        cfg, state, _ = loaders.gemma_2_sae_huggingface_loader(
            "google/gemma-scope-2b-pt-res", "layer_12/width_16k", cfg_overrides={"d_in": D, "d_sae": M}
        )
        theirs = SAE.from_dict(loaders.handle_config_defaulting(cfg))
        theirs.load_state_dict(state)
        yield compared("ours -> theirs", f"{name} (Gemma Scope)", sae, (theirs.encode, theirs.decode), 1 / 0.23)

    size = {"d_in": D, "d_sae": M}
    own: dict[str, Any] = {
        "standard": sae_lens.StandardSAE(sae_lens.StandardSAEConfig(**size)),
        "standard, not centred": sae_lens.StandardSAE(sae_lens.StandardSAEConfig(**size, apply_b_dec_to_input=False)),
        "gated": sae_lens.GatedSAE(sae_lens.GatedSAEConfig(**size)),
        "jumprelu": sae_lens.JumpReLUSAE(sae_lens.JumpReLUSAEConfig(**size)),
        "topk": sae_lens.TopKSAE(sae_lens.TopKSAEConfig(**size, k=K)),
        "topk, by decoder norm": sae_lens.TopKSAE(
            sae_lens.TopKSAEConfig(**size, k=K, rescale_acts_by_decoder_norm=True)
        ),
        "transcoder": sae_lens.Transcoder(sae_lens.TranscoderConfig(**size, d_out=OUT, apply_b_dec_to_input=False)),
        "jumprelu_transcoder": sae_lens.JumpReLUTranscoder(
            sae_lens.JumpReLUTranscoderConfig(**size, d_out=OUT, apply_b_dec_to_input=False)
        ),
    }
    for name, theirs in own.items():
        shaken(theirs).save_model(scratch / f"own {name}")
        sae = import_sae(scratch / f"own {name}")
        yield compared("theirs -> ours", name, sae, (theirs.encode, theirs.decode), 1.0)

    trainers: dict[str, Any] = {
        "jumprelu": sae_lens.JumpReLUTrainingSAE(sae_lens.JumpReLUTrainingSAEConfig(**size)),
        "batchtopk": sae_lens.BatchTopKTrainingSAE(sae_lens.BatchTopKTrainingSAEConfig(**size, k=K)),
        "matryoshka": sae_lens.MatryoshkaBatchTopKTrainingSAE(
            sae_lens.MatryoshkaBatchTopKTrainingSAEConfig(**size, k=K, matryoshka_widths=[64, M])
        ),
    }
    for name, trainer in trainers.items():
        shaken(trainer)
        if name != "jumprelu":
            trainer.topk_threshold.fill_(0.2)
        trainer.save_inference_model(scratch / f"inference {name}")
        trainer.save_model(scratch / f"training {name}")
        theirs = SAE.load_from_disk(scratch / f"inference {name}")
        for kind in ("inference", "training"):
            sae = import_sae(scratch / f"{kind} {name}")
            assert sae.architecture == name, f"{kind} {name} came back as {sae.architecture}"
            assert name == "jumprelu" or sae.k == K
            yield compared("theirs -> ours", f"{name}, {kind} file", sae, (theirs.encode, theirs.decode), 1.0)


# ---------------------------------------------------------------- sparsify


def sparsify(scratch: Path) -> Iterator[Row]:
    from sparsify import SparseCoder, SparseCoderConfig

    def coder(theirs: Any) -> Coder:
        def encode(raw_TD: torch.Tensor) -> torch.Tensor:
            found = theirs.encode(raw_TD)
            return torch.zeros(len(raw_TD), M).scatter(1, found.top_indices, found.top_acts)

        def decode(f_TM: torch.Tensor) -> torch.Tensor:
            best = f_TM.topk(K, dim=1)
            return theirs.decode(best.values, best.indices)

        return encode, decode

    for name, sae in (
        ("topk", random_sae("topk")),
        ("topk, not centred", random_sae("topk", subtract_b_dec=False)),
        ("topk transcoder", random_sae("topk", D)),
    ):
        theirs = SparseCoder.load_from_disk(exported(sae, "sparsify", scratch / name))
        yield compared("ours -> theirs", name, sae, coder(theirs), 1 / sae.reconstruction_scale)
    for name, transcode in (("topk", False), ("topk transcoder", True)):
        theirs = SparseCoder(D, SparseCoderConfig(num_latents=M, k=K, transcode=transcode))
        with torch.no_grad():
            theirs.W_dec.copy_(torch.randn(M, D))  # a transcoder's starts at 0
        shaken(theirs).save_to_disk(scratch / f"own {name}")
        yield compared("theirs -> ours", name, import_sae(scratch / f"own {name}"), coder(theirs), 1.0)


# ---------------------------------------------------------------- dictionary_learning


def dictionary_learning(scratch: Path) -> Iterator[Row]:
    # Its loader's module also streams compressed corpora, which this environment has no library for: an empty one
    # stands in, after `datasets` has seen that the real one is not there.
    import datasets  # noqa: F401

    sys.modules.setdefault("zstandard", types.ModuleType("zstandard"))
    from dictionary_learning.trainers import batch_top_k, gdm, jumprelu, matryoshka_batch_top_k, standard, top_k
    from dictionary_learning.utils import load_dictionary

    names = ("relu_l1", "gated", "topk", "batchtopk", "matryoshka", "jumprelu")
    cases = [(name, random_sae(name)) for name in names]
    cases += [(f"{name}, not centred", random_sae(name, subtract_b_dec=False)) for name in ("relu_l1", "jumprelu")]
    for name, sae in cases:
        theirs, _ = load_dictionary(str(exported(sae, "dictionary_learning", scratch / name)), "cpu")
        yield compared("ours -> theirs", name, sae, (theirs.encode, theirs.decode), 1 / sae.input_scale)

    common = {"steps": 5000, "activation_dim": D, "dict_size": M, "layer": 12, "lm_name": MODEL, "device": "cpu"}
    common |= {"warmup_steps": 1}
    trainers: dict[str, Any] = {
        "AutoEncoder": standard.StandardTrainer(**common),
        "AutoEncoderNew": standard.StandardTrainerAprilUpdate(**common),
        "GatedAutoEncoder": gdm.GatedSAETrainer(**common),
        "JumpReluAutoEncoder": jumprelu.JumpReluTrainer(**common),
        "AutoEncoderTopK": top_k.TopKTrainer(**common, k=K),
        "BatchTopKSAE": batch_top_k.BatchTopKTrainer(**common, k=K),
        "MatryoshkaBatchTopKSAE": matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer(
            **common, k=K, group_fractions=[0.25, 0.75]
        ),
    }
    for name, trainer in trainers.items():
        shaken(trainer.ae)
        if name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
            trainer.ae.threshold.fill_(0.4)
        folder = scratch / f"own {name}"
        folder.mkdir()
        config = {**trainer.config, "dict_class": type(trainer.ae).__name__}  # the April one calls itself otherwise
        torch.save(trainer.ae.state_dict(), folder / "ae.pt")
        (folder / "config.json").write_text(json.dumps({"trainer": config}))
        theirs, _ = load_dictionary(str(folder), "cpu")
        sae = import_sae(folder)
        yield compared("theirs -> ours", name, sae, (theirs.encode, theirs.decode), 1.0)


# ---------------------------------------------------------------- the driver


def inside(peer: str) -> None:
    """Runs in the peer's environment; prints its rows as the last line."""
    torch.manual_seed(0)
    checks: dict[str, Callable[[Path], Iterator[Row]]] = {
        "saelens": saelens,
        "sparsify": sparsify,
        "dictionary_learning": dictionary_learning,
    }
    with tempfile.TemporaryDirectory() as scratch:
        rows = list(checks[peer](Path(scratch)))
    print(json.dumps(rows))


def main() -> None:
    from peer_envs import default_dir, python_of

    parser = argparse.ArgumentParser(description="Compares our files with the libraries that they are for.")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(PEERS)}; none: all")
    parser.add_argument("--dir", type=Path, default=default_dir())
    args = parser.parse_args()
    folder, worst = args.dir.expanduser().resolve(), 0.0
    if unknown := set(args.names) - set(PEERS):
        sys.exit(f"no peer called {', '.join(sorted(unknown))}: the peers are {', '.join(PEERS)}")
    print(f"d_in {D}, d_out {OUT}, d_sae {M}, k {K}, float32; largest difference / largest value\n")
    print(f"{'library':20s} {'way':15s} {'SAE':30s} {'activations':>12s} {'reconstruction':>15s} {'tokens':>7s}")
    for peer in args.names or PEERS:
        command = [python_of(peer, folder), Path(__file__).resolve(), "--inside", peer]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        for way, name, f_share, back_share, tokens in json.loads(done.stdout.splitlines()[-1]):
            worst = max(worst, f_share, back_share)
            flag = "" if max(f_share, back_share) <= TOLERANCE else "   <- too large"
            print(f"{peer:20s} {way:15s} {name:30s} {f_share:12.1e} {back_share:15.1e} {tokens:7d}{flag}")
    print(f"\nlargest of all: {worst:.1e} (allowed: {TOLERANCE:.0e})")
    sys.exit(worst > TOLERANCE)


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "--inside":
        inside(sys.argv[2])
    else:
        main()
