"""Places as a config names them: `~` is expanded, and an address that nothing here opens is no folder's name."""

from __future__ import annotations

import os
import re
from typing import Annotated

from pydantic import AfterValidator


def is_address(text: str) -> bool:
    """Whether it begins like gs://bucket, file:///x or (a slip of the hand) s3:/bucket; a folder `x:` is ./x:/"""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", text) is not None


def expanded(text: str) -> str:
    """`text` with `~` as its owner's home.

    Raises:
        ValueError: there is no such home.
    """
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise ValueError(f"there is no home folder {path.partition('/')[0]}; a folder of this name is ./{path}")
    return path


def _place(text: str) -> str:
    if text.startswith("s3://"):
        return text
    if is_address(text):
        raise ValueError("expected a folder (local or mounted), or s3://bucket/prefix")
    return expanded(text)


def _folder(text: str) -> str:
    if is_address(text):
        raise ValueError("expected a folder (local or mounted) or a file in one, not an address")
    return expanded(text)


def _runs_dir(text: str) -> str:
    if is_address(text):
        raise ValueError(
            "expected a folder (local or mounted): of a run only checkpoints (trainer.checkpoint_dir) and activation "
            "stores (activations.store) may lie at s3://bucket/prefix"
        )
    return expanded(text)


Place = Annotated[str, AfterValidator(_place)]  # a folder or s3://bucket/prefix
LocalPath = Annotated[str, AfterValidator(_folder)]
RunsDir = Annotated[str, AfterValidator(_runs_dir)]
