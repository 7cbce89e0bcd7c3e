"""Exact selection, ties included, against a full sort; shards are threads, in tests/trainer processes."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_ray.sae.selection import Alone, Gate, Shard, select_above, select_batch_topk, select_topk


class Thread:
    """Collectives between threads of one process, so that a selection can be run on any mesh quickly."""

    def __init__(self, dp: int, tp: int, rank: int, barrier: threading.Barrier, board: list):
        self.dp, self.tp, self.rank, self.barrier, self.board = dp, tp, rank, barrier, board
        self.tp_rank = rank % tp

    def _everyone(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self.board[self.rank] = tensor
        self.barrier.wait()
        out = list(self.board)
        self.barrier.wait()
        return out

    def sum_mesh(self, tensor):
        return sum(self._everyone(tensor))

    def gather_tp(self, tensor):
        first = self.rank - self.tp_rank
        return torch.stack(self._everyone(tensor)[first : first + self.tp])

    def gather_mesh_ragged(self, tensor_N):
        return torch.cat(self._everyone(tensor_N))


def on_mesh(pre_BM: torch.Tensor, dp: int, tp: int, select) -> torch.Tensor:
    """The active mask of the whole batch when each shard selects on its own part."""
    n_rows, d_sae = pre_BM.shape
    rows, width = n_rows // dp, d_sae // tp
    mask = torch.zeros(pre_BM.shape, dtype=torch.bool)
    barrier, board = threading.Barrier(dp * tp, timeout=20), [None] * (dp * tp)

    def work(rank: int) -> None:
        row, col = rank // tp * rows, rank % tp * width
        part = pre_BM[row : row + rows, col : col + width].contiguous()
        gate: Gate = select(part, Shard(row, n_rows, col, d_sae), Thread(dp, tp, rank, barrier, board))
        mask[gate.rows_N + row, gate.cols_N + col] = True

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(dp * tp)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return mask


def by_sorting(values: torch.Tensor, n: int) -> torch.Tensor:
    order = torch.sort(values, descending=True, stable=True).indices[:n]
    mask = torch.zeros_like(values, dtype=torch.bool)
    mask[order] = True
    return mask & (values > 0)


# Few distinct values: most cuts fall inside a run of ties.
matrices = st.integers(0, 2**31).map(
    lambda seed: torch.randint(-3, 6, (6, 8), generator=torch.Generator().manual_seed(seed)) / 7
)


@settings(max_examples=40, deadline=None)
@given(matrices, st.integers(1, 48), st.sampled_from([(1, 1), (1, 2), (2, 1), (3, 2), (2, 4)]), st.booleans())
def test_batch_topk_is_the_sorted_prefix_on_every_mesh(pre, n_keep, mesh, double):
    pre = pre.double() if double else pre.float()
    mask = on_mesh(pre, *mesh, lambda part, shard, coll: select_batch_topk(part, n_keep, shard, coll))
    assert torch.equal(mask, by_sorting(pre.flatten(), n_keep).view_as(pre))


@settings(max_examples=40, deadline=None)
@given(matrices, st.integers(1, 8), st.sampled_from([(1, 1), (1, 2), (2, 1), (1, 8), (2, 4)]))
def test_topk_is_the_sorted_prefix_of_each_token_on_every_mesh(pre, k, mesh):
    mask = on_mesh(pre.float(), *mesh, lambda part, shard, coll: select_topk(part, k, coll))
    assert torch.equal(mask, torch.stack([by_sorting(row, k) for row in pre.float()]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batch_topk_keeps_exactly_k_of_nearly_equal_values(dtype):
    # Neighbouring floats share all digits but the last: only a full radix descent tells them apart.
    step = torch.finfo(dtype).eps
    pre = (1 + step * torch.randperm(4000).to(dtype)).view(40, 100)
    gate = select_batch_topk(pre, 1234, Shard(0, 40, 0, 100), Alone())
    assert len(gate.rows_N) == 1234
    assert float(gate.threshold) == float(pre.flatten().sort(descending=True).values[1233])


def test_identical_tokens_still_give_exactly_k_per_batch():
    pre = torch.ones(10, 16)
    gate = select_batch_topk(pre, 30, Shard(0, 10, 0, 16), Alone())
    assert (gate.rows_N * 16 + gate.cols_N).tolist() == list(range(30))


def test_only_positive_values_are_active_however_many_are_asked_for():
    pre = torch.tensor([[-1.0, 0.0, 1e-42], [2.0, -0.0, -3.0]])
    gate = select_batch_topk(pre, 5, Shard(0, 2, 0, 3), Alone())
    assert list(zip(gate.rows_N.tolist(), gate.cols_N.tolist(), strict=True)) == [(0, 2), (1, 0)]
    assert float(gate.threshold) == 0


def test_the_threshold_gate_passes_what_reaches_it():
    gate = select_above(torch.tensor([[0.5, 0.4, -1.0, 0.6]]), torch.tensor(0.5))
    assert gate.cols_N.tolist() == [0, 3]
