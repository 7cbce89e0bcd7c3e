"""A Dockerfile's stages and instructions, and the files that .dockerignore lets a builder have."""

from __future__ import annotations

import fnmatch
import json
import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path

INSTRUCTIONS = {
    "ADD", "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL", "RUN", "SHELL",
    "STOPSIGNAL", "USER", "VOLUME", "WORKDIR",
}  # fmt: skip


@dataclass
class Stage:
    """One FROM and what follows it, as (instruction, arguments)."""

    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def all(self, instruction: str) -> list[str]:
        return [arguments for name, arguments in self.steps if name == instruction]


def stages(text: str) -> list[Stage]:
    """The stages of a Dockerfile, in order.

    Raises:
        ValueError: an unknown instruction, one before the first FROM, a list that is no JSON, a shell line whose quotes
            do not close.
    """
    found: list[Stage] = []
    for instruction, arguments in _instructions(text):
        if instruction not in INSTRUCTIONS:
            raise ValueError(f"unknown instruction {instruction!r}")
        if instruction == "FROM":
            base, *named = arguments.split()
            found.append(Stage(named[1] if named else base, base))
            continue
        if not found:
            raise ValueError(f"{instruction} before the first FROM")
        if arguments.startswith("["):
            json.loads(arguments)
        elif instruction == "RUN":
            shlex.split(arguments)
        found[-1].steps.append((instruction, arguments))
    return found


def _instructions(text: str) -> list[tuple[str, str]]:
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", "").splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined)]


def lineage(found: list[Stage], name: str) -> list[Stage]:
    """The stages that an image is made of, from its outermost base to itself."""
    by_name = {stage.name: stage for stage in found}
    line = [by_name[name]]
    while line[0].base in by_name:
        line.insert(0, by_name[line[0].base])
    return line


def context(root: Path) -> set[str]:
    """Files that a builder gets of a folder whose .dockerignore excludes all and lets some in again."""
    patterns = [line for line in (root / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    found = set()
    for folder, folders, files in os.walk(root):
        folders[:] = [each for each in folders if each not in (".git", ".venv")]
        for name in files:
            path = (Path(folder) / name).relative_to(root).as_posix()
            if _let_in(path, patterns):
                found.add(path)
    return found


def _let_in(path: str, patterns: list[str]) -> bool:
    """The last pattern that fits a file or a folder above it decides."""
    let_in = True
    parents = [path, *(parent.as_posix() for parent in Path(path).parents if parent.as_posix() != ".")]
    for pattern in patterns:
        plain = pattern.removeprefix("!").removeprefix("**/")
        names = [Path(each).name for each in parents] if "**/" in pattern else parents
        if any(fnmatch.fnmatchcase(each, plain) for each in names):
            let_in = pattern.startswith("!")
    return let_in
