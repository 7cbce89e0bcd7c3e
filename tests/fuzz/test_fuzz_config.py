"""Whatever a config file or `--set` holds, it is a valid run or one UserError."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml
from fuzzing import JSON, WORDS, tries
from hypothesis import given
from hypothesis import strategies as st

from sae_ray.config import RunConfig
from sae_ray.config_file import load_config, parse_config
from sae_ray.errors import UserError, printable

BASE: dict[str, Any] = {"name": "a", "hook": {"layer": 3}, "saes": [{"name": "b", "sae": {"k": 16}}]}
# Fragments of YAML that mean something to its reader.
_TOKENS = [
    *("name: a\n", "hook: {layer: 3}\n", "sae:\n  k: ", "saes:\n- name: x\n", "judges: {heldout: ", "trainer: "),
    *("- ", ": ", "? ", "| ", "> ", "&a ", "*a", "<<: ", "!!int ", "!!float ", "!!bool ", "!!binary ", "!!set "),
    *(
        "!!timestamp ",
        "!!python/name:os.system ",
        "{",
        "}",
        "[",
        "]",
        ",",
        "\n",
        "  ",
        "\t",
        "#",
        "%YAML 9.9\n",
        "---\n",
    ),
    *("2024-01-99", "1:99:99", "0x", "0b2", "1e999", ".nan", ".inf", "~", "'", '"', "\\", "\x07", "\ufeff", "é"),
]
YAML_TEXT = st.lists(st.one_of(st.sampled_from(_TOKENS), st.text(max_size=3)), max_size=25).map("".join)


def _keys() -> list[str]:
    """Every key of a run config, as --set names it."""

    def below(section: type, prefix: str) -> list[str]:
        found = []
        for key, field in section.model_fields.items():  # type: ignore[attr-defined]
            found.append(prefix + key)
            if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
                found += below(field.annotation, f"{prefix}{key}.")
        return found

    return below(RunConfig, "")


KEYS = st.one_of(
    st.sampled_from(_keys()),
    st.sampled_from(["hook_out.layer", "judges.explainer.model", "judges.heldout.autoscaling", "saes.0.trainer.lr"]),
)


def outcome(parse: Any) -> RunConfig | None:
    """What came of it: a config that can be written down, or None for a UserError in words of bounded length."""
    try:
        run = parse()
    except UserError as error:
        said = str(error)
    else:
        assert isinstance(run, RunConfig)
        run.to_yaml()
        return run
    assert 0 < len(said) < 50_000
    assert printable(said).isprintable()
    return None


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "run.yaml"


@tries(0.12)
@given(text=YAML_TEXT, minimal=st.booleans())
def test_any_text_is_a_config_or_one_error(file, text, minimal):
    try:
        file.write_text(("name: a\nhook: {layer: 3}\n" if minimal else "") + text, encoding="utf-8")
    except UnicodeEncodeError:
        return
    outcome(lambda: load_config(file))


@tries(0.03)
@given(data=st.binary(max_size=60))
def test_any_bytes_are_a_config_or_one_error(file, data):
    file.write_bytes(data)
    outcome(lambda: load_config(file))


def _set(tree: Any, key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for parent in parents:
        if isinstance(tree, list):
            tree = tree[0]
            continue
        if not isinstance(tree.get(parent), (dict, list)):
            tree[parent] = {}
        tree = tree[parent]
    if isinstance(tree, dict):
        tree[leaf] = value


@tries(0.12)
@given(changes=st.lists(st.tuples(KEYS, JSON), min_size=1, max_size=4))
def test_any_value_of_any_key_is_a_config_or_one_error(changes):
    tree = copy.deepcopy(BASE)
    for key, value in changes:
        _set(tree, key, value)
    outcome(lambda: parse_config(tree, "run.yaml"))


@tries(0.08)
@given(sets=st.lists(st.tuples(st.one_of(KEYS, WORDS), st.one_of(YAML_TEXT, WORDS)), min_size=1, max_size=3))
def test_any_override_is_a_config_or_one_error(sets):
    items = [f"{key}={value}" for key, value in sets]
    outcome(lambda: parse_config(copy.deepcopy(BASE), "run.yaml", items))


def test_the_config_that_is_varied_here_is_a_valid_one():
    run = outcome(lambda: parse_config(copy.deepcopy(BASE), "run.yaml"))
    assert run is not None
    assert yaml.safe_load(run.to_yaml())["saes"][0]["name"] == "b"
    assert len(_keys()) > 120
