"""Judges scale with the backlog, and the cluster with the judges: no node, two, none, by Ray's own autoscaler.

Ray's fake provider starts the nodes that the autoscaler asks for, on a machine of their own (a network namespace), so
that no other Ray on this host is seen or stopped; `ray.cluster_utils.AutoscalingCluster` would stop them all.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import pytest
from machines import PORT, can_make, two_machines
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

pytestmark = [
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not can_make(), reason="needs to make network namespaces"),
]

JUDGE = {
    "cpus": 0.5,
    "resources": {"judge": 1},
    "label_selector": {"sae-ray/role": "judge"},
    "autoscaling": {
        "min_replicas": 0, "initial_replicas": 0, "max_replicas": 2, "target_ongoing_requests": 2,
        "max_ongoing_requests": 4, "upscale_delay_s": 1, "downscale_delay_s": 2,
    },
}  # fmt: skip


def launcher(address: str) -> dict:
    """A cluster of a head without any CPU, and up to three nodes for judges."""
    # The head's type is named as the fake provider expects it.
    types = {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "judges": {
            "resources": {"CPU": 1, "judge": 1, "object_store_memory": 100 << 20},
            "labels": {"sae-ray/role": "judge"},
            "node_config": {},
            "min_workers": 0,
            "max_workers": 3,
        },
    }
    provider = {
        # By its class: by its name it reads an example file that Ray's wheels do not have.
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
        "launch_multiple": True,
        "head_node_id": FAKE_HEAD_NODE_ID,
        "gcs_address": address,
    }
    empty = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
    empty = (*empty, "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files")
    return {
        "cluster_name": "scaled",
        "max_workers": 3,
        "provider": provider,
        "available_node_types": types,
        "head_node_type": "ray.head.default",
        "idle_timeout_minutes": 0.05,
        "upscaling_speed": 1.0,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        **{key: [] for key in empty},
    }


def test_a_backlog_of_judging_brings_nodes_and_its_end_takes_them_away(tmp_path: Path) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="sa", dir="/tmp", ignore_cleanup_errors=True) as short,
        two_machines() as (head, _),
    ):
        address = f"{head.address}:{PORT}"
        config = tmp_path / "launcher.yaml"
        config.write_text(json.dumps(launcher(address)))
        head.ray(
            *("--head", "--port", str(PORT), "--num-cpus", "0", "--include-dashboard", "false", "--temp-dir", short),
            *("--include-log-monitor", "false", "--object-store-memory", str(100 << 20)),
            *("--autoscaling-config", str(config)),
            RAY_FAKE_CLUSTER="1",
            AUTOSCALER_UPDATE_INTERVAL_S="1",
            RAY_enable_autoscaler_v2="1",
            RAY_CLOUD_INSTANCE_ID=FAKE_HEAD_NODE_ID,
            RAY_OVERRIDE_NODE_ID_FOR_TESTING=FAKE_HEAD_NODE_ID,
        )
        program = Path(__file__).with_name("scaled_judges.py")
        out = head.run(sys.executable, str(program), address, json.dumps(JUDGE), str(tmp_path), timeout=3000)
    said = json.loads(out.splitlines()[-1])
    assert said["deployed"] == {"nodes": 0, "judges": 0}
    assert (said["backlog"]["nodes"], said["backlog"]["judges"]) == (2, 2)
    assert said["answered_by"] == 2, "both nodes' judges answered"
    assert (said["idle"]["nodes"], said["idle"]["judges"]) == (0, 0)
