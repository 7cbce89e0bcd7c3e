"""Where documents come from, in which order, and what is said when they cannot be read."""

from __future__ import annotations

import gzip
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sae_ray.config import CorpusConfig
from sae_ray.corpus import open_corpus
from sae_ray.corpus.documents import buffer_shuffle
from sae_ray.corpus.installed_docs import _extract
from sae_ray.errors import UserError

TEXTS = [f"document {i}" for i in range(30)]


def documents(seed=0, epoch=0, **fields) -> list[str]:
    return list(open_corpus(CorpusConfig(**fields)).documents(seed, epoch))


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    return path


@pytest.fixture(params=["jsonl", "jsonl.gz", "parquet", "hf"])
def stored(request, tmp_path) -> dict:
    """The same 30 documents in each streamed format."""
    lines = "".join(json.dumps({"text": t}) + "\n" for t in TEXTS)
    if request.param == "jsonl":
        (tmp_path / "a.jsonl").write_text(lines)
        return {"kind": "jsonl", "paths": [str(tmp_path / "*.jsonl")]}
    if request.param == "jsonl.gz":
        with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
            file.write(lines)
        return {"kind": "jsonl", "paths": [str(tmp_path / "a.jsonl.gz")]}
    if request.param == "parquet":
        pq.write_table(pa.table({"text": TEXTS, "other": range(30)}), tmp_path / "a.parquet", row_group_size=7)
        return {"kind": "parquet", "paths": [str(tmp_path / "a.parquet")]}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(lines)
    return {"kind": "hf", "dataset": str(tmp_path / "data")}


def test_every_format_yields_all_documents(stored):
    assert documents(**stored, shuffle=False) == TEXTS


def test_shuffle_depends_on_seed_and_epoch_alone(stored):
    first = documents(seed=1, **stored)
    assert sorted(first) == sorted(TEXTS)
    assert first != TEXTS
    assert documents(seed=1, **stored) == first
    assert documents(seed=2, **stored) != first
    assert documents(seed=1, epoch=1, **stored) != first


def test_max_documents_takes_the_first_ones(stored):
    assert sorted(documents(**stored, max_documents=5)) == sorted(TEXTS[:5])


def test_a_text_file_is_cut_between_paragraphs_and_nothing_is_lost(tmp_path):
    paragraph = "word " * 200 + "\n"
    (tmp_path / "book.txt").write_text((paragraph + "\n") * 20)
    pieces = documents(kind="text", paths=[str(tmp_path / "*.txt")], shuffle=False)
    assert len(pieces) > 3
    assert "".join(pieces) == (paragraph + "\n") * 20
    assert all(piece.endswith("\n\n") for piece in pieces if piece)


def test_buffer_shuffle_keeps_every_document_with_a_small_buffer():
    shuffled = list(buffer_shuffle(TEXTS, 4, random.Random(0)))
    assert sorted(shuffled) == sorted(TEXTS)
    assert shuffled != TEXTS


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet"])
def test_a_missing_file_is_named(kind, tmp_path):
    missing = str(tmp_path / "nothing-*.x")
    with pytest.raises(UserError, match=r"corpus\.paths: .*nothing-\*\.x: no such file"):
        open_corpus(CorpusConfig(kind=kind, paths=[missing]))


def test_a_bad_json_line_is_named(jsonl):
    with jsonl.open("a") as file:
        file.write("{not json\n")
    with pytest.raises(UserError, match=r"a\.jsonl:31: is not JSON"):
        documents(kind="jsonl", paths=[str(jsonl)])


def test_a_missing_json_field_names_those_there_are(jsonl):
    with pytest.raises(UserError, match=r"a\.jsonl:1: has no field 'body'; it has text \(corpus\.text_field\)"):
        documents(kind="jsonl", paths=[str(jsonl)], text_field="body")


def test_a_field_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": 3}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:1: field 'text' holds int"):
        documents(kind="jsonl", paths=[str(tmp_path / "a.jsonl")])


def test_a_missing_parquet_column_names_those_there_are(tmp_path):
    pq.write_table(pa.table({"body": TEXTS}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"has no column 'text'; it has body"):
        documents(kind="parquet", paths=[str(tmp_path / "a.parquet")])


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    (tmp_path / "a.parquet").write_text("no")
    with pytest.raises(UserError, match=r"a\.parquet: cannot be read as Parquet"):
        documents(kind="parquet", paths=[str(tmp_path / "a.parquet")])


def test_a_dataset_that_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(UserError, match=r"corpus\.dataset .*absent.* cannot be opened"):
        documents(kind="hf", dataset=str(tmp_path / "absent"))


def test_installed_docs_parses_without_importing(tmp_path):
    prose = "Explain what the function does, at length. " * 8
    package = tmp_path / "pkg"
    package.mkdir()
    (package / "a.py").write_text(f'"""{prose}"""\nraise RuntimeError("imported!")\n')
    (package / "b.py").write_text(f'def f():\n    """{prose}"""\n')  # the same text again
    (package / "c.py").write_text('"""Too short."""\n')
    (package / "d.py").write_text(f'"""{prose}\n')  # does not parse
    found = [text for text in _extract([tmp_path]) if "Explain what" in text]
    assert found == [prose.strip()]


def test_installed_docs_stop_at_the_size_limit(tmp_path):
    assert 0 < sum(map(len, _extract([tmp_path], max_chars=20_000))) <= 20_000
