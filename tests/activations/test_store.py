"""The activation store without Ray: what is written is read, and what does not fit a run is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sae_ray.activations.block import Block
from sae_ray.activations.producer import ActivationProducer
from sae_ray.activations.store import ActivationStore, chunk_key, stream_settings, write_chunk
from sae_ray.config import RunConfig
from sae_ray.corpus.reader import TokenBlock
from sae_ray.errors import UserError
from sae_ray.storage import LocalStorage

HOOKS = {"blocks.2.hook_resid_post": 6, "blocks.4.hook_resid_post": 3}


def config(**sections: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "name": "stored",
        "hook": {"layer": 2},
        "corpus": {"context_length": 32},
        "activations": {"block_sequences": 2, "mix_blocks": 2, "window_blocks": 4},
        "sae": {"d_sae": 64, "k": 4},
        "trainer": {"batch_tokens": 16, "steps": 20},
        "rlaif": {"enabled": False},
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values} if isinstance(values, dict) else values
    return RunConfig.model_validate(tree)


def block(block_id: int, dtype: torch.dtype = torch.float32, kept: int = 20) -> dict[str, Any]:
    """A block of 2 x 32 tokens of which `kept` count, at both hook points."""
    generator = torch.Generator().manual_seed(block_id)
    tokens_SL = np.arange(64, dtype=np.int32).reshape(2, 32)
    acts = {name: torch.randn(2, 32, width, generator=generator).to(dtype) for name, width in HOOKS.items()}
    return Block.from_activations(block_id, TokenBlock(tokens_SL, tokens_SL < kept), acts).to_numpy_dict()


def write_store(folder: Path, blocks: list[dict[str, Any]], dtype: str = "float32") -> ActivationStore:
    columns, storage, chunks = blocks[0]["columns"], LocalStorage(folder), {}
    for each in blocks:
        entry = write_chunk(storage, "train", each)
        chunks[chunk_key("train", each["block_id"])] = {**entry, "tokens": len(each["acts"]), "sequence_tokens": 64}
    index = {"settings": stream_settings(config()), "columns": columns, "dtype": dtype, "chunks": chunks}
    ActivationStore(str(folder), index).write_index()
    return ActivationStore.open(str(folder))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_comes_back_bit_for_bit(dtype, tmp_path):
    wrote = block(3, dtype)
    got = write_store(tmp_path, [wrote]).read("train", 3, list(HOOKS))
    assert got.keys() == wrote.keys()
    for name, value in wrote.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)
        if isinstance(value, np.ndarray):
            assert got[name].dtype == value.dtype
    assert torch.equal(Block(**got).acts_TD(), Block(**wrote).acts_TD())


def test_a_run_may_read_some_of_the_hook_points_in_its_own_order(tmp_path):
    wrote = Block(**block(0))
    store = write_store(tmp_path, [block(0)])
    second = "blocks.4.hook_resid_post"
    alone = Block(**store.read("train", 0, [second]))
    assert alone.acts.shape == (20, 3)
    assert torch.equal(alone.acts_TD(), wrote.acts_TD(hook=second))
    turned = Block(**store.read("train", 0, [second, "blocks.2.hook_resid_post"]))
    for hook in HOOKS:
        assert torch.equal(turned.acts_TD(hook=hook), wrote.acts_TD(hook=hook))
    assert torch.equal(turned.acts_TD(), wrote.acts_TD(hook=second)), "the run's main input comes first"


def test_a_producer_hands_out_stored_blocks_without_the_model(tmp_path, monkeypatch):
    store = write_store(tmp_path, [block(0), block(1)])
    cfg = config(activations={"store": str(tmp_path)})
    producer = ActivationProducer(cfg.model_dump_json())
    monkeypatch.setattr(producer, "_load", lambda: pytest.fail("the model was loaded"))
    ready = producer.ready()
    assert (ready["widths"], ready["dtype"], ready["stored_train_blocks"]) == ({cfg.hook.name: 6}, "float32", 2)
    meta, got = producer.produce("train", 1)
    assert (meta["tokens"], meta["sequence_tokens"]) == (20, 64)
    np.testing.assert_array_equal(got["acts"], store.read("train", 1, [cfg.hook.name])["acts"])


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_chunk_is_named(damage, tmp_path):
    store = write_store(tmp_path, [block(0)])
    chunk = tmp_path / chunk_key("train", 0)
    data = bytearray(chunk.read_bytes())
    data[-2] ^= 1
    chunk.unlink()
    if damage != "delete":
        chunk.write_bytes(data if damage == "flip" else data[:-1])
    with pytest.raises(UserError, match=r"train/00000000\.safetensors: (is corrupt|cannot be read)"):
        store.read("train", 0, list(HOOKS))


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"seed": 9}, "seed is 0 there, 9 here"),
        ({"corpus": {"context_length": 64}}, "corpus.context_length is 32 there, 64 here"),
        ({"activations": {"mask_first_tokens": 2}}, "activations.mask_first_tokens is 1 there, 2 here"),
        ({"model": {"dtype": "bfloat16"}}, "model.dtype is 'float32' there, 'bfloat16' here"),
        ({"hook": {"layer": 3}}, "hook blocks.3.hook_resid_post is not there, only blocks.2"),
    ],
)
def test_another_stream_is_refused_by_key(sections, named, tmp_path):
    store = write_store(tmp_path, [block(0)])
    store.check(config())
    with pytest.raises(UserError) as caught:
        store.check(config(**sections))
    assert named in str(caught.value)


def test_the_steps_of_a_store_are_counted_exactly_and_a_longer_run_is_refused(tmp_path):
    # Windows of 40, 30 and 52 tokens in batches of about 16: round(2.5), round(1.9), round(3.25) steps.
    blocks = [block(i, kept=kept) for i, kept in enumerate((20, 20, 10, 20, 22, 30, 20))]
    store = write_store(tmp_path, blocks)
    steps = 2 + 2 + 3
    assert store.steps(config()) == steps
    store.check_enough(config(trainer={"steps": steps}))
    with pytest.raises(UserError, match=rf"its 7 train blocks are {steps} steps, the run has 8; .*--blocks 8"):
        store.check_enough(config(trainer={"steps": steps + 1}))


def test_of_two_that_write_one_store_the_later_is_told(tmp_path):
    first = write_store(tmp_path, [block(0)])
    second = ActivationStore.open(str(tmp_path))
    first.chunks["train/1"] = first.chunks[chunk_key("train", 0)]
    first.write_index()
    first.write_index()
    with pytest.raises(UserError, match=r"index\.json: somebody else has committed there"):
        second.write_index()
    assert "train/1" in ActivationStore.open(str(tmp_path)).chunks


def test_blocks_behind_a_gap_do_not_count(tmp_path):
    store = write_store(tmp_path, [block(0), block(1), block(3)])
    assert store.train_blocks == 2


def test_what_is_no_store_is_said(tmp_path):
    with pytest.raises(UserError, match="holds no activation store"):
        ActivationStore.open(str(tmp_path))
    (tmp_path / "index.json").write_text('{"format": 1, "chunks": []}')
    with pytest.raises(UserError, match=r"index\.json: is not the index of an activation store"):
        ActivationStore.open(str(tmp_path))
    (tmp_path / "index.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match="has format 99"):
        ActivationStore.open(str(tmp_path))
