"""One contract, two storages: a folder, and a real S3 server. Then what each says when it cannot."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
import ray
import yaml
from s3_server import BUCKET, S3Server

from sae_ray import cli, s3
from sae_ray.errors import UserError
from sae_ray.storage import LocalStorage, Storage, ensure_writable, join, open_storage, probe
from sae_ray.trainer.checkpoint import FORMAT
from sae_ray.trainer.claim import Claim

NOTHING_LISTENS = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    running = S3Server()
    yield running
    running.stop()


@pytest.fixture
def on_s3(server: S3Server, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A location of the test's own on the server, which the environment leads to."""
    for key, value in server.settings.items():
        monkeypatch.setenv(key, value)
    return f"s3://{BUCKET}/{request.node.name}"


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return open_storage(tmp_path / "root" if request.param == "local" else request.getfixturevalue("on_s3"))


def test_what_is_written_is_read_listed_and_removed(storage: Storage) -> None:
    digest = storage.write("step-1/shard.bin", b"weights")
    assert storage.write("step-1/parts.bin", [memoryview(b"wei"), memoryview(b"ghts")]) == digest
    storage.write("step-10/shard.bin", b"")
    assert storage.read("step-1/parts.bin", digest) == b"weights"
    assert storage.exists("step-1/shard.bin")
    assert not storage.exists("step-1/other.bin")
    assert [storage.size(f"step-1/{name}") for name in ("shard.bin", "other.bin", "shard.bin/x")] == [7, None, None]
    assert storage.list() == ["step-1/parts.bin", "step-1/shard.bin", "step-10/shard.bin"]
    assert storage.list("step-1") == ["step-1/parts.bin", "step-1/shard.bin"]
    assert storage.folders() == ["step-1", "step-10"]
    storage.delete("step-1")
    assert storage.list() == ["step-10/shard.bin"]
    storage.delete("step-10/shard.bin")
    storage.delete("never/was")
    assert storage.list() == []


def test_a_second_write_replaces_the_first(storage: Storage) -> None:
    storage.write("manifest.json", b"first, and longer")
    storage.write("manifest.json", b"second")
    assert storage.read("manifest.json") == b"second"


def test_other_content_than_was_committed_is_named_as_corrupt(storage: Storage) -> None:
    digest = storage.write("shard.bin", b"weights")
    storage.write("shard.bin", b"wEights")
    with pytest.raises(UserError, match=r"shard\.bin: is corrupt: sha256"):
        storage.read("shard.bin", digest)


def test_a_missing_file_is_named(storage: Storage) -> None:
    with pytest.raises(UserError, match=r"no/such\.bin: cannot be read: (No such file|there is no such object)"):
        storage.read("no/such.bin")


def test_of_commits_to_one_key_only_those_that_know_what_is_there_count(storage: Storage) -> None:
    first = storage.commit("manifest.json", b"first")
    assert storage.commit("manifest.json", b"first") == first
    with pytest.raises(UserError, match=r"manifest\.json: somebody else has committed there"):
        storage.commit("manifest.json", b"second")
    second = storage.commit("manifest.json", b"second", after=first)
    with pytest.raises(UserError, match="somebody else has committed there"):
        storage.commit("manifest.json", b"third", after=first)
    assert storage.read("manifest.json", second) == b"second"
    assert storage.list() == ["manifest.json"]


def test_of_commits_at_once_one_counts(storage: Storage) -> None:
    refused = []

    def commit(data: bytes) -> None:
        try:
            storage.commit("manifest.json", data)
        except UserError:
            refused.append(data)

    contents = [bytes([i]) * 1000 for i in range(8)]
    threads = [threading.Thread(target=commit, args=(data,)) for data in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 7
    assert storage.read("manifest.json") in set(contents) - set(refused)


def test_two_writers_at_once_leave_one_whole_file(storage: Storage) -> None:
    contents = [bytes([i]) * 100_000 for i in range(8)]
    threads = [threading.Thread(target=storage.write, args=("same.bin", data)) for data in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert storage.read("same.bin") in contents


# -- a folder -----------------------------------------------------------------------------------------------


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    storage = LocalStorage(tmp_path)
    storage.write("a/b.bin", b"first")

    def torn(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", torn)
    with pytest.raises(UserError, match=r"b\.bin: cannot be written: No space left on device; free some space"):
        storage.write("a/b.bin", b"second")
    assert storage.read("a/b.bin") == b"first"
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.bin"]


def test_keys_cannot_leave_the_root(tmp_path):
    with pytest.raises(UserError, match="is outside"):
        LocalStorage(tmp_path / "run").write("../other", b"")


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not writable"):
        ensure_writable(tmp_path / "file" / "run")
    with pytest.raises(UserError, match=r"trainer\.checkpoint_dir = .*file/run: .*cannot be written"):
        probe(tmp_path / "file" / "run", "trainer.checkpoint_dir")


def test_the_kernels_refusal_of_a_large_file_leaves_the_old_one(tmp_path):
    """A real refusal in the middle of a write: the process may write no file over 64 KiB."""
    script = (
        "import sys; from sae_ray.storage import LocalStorage; from sae_ray.errors import UserError\n"
        "storage = LocalStorage(sys.argv[1])\n"
        "storage.write('shard.bin', b'old')\n"
        "try: storage.write('shard.bin', bytes(1 << 20))\n"
        "except UserError as error: print(error)\n"
    )

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))

    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], preexec_fn=limit, capture_output=True, text=True, timeout=60
    )
    assert "shard.bin: cannot be written: File too large" in done.stdout, done
    assert (tmp_path / "shard.bin").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["shard.bin"]


# -- S3 -----------------------------------------------------------------------------------------------------


def test_a_large_object_goes_up_in_parts_and_comes_back_whole(on_s3, server, monkeypatch):
    monkeypatch.setattr(s3, "MULTIPART_BYTES", 10 << 20)  # parts of 5 MiB, S3's smallest
    storage = open_storage(on_s3)
    parts = [memoryview(os.urandom(7 << 20)), memoryview(b""), memoryview(os.urandom(6 << 20))]
    digest = storage.write("large.bin", parts)
    assert storage.read("large.bin", digest) == b"".join(parts)
    key = on_s3.removeprefix(f"s3://{BUCKET}/") + "/large.bin"
    assert server.client.head_object(Bucket=BUCKET, Key=key)["ETag"].strip('"').endswith("-3")


def test_more_keys_than_one_request_may_name_are_listed_and_removed(on_s3, monkeypatch):
    monkeypatch.setattr(s3, "DELETED_AT_ONCE", 2)
    storage = open_storage(on_s3)
    for i in range(5):
        storage.write(f"step-1/{i}", b"")
    storage.delete("step-1")
    assert storage.list() == []


def test_locations_are_joined_without_a_path_eating_the_slashes():
    assert join("s3://bucket/prefix/", "step-1") == "s3://bucket/prefix/step-1"
    assert join("runs/a", "step-1") == Path("runs/a/step-1")


def test_no_bucket_is_said_before_anything_is_asked():
    with pytest.raises(UserError, match="names no bucket"):
        open_storage("s3:///prefix")


@pytest.mark.parametrize("action", ["write", "read", "exists", "list", "delete", "folders"])
def test_a_bucket_that_is_not_there_is_named(action, on_s3):
    storage = open_storage("s3://no-such-bucket/run")
    arguments = {"write": ("key", b""), "read": ("key",), "exists": ("key",), "delete": ("key",)}.get(action, ())
    if action == "exists":  # S3 answers a plain 404 here, as for a key that is missing
        assert storage.exists("key") is False
        return
    with pytest.raises(UserError, match=r"s3://no-such-bucket/run.*: there is no such bucket; create it"):
        getattr(storage, action)(*arguments)


def test_a_server_that_refuses_connections_is_given_up_in_bounded_time(on_s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", NOTHING_LISTENS)
    with pytest.raises(UserError, match=r"s3://runs/.*/key: cannot be written: .*127\.0\.0\.1:9.*AWS_ENDPOINT_URL"):
        open_storage(on_s3).write("key", b"")


def test_the_region_is_what_aws_region_says(on_s3, monkeypatch):
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    assert open_storage(on_s3)._client.meta.region_name == "eu-central-1"
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    assert open_storage(on_s3)._client.meta.region_name == "eu-central-1"
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    monkeypatch.setenv("AWS_REGION", "")
    assert open_storage(on_s3)._client.meta.region_name == "us-west-2"


def test_a_client_without_credentials_is_told_what_to_set(on_s3, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(UserError, match="no credentials; set AWS_ACCESS_KEY_ID"):
        open_storage(on_s3).write("key", b"")


def test_a_write_that_the_policy_denies_says_which_rights_are_needed(server, on_s3, monkeypatch):
    """The server itself enforces the policy, for a user whose rights are to read only."""
    denied = deny_writes(server)
    for name, value in denied.items():
        monkeypatch.setenv(name, value)
    try:
        with pytest.raises(UserError, match=r"s3://runs/.*key: cannot be written: access denied; .*s3:PutObject"):
            open_storage(on_s3).write("key", b"")
        with pytest.raises(UserError, match=r"^trainer\.checkpoint_dir = s3://runs/.*access denied"):
            probe(on_s3, "trainer.checkpoint_dir")
    finally:
        enforce_policies(server, after=1_000_000)


# -- the command line ---------------------------------------------------------------------------------------


@pytest.fixture
def run_cli(tmp_path, monkeypatch, capsys):
    """Runs `sae-ray` in this process with a small config; returns (exit code, stderr). No cluster may start."""
    monkeypatch.setattr(ray, "init", lambda *args, **kwargs: pytest.fail("a cluster was started"))

    def run(command: str, *options: str, **sections: object) -> tuple[int, str]:
        path = tmp_path / "run.yaml"
        base = {"name": "run", "runs_dir": str(tmp_path / "runs"), "hook": {"layer": 2}, "rlaif": {"enabled": False}}
        path.write_text(yaml.safe_dump({**base, **sections}))
        monkeypatch.setattr(sys, "argv", ["sae-ray", command, str(path), *options])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0), capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("s3://no-such-bucket/run", "there is no such bucket; create it"),
        (__file__ + "/run", "Not a directory"),
    ],
)
def test_a_checkpoint_dir_that_cannot_be_written_is_one_line_before_a_cluster(run_cli, on_s3, location, said):
    code, err = run_cli("train", trainer={"checkpoint_dir": location})
    assert code == 2
    assert err.startswith(f"sae-ray: trainer.checkpoint_dir = {location}: ")
    assert said in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("train", "--set", "activations.store=s3://runs/none"), "s3://runs/none: holds no activation store"),
        (("store", "--to", "s3://no-such-bucket/x"), "--to = s3://no-such-bucket/x"),
        (("store", "--to", "x", "--split", "test"), "--split test: allowed: train, evidence, heldout"),
    ],
)
def test_a_store_that_cannot_be_used_is_one_line_before_a_cluster(run_cli, on_s3, options, said):
    code, err = run_cli(*options)
    assert code == 2
    assert said in err
    assert len(err.strip().splitlines()) == 1


def committed(location: str, config: dict[str, object], format: int = FORMAT) -> None:
    """A commit of one step of some run at `location`."""
    manifest = {"format": format, "step": 5, "pin": None, "files": {}, "config": config}
    open_storage(location).write("step-5/manifest.json", json.dumps(manifest).encode())


def test_another_runs_checkpoints_are_neither_resumed_nor_removed(run_cli, on_s3):
    committed(on_s3, {"name": "other", "hook": {"layer": 2}, "rlaif": {"enabled": False}})
    code, err = run_cli("train", trainer={"checkpoint_dir": on_s3})
    assert code == 2
    assert f"{on_s3}: holds a run with other settings (name was 'other', is 'run')" in err
    code, err = run_cli("train", "--fresh", trainer={"checkpoint_dir": on_s3})
    assert code == 2
    assert f"{on_s3}/step-5 is a checkpoint of the run 'other'; not removed" in err
    assert open_storage(on_s3).list() == ["step-5/manifest.json"]


def test_another_versions_checkpoints_are_not_resumed(run_cli, on_s3):
    committed(on_s3, {"name": "run"}, format=FORMAT - 1)
    code, err = run_cli("train", trainer={"checkpoint_dir": on_s3})
    assert code == 2
    assert f"has format {FORMAT - 1}, this version reads {FORMAT}; start anew (--fresh)" in err


@pytest.mark.parametrize("format", [FORMAT, FORMAT - 1])
def test_fresh_removes_the_runs_own_checkpoints_and_nothing_else(run_cli, on_s3, format):
    committed(on_s3, {"name": "run", "hook": {"layer": 2}, "rlaif": {"enabled": False}}, format)
    open_storage(on_s3).write("notes.txt", b"mine")
    Claim(on_s3, "run").hold()
    code, err = run_cli("train", "--fresh", "--check", trainer={"checkpoint_dir": on_s3})
    assert code == 0, err
    assert open_storage(on_s3).list() == ["notes.txt"]


def deny_writes(server: S3Server) -> dict[str, str]:
    """A new user that may only read; from the next request on the server checks who may do what."""
    iam = boto3.client("iam")
    iam.create_user(UserName="reader")
    key = iam.create_access_key(UserName="reader")["AccessKey"]
    policy = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:Get*", "Resource": "*"}]}
    iam.put_user_policy(UserName="reader", PolicyName="read", PolicyDocument=json.dumps(policy))
    enforce_policies(server, after=0)
    return {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}


def enforce_policies(server: S3Server, after: int) -> None:
    request = urllib.request.Request(
        server.settings["AWS_ENDPOINT_URL"] + "/moto-api/reset-auth",
        data=str(after).encode(),
        headers={"Content-Type": "text/plain"},
        method="POST",
    )
    urllib.request.urlopen(request, timeout=5).close()


@pytest.mark.parametrize("place", ["gs://bucket/acts", "file:///acts", "s3:/bucket/acts"])
def test_a_place_that_nothing_here_opens_is_not_made_a_folder(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^{place}: expected a folder"):
        open_storage(place)
    assert list(tmp_path.iterdir()) == []
