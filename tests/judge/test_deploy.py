"""What a judge's settings become: arguments of Ray Serve LLM and vLLM, applications by role, errors in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sae_ray.config import AutoscalingConfig, JudgeConfig, RunConfig
from sae_ray.config_file import parse_config
from sae_ray.errors import UserError
from sae_ray.judge.deploy import SETTINGS_VARIABLE, app_name, llm_config, placement, replica_env
from sae_ray.judge.endpoint import EndpointClient
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


@pytest.mark.parametrize(("rank", "asked"), [(4, 16), (17, 32), (128, 128)])
def test_the_engine_makes_room_for_the_largest_adapter(tmp_path: Path, rank: int, asked: int) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": rank}))
    assert llm_config(JudgeConfig(lora={"a": str(tmp_path), "b": "hub/id"}))["engine_kwargs"]["max_lora_rank"] == asked


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


@pytest.mark.parametrize("judges", [{}, {"heldout": {"api_key_env": "sk-1234-secret", "endpoint": "http://h/v1"}}])
def test_a_key_pasted_where_a_variable_belongs_is_refused_and_not_repeated(judges: Any) -> None:
    judge = {} if judges else {"api_key_env": "sk-1234-secret", "endpoint": "http://h/v1"}
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


def test_a_role_may_leave_the_endpoint_and_takes_its_key_along() -> None:
    judge = {"endpoint": "http://h/v1", "endpoint_model": "m", "api_key_env": "KEY"}
    made = judges_of(run({"heldout": {"endpoint": None, "model": "x"}}, **judge))
    assert (made["heldout"].endpoint, made["heldout"].endpoint_model, made["heldout"].api_key_env) == (None,) * 3
    assert made["explainer"].endpoint == "http://h/v1"


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
