"""Storage on S3 and whatever speaks its protocol.

Endpoint, region and credentials come from where every AWS tool takes them: `AWS_ENDPOINT_URL`, `AWS_REGION`,
`AWS_PROFILE`, `AWS_ACCESS_KEY_ID`, instance roles. A put is atomic: an object that is not there in whole is
not there. The server checks each upload against a SHA-256 that is sent along, and keeps it as the object's metadata,
so that a reader can check what it got whatever the endpoint offers. What lies where: docs/storage.md.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import io
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import boto3
from boto3.exceptions import Boto3Error, S3UploadFailedError
from boto3.s3.transfer import TransferConfig
from botocore.client import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    FlexibleChecksumError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ReadTimeoutError,
    ResponseStreamingError,
)

from sae_ray.errors import UserError
from sae_ray.s3_traffic import TRAFFIC, TRIES, pause_before
from sae_ray.storage import S3, Data, check_hash, taken

_log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S, READ_TIMEOUT_S, ATTEMPTS = 5, 60, 4
MULTIPART_BYTES = 64 << 20  # larger objects go up in parts, several at a time
DELETED_AT_ONCE = 1000  # the most that one request may name

_REASONS = {
    "NoSuchBucket": "there is no such bucket; create it or correct the name",
    "AccessDenied": "access denied; these credentials need s3:GetObject, s3:PutObject, s3:DeleteObject, s3:ListBucket",
    "InvalidAccessKeyId": "the access key is unknown there; check AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL",
    "SignatureDoesNotMatch": "the secret key does not fit; check AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "the session token has expired; log in again",
    "PermanentRedirect": "the bucket is in another region; set AWS_REGION to it",
    "QuotaExceeded": "the storage is full; free some space or choose another place",
}
_MISSING = ("NoSuchKey", "404", "NotFound")
# An object's metadata: the SHA-256 of its content, in hexadecimal digits.
SHA256 = "sha256"
# An answer's body that botocore, which has handed it on, does not fetch again.
_TORN = (ResponseStreamingError, ReadTimeoutError, IncompleteReadError, FlexibleChecksumError)
# Refusals that say "again" and that botocore does not take so: damaged on the way there, or a write beside ours.
_AGAIN = (
    "BadDigest",
    "XAmzContentChecksumMismatch",
    "IncompleteBody",
    "ConditionalRequestConflict",
    "OperationAborted",
    "NoSuchUpload",
)
_LOST_RACE = ("PreconditionFailed", "412")
_NO_CONDITIONS = ("NotImplemented", "501", "UnsupportedOperation")
_REASONS |= {"403": _REASONS["AccessDenied"], "AllAccessDisabled": _REASONS["AccessDenied"]}


class S3Storage:
    """Objects below `s3://bucket/prefix`."""

    def __init__(self, location: str):
        self.bucket, _, prefix = location.removeprefix(S3).partition("/")
        if not self.bucket:
            raise UserError(f"{location}: names no bucket; expected s3://bucket/prefix")
        self.prefix = prefix.strip("/")

    def url(self, key: str = "") -> str:
        return f"{S3}{self.bucket}/{self._key(key)}"

    def write(self, key: str, data: Data) -> str:
        parts = [memoryview(data)] if isinstance(data, bytes) else list(data)
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        with self._explained(key, "cannot be written", "write"):
            size = sum(part.nbytes for part in parts)
            if size <= MULTIPART_BYTES:
                self._put(key, b"".join(parts), digest.digest())
            else:
                _again(lambda: self._upload(key, parts, digest.hexdigest()))
        TRAFFIC.add("written_bytes", size)
        return digest.hexdigest()

    def commit(self, key: str, data: bytes, after: str | None = None) -> str:
        digest = hashlib.sha256(data)
        with self._explained(key, "cannot be committed", "commit"):
            try:
                held = None if after is None else self._head(key)
                if after is not None and (held is None or self._digest_of(key, held) != after):
                    raise taken(self.url(key))
                condition = {"IfNoneMatch": "*"} if held is None else {"IfMatch": held["ETag"]}
                self._put(key, data, digest.digest(), **condition)
            except (ClientError, UserError) as error:
                code = _code(error) if isinstance(error, ClientError) else "PreconditionFailed"
                if code in (*_LOST_RACE, *_MISSING):
                    # Ours, if an earlier attempt got through and its answer was lost.
                    if (now := self._head(key)) is None or self._digest_of(key, now) != digest.hexdigest():
                        raise taken(self.url(key)) from error
                elif code in _NO_CONDITIONS:
                    self._commit_unconditionally(key, data, digest.digest(), after)
                else:
                    raise
        TRAFFIC.add("written_bytes", len(data))
        return digest.hexdigest()

    def read(self, key: str, sha256: str | None = None) -> bytes:
        with self._explained(key, "cannot be read", "read"):
            seen = ""
            for turn in range(TRIES):
                # What fails here, botocore has tried often enough.
                answer = self._client.get_object(Bucket=self.bucket, Key=self._key(key))
                try:
                    data: bytes = answer["Body"].read()
                except _TORN:
                    if turn == TRIES - 1:
                        TRAFFIC.add("corrupt")
                        raise
                    pause_before(turn)
                    continue
                TRAFFIC.add("read_bytes", len(data))
                stored = answer["Metadata"].get(SHA256)
                found = hashlib.sha256(data).hexdigest()
                # The same wrong bytes twice, or those that were stored, are not the wire's doing.
                if found in (sha256 or stored or found, stored, seen) or turn == TRIES - 1:
                    break
                seen = found
                pause_before(turn)
        try:
            if sha256 is not None:
                check_hash(self.url(key), data, sha256)
            else:
                check_hash(self.url(key), data, stored, "it was stored with")
        except UserError:
            TRAFFIC.add("corrupt")
            raise
        return data

    def exists(self, key: str) -> bool:
        with self._explained(key, "cannot be looked up", "look up"):
            return self._head(key) is not None

    def size(self, key: str) -> int | None:
        with self._explained(key, "cannot be looked up", "look up"):
            held = self._head(key)
        return None if held is None else int(held["ContentLength"])

    def folders(self) -> list[str]:
        root = f"{self.prefix}/" if self.prefix else ""
        found: list[str] = []
        with self._explained("", "cannot be listed", "list"):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=root, Delimiter="/"
            )
            for page in pages:
                found += [entry["Prefix"].removeprefix(root).rstrip("/") for entry in page.get("CommonPrefixes", ())]
        return sorted(found)

    def list(self, prefix: str = "") -> list[str]:
        root = f"{self.prefix}/" if self.prefix else ""
        folder = f"{self._key(prefix)}/" if prefix.strip("/") else root
        found: list[str] = []
        with self._explained(prefix, "cannot be listed", "list"):
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=folder):
                found += [entry["Key"].removeprefix(root) for entry in page.get("Contents", ())]
        return sorted(found)

    def delete(self, key: str) -> None:
        keys = [*([key] if key else []), *self.list(key)]
        with self._explained(key, "cannot be removed", "remove"):
            for start in range(0, len(keys), DELETED_AT_ONCE):
                objects = [{"Key": self._key(each)} for each in keys[start : start + DELETED_AT_ONCE]]
                answer = self._client.delete_objects(Bucket=self.bucket, Delete={"Objects": objects, "Quiet": True})
                for refused in answer.get("Errors", ()):
                    reason = _REASONS.get(refused["Code"], refused["Message"])
                    raise UserError(f"{S3}{self.bucket}/{refused['Key']}: cannot be removed: {reason}")

    # -- inside -----------------------------------------------------------------------------------------

    def _put(self, key: str, body: bytes, sha256: bytes, **condition: str) -> None:
        _again(
            lambda: self._client.put_object(
                Bucket=self.bucket,
                Key=self._key(key),
                Body=body,
                ChecksumSHA256=base64.b64encode(sha256).decode(),
                Metadata={SHA256: sha256.hex()},
                **condition,
            )
        )

    def _upload(self, key: str, parts: Sequence[memoryview], sha256: str) -> None:
        try:
            self._client.upload_fileobj(
                io.BufferedReader(_Parts(parts), MULTIPART_BYTES),
                self.bucket,
                self._key(key),
                ExtraArgs={"ChecksumAlgorithm": "SHA256", "Metadata": {SHA256: sha256}},
                Config=TransferConfig(multipart_threshold=MULTIPART_BYTES, multipart_chunksize=MULTIPART_BYTES // 2),
            )
        except (ClientError, S3UploadFailedError) as error:
            cause = _cause(error)
            if not isinstance(cause, ClientError) or _code(cause) != "NoSuchUpload":
                raise
            # Completed already, if it was only the answer that was lost: botocore asks for it once more.
            if (held := self._head(key)) is None or held["Metadata"].get(SHA256) != sha256:
                raise

    def _commit_unconditionally(self, key: str, data: bytes, sha256: bytes, after: str | None) -> None:
        """Looks, then writes: between the two somebody else may write, and nobody would notice."""
        TRAFFIC.add("unconditional")
        _log.warning("%s: the endpoint knows no conditional writes; two runs that write there at once go unseen", self)
        held = self._head(key)
        if (None if held is None else self._digest_of(key, held)) not in (after, sha256.hex()):
            raise taken(self.url(key))
        self._put(key, data, sha256)

    def _head(self, key: str) -> dict[str, Any] | None:
        """What the endpoint says of an object; None if there is none."""
        try:
            found: dict[str, Any] = self._client.head_object(Bucket=self.bucket, Key=self._key(key))
        except ClientError as error:
            if _code(error) in _MISSING:
                return None
            raise
        return found

    def _digest_of(self, key: str, held: dict[str, Any]) -> str:
        """SHA-256 of an object; read where it was written by something that does not note it."""
        return held["Metadata"].get(SHA256) or hashlib.sha256(self.read(key)).hexdigest()

    def __str__(self) -> str:
        return self.url()

    @property
    def _client(self) -> Any:
        return _client(tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_"))))

    def _key(self, key: str) -> str:
        return "/".join(part for part in (self.prefix, key.strip("/")) if part)

    @contextlib.contextmanager
    def _explained(self, key: str, what: str, action: str) -> Iterator[None]:
        """Turns what boto3 raises into one line that names the object and what to do, and times the action."""
        try:
            with TRAFFIC.timed(action):
                yield
        except (ClientError, BotoCoreError, Boto3Error) as error:
            raise UserError(f"{self.url(key)}: {what}: {_reason(error)}") from error


@functools.lru_cache(maxsize=4)
def _client(environment: tuple[tuple[str, str], ...]) -> Any:
    """A client (safe to share between threads) for the AWS settings as they are now, which are `environment`."""
    config = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        retries={"total_max_attempts": ATTEMPTS, "mode": "standard"},
    )
    try:
        # Botocore itself reads AWS_DEFAULT_REGION only, unlike every other SDK.
        region = dict(environment).get("AWS_REGION") or None
        client = boto3.session.Session(region_name=region).client("s3", config=config)
        client.meta.events.register("needs-retry.s3", TRAFFIC.on_attempt, unique_id="sae_ray")
        return client
    except (BotoCoreError, ValueError) as error:
        raise UserError(f"S3: the AWS settings cannot be used: {error}") from error


def _again(action: Callable[[], Any]) -> Any:
    """Does it again where the endpoint says so and botocore does not."""
    for turn in range(TRIES):
        try:
            return action()
        except (ClientError, S3UploadFailedError) as error:
            cause = _cause(error)
            if turn == TRIES - 1 or not isinstance(cause, ClientError) or _code(cause) not in _AGAIN:
                raise
            pause_before(turn)
    raise AssertionError("unreachable")


def _cause(error: BaseException) -> BaseException | None:
    return error.__cause__ or error.__context__ if isinstance(error, S3UploadFailedError) else error


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _reason(error: Exception) -> str:
    cause = _cause(error)
    if isinstance(cause, FlexibleChecksumError):
        return "is corrupt: its content does not fit the checksum that it was stored with"
    if isinstance(cause, (ResponseStreamingError, IncompleteReadError)):
        return (
            f"the answer broke off {TRIES} times ({' '.join(str(cause).split())}); is the server, or a proxy, unwell?"
        )
    if isinstance(cause, ClientError):
        entry = cause.response.get("Error", {})
        code = entry.get("Code", "")
        if code in _MISSING:
            return "there is no such object"
        return _REASONS.get(code) or f"{entry.get('Message') or 'refused'} ({code})"
    if isinstance(cause, NoCredentialsError | PartialCredentialsError):
        return "no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    return f"{' '.join(str(cause).split())}; check AWS_ENDPOINT_URL, AWS_REGION and that the server is up"


class _Parts(io.RawIOBase):
    """A stream over buffers, for boto3's transfer manager."""

    def __init__(self, parts: Sequence[memoryview]):
        self._parts = [part.cast("B") for part in parts if part.nbytes]

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        if not self._parts:
            return 0
        part = self._parts[0]
        count = min(len(target), len(part))
        target[:count] = part[:count]
        self._parts[0] = part[count:]
        if not self._parts[0]:
            self._parts.pop(0)
        return count
