"""English text that every machine has: docstrings of the installed Python packages, and pydoc's topics.

Source files are parsed, never imported. The documents depend only on which versions are installed, so all
nodes of a cluster that run the same image read the same corpus; the time the first use takes does not enter.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from sae_ray.embedded import cache_dir

_FORMAT = 1
MIN_CHARS = 200
MAX_CHARS = 13_000_000
# Generated API wrappers are large and say the same thing a thousand times.
_MAX_FILE_BYTES = 400_000
# Only files that are mostly prose are parsed: it is parsing that takes the time.
_MIN_PROSE_SHARE = 0.3
_SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "_vendor", "vendor"}


def installed_docs() -> list[str]:
    """Documents of at least 200 characters, without duplicates, about 13 MB at most, in a fixed order.

    The first use takes some seconds and leaves a JSONL file in the cache, named after the installed packages.
    """
    path = cache_dir() / "corpus" / f"installed-docs-{_fingerprint()}.jsonl"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.is_file():
                building = path.with_suffix(".building")
                with building.open("w", encoding="utf-8") as file:
                    file.writelines(json.dumps({"text": text}) + "\n" for text in _extract(_roots()))
                building.replace(path)
    with path.open(encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def _roots() -> list[Path]:
    paths = sysconfig.get_paths()
    return [Path(paths[key]) for key in ("stdlib", "purelib")]


def _fingerprint() -> str:
    packages = sorted({f"{d.name}=={d.version}" for d in importlib.metadata.distributions()})
    state = [f"format {_FORMAT}", sys.version, *map(str, _roots()), *packages]
    return hashlib.sha256("\n".join(state).encode()).hexdigest()[:16]


def _extract(roots: list[Path], max_chars: int = MAX_CHARS) -> Iterator[str]:
    """Topics first, then docstrings of files in the order of their hashed path.

    The hash makes any prefix a fair sample of all packages, so the size limit does not favour the letter A.
    """
    seen: set[bytes] = set()
    total = 0
    for text in _candidates(roots):
        text = text.strip()
        key = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()
        if len(text) < MIN_CHARS or key in seen:
            continue
        seen.add(key)
        total += len(text)
        if total > max_chars:
            return
        yield text


def _candidates(roots: list[Path]) -> Iterator[str]:
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))
    files = [(path.relative_to(root).as_posix(), path) for root in roots for path in _sources(root)]
    for _, path in sorted(files, key=lambda item: hashlib.blake2b(item[0].encode()).digest()):
        yield from _docstrings(path)


def _sources(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - _SKIPPED_FOLDERS)
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _docstrings(path: Path) -> Iterator[str]:
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            return
        source = path.read_text(encoding="utf-8")
        quoted = sum(len(part) for part in source.split('"""')[1::2])
        if quoted < MIN_CHARS or quoted < _MIN_PROSE_SHARE * len(source):
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            tree = ast.parse(source)
    except (OSError, ValueError, SyntaxError, RecursionError):
        return  # a package may ship templates or Python 2; they are no documents
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            # A lone surrogate cannot be tokenized.
            if text and not any("\ud800" <= char <= "\udfff" for char in text):
                yield text
