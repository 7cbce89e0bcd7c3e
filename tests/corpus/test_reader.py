"""Block i is a function of (config, seed, split, i)."""

from __future__ import annotations

import json
from itertools import islice

import numpy as np
import pytest

from sae_ray.activations.subject import load_tokenizer
from sae_ray.config import ModelConfig, RunConfig
from sae_ray.corpus import SPLITS, BlockReader, check_corpus, split_of
from sae_ray.corpus.reader import _pieces
from sae_ray.errors import UserError

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
TEXTS = [" ".join(WORDS[(i * j) % 10] for j in range(1, 6 + i % 40)) + f" {i}" for i in range(200)]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ModelConfig())


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))

    def build(texts=None, corpus=None, activations=None, seed=0) -> RunConfig:
        if texts is not None:
            path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        return RunConfig.model_validate(
            {
                "name": "t",
                "seed": seed,
                "hook": {"layer": 1},
                "corpus": {"kind": "jsonl", "paths": [str(path)], "context_length": 32, **(corpus or {})},
                "activations": {"block_sequences": 4, **(activations or {})},
            }
        )

    return build


def text_of(tokenizer, tokens_SL) -> list[str]:
    return [tokenizer.decode(row[row >= 0]) for row in tokens_SL]


def test_blocks_do_not_depend_on_the_order_of_requests_or_the_reader(config, tokenizer):
    cfg = config()
    walker = BlockReader(cfg, tokenizer)
    in_order = [walker.block("train", i).tokens_SL for i in range(60)]  # several epochs
    for order in ([59, 3, 30], [0, 59], [7, 6, 5]):
        reader = BlockReader(cfg, tokenizer)
        for i in order:
            np.testing.assert_array_equal(reader.block("train", i).tokens_SL, in_order[i])


def test_a_block_far_behind_the_cursor_is_read_again(config, tokenizer, monkeypatch):
    monkeypatch.setattr("sae_ray.corpus.reader._REMEMBERED_BLOCKS", 2)
    reader = BlockReader(config(), tokenizer)
    first = reader.block("train", 0).tokens_SL
    reader.block("train", 10)
    np.testing.assert_array_equal(reader.block("train", 0).tokens_SL, first)


def test_another_seed_gives_other_blocks(config, tokenizer):
    one, two = (BlockReader(config(seed=s), tokenizer).block("train", 0).tokens_SL for s in (0, 1))
    assert not np.array_equal(one, two)


def test_epochs_repeat_the_documents_in_another_order(config, tokenizer):
    cfg = config(texts=TEXTS[:40], corpus={"pack": False})
    n = sum(split_of(t) == "train" for t in TEXTS[:40])
    rows = list(islice(BlockReader(cfg, tokenizer).sequences("train"), 60 * n))
    texts = text_of(tokenizer, np.stack(rows))
    per_epoch = next(k for k in range(n, 3 * n) if sorted(texts[:k]) == sorted(texts[k : 2 * k]))
    assert texts[:per_epoch] != texts[per_epoch : 2 * per_epoch]


def test_a_document_is_in_exactly_one_split(config, tokenizer):
    cfg = config(corpus={"pack": False, "context_length": 256, "shuffle": False})
    seen: dict[str, str] = {}
    for split in SPLITS:
        expected = [t for t in TEXTS if split_of(t) == split]
        rows = list(islice(BlockReader(cfg, tokenizer).sequences(split), len(expected)))
        assert text_of(tokenizer, np.stack(rows)) == expected
        seen.update(dict.fromkeys(expected, split))
    assert len(seen) == len(TEXTS)
    share = sum(split == "train" for split in seen.values()) / len(seen)
    assert 0.8 < share < 0.97


def test_packing_joins_documents_with_a_separator_and_loses_no_token(config, tokenizer):
    cfg = config(corpus={"shuffle": False})
    documents = [t for t in TEXTS if split_of(t) == "train"]
    separator = tokenizer.get_vocab()["<|endoftext|>"]
    stream = [i for t in documents for i in [*tokenizer(t).input_ids, separator]]
    rows = list(islice(BlockReader(cfg, tokenizer).sequences("train"), -(-len(stream) // 32)))
    packed = np.concatenate(rows)
    assert packed[packed >= 0].tolist() == stream
    assert all((row >= 0).all() for row in rows[:-1])


def test_without_packing_a_sequence_holds_one_document_and_padding(config, tokenizer):
    cfg = config(corpus={"pack": False, "shuffle": False})
    block = BlockReader(cfg, tokenizer).block("train", 0)
    first = tokenizer(next(t for t in TEXTS if split_of(t) == "train")).input_ids
    assert block.tokens_SL[0, : len(first)].tolist() == first[:32]
    assert (block.tokens_SL[0, len(first) :] == -1).all()
    assert not block.keep_SL[block.tokens_SL == -1].any()


@pytest.mark.parametrize("mask_special", [True, False])
@pytest.mark.parametrize("mask_first", [0, 3])
def test_masks_drop_special_tokens_and_first_positions(config, tokenizer, mask_special, mask_first):
    cfg = config(activations={"mask_special_tokens": mask_special, "mask_first_tokens": mask_first})
    block = BlockReader(cfg, tokenizer).block("train", 0)
    special = np.isin(block.tokens_SL, tokenizer.all_special_ids)
    assert special.any()
    expected = block.tokens_SL >= 0
    expected[:, :mask_first] = False
    if mask_special:
        expected &= ~special
    np.testing.assert_array_equal(block.keep_SL, expected)


def test_text_that_quotes_a_control_token_does_not_become_one(config, tokenizer):
    cfg = config(texts=[f"{i} <|im_end|> said the text" for i in range(200)])
    block = BlockReader(cfg, tokenizer).block("train", 0)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in block.tokens_SL


def test_a_tokenizer_that_adds_bos_gets_it_at_the_start_of_each_sequence(config, tokenizer):
    class WithBos:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, text, add_special_tokens=True, **options):
            out = tokenizer(text, add_special_tokens=add_special_tokens, **options)
            if add_special_tokens:
                out["input_ids"] = [tokenizer.bos_token_id, *out["input_ids"]]
            return out

    block = BlockReader(config(), WithBos()).block("train", 0)
    assert (block.tokens_SL[:, 0] == tokenizer.bos_token_id).all()
    assert (block.tokens_SL[:, 1:] != tokenizer.bos_token_id).all()


def test_a_long_document_is_cut_without_loss():
    document = "some words " * 20_000
    pieces = _pieces(document)
    assert len(pieces) > 3
    assert "".join(pieces) == document
    assert max(map(len, pieces)) <= 50_000
    assert "".join(_pieces("x" * 120_001)) == "x" * 120_001


def test_check_accepts_a_good_corpus(config, tokenizer):
    check_corpus(config(), tokenizer)


@pytest.mark.parametrize(
    ("texts", "activations", "message"),
    [
        ([], {}, r"corpus\.paths .*corpus\.jsonl: no tokens: no documents"),
        (["", " "], {}, r"corpus\.paths .*corpus\.jsonl: no tokens: all 2 documents are empty"),
        (["one document"], {}, r"corpus\.jsonl: no tokens in its \w+ split"),
        (TEXTS, {"mask_first_tokens": 32}, r"activations\.mask_first_tokens = 32: masks all"),
    ],
)
def test_check_refuses_a_corpus_without_usable_tokens(config, tokenizer, texts, activations, message):
    with pytest.raises(UserError, match=message):
        check_corpus(config(texts=texts, activations=activations), tokenizer)
