from __future__ import annotations

import pytest

from sae_ray.config import AutoscalingConfig, JudgeConfig
from sae_ray.judge.deploy import app_name, llm_config, placement, replica_env


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
    assert options["max_ongoing_requests"] == 16
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
