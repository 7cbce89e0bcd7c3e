"""cluster/aws.yaml against Ray's launcher; the scripts of cluster/slurm and docker/drain-node.sh run with stand-ins."""

from __future__ import annotations

import copy
import json
import os
import shutil
import stat
import subprocess
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
from manifests import CLUSTER, ROOT, only
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.symmetric_run import curate_and_validate_ray_start_args
from ray_commands import ray_commands, unknown_options

AWS = CLUSTER / "aws.yaml"
SBATCH = CLUSTER / "slurm/sae-ray.sbatch"
DRAIN = ROOT / "docker/drain-node.sh"
WITH_COMMANDS = [AWS, SBATCH, DRAIN, ROOT / "docker/compose.yaml"]


def texts(path: Path) -> list[str]:
    """What a file says to a shell: all of a script, the strings of a YAML file and its lists of words."""
    return strings(only(path)) if path.suffix == ".yaml" else [path.read_text()]


def strings(node: Any) -> list[str]:
    if isinstance(node, dict):
        return [found for value in node.values() for found in strings(value)]
    if isinstance(node, list):
        # Words of one command, unless they are commands themselves.
        line = [" ".join(node)] if all(isinstance(each, str) and " " not in each for each in node) else []
        return line + [found for each in node for found in strings(each)]
    return [node] if isinstance(node, str) else []


def stand_in(folder: Path, name: str, script: str) -> None:
    """A program of this name that runs a shell script."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


# -- EC2 ----------------------------------------------------------------------------------------------


def test_the_launcher_takes_the_cluster() -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())
    config = only(AWS)
    jsonschema.validate(config, schema)
    validate_config(prepare_config(copy.deepcopy(config)))


@pytest.mark.parametrize(
    ("section", "value"),
    [
        ({"worker_nodes_": {}}, "worker_nodes_"),
        ({"provider": {"region": "us-west-2"}}, "type"),
        ({"docker": {"images": "x"}}, "images"),
        ({"available_node_types": {"head": {"resources": {"CPU": 0}, "node_config": {}, "label": {}}}}, "label"),
        ({"available_node_types": {"head": {"resources": {"CPU": "none"}, "node_config": {}}}}, "none"),
        ({"head_node_type": "heads"}, "head_node_type"),
    ],
)
def test_the_launcher_refuses_a_mistake(section: dict[str, Any], value: str) -> None:
    with pytest.raises((jsonschema.ValidationError, ValueError, KeyError), match=value):
        validate_config(prepare_config({**copy.deepcopy(only(AWS)), **section}))


def test_a_node_type_for_each_role_costs_nothing_until_it_is_used() -> None:
    config = only(AWS)
    types = {name: each for name, each in config["available_node_types"].items() if name != config["head_node_type"]}
    assert {each["labels"]["sae-ray/role"] for each in types.values()} == {"producer", "trainer", "judge"}
    assert all(each["min_workers"] == 0 for each in types.values())
    assert config["available_node_types"]["head"]["resources"] == {"CPU": 0}
    assert config["max_workers"] == sum(each["max_workers"] for each in types.values())
    # What is restarted must not be lost with its machine: only what can be computed or asked again is on spot.
    on_spot = {name for name, each in types.items() if "InstanceMarketOptions" in each["node_config"]}
    assert on_spot == {"producers", "judges"}


def test_nobody_outside_reaches_more_than_ssh() -> None:
    config = only(AWS)
    (rule,) = config["provider"]["security_group"]["IpPermissions"]
    assert (rule["FromPort"], rule["ToPort"]) == (22, 22)
    assert all(each["CidrIp"] != "0.0.0.0/0" for each in rule["IpRanges"])
    (head,) = [line for line in config["head_start_ray_commands"] if "--head" in line]
    assert "--dashboard-host=127.0.0.1" in head
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    (token,) = [each for each in config["docker"]["run_options"] if "RAY_AUTH_TOKEN_PATH" in each]
    assert token.partition("=")[2] in config["file_mounts"]


# -- Ray's command lines ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", WITH_COMMANDS, ids=lambda path: path.name)
def test_every_ray_command_is_one_that_this_ray_has(path: Path) -> None:
    found = [words for text in texts(path) for words in ray_commands(text)]
    assert found
    assert [unknown_options(words) for words in found] == [[]] * len(found)


def test_a_ray_command_with_a_mistake_is_found() -> None:
    assert ray_commands("ulimit -n 4; ray start --heads --port=1; ray stop") == [
        ["start", "--heads", "--port=1"],
        ["stop"],
    ]
    assert unknown_options(["start", "--heads", "--port=1"]) == ["--heads"]
    assert unknown_options(["begin", "--head"]) == ["begin"]
    assert unknown_options(["job", "submits"]) == ["submits"]
    assert unknown_options(["symmetric-run", "--address", "a:1", "--num-cpus=2", "--min-node", "2"]) == ["--min-node"]


# -- Slurm --------------------------------------------------------------------------------------------


def sbatch(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the batch script where srun, scontrol and ray only say what they were asked."""
    for name, script in {
        "srun": 'printf "%s\\n" "$RAY_AUTH_MODE" "$@"',
        "scontrol": 'test "$1 $2 $3" = "show hostnames node[1-3]" && printf "node1\\nnode2\\nnode3\\n"',
        "ray": 'mkdir -p "$HOME/.ray" && touch "$HOME/.ray/auth_token"',
    }.items():
        stand_in(tmp_path, name, script)
    slurm = {
        "SLURM_JOB_NUM_NODES": "3",
        "SLURM_JOB_NODELIST": "node[1-3]",
        "SLURM_JOB_ID": "123456",
        "SLURM_CPUS_ON_NODE": "64",
    }
    env = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "SAE_RAY_VENV": str(tmp_path),
        **slurm,
        **environment,
    }
    return subprocess.run(
        ["bash", SBATCH, *arguments], env=env, capture_output=True, text=True, timeout=30, cwd=tmp_path
    )


def test_slurm_starts_ray_on_every_node_and_the_run_on_the_first(tmp_path: Path) -> None:
    done = sbatch(tmp_path, "run.yaml", "--set", "name=a b")
    assert done.returncode == 0, done.stderr
    mode, *words = done.stdout.splitlines()
    separator = words.index("ray")
    step, (_, command, *rest) = words[:separator], words[separator:]
    assert mode == "token"
    assert {"--nodes=3", "--ntasks=3", "--ntasks-per-node=1", "--cpus-per-task=64"} <= set(step)
    assert command == "symmetric-run"
    divider = rest.index("--")
    assert rest[:4] == ["--address", "node1:23456", "--min-nodes", "3"]
    # Ray's own reading of the arguments; --head, --port and --node-ip-address it would refuse.
    started = curate_and_validate_ray_start_args(rest[:divider])
    assert [each.partition("=")[0] for each in started] == [
        "--num-cpus",
        "--include-dashboard",
        "--disable-usage-stats",
    ]
    assert rest[divider + 1 :] == ["sae-ray", "train", "run.yaml", "--set", "ray.address=auto", "--set", "name=a b"]
    assert stat.S_IMODE((tmp_path / ".ray/auth_token").stat().st_mode) == 0o600


def test_slurm_without_a_config_says_what_is_missing(tmp_path: Path) -> None:
    done = sbatch(tmp_path)
    assert done.returncode == 2
    assert "usage: sbatch" in done.stderr


def test_slurm_asks_for_whole_nodes_and_comes_back_after_preemption() -> None:
    asked = [line.removeprefix("#SBATCH ") for line in SBATCH.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--exclusive", "--requeue", "--ntasks-per-node=1", "--open-mode=append"} <= set(asked)
    lines = SBATCH.read_text().splitlines()
    last = max(n for n, line in enumerate(lines) if line.startswith("#SBATCH"))
    # sbatch reads no option below the first command.
    assert all(line.startswith("#") or not line for line in lines[: last + 1])


# -- draining a node ----------------------------------------------------------------------------------


def drain(tmp_path: Path, seconds: int, cmdlines: dict[str, list[str]]) -> tuple[subprocess.Popen[str], Path]:
    """Starts the hook over a list of processes that the test makes up, with a `ray` that only notes what it is told."""
    stand_in(tmp_path, "ray", f'printf "%s\\n" "$@" >> {tmp_path}/asked')
    for pid, words in cmdlines.items():
        (tmp_path / "proc" / pid).mkdir(parents=True)
        (tmp_path / "proc" / pid / "cmdline").write_bytes(b"".join(word.encode() + b"\0" for word in words))
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    hook = subprocess.Popen([DRAIN, str(seconds), tmp_path / "proc"], env=env, stderr=subprocess.PIPE, text=True)
    return hook, tmp_path / "proc"


def test_a_node_is_drained_and_waited_for_until_its_raylet_ends(tmp_path: Path) -> None:
    raylet = ["/opt/raylet", "--raylet_socket_name=x", "--node_id=abc123", "--gcs-address=a:1"]
    hook, proc = drain(tmp_path, 60, {"7": ["/bin/sh", "-c", "--node"], "31": raylet})
    deadline = time.monotonic() + 20
    while not (tmp_path / "asked").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    assert hook.poll() is None  # work is still there
    shutil.rmtree(proc / "31")
    assert hook.wait(timeout=20) == 0
    asked = (tmp_path / "asked").read_text().splitlines()
    assert unknown_options(asked) == []
    assert asked[asked.index("--node-id") + 1] == "abc123"
    assert asked[asked.index("--deadline-remaining-seconds") + 1] == "60"


def test_a_drain_ends_at_its_deadline_and_is_none_without_a_raylet(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    hook, _ = drain(tmp_path / "a", 1, {"31": ["raylet", "--node_id=abc123"]})
    assert hook.wait(timeout=20) == 0
    (tmp_path / "b").mkdir()
    hook, _ = drain(tmp_path / "b", 60, {"7": ["/bin/sh"]})
    assert hook.wait(timeout=20) == 0
    assert "no raylet" in hook.communicate()[1]
    assert not (tmp_path / "b/asked").exists()
