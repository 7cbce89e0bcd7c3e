import os

import pytest

from sae_ray.errors import UserError
from sae_ray.storage import LocalStorage, ensure_writable


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    storage = LocalStorage(tmp_path)
    storage.write("a/b.bin", b"first")

    def torn(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", torn)
    with pytest.raises(OSError, match="No space"):
        storage.write("a/b.bin", b"second")
    assert storage.read("a/b.bin") == b"first"
    assert storage.list() == ["a/b.bin"]
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.bin"]


def test_a_changed_file_is_named_as_corrupt(tmp_path):
    storage = LocalStorage(tmp_path)
    digest = storage.write("shard.bin", b"weights")
    assert storage.read("shard.bin", digest) == b"weights"
    (tmp_path / "shard.bin").write_bytes(b"wEights")
    with pytest.raises(UserError, match=r"shard\.bin: is corrupt"):
        storage.read("shard.bin", digest)


def test_keys_cannot_leave_the_root(tmp_path):
    with pytest.raises(UserError, match="is outside"):
        LocalStorage(tmp_path / "run").write("../other", b"")


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not writable"):
        ensure_writable(tmp_path / "file" / "run")
