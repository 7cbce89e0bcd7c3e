"""Documents of a corpus, in an order that depends on the seed and the epoch alone.

A source reads documents in their stored order; shuffling is added here, once, for all of them.
"""

from __future__ import annotations

import glob
import gzip
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from sae_ray.config import CorpusConfig
from sae_ray.corpus.installed_docs import installed_docs
from sae_ray.errors import UserError

SHUFFLE_BUFFER = 10_000
"""Documents shuffled together where a corpus is streamed; installed-docs and text are shuffled whole."""

_PIECE_CHARS = 4_000


class Source(Protocol):
    """A place documents come from. Given `rng`, `read` shuffles what is cheap to shuffle: whole files."""

    name: str
    in_memory: bool

    def read(self, rng: random.Random | None) -> Iterator[str]: ...


@dataclass(frozen=True)
class Corpus:
    cfg: CorpusConfig
    source: Source

    @property
    def name(self) -> str:
        return self.source.name

    def documents(self, seed: int = 0, epoch: int = 0) -> Iterator[str]:
        """All documents once. The same (seed, epoch) gives the same order on every machine."""
        limit = self.cfg.max_documents
        if not self.cfg.shuffle:
            return islice(self.source.read(None), limit)
        rng = random.Random(f"{seed}/{epoch}")
        if self.source.in_memory:
            documents = list(islice(self.source.read(None), limit))
            rng.shuffle(documents)
            return iter(documents)
        # With a limit the *first* documents are wanted, so their files must not be reordered.
        documents_in_order = self.source.read(None if limit else rng)
        return buffer_shuffle(islice(documents_in_order, limit), SHUFFLE_BUFFER, rng)


def open_corpus(cfg: CorpusConfig) -> Corpus:
    """The corpus that `cfg` names.

    Raises:
        UserError: a path matches no file.
    """
    if cfg.kind == "installed-docs":
        return Corpus(cfg, InstalledDocs())
    if cfg.kind == "hf":
        return Corpus(cfg, HubDataset(cfg))
    if cfg.kind == "text":
        return Corpus(cfg, TextFiles(cfg))
    return Corpus(cfg, JsonLines(cfg) if cfg.kind == "jsonl" else ParquetFiles(cfg))


def buffer_shuffle(documents: Iterable[str], size: int, rng: random.Random) -> Iterator[str]:
    """Streaming shuffle: each document leaves a buffer of `size` at random."""
    buffer: list[str] = []
    for document in documents:
        if len(buffer) < size:
            buffer.append(document)
            continue
        chosen = rng.randrange(size)
        yield buffer[chosen]
        buffer[chosen] = document
    rng.shuffle(buffer)
    yield from buffer


class InstalledDocs:
    name = "corpus.kind installed-docs"
    in_memory = True

    def __init__(self) -> None:
        self._documents: list[str] | None = None

    def read(self, rng: random.Random | None) -> Iterator[str]:
        if self._documents is None:
            self._documents = installed_docs()
        return iter(self._documents)


class TextFiles:
    """Text files, cut between paragraphs into documents of about 4,000 characters.

    Splits are made of whole documents, so one book must be many documents for it to have a held-out part.
    """

    in_memory = True

    def __init__(self, cfg: CorpusConfig) -> None:
        self.paths = _expand(cfg.paths)
        self.name = _source_name(cfg)

    def read(self, rng: random.Random | None) -> Iterator[str]:
        for path in self.paths:
            try:
                with _open(path) as file:
                    yield from _paragraph_groups(file)
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from error


class JsonLines:
    """One JSON object a line (`.gz` allowed), the text under `corpus.text_field`."""

    in_memory = False

    def __init__(self, cfg: CorpusConfig) -> None:
        self.paths = _expand(cfg.paths)
        self.name = _source_name(cfg)
        self.field = cfg.text_field

    def read(self, rng: random.Random | None) -> Iterator[str]:
        for path in _shuffled(self.paths, rng):
            try:
                with _open(path) as file:
                    for number, line in enumerate(file, start=1):
                        if line.strip():
                            yield self._text(line, f"{path}:{number}")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from error

    def _text(self, line: str, where: str) -> str:
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: is not JSON: {error.msg} at column {error.colno}") from error
        if not isinstance(record, dict):
            raise UserError(f"{where}: expected a JSON object, found {type(record).__name__}")
        return _field_text(record, self.field, where)


class ParquetFiles:
    """Parquet files, read one row group at a time."""

    in_memory = False

    def __init__(self, cfg: CorpusConfig) -> None:
        self.paths = _expand(cfg.paths)
        self.name = _source_name(cfg)
        self.field = cfg.text_field

    def read(self, rng: random.Random | None) -> Iterator[str]:
        import pyarrow
        import pyarrow.parquet as parquet

        for path in _shuffled(self.paths, rng):
            try:
                with parquet.ParquetFile(path) as file:
                    columns = file.schema_arrow.names
                    if self.field not in columns:
                        raise UserError(
                            f"{path}: has no column {self.field!r}; it has {', '.join(columns)} (corpus.text_field)"
                        )
                    for batch in file.iter_batches(batch_size=1024, columns=[self.field]):
                        for text in batch.column(0).to_pylist():
                            if text is not None:
                                yield _field_text({self.field: text}, self.field, str(path))
            except (OSError, pyarrow.ArrowException) as error:
                raise UserError(f"{path}: cannot be read as Parquet: {error}") from error


class HubDataset:
    """A Hugging Face dataset (an id, or a local folder that `datasets` understands), streamed."""

    in_memory = False

    def __init__(self, cfg: CorpusConfig) -> None:
        self.cfg = cfg
        self.name = _source_name(cfg)

    def read(self, rng: random.Random | None) -> Iterator[str]:
        import datasets

        datasets.disable_progress_bars()
        try:
            dataset = datasets.load_dataset(self.cfg.dataset, self.cfg.subset, split=self.cfg.split, streaming=True)
        except Exception as error:  # its errors share no base class
            raise UserError(f"{self.name}: cannot be opened: {_one_line(error)}") from error
        if rng is not None:
            # Shards are permuted; the rows are shuffled by the buffer that all streamed corpora share.
            dataset = dataset.shuffle(seed=rng.randrange(2**32), buffer_size=1)
        for number, record in enumerate(dataset):
            yield _field_text(record, self.cfg.text_field, f"{self.name}, row {number}")


def _paragraph_groups(lines: Iterable[str]) -> Iterator[str]:
    group: list[str] = []
    size = 0
    for line in lines:
        group.append(line)
        size += len(line)
        # A file without blank lines is still cut, at four times the size.
        if (size >= _PIECE_CHARS and not line.strip()) or size >= 4 * _PIECE_CHARS:
            yield "".join(group)
            group, size = [], 0
    yield "".join(group)


def _field_text(record: dict[str, Any], field: str, where: str) -> str:
    if field not in record:
        raise UserError(f"{where}: has no field {field!r}; it has {', '.join(map(str, record))} (corpus.text_field)")
    text = record[field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"{where}: field {field!r} holds {type(text).__name__}, not text (corpus.text_field)")
    return text


def _expand(patterns: list[str]) -> list[Path]:
    paths: list[Path] = []
    for pattern in patterns:
        if "://" in pattern:
            raise UserError(f"corpus.paths: {pattern}: only local (or mounted) files can be read")
        found = sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))
        files = [Path(path) for path in found if Path(path).is_file()]
        if not files:
            raise UserError(f"corpus.paths: {pattern}: no such file")
        paths += files
    return list(dict.fromkeys(paths))


def _open(path: Path) -> Any:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _shuffled(paths: list[Path], rng: random.Random | None) -> list[Path]:
    return paths if rng is None else rng.sample(paths, len(paths))


def _source_name(cfg: CorpusConfig) -> str:
    if cfg.kind == "hf":
        return f"corpus.dataset {cfg.dataset}" + (f" ({cfg.subset})" if cfg.subset else "") + f", {cfg.split}"
    return f"corpus.paths {', '.join(cfg.paths)}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
