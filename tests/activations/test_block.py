"""A block keeps what its mask says, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sae_ray.activations.block import Block
from sae_ray.corpus.reader import TokenBlock


@pytest.fixture
def tokens() -> TokenBlock:
    tokens_SL = np.array([[7, 8, 9], [5, 6, -1]], dtype=np.int32)
    keep_SL = np.array([[False, True, True], [False, True, False]])
    return TokenBlock(tokens_SL, keep_SL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_the_kept_tokens_in_sequence_then_position_order(tokens, dtype):
    acts_SLD = torch.randn(2, 3, 4).to(dtype)
    block = Block.from_numpy_dict(Block.from_activations(9, tokens, {"a": acts_SLD}).to_numpy_dict())
    expected_TD = torch.stack([acts_SLD[0, 1], acts_SLD[0, 2], acts_SLD[1, 1]])
    assert block.block_id == 9
    assert torch.equal(block.acts_TD(dtype), expected_TD)
    assert (block.n_tokens, block.columns) == (3, {"a": (0, 4)})
    assert block.seq_T.tolist() == [0, 0, 1]
    assert block.pos_T.tolist() == [1, 2, 1]
    np.testing.assert_array_equal(block.keep_SL, tokens.keep_SL)


def test_bfloat16_takes_two_bytes_and_widens_without_loss(tokens):
    block = Block.from_activations(0, tokens, {"a": torch.randn(2, 3, 4).bfloat16()})
    assert block.acts.dtype == np.uint16
    assert block.acts_TD().dtype == torch.bfloat16
    assert torch.equal(block.acts_TD(torch.float32), block.acts_TD().float())


def test_reading_a_stored_block_copies_and_warns_nothing(tokens, recwarn):
    block = Block.from_activations(0, tokens, {"a": torch.randn(2, 3, 4)})
    block.acts.flags.writeable = False  # as Ray hands it out
    assert block.acts_TD().data_ptr() == block.acts.ctypes.data
    assert len(recwarn) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hook_points_lie_side_by_side_and_are_read_by_name(tokens, dtype):
    first_SLD, second_SLD = torch.randn(2, 3, 4).to(dtype), torch.randn(2, 3, 6).to(dtype)
    block = Block.from_activations(0, tokens, {"first": first_SLD, "second": second_SLD})
    assert block.acts.shape == (3, 10)
    assert block.acts.flags.c_contiguous
    assert torch.equal(block.acts_TD(), first_SLD[torch.from_numpy(tokens.keep_SL)])
    assert torch.equal(block.acts_TD(hook="second"), second_SLD[torch.from_numpy(tokens.keep_SL)])
    assert torch.equal(block.acts_TD(torch.float32, "second"), block.acts_TD(hook="second").float())
    with pytest.raises(KeyError, match="holds no third, only first, second"):
        block.acts_TD(hook="third")
