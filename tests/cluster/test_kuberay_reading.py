"""What Ray makes of cluster/kuberay: its autoscaler of the groups, Serve of the judges, and sae_ray of the job."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from manifests import CLUSTERFILE, KUBERAY, ROOT, SERVICEFILE, changed, only
from pydantic import BaseModel
from ray import serve
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.serve.config import AutoscalingConfig as ServeAutoscaling
from ray.serve.schema import (
    DeploymentSchema,
    HTTPOptionsSchema,
    RayActorOptionsSchema,
    ServeApplicationSchema,
    ServeDeploySchema,
)

from sae_ray.config import AutoscalingConfig, JudgeConfig
from sae_ray.config_file import load_config
from sae_ray.errors import UserError
from sae_ray.judge.deploy import llm_config
from sae_ray.placement import selected

CLUSTER_SPEC = only(CLUSTERFILE)["spec"]

# -- the autoscaler -----------------------------------------------------------------------------------


def read_by_autoscaler(spec: Any) -> dict[str, Any]:
    """The node types that Ray's autoscaler makes of a cluster, as it does beside the head."""
    cluster = {"metadata": {"name": "sae-ray", "namespace": "sae-ray"}, "spec": copy.deepcopy(spec)}
    return _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]


def test_the_autoscaler_sees_a_group_for_each_role_that_starts_at_none() -> None:
    types = read_by_autoscaler(CLUSTER_SPEC)
    head = types.pop("headgroup")
    assert head["resources"]["CPU"] == 0  # whatever computes goes elsewhere
    assert {name: each["labels"] for name, each in types.items()} == {
        "producers": {"sae-ray/role": "producer"},
        "trainers": {"sae-ray/role": "trainer"},
        "judges": {"sae-ray/role": "judge"},
    }
    for name, role in (("producers", "producer"), ("trainers", "trainer"), ("judges", "judge")):
        assert types[name]["min_workers"] == 0 < types[name]["max_workers"]
        assert types[name]["resources"][role] == 1
    assert {name: each["resources"]["GPU"] for name, each in types.items()} == {
        "producers": 1,
        "trainers": 4,
        "judges": 1,
    }


def test_the_autoscaler_refuses_a_cluster_whose_groups_it_cannot_read() -> None:
    for path, value in (
        ("minReplicas", "none"),
        ("labels", {"sae-ray/role": "a judge"}),
        ("resources", {"CPU": "half"}),
    ):
        with pytest.raises((ArithmeticError, ValueError, TypeError, jsonschema.ValidationError)):
            read_by_autoscaler(changed(CLUSTER_SPEC, f"workerGroupSpecs.2.{path}", value))


# -- what runs on it ----------------------------------------------------------------------------------


def config_of(entrypoint: str) -> Any:
    """The run config that a `sae-ray train` command line means."""
    program, command, file, *options = shlex.split(entrypoint)
    assert (program, command) == ("sae-ray", "train")
    overrides = [value for flag, value in itertools.pairwise(options) if flag == "--set"]
    assert {each for each in options if each.startswith("--")} <= {"--set", "--verbose", "--fresh"}
    return load_config(ROOT / Path(file).relative_to("/app"), overrides)


def test_the_job_trains_a_config_of_the_image_on_this_cluster() -> None:
    job, cluster = only(KUBERAY / "rayjob.yaml"), only(CLUSTERFILE)
    config = config_of(job["spec"]["entrypoint"])
    assert config.ray.address == "auto"
    mounts = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    assert config.runs_dir in [mount["mountPath"] for mount in mounts]
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    types = read_by_autoscaler(cluster["spec"])
    assert config.trainer.tp * config.trainer.gpus <= types["trainers"]["resources"]["GPU"]
    assert config.activations.gpus <= types["producers"]["resources"]["GPU"]
    assert config.judge.gpus <= types["judges"]["resources"]["GPU"]
    # Each part is kept to its own group.
    for section, group in ((config.activations, "producers"), (config.trainer, "trainers"), (config.judge, "judges")):
        assert [name for name, each in types.items() if selected(each["labels"], section.label_selector)] == [group]
    with pytest.raises(UserError, match=r"ray\.adress"):
        config_of(job["spec"]["entrypoint"].replace("ray.address", "ray.adress"))


def served() -> dict[str, Any]:
    return yaml.safe_load(only(SERVICEFILE)["spec"]["serveConfigV2"])


def refused_by_serve(config: dict[str, Any]) -> list[str]:
    """Keys that Serve does not know, which it would ignore.

    Raises:
        ValueError: what it knows, with a value that it does not take.
    """
    ServeDeploySchema.model_validate(config)
    unknown: list[str] = []
    found: list[tuple[dict[str, Any], type[BaseModel]]] = [
        (config, ServeDeploySchema),
        (config["http_options"], HTTPOptionsSchema),
    ]
    for app in config["applications"]:
        found.append((app, ServeApplicationSchema))
        options = [each["deployment_config"] for each in app["args"]["llm_configs"]]
        for each in [*options, app["args"]["ingress_deployment_config"]]:
            DeploymentSchema.model_validate({"name": "one", **each})
            unknown += [key for key in each if key not in inspect.signature(serve.deployment).parameters]
            ServeAutoscaling.model_validate(each["autoscaling_config"])
            found.append((each["autoscaling_config"], ServeAutoscaling))
            found.append((each["ray_actor_options"], RayActorOptionsSchema))
    return unknown + [key for part, schema in found for key in part if key not in schema.model_fields]


def test_serve_takes_the_judges_config() -> None:
    assert refused_by_serve(served()) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("proxy_location", "Everywhere"),
        ("applications.0.import_path", "ray"),
        ("applications.0.args.llm_configs.0.deployment_config.max_ongoing_requests", 0),
        ("applications.0.args.llm_configs.0.deployment_config.autoscaling_config.max_replicas", -1),
    ],
)
def test_serve_refuses_a_wrong_value(path: str, value: Any) -> None:
    with pytest.raises(ValueError, match=path.split(".")[-1]):
        refused_by_serve(changed(served(), path, value))


def test_a_key_that_serve_would_ignore_is_found() -> None:
    for path in ("http_option", "applications.0.argument", "applications.0.args.ingress_deployment_config.replicas"):
        assert refused_by_serve(changed(served(), path, {})) == [path.split(".")[-1]]


def test_the_served_judge_is_set_up_as_a_run_would_set_it_up() -> None:
    (args,) = [app["args"] for app in served()["applications"]]
    (written,) = args["llm_configs"]
    ours = llm_config(
        JudgeConfig(
            model=written["model_loading_config"]["model_source"],
            gpus=1,
            autoscaling=AutoscalingConfig(min_replicas=0, initial_replicas=0, max_replicas=8, max_queued_requests=256),
        )
    )
    for key in ("accelerator_config", "placement_group_config", "log_engine_metrics", "model_loading_config"):
        assert written[key] == ours[key], key
    # A router that our client steers by session, and statistics that our server reads, are no use behind OpenAI's API.
    deployment = {k: v for k, v in ours["deployment_config"].items() if k not in ("name", "request_router_config")}
    engine = {
        k: v
        for k, v in ours["engine_kwargs"].items()
        if k not in ("disable_log_stats", "enable_logging_iteration_details")
    }
    assert written["deployment_config"] == deployment
    assert written["engine_kwargs"] == engine
    assert json.loads(json.dumps(written)) == written
    # With no judge running the way in must not need a node either.
    assert args["ingress_deployment_config"]["ray_actor_options"] == {"num_cpus": 0}
    assert args["ingress_deployment_config"]["autoscaling_config"]["min_replicas"] > 0
