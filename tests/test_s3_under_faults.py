"""S3 behind a proxy that spoils requests: what is read and committed is whole and right, or refused by name."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from botocore.exceptions import ClientError
from s3_faults import FAULTS, SLOW_S, S3Faults
from s3_server import BUCKET, S3Server

from sae_ray import s3, s3_traffic
from sae_ray.errors import UserError
from sae_ray.s3_traffic import TRAFFIC, TRIES
from sae_ray.storage import Storage, open_storage

DATA = bytes(range(256)) * 40
RETRIED = [fault for fault in FAULTS if fault != "slow"]


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    running = S3Server()
    yield running
    running.stop()


@pytest.fixture
def faults(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Faults]:
    """A proxy that spoils nothing yet; the environment leads to it."""
    monkeypatch.setattr(s3_traffic, "_BASE_S", 0.01)
    with S3Faults(server.settings["AWS_ENDPOINT_URL"]) as proxy:
        for key, value in (server.settings | {"AWS_ENDPOINT_URL": proxy.url}).items():
            monkeypatch.setenv(key, value)
        yield proxy


@pytest.fixture
def storage(faults: S3Faults, request: pytest.FixtureRequest) -> Storage:
    return open_storage(f"s3://{BUCKET}/{abs(hash(request.node.name))}")


def counted(before: dict[str, int], name: str) -> int:
    return TRAFFIC.counts()[name] - before[name]


def raw(server: S3Server, storage: Storage, key: str) -> bytes:
    """What really lies there."""
    found = server.client.get_object(Bucket=BUCKET, Key=storage.url(key).removeprefix(f"s3://{BUCKET}/"))
    return bytes(found["Body"].read())


@pytest.mark.parametrize("fault", RETRIED)
@pytest.mark.parametrize("known", [True, False], ids=["hash-known", "hash-of-the-object"])
def test_an_answer_that_is_spoilt_once_is_asked_for_again(faults, storage, fault, known):
    digest = storage.write("shard", DATA)
    before = TRAFFIC.counts()
    faults.script(fault)
    assert storage.read("shard", digest if known else None) == DATA
    assert counted(before, "retries") == 1
    assert faults.done[fault] == 1


def test_a_slow_answer_is_waited_for(faults, storage):
    storage.write("shard", DATA)
    before = TRAFFIC.counts()
    faults.script("slow")
    assert SLOW_S < s3.READ_TIMEOUT_S
    assert storage.read("shard") == DATA
    assert counted(before, "retries") == 0


@pytest.mark.parametrize("fault", ["slow", "503", "reset", "lost"])
def test_a_write_that_is_spoilt_once_is_there_whole(faults, storage, server, fault):
    before = TRAFFIC.counts()
    faults.script(fault)
    storage.write("shard", DATA)
    assert raw(server, storage, "shard") == DATA
    assert counted(before, "retries") == (fault != "slow")


@pytest.mark.parametrize(
    ("fault", "said"), [("truncate", "broke off 4 times"), ("flip", "corrupt"), ("503", "SlowDown")]
)
def test_what_stays_spoilt_is_given_up_by_name_in_bounded_tries(faults, storage, monkeypatch, fault, said):
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.01)
    storage.write("shard", DATA)
    faults.script(*[fault] * 50)
    faults.done.clear()
    with pytest.raises(UserError, match=r"s3://runs/\d+/shard: .*" + said):
        storage.read("shard")
    assert faults.done[fault] <= TRIES


def test_an_object_that_lies_there_torn_is_refused_by_name(faults, storage, server):
    digest = storage.write("index.json", DATA)
    key = storage.url("index.json").removeprefix(f"s3://{BUCKET}/")
    server.client.put_object(Bucket=BUCKET, Key=key, Body=DATA[:100], Metadata={s3.SHA256: digest})
    before = TRAFFIC.counts()
    for sha256 in (digest, None):
        with pytest.raises(UserError, match=r"index\.json: is corrupt: sha256"):
            storage.read("index.json", sha256)
    assert counted(before, "corrupt") == 2
    # An object of somebody else, who notes no hash, is read.
    server.client.put_object(Bucket=BUCKET, Key=key, Body=b"{}")
    assert storage.read("index.json") == b"{}"


def test_a_commit_whose_answer_is_lost_is_not_taken_for_somebody_elses(faults, storage, server):
    faults.script("lost")
    first = storage.commit("manifest", b"ours")
    faults.script("lost")
    assert storage.commit("manifest", b"ours, later", after=first) != first
    assert raw(server, storage, "manifest") == b"ours, later"


@pytest.mark.parametrize("unknown", [(), ("If-None-Match", "If-Match")], ids=["conditional", "without-conditions"])
def test_the_second_of_two_commits_is_refused_and_changes_nothing(server, faults, storage, caplog, unknown):
    faults.unknown = unknown
    before = TRAFFIC.counts()
    first = storage.commit("manifest", b"first")
    for after in (None, "0" * 64):
        with pytest.raises(UserError, match=r"manifest: somebody else has committed there since: two runs write"):
            storage.commit("manifest", b"second", after=after)
    assert raw(server, storage, "manifest") == b"first"
    assert storage.commit("manifest", b"first") == first
    storage.commit("manifest", b"third", after=first)
    assert raw(server, storage, "manifest") == b"third"
    assert (counted(before, "unconditional") > 0) == bool(unknown)
    assert ("knows no conditional writes" in caplog.text) == bool(unknown)


def test_a_large_upload_survives_lost_and_broken_parts(faults, storage, server, monkeypatch):
    monkeypatch.setattr(s3, "MULTIPART_BYTES", 10 << 20)  # parts of 5 MiB, S3's smallest
    data = os.urandom(11 << 20)
    faults.script("", "reset", "lost", "503")
    before = TRAFFIC.counts()
    digest = storage.write("large", data)
    assert faults.done["reset"] == faults.done["lost"] == faults.done["503"] == 1
    assert counted(before, "retries") >= 3
    assert storage.read("large", digest) == raw(server, storage, "large") == data


@pytest.mark.parametrize("there", ["ours", "nothing"])
def test_an_upload_whose_completion_is_not_answered_is_looked_for_and_else_made_anew(
    faults, storage, server, monkeypatch, there
):
    monkeypatch.setattr(s3, "MULTIPART_BYTES", 10 << 20)
    data = os.urandom(11 << 20)
    key, real, uploads = storage.url("large").removeprefix(f"s3://{BUCKET}/"), s3.S3Storage._head, []

    def head(storage, name):
        uploads.append(name)
        if there == "nothing" and len(uploads) == 1:
            server.client.delete_object(Bucket=BUCKET, Key=key)
        return real(storage, name)

    monkeypatch.setattr(s3.S3Storage, "_head", head)
    faults.methods = ("POST",)
    faults.script("", "lost", "gone")  # created; completed, and nobody hears of it; asked again by botocore
    digest = storage.write("large", data)
    assert faults.done["lost"] == len(uploads) == 1
    assert storage.read("large", digest) == raw(server, storage, "large") == data
    created, completed = (1, 2) if there == "ours" else (2, 3)
    assert sum(faults.done.values()) == created + completed


def test_an_upload_that_is_gone_each_time_is_given_up_by_name(faults, storage, monkeypatch):
    monkeypatch.setattr(s3, "MULTIPART_BYTES", 10)
    gone, tries = ClientError({"Error": {"Code": "NoSuchUpload", "Message": "gone"}}, "CompleteMultipartUpload"), []

    def upload(*_, **__):
        tries.append(1)
        raise gone

    monkeypatch.setattr(storage._client, "upload_fileobj", upload)
    with pytest.raises(UserError, match=r"/large: cannot be written: gone \(NoSuchUpload\)"):
        storage.write("large", bytes(11))
    assert len(tries) == TRIES


@pytest.mark.parametrize("seed", [0, 1])
def test_under_random_faults_every_object_is_what_was_written(faults, storage, monkeypatch, seed):
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.01)
    faults.spoil(0.25, seed)
    refused = []
    for number in range(40):
        data = bytes([number]) * (1 + 97 * number)
        try:
            digest = storage.write(f"o-{number}", data)
            assert storage.read(f"o-{number}", digest) == data
        except UserError as error:  # spoilt four times in a row
            refused.append((f"o-{number}", str(error)))
    assert len(refused) <= 4
    assert all(name in said for name, said in refused)
    assert sum(faults.done[fault] for fault in FAULTS) > 5
