"""Ray's command lines in scripts and manifests, checked against the commands that the installed Ray has."""

from __future__ import annotations

import re
import shlex

import click
from ray.scripts.scripts import cli

# Shell words that end a command.
_ENDS = {";", "&&", "||", "|", "--", "\\"}


def ray_commands(text: str) -> list[list[str]]:
    """The words after `ray` of every such command line in a text, up to what ends it; comments are left out."""
    lines = [line for line in text.replace("\\\n", " ").splitlines() if not line.lstrip().startswith("#")]
    found = []
    for line in lines:
        for match in re.finditer(
            r"(?:^|[\s;(])ray ((?:start|stop|symmetric-run|health-check|drain-node|get-auth-token|job)\b[^;&|>]*)", line
        ):
            words = shlex.split(match.group(1), comments=True)
            ends = [n for n, word in enumerate(words) if word in _ENDS]
            found.append(words[: ends[0]] if ends else words)
    return found


def unknown_options(words: list[str]) -> list[str]:
    """What of a command line the installed Ray does not know: the command itself, or its options."""
    command: click.Command = cli
    words = list(words)
    while isinstance(command, click.Group):
        name = words.pop(0) if words else ""
        if name not in command.commands:
            return [name]
        command = command.commands[name]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    if command.name == "symmetric_run":  # passes what it does not know on to `ray start`
        known |= {option for parameter in cli.commands["start"].params for option in parameter.opts}
    return [word for word in words if word.startswith("-") and word.split("=")[0] not in known]
