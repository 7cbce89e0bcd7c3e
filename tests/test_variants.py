"""A run's further SAEs: what they take over, what they may change, and how a mistake is named."""

from __future__ import annotations

from typing import Any

import pytest

from sae_ray.config import RunConfig
from sae_ray.config_file import parse_config
from sae_ray.errors import UserError
from sae_ray.sae.architectures import REGISTRY
from sae_ray.sae.architectures.topk import TopK

BASE: dict[str, Any] = {
    "name": "run",
    "hook": {"layer": 3, "site": "mlp_out"},
    "sae": {"d_sae": 64, "k": 8},
    "rlaif": {"enabled": False},
    "evaluation": {"latents": 0},
}


def run(saes: Any, **sections: Any) -> RunConfig:
    return parse_config({**BASE, "saes": saes, **sections}, "run.yaml")


def test_a_variant_is_the_runs_own_sections_with_some_keys_changed():
    config = run(
        [
            {"name": "wide", "sae": {"d_sae": 128}, "trainer": {"lr": 1e-3}},
            {"name": "early", "hook": {"layer": 1}},
            {"name": "across", "hook": {"site": "mlp_in"}, "hook_out": {"layer": 3, "site": "mlp_out"}},
        ]
    )
    specs = config.specs()
    assert list(specs) == ["main", "wide", "early", "across"]
    assert specs["main"].sae == config.sae
    assert (specs["wide"].sae.d_sae, specs["wide"].sae.k) == (128, 8)
    assert specs["wide"].trainer == config.trainer.model_copy(update={"lr": 1e-3})
    assert specs["early"].hook.name == specs["early"].target.name == "blocks.1.hook_mlp_out"
    assert specs["across"].target.name == "blocks.3.hook_mlp_out"
    names = ["blocks.3.hook_mlp_out", "blocks.1.hook_mlp_out", "blocks.3.mlp.hook_in"]
    assert [hook.name for hook in config.hooks] == names


def test_variants_of_a_transcoder_are_transcoders_unless_they_say_none():
    config = run(
        [
            {"name": "later", "hook_out": {"layer": 5}},
            {"name": "same", "sae": {"k": 4}},
            {"name": "plain", "hook_out": "none"},
        ],
        hook_out={"layer": 4, "site": "resid_mid"},
    )
    targets = {name: spec.target.name for name, spec in config.specs().items()}
    assert targets == {
        "main": "blocks.4.hook_resid_mid",
        "later": "blocks.5.hook_resid_mid",
        "same": "blocks.4.hook_resid_mid",
        "plain": "blocks.3.hook_mlp_out",
    }
    assert config.specs()["plain"].hook_out is None


def test_a_resolved_config_means_the_same_saes(tmp_path):
    import yaml

    config = run([{"name": "plain", "hook_out": "none"}, {"name": "k4", "sae": {"k": 4}}], hook_out={"layer": 4})
    assert parse_config(yaml.safe_load(config.to_yaml()), "resolved.yaml").specs() == config.specs()
    assert RunConfig.model_validate_json(config.model_dump_json()).specs() == config.specs()


@pytest.mark.parametrize(
    ("saes", "said"),
    [
        ([{"name": "a"}, {"name": "b", "sae": {"kk": 4}}], ["saes[1].sae.kk: unknown key; did you mean 'k'", "aux_k"]),
        ([{"name": "a", "sae": {"k": 0}}], ["saes[0].sae.k = 0: ", "greater than 0"]),
        ([{"name": "a", "sae": {"k": 65}}], ["saes[0].sae.k 65 is larger than sae.d_sae 64"]),
        ([{"name": "a", "sae": {"d_sae": 65}}], ["saes[0].sae.d_sae 65 is not divisible by trainer.tp 2; 64 or 66"]),
        ([{"name": "a", "trainer": {"lrr": 1}}], ["saes[0].trainer.lrr: unknown key; did you mean 'lr'"]),
        ([{"name": "a", "trainer": {"lr": -1}}], ["saes[0].trainer.lr = -1: "]),
        ([{"name": "a", "trainer": {"steps": 9}}], ["saes[0].trainer.steps: is shared by all SAEs", "grad_clip"]),
        ([{"name": "a", "hook": {"layr": 9}}], ["saes[0].hook.layr: unknown key; did you mean 'layer'"]),
        ([{"name": "a", "hook_out": {"site": "mlp_out"}}], ["saes[0].hook_out.layer: is required"]),
        ([{"name": "a", "hook_out": {"layer": 2}}], ["saes[0].hook_out blocks.2.hook_resid_post does not lie behind"]),
        ([{"nam": "a"}], ["saes[0].name: is required", "saes[0].nam: unknown key; did you mean 'name'"]),
        ([{"name": "a"}, {"name": "a"}], ["saes[1].name 'a' stands twice"]),
        ([{"name": "control"}], ["saes[0].name 'control' is one of main, control"]),
        ([{"name": "main"}], ["saes[0].name 'main' is one of"]),
        ([{"name": "../a"}], ["saes[0].name '../a': a name is"]),
        ({"a": {}}, ["saes: ", "list"]),
    ],
)
def test_a_mistake_in_a_variant_is_one_line_that_names_its_place(saes, said):
    with pytest.raises(UserError) as error:
        run(saes)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("run.yaml: saes")
    for part in said:
        assert part in message


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"sae": {"architecture": "unasked"}}, "sae.architecture unasked cannot be judged"),
        ({"hook_out": {"layer": 4}}, "hook_out blocks.4.hook_resid_post: a transcoder cannot be judged"),
    ],
)
def test_what_judges_cannot_be_asked_about_is_refused_before_it_trains(sections, said, monkeypatch):
    monkeypatch.setitem(REGISTRY, "unasked", type("Unasked", (TopK,), {"name": "unasked", "judged": False}))
    refusals = {"rlaif": {}, "evaluation": {"latents": 0}}, {"evaluation": {"latents": 4}}
    for refused, key in zip(refusals, ("rlaif.enabled: false", "evaluation.latents: 0"), strict=True):
        with pytest.raises(UserError, match=said) as error:
            run([], **sections, **refused)
        assert f"set {key}, or" in str(error.value)
    assert run([], **sections).specs()
    judged_main = {"rlaif": {}, "evaluation": {}}
    sae = {"sae": sections["sae"]} if "sae" in sections else {"hook_out": sections["hook_out"]}
    assert list(run([{"name": "beside", **sae}], **judged_main).specs()) == ["main", "beside"]


def test_without_a_reconstruction_phase_every_sae_starts_from_a_trained_one():
    tuned = {"trainer": {"steps": 0}, "rlaif": {}, "evaluation": {"latents": 0}}
    start = {"sae": {"init_from": "there"}}
    with pytest.raises(UserError, match=r"trainer\.steps 0: .* name a trained one in sae\.init_from"):
        run([], **tuned)
    with pytest.raises(UserError, match=r"name a trained one in saes\[0\]\.sae\.init_from"):
        run([{"name": "new", "sae": {"init_from": None}}], **tuned, **start)
    with pytest.raises(UserError, match=r"trainer\.steps 0 and rlaif\.enabled false: nothing would be trained"):
        run([], **{**tuned, "rlaif": {"enabled": False}}, **start)
    config = run([{"name": "too"}], **tuned, **start)
    assert config.total_steps == config.rlaif.steps


@pytest.mark.parametrize("architecture", ["relu_l1", "gated"])
def test_saes_without_thresholds_are_judged_but_for_an_estimator_that_needs_a_ranking(architecture):
    sae = {"architecture": architecture, "sparsity_coef": 1.0, "d_sae": 64}
    assert run([], sae=sae, rlaif={}, evaluation={"latents": 4}).rlaif.enabled
    with pytest.raises(UserError, match=f"rlaif.estimator selection_bonus acts on .* {architecture} has neither"):
        run([], sae=sae, rlaif={"estimator": "selection_bonus"})
