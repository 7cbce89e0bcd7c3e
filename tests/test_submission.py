"""Submitting by name: whoever asks, and however often, a run is under way once. Against a client in memory."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobType
from rich.console import Console

from sae_ray import submission
from sae_ray.config import RunConfig
from sae_ray.config_file import load_config
from sae_ray.errors import UserError
from sae_ray.submission import Jobs, checked_address, for_cluster, print_status

LOCAL = "http://127.0.0.1:8265"


class Cluster:
    """What a dashboard knows; every `Jobs` of a test talks to the same one."""

    def __init__(self) -> None:
        self.jobs: dict[str, JobDetails] = {}
        self.configs: dict[str, Any] = {}
        self.log = ["[00:01] step 1\n", "[00:02] step 2\n"]
        self.breaks = 0  # connections that break after the first chunk
        self.before_submit: Any = None
        self.down: Exception | None = None
        self.starting = 0  # submissions that the head is not ready for

    def __call__(self, address: str) -> Cluster:
        if self.down is not None:
            raise self.down
        return self

    def list_jobs(self) -> list[JobDetails]:
        return list(self.jobs.values())

    def submit_job(self, entrypoint: str, submission_id: str, runtime_env: Any, metadata: dict[str, str]) -> str:
        if self.before_submit is not None:
            earlier, self.before_submit = self.before_submit, None
            earlier()
        if self.starting:
            self.starting -= 1
            raise RuntimeError("Request failed with status code 500: No available agent to submit job")
        if submission_id in self.jobs:
            raise RuntimeError(f"Job with submission_id {submission_id} already exists")
        self.configs[submission_id] = yaml.safe_load(Path(runtime_env["working_dir"], "run.yaml").read_text())
        self.jobs[submission_id] = JobDetails(
            type=JobType.SUBMISSION, submission_id=submission_id, status=JobStatus.RUNNING, entrypoint=entrypoint,
            metadata=metadata, runtime_env=runtime_env, start_time=1000,
        )  # fmt: skip
        return submission_id

    def end(self, job_id: str, status: JobStatus) -> None:
        self.jobs[job_id].status = status

    def stop_job(self, job_id: str) -> None:
        self.end(job_id, JobStatus.STOPPED)

    def get_job_logs(self, job_id: str) -> str:
        return "".join(self.log)

    async def tail_job_logs(self, job_id: str) -> Any:
        for text in self.log:
            yield text
            await asyncio.sleep(0)
            if self.breaks:
                self.breaks -= 1
                raise RuntimeError("closed unexpectedly")
        self.end(job_id, JobStatus.SUCCEEDED)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    made = Cluster()
    monkeypatch.setattr(submission, "JobSubmissionClient", made)
    monkeypatch.setattr(submission, "_PAUSE_S", 0.0)
    for name in (*submission.ADDRESS_VARIABLES, "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    return made


def config(tmp_path: Path, **sections: Any) -> RunConfig:
    raw = {"name": "night", "runs_dir": str(tmp_path), "hook": {"layer": 2}, **sections}
    return for_cluster(RunConfig.model_validate(raw), "night.yaml")


def test_a_run_is_submitted_once_however_often_it_is_asked_for(cluster: Cluster, tmp_path: Path) -> None:
    first, is_new = Jobs().submit(config(tmp_path))
    again, is_new_again = Jobs().submit(config(tmp_path))
    assert (first.id, is_new, again.id, is_new_again) == ("sae-ray-night-1", True, "sae-ray-night-1", False)
    assert cluster.jobs[first.id].entrypoint == "python -m sae_ray.cli train run.yaml"
    written = RunConfig.model_validate(cluster.configs[first.id])
    assert written == config(tmp_path)
    assert written.ray.address == "auto"


@pytest.mark.parametrize("ended", [JobStatus.FAILED, JobStatus.STOPPED, JobStatus.SUCCEEDED])
def test_after_an_attempt_has_ended_the_next_goes_on(cluster: Cluster, tmp_path: Path, ended: JobStatus) -> None:
    for number in range(1, 12):
        attempt, is_new = Jobs().submit(config(tmp_path))
        assert (attempt.number, is_new) == (number, True)
        cluster.end(attempt.id, ended)
    assert [each.number for each in Jobs().attempts("night")] == list(range(1, 12))
    assert Jobs().latest("night").number == 11  # not 9, which is last as text


def test_of_two_that_submit_at_once_one_joins_the_other(cluster: Cluster, tmp_path: Path) -> None:
    cluster.before_submit = lambda: Jobs().submit(config(tmp_path))
    attempt, is_new = Jobs().submit(config(tmp_path))
    assert (attempt.id, is_new) == ("sae-ray-night-1", False)
    assert len(cluster.jobs) == 1


def test_a_head_that_has_just_started_is_asked_again_for_a_while(cluster: Cluster, tmp_path: Path) -> None:
    cluster.starting = 3
    assert Jobs().submit(config(tmp_path))[1]
    cluster.end("sae-ray-night-1", JobStatus.FAILED)
    cluster.starting = 99
    with pytest.raises(UserError, match="No available agent"):
        Jobs().submit(config(tmp_path))


def test_another_config_under_the_same_name_is_refused_while_one_is_under_way(cluster: Cluster, tmp_path: Path) -> None:
    attempt, _ = Jobs().submit(config(tmp_path))
    with pytest.raises(UserError, match=r"night: is under way .* with another config .*sae-ray-night-1"):
        Jobs().submit(config(tmp_path, seed=7))
    cluster.end(attempt.id, JobStatus.FAILED)
    assert Jobs().submit(config(tmp_path, seed=7))[1]


def test_jobs_of_others_are_left_alone(cluster: Cluster, tmp_path: Path) -> None:
    cluster.jobs["x"] = JobDetails(
        type=JobType.SUBMISSION, submission_id="x", status=JobStatus.RUNNING, entrypoint="other"
    )
    Jobs().submit(config(tmp_path))
    assert [each.run for each in Jobs().runs()] == ["night"]
    with pytest.raises(UserError, match=r"day: no such run at .*; there: night"):
        Jobs().stop("day")
    assert cluster.jobs["x"].status is JobStatus.RUNNING


def test_following_shows_everything_once_though_the_connection_breaks(cluster: Cluster, tmp_path: Path) -> None:
    attempt, _ = Jobs().submit(config(tmp_path))
    shown: list[str] = []
    cluster.breaks = 2
    assert Jobs().follow(attempt, shown.append).status is JobStatus.SUCCEEDED
    assert "".join(shown) == "".join(cluster.log)


def test_a_dashboard_that_is_away_between_two_looks_is_asked_again(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt, _ = Jobs().submit(config(tmp_path))
    jobs, listed, failures = Jobs(), cluster.list_jobs, [requests.ConnectionError("refused")] * 2

    def list_jobs() -> list[JobDetails]:
        if failures:
            raise failures.pop()
        return listed()

    monkeypatch.setattr(cluster, "list_jobs", list_jobs)
    assert jobs.follow(attempt, lambda text: None).status is JobStatus.SUCCEEDED
    failures += [requests.ConnectionError("refused")] * 99
    with pytest.raises(UserError, match=r"lost while following night: .*refused"):
        jobs.follow(attempt, lambda text: None)


def test_what_a_job_says_is_no_markup_and_steers_no_terminal(cluster: Cluster, tmp_path: Path) -> None:
    Jobs().submit(config(tmp_path))
    cluster.log = ["loading [/tmp] [abc] \x1b[2J\n"]
    console = Console(file=io.StringIO(), width=160)
    print_status(Jobs(), "night", console)
    assert console.file.getvalue().rstrip().endswith("loading [/tmp] [abc] \\x1b[2J")  # type: ignore[attr-defined]


def test_a_connection_that_breaks_again_and_again_is_given_up(cluster: Cluster, tmp_path: Path) -> None:
    attempt, _ = Jobs().submit(config(tmp_path))
    cluster.breaks = 99
    with pytest.raises(UserError, match="lost while following night: closed unexpectedly"):
        Jobs().follow(attempt, lambda text: None)


def test_the_status_of_a_run_has_its_attempts_and_last_line(cluster: Cluster, tmp_path: Path) -> None:
    attempt, _ = Jobs().submit(config(tmp_path))
    cluster.end(attempt.id, JobStatus.FAILED)
    Jobs().submit(config(tmp_path))
    console = Console(file=io.StringIO(), width=160)
    print_status(Jobs(), "night", console)
    told = console.file.getvalue()  # type: ignore[attr-defined]
    assert "FAILED" in told
    assert "RUNNING" in told
    assert told.rstrip().endswith("[00:02] step 2")


@pytest.mark.parametrize(
    ("down", "said"),
    [
        (ConnectionError("Failed to connect"), "no Ray dashboard answers there: Failed to connect"),
        (AuthenticationError("Unauthorized"), "the token is refused or missing"),
        (requests.ConnectTimeout("timed out"), "no Ray dashboard answers there: timed out"),
        (requests.exceptions.InvalidJSONError("half an answer"), f"{LOCAL}: half an answer"),
    ],
)
def test_what_the_cluster_refuses_is_said(cluster: Cluster, down: Exception, said: str) -> None:
    cluster.down = down
    with pytest.raises(UserError, match=said):
        Jobs(LOCAL)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"runs_dir": "runs"}, "runs_dir = 'runs': is relative .* outlives the job"),
        ({"ray": {"address": "head:6379"}}, r"ray.address = 'head:6379': a job joins the cluster"),
        ({"model": {"name": "./models/mine"}}, "model.name = './models/mine': is relative"),
        ({"corpus": {"kind": "text", "paths": ["/data/a.txt", "./b.txt"]}}, r"corpus.paths = './b.txt': is relative"),
        ({"sae": {"init_from": "../other"}}, "sae.init_from = '../other': is relative"),
        ({"corpus": {"kind": "text", "paths": ["texts/*.txt"]}}, r"corpus.paths = 'texts/\*.txt': is relative"),
        ({"trainer": {"checkpoint_dir": "new"}}, "trainer.checkpoint_dir = 'new': .* outlives the job, or s3://"),
        ({"rlaif": {"replay_rewards": "runs/taught"}}, "rlaif.replay_rewards = 'runs/taught': is relative"),
        ({"saes": [{"name": "b", "sae": {"init_from": "sae"}}]}, r"saes\[0\].sae.init_from = 'sae': is relative"),
        ({"judges": {"heldout": {"model": "./judge"}}}, "judges.heldout.model = './judge': is relative"),
        ({"judge": {"lora": {"terse": "./terse"}}}, "judge.lora.terse = './terse': .* or a Hugging Face id"),
    ],
)
def test_what_only_this_machine_has_is_refused(tmp_path: Path, sections: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^night.yaml: {said}"):
        config(tmp_path, **sections)


def test_names_of_models_and_places_that_every_node_sees_can_be_submitted(tmp_path: Path) -> None:
    run = config(
        tmp_path, judges={"heldout": {"model": "google/gemma", "lora": {"terse": "me/terse"}}},
        trainer={"checkpoint_dir": "s3://bucket/ck"}, sae={"init_from": "~/sae"},
    )  # fmt: skip
    assert run.trainer.checkpoint_dir == "s3://bucket/ck"
    assert Path(str(run.sae.init_from)).is_absolute()


def test_another_machine_is_not_talked_to_without_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    for loopback in (LOCAL, "http://localhost:8265/", "http://[::1]:8265"):
        assert checked_address(loopback) == loopback.rstrip("/")
    with pytest.raises(UserError, match=r"--address http://10.0.0.1:8265: whoever reaches .* RAY_AUTH_MODE=token"):
        checked_address("http://10.0.0.1:8265")
    assert checked_address("http://10.0.0.1:8265", trust_network=True)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "f" * 64)
    assert checked_address("https://ray.example.org")


@pytest.mark.parametrize("address", ["10.0.0.1:6379", "ray://head:10001", "http://", "auto", "http://[::1:8265"])
def test_an_address_that_is_no_dashboards_is_refused(address: str) -> None:
    with pytest.raises(UserError, match="expected the dashboard's"):
        checked_address(address, trust_network=True)


def test_a_password_in_the_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(UserError, match="RAY_AUTH_TOKEN") as refused:
        checked_address("http://me:hunter2@head:8265")
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("job", ["node8", "nodes4", "finetune_gemma_scope"])
def test_the_jobs_for_clusters_can_be_submitted(job: str) -> None:
    path = Path(__file__).parents[1] / "jobs" / f"{job}.yaml"
    run = for_cluster(load_config(path), str(path))
    assert Path(run.runs_dir).is_absolute()
    assert run.ray.address == "auto"
