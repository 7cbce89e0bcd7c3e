"""What a judge's settings become: arguments of Ray Serve LLM and vLLM, applications by role, errors in words."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import save_file

from sae_ray.config import AutoscalingConfig, JudgeConfig, RunConfig
from sae_ray.config_file import parse_config
from sae_ray.errors import UserError
from sae_ray.judge.adapters import adapter_folders, engine_room
from sae_ray.judge.deploy import SETTINGS_VARIABLE, app_name, check_mirrored, llm_config, placement, replica_env
from sae_ray.judge.endpoint import EndpointClient
from sae_ray.judge.metrics import BusyShare, StepClock
from sae_ray.judge.pool import JudgePool
from sae_ray.judge.roles import judges_of

BASE: dict[str, Any] = {"name": "run", "hook": {"layer": 3}}


def run(judges: Any = None, **judge: Any) -> RunConfig:
    return parse_config({**BASE, "judge": judge, "judges": judges or {}}, source="run.yaml")


def test_a_cpu_replica_asks_for_its_own_cpus_only() -> None:
    """Ray Serve LLM adds the replica's CPUs to the first bundle, so the engine's share must be 0."""
    made = llm_config(JudgeConfig(cpus=1.5))
    assert made["placement_group_config"]["bundles"] == [{"CPU": 0}]
    assert made["deployment_config"]["ray_actor_options"] == {"num_cpus": 1.5}
    assert made["accelerator_config"] == {"kind": "cpu"}


def test_a_gpu_replica_is_config_only() -> None:
    made = llm_config(JudgeConfig(gpus=1, tensor_parallel=2))
    assert made["accelerator_config"] == {"kind": "gpu"}
    assert placement(JudgeConfig(gpus=1, tensor_parallel=2))["bundle_per_worker"] == {"GPU": 1}
    assert made["engine_kwargs"]["tensor_parallel_size"] == 2
    assert not {"block_size", "enforce_eager", "kv_cache_memory_bytes"} & set(made["engine_kwargs"])
    assert "VLLM_CPU_OMP_THREADS_BIND" not in replica_env(JudgeConfig(gpus=1))


def test_a_fenced_replica_asks_for_its_resources_once_and_for_labelled_nodes() -> None:
    fence: dict[str, Any] = {"resources": {"judge": 0.5}, "label_selector": {"sae-ray/role": "judge"}}
    made = llm_config(JudgeConfig(**fence))
    assert made["placement_group_config"]["bundles"] == [{"CPU": 0, "judge": 0.5}]
    # The actor lies in the first bundle; what it asked for itself, Ray Serve LLM would add to that.
    assert made["deployment_config"]["ray_actor_options"] == {"num_cpus": 1}
    assert made["deployment_config"]["placement_group_bundle_label_selector"] == [{"sae-ray/role": "judge"}]
    assert placement(JudgeConfig(gpus=1, **fence))["bundle_per_worker"] == {"GPU": 1, "judge": 0.5}
    assert "placement_group_bundle_label_selector" not in llm_config(JudgeConfig())["deployment_config"]
    assert judges_of(run({"heldout": {"resources": {"big": 1}}}, **fence))["heldout"].resources == {"big": 1}


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("resources", {"GPU": 1}, "set gpus beside it"),
        ("resources", {"memory": 1e9}, "is no custom resource"),
        ("resources", {"judge": 0}, "greater than 0"),
        ("label_selector", {"role": "a judge"}, "selects nothing"),
        ("label_selector", {"a role": "judge"}, "is no label's name"),
        ("label_selector", {"role": "in(a, b"}, "selects nothing"),
    ],
)
def test_a_fence_that_ray_would_refuse_is_refused_by_the_config(key: str, value: Any, said: str) -> None:
    with pytest.raises(UserError, match=rf"judge\.{key}.*{said}"):
        run(**{key: value})


def test_autoscaling_is_what_the_config_says_and_never_a_default() -> None:
    scaling = AutoscalingConfig(min_replicas=0, initial_replicas=1, max_replicas=3, downscale_delay_s=7)
    options = llm_config(JudgeConfig(autoscaling=scaling))["deployment_config"]
    assert (options["max_ongoing_requests"], options["max_queued_requests"]) == (16, -1)
    assert options["autoscaling_config"] == {
        "min_replicas": 0,
        "initial_replicas": 1,
        "max_replicas": 3,
        "target_ongoing_requests": 8,
        "upscale_delay_s": 5,
        "downscale_delay_s": 7,
        "upscaling_factor": 4,
    }


@pytest.mark.parametrize("name", ["run.1", "a_b-c"])
def test_two_runs_do_not_share_an_application(name: str) -> None:
    assert app_name(name).startswith("sae-ray-judge-")
    assert app_name(name) != app_name(name + "x")


def test_quantisation_adapters_and_further_arguments_reach_the_engine() -> None:
    plain = llm_config(JudgeConfig())["engine_kwargs"]
    assert not {"quantization", "enable_lora", "max_lora_rank"} & set(plain)
    cfg = JudgeConfig(quantization="awq", lora={"a": "x", "b": "y"}, engine_kwargs={"seed": 3, "max_lora_rank": 64})
    made = llm_config(cfg)["engine_kwargs"]
    assert made["quantization"] == "awq"
    assert (made["enable_lora"], made["max_loras"], made["max_lora_rank"], made["seed"]) == (True, 2, 64, 3)
    assert json.loads(replica_env(cfg)[SETTINGS_VARIABLE])["lora"] == {"a": "x", "b": "y"}


def test_a_judges_weights_are_no_pickles() -> None:
    def load_format(**settings: Any) -> str | None:
        return llm_config(JudgeConfig(**settings))["engine_kwargs"].get("load_format")

    assert load_format() == load_format(quantization="awq") == "safetensors"
    assert load_format(quantization="gguf") is None, "its own loader"
    assert load_format(engine_kwargs={"load_format": "dummy"}) == "dummy", "a config is trusted"


@pytest.mark.parametrize(("rank", "asked"), [(4, 16), (17, 32), (128, 128)])
def test_the_engine_makes_room_for_the_largest_adapter(tmp_path: Path, rank: int, asked: int) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": rank}))
    assert llm_config(JudgeConfig(lora={"a": str(tmp_path), "b": "hub/id"}))["engine_kwargs"]["max_lora_rank"] == asked


def adapter(folder: Path, modules: list[str], rank: int = 4) -> str:
    """An adapter's folder as PEFT saves it, with weights of these modules."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank, "target_modules": "all-linear"}))
    parts = [f"base_model.model.{name}.lora_{side}.weight" for name in modules for side in "AB"]
    save_file({part: np.zeros((2, 2), np.float32) for part in parts}, folder / "adapter_model.safetensors")
    return str(folder)


def test_the_engine_makes_room_for_the_modules_that_adapters_change_and_no_others(tmp_path: Path) -> None:
    """From the weights themselves: PEFT's config may say `all-linear`, or a pattern."""
    layer = "model.layers.0"
    lora = {
        "a": adapter(tmp_path / "a", [f"{layer}.self_attn.q_proj", f"{layer}.mlp.down_proj"], rank=8),
        "b": adapter(tmp_path / "b", [f"{layer}.self_attn.q_proj", "model.embed_tokens"], rank=40),
    }
    assert engine_room(adapter_folders(lora)) == {
        "max_lora_rank": 64,
        "lora_target_modules": ["down_proj", "embed_tokens", "q_proj"],
    }


def test_an_adapter_that_a_likelihood_would_not_see_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"judge\.lora\.a .*lm_head"):
        engine_room({"a": adapter(tmp_path / "a", ["model.layers.0.mlp.up_proj", "lm_head"])})


def test_an_adapter_without_safetensors_and_one_that_is_nowhere_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "adapter_config.json").write_text('{"r": 4}')
    (tmp_path / "old" / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"judge\.lora\.old .*adapter_model\.safetensors"):
        adapter_folders({"old": str(tmp_path / "old")})
    with pytest.raises(UserError, match=r"judge\.lora\.gone .*is no folder here"):
        adapter_folders({"gone": str(tmp_path / "gone")})


def test_a_mirror_that_gave_no_model_is_named_with_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"judge\.s3_mirror s3://b/m: no \*\.safetensors came"):
        check_mirrored("s3://b/m", str(tmp_path))
    # What Ray Serve LLM calls the model when nothing came at all.
    with pytest.raises(UserError, match=r"no config\.json and no \*\.safetensors .*AWS_ENDPOINT_URL"):
        check_mirrored("s3://b/m", "judge-0123456789ab")
    (tmp_path / "model.safetensors").touch()
    check_mirrored("s3://b/m", str(tmp_path))


def test_a_mirrors_address_goes_to_replicas_and_its_keys_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    mirrored = replica_env(JudgeConfig(s3_mirror="s3://models/a"))
    assert mirrored["AWS_ENDPOINT_URL"] == "http://127.0.0.1:9"
    assert "secret" not in json.dumps(mirrored)
    assert "AWS_ENDPOINT_URL" not in replica_env(JudgeConfig())


@pytest.mark.parametrize("named", [False, True], ids=["while its engine starts", "when its engine serves"])
def test_a_killed_replica_leaves_no_engine_behind(named: bool) -> None:
    """A stand-in for the replica: an interpreter with a child and grandchild that would outlive it."""
    script = (
        "import subprocess, sys, time\n"
        "from sae_ray.judge.reaper import start_reaper\n"
        "reaper = start_reaper()\n"
        "child = subprocess.Popen([sys.executable, '-c', "
        '\'import subprocess; subprocess.run(["sleep", "600"])\'])\n'
        f"if {named}: time.sleep(1); reaper.watch([child.pid])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    replica = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert replica.stdout is not None
        engine = psutil.Process(int(replica.stdout.readline()))
        if not named:
            time.sleep(2.5)  # longer than the reaper takes to look around
        tree = [engine, *engine.children(recursive=True)]
        assert len(tree) == 2
    finally:
        replica.kill()
        replica.communicate()
    assert not psutil.wait_procs(tree, timeout=10)[1]


def test_what_an_engine_step_took_is_always_reported() -> None:
    made = llm_config(JudgeConfig())["engine_kwargs"]
    assert (made["disable_log_stats"], made["enable_logging_iteration_details"]) == (False, True)


def test_time_in_steps_is_told_from_time_with_requests_and_unknown_where_no_replica_tells_it() -> None:
    clock, share = StepClock(), BusyShare()
    share.add({"replica": "a", "up_seconds": 10, "busy_seconds": 4, "step_seconds": clock.seconds})
    clock.add(1500)
    clock.add(500)
    share.add({"replica": "a", "up_seconds": 20, "busy_seconds": 12, "step_seconds": clock.seconds})
    assert (share.value, share.stepping, clock.steps) == (0.8, 0.2, 2)
    for up in (0, 10):
        share.add({"replica": "silent", "up_seconds": up, "busy_seconds": up})
    assert (share.value, share.stepping) == (0.9, None)


def test_two_mirrors_do_not_share_a_folder_on_a_node() -> None:
    one, other, same = (
        llm_config(JudgeConfig(s3_mirror=uri))["model_loading_config"]
        for uri in ("s3://models/a", "s3://models/b", "s3://models/a/")
    )
    assert one["model_source"] == {"bucket_uri": "s3://models/a"}
    assert one == same
    assert one["model_id"] != other["model_id"]


@pytest.mark.parametrize(
    ("judge", "judges", "said"),
    [
        ({}, {"explainer": {"modle": "x"}}, ["judges.explainer.modle", "unknown key", "did you mean 'mod"]),
        ({}, {"explaner": {}}, ["judges.explaner", "did you mean 'explainer'"]),
        ({}, {"scorer": {}}, ["judges.scorer", "`judge` is the scorer"]),
        ({}, {"heldout": {"context_tokens": 8}}, ["judges.heldout.context_tokens", "judge.context_tokens"]),
        (
            {},
            {"heldout": {"autoscaling": {"max_replica": 2}}},
            ["judges.heldout.autoscaling.max_replica", "did you mean 'max_replicas'"],
        ),
        ({}, {"heldout": {"dtype": "int4"}}, ["judges.heldout.dtype = 'int4'", "bfloat16"]),
        ({}, {"heldout": {"adapter": "a"}}, ["judges.heldout.adapter 'a' is not among"]),
        ({"app": "shared"}, {"heldout": {"model": "x"}}, ["judges.heldout.model", "judge.app would answer instead"]),
        ({"endpoint": "http://h/v1"}, {"heldout": {"model": "x"}}, ["judges.heldout.endpoint, or null"]),
        ({"endpoint": "http://h/v1", "app": "a"}, {}, ["judge.endpoint and judge.app"]),
        ({"endpoint": "h:8000"}, {}, ["judge.endpoint is no base URL"]),
        ({"endpoint_model": "m"}, {}, ["judge.endpoint_model is for judge.endpoint"]),
        ({"engine_kwargs": {"dtype": "half"}}, {}, ["judge.engine_kwargs.dtype", "judge.dtype"]),
        ({"engine_kwargs": {"block_size": 16}}, {}, ["judge.engine_kwargs.block_size", "is fixed"]),
        (
            {"engine_kwargs": {"lora_target_modules": ["x"]}},
            {},
            ["judge.engine_kwargs.lora_target_modules", "judge.lora"],
        ),
        ({"s3_mirror": "/models"}, {}, ["judge.s3_mirror '/models'", "s3://bucket/prefix"]),
        ({"lora": {"a": "s3://b/a"}}, {}, ["judge.lora.a", "folder"]),
        ({"autoscaling": {"max_queued_requests": 0}}, {}, ["max_queued_requests 0"]),
    ],
)
def test_keys_that_do_not_fit_are_one_line_that_names_them(judge: Any, judges: Any, said: list[str]) -> None:
    with pytest.raises(UserError) as error:
        run(judges, **judge)
    assert "\n" not in str(error.value)
    for part in said:
        assert part in str(error.value)


@pytest.mark.parametrize("key", ["sk-1234-secret", "hf_AbCdsecret", "gsk_secret1234"])
@pytest.mark.parametrize("role", ["scorer", "heldout"])
def test_a_key_pasted_where_a_variable_belongs_is_refused_and_not_repeated(role: str, key: str) -> None:
    pasted = {"api_key_env": key, "endpoint": "http://h/v1"}
    judges, judge = ({"heldout": pasted}, {}) if role == "heldout" else ({}, pasted)
    with pytest.raises(UserError, match="must not be the key itself") as error:
        run(judges, **judge)
    assert "secret" not in str(error.value)
    with pytest.raises(UserError, match="without a key") as error:
        run(endpoint="https://user:secret@h/v1")
    assert "secret" not in str(error.value)


def test_a_role_takes_over_what_it_does_not_name() -> None:
    made = judges_of(
        run(
            {"explainer": {"model": "big/model", "autoscaling": {"max_replicas": 4}}},
            dtype="float32",
            autoscaling={"max_replicas": 2, "upscale_delay_s": 9},
        )
    )
    assert set(made) == {"scorer", "explainer"}, "a scorer cannot hold itself out"
    explainer = made["explainer"]
    assert (explainer.model, explainer.dtype) == ("big/model", "float32")
    assert (explainer.autoscaling.max_replicas, explainer.autoscaling.upscale_delay_s) == (4, 9)
    assert made["scorer"] == run(dtype="float32", autoscaling={"max_replicas": 2, "upscale_delay_s": 9}).judge


def test_adapters_and_a_mirror_stay_with_the_model_that_they_are_of() -> None:
    judge = {"model": "qwen/x", "lora": {"terse": "a/b"}, "adapter": "terse", "s3_mirror": "s3://b/qwen"}
    for other in (
        {"model": "gemma/y"},
        {"s3_mirror": "s3://b/gemma"},
        {"endpoint": "https://h/v1"},
        {"app": "serving"},
    ):
        made = judges_of(run({"heldout": other, "explainer": {"max_attempts": 2}}, **judge))
        assert (made["heldout"].lora, made["heldout"].adapter) == ({}, None), other
        assert (made["explainer"].lora, made["explainer"].adapter) == ({"terse": "a/b"}, "terse")
    assert judges_of(run({"heldout": {"model": "gemma/y"}}, **judge))["heldout"].s3_mirror is None
    own = {"model": "gemma/y", "lora": {"mine": "c/d"}, "adapter": "mine", "s3_mirror": "s3://b/gemma"}
    made = judges_of(run({"heldout": own}, **judge))["heldout"]
    assert (made.lora, made.adapter, made.s3_mirror) == ({"mine": "c/d"}, "mine", "s3://b/gemma")
    same = judges_of(run({"explainer": {"model": "qwen/x", "adapter": None}}, **judge))["explainer"]
    assert (same.lora, same.adapter, same.s3_mirror) == ({"terse": "a/b"}, None, "s3://b/qwen")


def test_a_role_may_leave_the_endpoint_and_takes_its_key_along() -> None:
    judge = {"endpoint": "https://h/v1", "endpoint_model": "m", "api_key_env": "KEY"}
    made = judges_of(run({"heldout": {"endpoint": None, "model": "x"}}, **judge))
    assert (made["heldout"].endpoint, made["heldout"].endpoint_model, made["heldout"].api_key_env) == (None,) * 3
    assert made["explainer"].endpoint == "https://h/v1"


def test_roles_share_an_application_exactly_if_the_same_thing_would_be_deployed() -> None:
    lora = {"terse": "a/b"}
    judges = {"explainer": {"adapter": "terse", "max_attempts": 2}, "heldout": {"model": "other/family"}}
    pool = JudgePool(run(judges, lora=lora))
    apps = pool.apps
    assert apps["explainer"] is apps["scorer"]
    assert apps["heldout"].name == "sae-ray-heldout-run"
    assert apps["scorer"].name == "sae-ray-judge-run"


def test_a_judge_elsewhere_is_not_deployed_and_is_asked_by_http() -> None:
    pool = JudgePool(run(endpoint="http://127.0.0.1:9/v1"))
    assert pool.apps == {}
    pool.start()
    assert pool.ready(0)
    assert pool.status()["scorer"]["endpoint"] == "http://127.0.0.1:9/v1"
    assert all(isinstance(client, EndpointClient) for client in pool.clients().values())
    pool.shutdown()
