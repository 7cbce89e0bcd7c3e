"""Where a run's files live: atomic writes, hashes, listing, on a local (or shared) folder or on S3.

A reader sees either the whole old file or the whole new one. Checkpoints and bank segments commit through
here, so that a crash leaves what was committed. `open_storage` takes a folder or `s3://bucket/prefix`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from sae_ray.errors import UserError
from sae_ray.places import is_address

S3 = "s3://"
# No room, over quota, larger than the file system or `ulimit -f` allows.
DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# A file system without hard links.
NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})

# Settings of the driver that actors on other nodes need too. Credentials are no such setting: they are the nodes' own.
AWS_SETTINGS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE")

Data = bytes | Iterable[memoryview]
"""A file's content, whole or in parts."""


class Storage(Protocol):
    """Files below one root. Keys are relative POSIX paths."""

    def url(self, key: str = "") -> str:
        """What a person calls `key`, in messages."""

    def write(self, key: str, data: Data) -> str:
        """Write atomically. Returns the sha256 of the content.

        Raises:
            UserError: no room, no permission, nothing there to write to; what was at `key` before is intact.
        """

    def commit(self, key: str, data: bytes, after: str | None = None) -> str:
        """Write `key` if nobody else has since: it is not there yet, or still holds what has the SHA-256 `after`.

        Returns the SHA-256 of `data`; there already, it is as good as written.

        Raises:
            UserError: like `write`, or somebody else has written there, whose content stays.
        """

    def read(self, key: str, sha256: str | None = None) -> bytes:
        """Read a file, checking its hash when one is given.

        Raises:
            UserError: missing, unreadable, or its content is not what was committed.
        """

    def exists(self, key: str) -> bool: ...

    def size(self, key: str) -> int | None:
        """Bytes of a file; None if there is none."""

    def folders(self) -> list[str]:
        """Names of the folders right below the root, sorted, also of those that hold only half-written files."""

    def list(self, prefix: str = "") -> list[str]:
        """Keys of all files below the folder `prefix`, sorted; half-written ones are left out."""

    def delete(self, key: str) -> None:
        """Remove the file `key`, or the folder of this name with everything below; nothing there is fine."""


def aws_environment() -> dict[str, str]:
    """The driver's S3 settings, for the environment of an actor on another node."""
    return {name: os.environ[name] for name in AWS_SETTINGS if name in os.environ}


def is_s3(location: str | Path) -> bool:
    return str(location).startswith(S3)


def open_storage(location: str | Path) -> Storage:
    """The storage rooted at a folder or at `s3://bucket/prefix`."""
    if is_s3(location):
        from sae_ray.s3 import S3Storage

        return S3Storage(str(location))
    if is_address(str(location)):
        raise UserError(f"{location}: expected a folder (local or mounted), or s3://bucket/prefix")
    return LocalStorage(location)


def join(location: str | Path, name: str) -> str | Path:
    """The location `name` below `location`."""
    return f"{str(location).rstrip('/')}/{name}" if is_s3(location) else Path(location) / name


def absolute(location: str | Path) -> str:
    """The location as other processes of the run call it."""
    return str(location) if is_s3(location) else str(Path(location).resolve())


class LocalStorage:
    """A folder."""

    def __init__(self, root: str | Path):
        self.root = Path(root)

    def path(self, key: str) -> Path:
        """Absolute path of `key`; refuses keys that leave the root."""
        path = (self.root / key).resolve()
        if not path.is_relative_to(self.root.resolve()):
            raise UserError(f"{key}: is outside {self.root}")
        return path

    def url(self, key: str = "") -> str:
        return str(self.root / key)

    def write(self, key: str, data: Data) -> str:
        path = self.path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return _replace(path, [data] if isinstance(data, bytes) else data)
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {why_not_written(error)}") from error

    def commit(self, key: str, data: bytes, after: str | None = None) -> str:
        path, sha256 = self.path(key), hashlib.sha256(data).hexdigest()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if after is None and _create(path, data):
                return sha256
            held = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None
            if held not in (after, sha256):
                raise taken(str(path))
            return _replace(path, [data])
        except OSError as error:
            raise UserError(f"{path}: cannot be committed: {why_not_written(error)}") from error

    def read(self, key: str, sha256: str | None = None) -> bytes:
        path = self.path(key)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error
        check_hash(str(path), data, sha256)
        return data

    def exists(self, key: str) -> bool:
        return self.path(key).exists()

    def size(self, key: str) -> int | None:
        path = self.path(key)
        try:
            return path.stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise UserError(f"{path}: cannot be looked up: {error.strerror}") from error

    def folders(self) -> list[str]:
        try:
            return sorted(p.name for p in self.root.iterdir() if p.is_dir())
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise UserError(f"{self.root}: cannot be listed: {error.strerror}") from error

    def list(self, prefix: str = "") -> list[str]:
        base = self.path(prefix)
        if not base.is_dir():
            return []
        files = (p for p in base.rglob("*") if p.is_file() and not p.name.startswith("."))
        return sorted(p.relative_to(self.root.resolve()).as_posix() for p in files)

    def delete(self, key: str) -> None:
        path = self.path(key)
        try:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise UserError(f"{path}: cannot be removed: {error.strerror}") from error


def _create(path: Path, data: bytes) -> bool:
    """Whether `path` was made with this content; False if something is there, or nobody can tell."""
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."), path.name)
    try:
        _replace(temporary, [data])
        os.link(temporary, path)  # unlike a rename, refused where there is a file: by the kernel, on NFS too
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno in NO_LINKS:
            return False
        raise
    finally:
        shutil.rmtree(temporary.parent, ignore_errors=True)
    return True


def _replace(path: Path, parts: Iterable[bytes | memoryview]) -> str:
    """Temporary file, fsync, rename. Returns the sha256."""
    digest = hashlib.sha256()
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb", buffering=0) as file:
            for part in parts:
                digest.update(part)
                rest = memoryview(part)
                while rest:
                    rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return digest.hexdigest()


def check_hash(url: str, data: bytes, sha256: str | None, told: str = "the manifest says") -> None:
    """Raises UserError unless `data` is what was committed."""
    if sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise UserError(f"{url}: is corrupt: sha256 {found[:12]}..., {told} {sha256[:12]}...")


def taken(url: str) -> UserError:
    """What is said of a commit that somebody else was faster with."""
    return UserError(
        f"{url}: somebody else has committed there since: two runs write to the same place; give one of them another "
        "name, trainer.checkpoint_dir or folder"
    )


def why_not_written(error: OSError) -> str:
    """The reason and what to do, for errors of a local disk."""
    reason = error.strerror or str(error)
    if error.errno not in DISK_FULL:
        return reason
    return f"{reason}; free some space or choose another place, then the same command goes on from the last commit"


def ensure_writable(folder: str | Path) -> None:
    """Create `folder` and prove that files can be written there.

    Raises:
        UserError: it cannot be created or written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"probe")
            file.flush()
    except OSError as error:
        raise UserError(f"run folder {folder}: is not writable: {error.strerror}") from error


PROBE = "sae-ray-probe"


def probe(location: str | Path, key: str) -> None:
    """Prove that files can be written and removed at `location`, which the config's `key` names.

    Raises:
        UserError: names the key, the place and what to do.
    """
    storage = open_storage(location)
    try:
        storage.write(PROBE, b"probe")
        storage.delete(PROBE)
    except UserError as error:
        raise UserError(f"{key} = {location}: {error}") from error


def is_written_whole(storage: Storage, key: str, sha256: str) -> bool:
    """Whether `key` is there and holds what its hash says."""
    with contextlib.suppress(UserError):
        storage.read(key, sha256)
        return True
    return False
