"""Reading a run config. What is wrong with it becomes one line: file, key, value, and what would be right."""

from __future__ import annotations

import difflib
import re
import reprlib
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from sae_ray.config import RunConfig
from sae_ray.errors import UserError
from sae_ray.logs import redacted

# What PyYAML lets through of tags that do not fit their text (`!!int x`, `!!bool x`, 2024-99-99), and of deep nesting.
_NOT_YAML = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)
# Whatever stands there in a value that is refused may be a secret.
_BEFORE_AT = re.compile(r"(?<=://)[^\s'\"]*(?=@)")
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother, _REPR.maxlist, _REPR.maxdict = 3, 200, 200, 10, 10


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read and validate a run config.

    Args:
        path: YAML file.
        overrides: `section.key=value` strings, values parsed as YAML, applied over the file.
    Raises:
        UserError: the file cannot be read, is not YAML, or a key or value is not allowed.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except _NOT_YAML as error:
        raise UserError(f"{path}: is not YAML: {' '.join(str(error).split()) or type(error).__name__}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a mapping of sections, found {type(raw).__name__}")
    return parse_config(raw, str(path), overrides)


def parse_config(raw: dict[str, Any], source: str, overrides: list[str] | None = None) -> RunConfig:
    """Validate an already parsed mapping; `source` names it in errors."""
    for item in overrides or []:
        _apply_override(raw, item)
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{source}: {explain(error)}") from error


def explain(error: ValidationError, under: tuple[str | int, ...] = ()) -> str:
    """A validation error in one line; `under` is where in the file the validated section lies."""
    said = "; ".join(_explain(item, under) for item in error.errors())
    return redacted(_BEFORE_AT.sub("***", said))


def _apply_override(raw: dict[str, Any], item: str) -> None:
    key, equals, value = item.partition("=")
    if not equals or not key:
        raise UserError(f"--set {item}: expected section.key=value")
    *parents, leaf = key.split(".")
    node = raw
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise UserError(f"--set {item}: {parent} is not a section")
    try:
        node[leaf] = yaml.safe_load(value)
    except _NOT_YAML as error:
        raise UserError(f"--set {item}: the value is not YAML") from error


def _explain(item: Any, under: tuple[str | int, ...]) -> str:
    """One pydantic error as `key: value: what is wrong, what is allowed`."""
    path = (*under, *item["loc"])
    key, message = _dotted(path), item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        return f"{key}: {unknown_key(str(path[-1]), _fields_of(path[:-1]))}"
    if item["type"] == "missing":
        return f"{key}: is required and missing"
    value = item["input"]
    if not isinstance(value, (dict, BaseModel)) and path[-1:] != ("api_key_env",):  # it may be the key itself
        return f"{key} = {_shown(value)}: {message}"
    if item["type"] == "value_error":  # a section's own check, which names the keys from the section on
        return f"{_dotted(under[:-1])}.{message}" if under else message
    return f"{key}: {message}"


def _shown(value: Any) -> str:
    """A value in short. YAML's aliases can make a few lines a structure that is endless to write out."""
    try:
        return _REPR.repr(value)
    except ValueError:  # a whole number of more digits than Python writes
        return f"a {type(value).__name__} that is too long to show"


def _dotted(path: tuple[str | int, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def unknown_key(key: str, allowed: list[str]) -> str:
    close = difflib.get_close_matches(key, allowed, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"unknown key; {hint}allowed here: {', '.join(allowed)}"


def _fields_of(path: tuple[str | int, ...]) -> list[str]:
    """Keys of the section at `path`; a section of a variant has those of the run's own."""
    section: Any = RunConfig
    in_mapping = False  # whose keys are the user's own: the next part is one
    for part in path[2:] if len(path) > 2 and path[0] == "saes" else path:
        annotation = section if isinstance(part, int) or in_mapping else section.model_fields[part].annotation
        in_mapping = get_origin(annotation) is dict
        section = next((arg for arg in get_args(annotation) if hasattr(arg, "model_fields")), annotation)
        if not hasattr(section, "model_fields"):
            return []
    return sorted(section.model_fields)
