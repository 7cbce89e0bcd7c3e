"""The peers that we are compared with, each in a virtual environment of its own.

    .venv/bin/python benchmarks/peer_envs.py [saelens dictionary_learning sparsify] [--dir DIR]

Every environment holds the same torch as ours (so that a comparison is of code, not of kernels), the peer at
a pinned version from the package registry, and `sae_ray` by path: its SAE core imports neither Ray nor vLLM.
An environment that is complete has a `.ready` file with the list of what was asked for, and is left alone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
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
}
IMPORTS = {
    "saelens": "import sae_lens, sae_lens.synthetic",
    "dictionary_learning": "from dictionary_learning.trainers.top_k import TopKTrainer, AutoEncoderTopK",
    "sparsify": "from sparsify import SparseCoder",
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
    with tempfile.TemporaryDirectory() as scratch:
        held = Path(scratch) / "constraints.txt"
        held.write_text(TORCH + "\n")
        _pip(python, TORCH)
        if bare := PEERS[name]["bare"]:
            _pip(python, "--no-deps", *bare)
        _pip(python, "--constraint", str(held), *PEERS[name]["full"], *OURS)
    _point_here(home)
    subprocess.run([python, "-c", f"{OURS_IMPORTS}\n{IMPORTS[name]}"], check=True)
    (home / ".ready").write_text(_recipe(name))
    return python


def _point_here(home: Path) -> None:
    """Makes this checkout's `sae_ray` importable in an environment."""
    site = next((home / "lib").glob("python*/site-packages"))
    (site / "sae_ray_by_path.pth").write_text(f"{REPO}\n")


def _pip(python: Path, *what: str) -> None:
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *what]
    subprocess.run(command, check=True)


def _recipe(name: str) -> str:
    return "\n".join([TORCH, *PEERS[name]["full"], *PEERS[name]["bare"], *OURS]) + "\n"


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
