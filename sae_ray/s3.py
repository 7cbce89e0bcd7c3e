"""Storage on S3 and whatever speaks its protocol.

Endpoint, region and credentials come from where every AWS tool takes them: `AWS_ENDPOINT_URL`, `AWS_REGION`,
`AWS_PROFILE`, `AWS_ACCESS_KEY_ID`, instance roles. A put is atomic: an object that is not there in whole is
not there. The server checks each upload against a SHA-256 that is sent along.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import io
import os
from collections.abc import Iterator
from typing import Any

import boto3
from boto3.exceptions import Boto3Error, S3UploadFailedError
from boto3.s3.transfer import TransferConfig
from botocore.client import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

from sae_ray.errors import UserError
from sae_ray.storage import S3, Data, check_hash

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
        with self._explained(key, "cannot be written"):
            if sum(part.nbytes for part in parts) <= MULTIPART_BYTES:
                checksum = base64.b64encode(digest.digest()).decode()
                self._client.put_object(
                    Bucket=self.bucket, Key=self._key(key), Body=b"".join(parts), ChecksumSHA256=checksum
                )
            else:
                self._client.upload_fileobj(
                    io.BufferedReader(_Parts(parts), MULTIPART_BYTES),
                    self.bucket,
                    self._key(key),
                    ExtraArgs={"ChecksumAlgorithm": "SHA256"},
                    Config=TransferConfig(
                        multipart_threshold=MULTIPART_BYTES, multipart_chunksize=MULTIPART_BYTES // 2
                    ),
                )
        return digest.hexdigest()

    def read(self, key: str, sha256: str | None = None) -> bytes:
        with self._explained(key, "cannot be read"):
            data = self._client.get_object(Bucket=self.bucket, Key=self._key(key))["Body"].read()
        check_hash(self.url(key), data, sha256)
        return data

    def exists(self, key: str) -> bool:
        with self._explained(key, "cannot be looked up"):
            try:
                self._client.head_object(Bucket=self.bucket, Key=self._key(key))
            except ClientError as error:
                if error.response.get("Error", {}).get("Code") in _MISSING:
                    return False
                raise
        return True

    def folders(self) -> list[str]:
        root = f"{self.prefix}/" if self.prefix else ""
        found: list[str] = []
        with self._explained("", "cannot be listed"):
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
        with self._explained(prefix, "cannot be listed"):
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=folder):
                found += [entry["Key"].removeprefix(root) for entry in page.get("Contents", ())]
        return sorted(found)

    def delete(self, key: str) -> None:
        keys = [*([key] if key else []), *self.list(key)]
        with self._explained(key, "cannot be removed"):
            for start in range(0, len(keys), DELETED_AT_ONCE):
                objects = [{"Key": self._key(each)} for each in keys[start : start + DELETED_AT_ONCE]]
                answer = self._client.delete_objects(Bucket=self.bucket, Delete={"Objects": objects, "Quiet": True})
                for refused in answer.get("Errors", ()):
                    reason = _REASONS.get(refused["Code"], refused["Message"])
                    raise UserError(f"{S3}{self.bucket}/{refused['Key']}: cannot be removed: {reason}")

    @property
    def _client(self) -> Any:
        return _client(tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_"))))

    def _key(self, key: str) -> str:
        return "/".join(part for part in (self.prefix, key.strip("/")) if part)

    @contextlib.contextmanager
    def _explained(self, key: str, what: str) -> Iterator[None]:
        """Turns what boto3 raises into one line that names the object and what to do."""
        try:
            yield
        except (ClientError, BotoCoreError, Boto3Error) as error:
            raise UserError(f"{self.url(key)}: {what}: {_reason(error)}") from error


@functools.lru_cache(maxsize=4)
def _client(environment: tuple[tuple[str, str], ...]) -> Any:
    """A client (safe to share between threads) for the AWS settings as they are now."""
    config = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        retries={"total_max_attempts": ATTEMPTS, "mode": "standard"},
    )
    try:
        return boto3.session.Session().client("s3", config=config)
    except (BotoCoreError, ValueError) as error:
        raise UserError(f"S3: the AWS settings cannot be used: {error}") from error


def _reason(error: Exception) -> str:
    cause = error.__cause__ or error.__context__ if isinstance(error, S3UploadFailedError) else error
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

    def __init__(self, parts: list[memoryview]):
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
