"""Where a run's files live: atomic writes, hashes, listing, on a local (or shared) folder.

A reader sees either the whole old file or the whole new one. Checkpoints and bank segments commit through
here, so that a crash leaves what was committed.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from sae_ray.errors import UserError


class LocalStorage:
    """Files below one root folder. Keys are relative POSIX paths."""

    def __init__(self, root: str | Path):
        self.root = Path(root)

    def path(self, key: str) -> Path:
        """Absolute path of `key`; refuses keys that leave the root."""
        path = (self.root / key).resolve()
        if not path.is_relative_to(self.root.resolve()):
            raise UserError(f"{key}: is outside {self.root}")
        return path

    def write(self, key: str, data: bytes) -> str:
        """Write atomically (temporary file, fsync, rename). Returns the sha256 of `data`."""
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        return hashlib.sha256(data).hexdigest()

    def read(self, key: str, sha256: str | None = None) -> bytes:
        """Read a file, checking its hash when one is given.

        Raises:
            UserError: missing, unreadable, or its content is not what was committed.
        """
        path = self.path(key)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error
        if sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != sha256:
            raise UserError(f"{path}: is corrupt: sha256 {found[:12]}..., the manifest says {sha256[:12]}...")
        return data

    def exists(self, key: str) -> bool:
        return self.path(key).exists()

    def list(self, prefix: str = "") -> list[str]:
        """Keys of all files below `prefix`, sorted; temporary files are left out."""
        base = self.path(prefix)
        if not base.is_dir():
            return []
        files = (p for p in base.rglob("*") if p.is_file() and not p.name.startswith("."))
        return sorted(p.relative_to(self.root.resolve()).as_posix() for p in files)


def ensure_writable(folder: str | Path) -> None:
    """Create `folder` and prove that files can be written there.

    Raises:
        UserError: it cannot be created or written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"run folder {folder}: is not writable: {error.strerror}") from error
