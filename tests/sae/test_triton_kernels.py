"""Every Triton kernel against its PyTorch form, and against dense float64 autograd.

Without a GPU the kernels run in Triton's interpreter. It must be switched on before triton is first imported,
which torch may long have done here: so the checks run in one child process. With a GPU they run on it, here.

Tolerances: float32 sums of a few dozen products of normal numbers, 1e-5; bfloat16 results are rounded to 8 bits
of mantissa once, at the end: 1e-2 relative.
"""

from __future__ import annotations

import functools
import importlib.util
import multiprocessing
import os
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from sae_ray.sae import selection, sparse, triton_kernels, triton_selection
from sae_ray.sae.selection import Alone, Gate, Shard
from sae_ray.sae.sparse import Codes
from sae_ray.sae.triton_jumprelu import JumpReLU, jumprelu_backward
from sae_ray.sae.triton_kernels import TILES

# `make test` puts triton into a folder of its own: a vLLM for CPUs that finds a triton without a GPU may stumble.
APART = Path(sys.prefix) / "triton"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None and not APART.is_dir(), reason="triton is not installed: make test"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Two column blocks, the second partial; segments of more than 4 pairs are split.
SMALL = TILES._replace(
    sum_block=16, sum_pairs=4, gradient_block=16, gradient_pairs=2, dot_block=16, dot_pairs=16, long=4
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
CASES = {}


@pytest.fixture(scope="module")
def interpreter():
    """A process in which kernels are interpreted, or None where they run on a GPU."""
    if DEVICE == "cuda":
        yield None
        return
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            patch.setenv("OMP_NUM_THREADS", "1")
            pool.submit(_few_blocks).result()  # starts the process, which keeps this environment
        yield pool


def _few_blocks():
    if importlib.util.find_spec("triton") is None:
        sys.path.append(str(APART))
    triton_selection.HISTOGRAM_BLOCKS = 2  # the interpreter walks through empty ones too


def _call(name, kwargs):
    torch.manual_seed(0)
    CASES[name](**kwargs)


def kernels(function):
    """Runs a test where kernels can run."""
    CASES[function.__name__] = function

    @functools.wraps(function)
    def test(request, **kwargs):
        pool = request.getfixturevalue("interpreter")
        if pool is None:
            _call(function.__name__, kwargs)
        else:
            pool.submit(_call, function.__name__, kwargs).result()

    test.__signature__ = _with_request(function)
    return test


def _with_request(function):
    import inspect

    own = inspect.signature(function)
    extra = inspect.Parameter("request", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return own.replace(parameters=[extra, *own.parameters.values()])


def assert_close(actual, expected, dtype=torch.float32):
    rtol, atol = (1e-2, 1e-2) if dtype == torch.bfloat16 else (1e-5, 1e-5)
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol)


def skewed(dtype, n_rows=11, n_latents=8, width=29):
    """Codes with an empty token, silent latents, a latent that fires on almost all tokens and odd sizes."""
    mask = torch.rand(n_rows, n_latents) < 0.25
    mask[:, 3] = True
    mask[4] = False
    mask[:, [0, n_latents - 1]] = False
    pre = (torch.rand(n_rows, n_latents) + 0.1).to(DEVICE, dtype)
    rows, cols = mask.to(DEVICE).nonzero(as_tuple=True)
    codes = Codes.of(pre, Gate(rows, cols, torch.zeros(())))
    tensors = [torch.randn(n, width).to(DEVICE, dtype) for n in (n_latents, n_rows, n_rows)]
    return codes, mask.to(DEVICE), *tensors


# ---------------------------------------------------------------------- products


@DTYPES
@kernels
def test_products_equal_their_pytorch_forms(dtype):
    codes, _, W, y, x = skewed(dtype)
    tiles = SMALL
    exact = codes._replace(vals_N=codes.vals_N.float())  # the reference on the same numbers, in float32
    assert_close(triton_kernels.decode(codes, W, tiles), sparse.decode(exact, W.float()), dtype)
    dots = (y.double()[codes.rows_N] * W.double()[codes.cols_N]).sum(1)
    for by_latent in (True, False):
        found = triton_kernels.dot_pairs(codes, y, W, torch.float32, tiles._replace(dot_by_latent=by_latent))
        assert_close(found, dots)
    weight = torch.randn(len(codes.vals_N), device=DEVICE)
    assert_close(
        triton_kernels.sum_by_latent(codes, weight, y, tiles), sparse.sum_by_latent(exact, weight, y.float()), dtype
    )
    totals = sparse.sum_scalars_by_latent(exact, weight)
    assert_close(triton_kernels.sum_scalars_by_latent(codes, weight), totals)
    grads = triton_kernels.gradients_by_latent(codes, weight, y, x, tiles=tiles)
    assert grads.W_enc_mD.dtype == dtype
    assert_close(grads.W_enc_mD, sparse.sum_by_latent(exact, weight, x.float()), dtype)
    assert_close(grads.W_dec_mD, sparse.sum_by_latent(exact, exact.vals_N, y.float()), dtype)
    assert_close(grads.b_enc_m, totals)


@DTYPES
@pytest.mark.parametrize("one_pass", [False, True], ids=["two-kernels", "one-kernel"])
@kernels
def test_gradients_equal_autograd_of_the_dense_form(dtype, one_pass):
    codes, mask, W_dec, target, x = skewed(dtype)
    leaf = [W_dec.double().requires_grad_()]
    # An encoder whose active pre-activations are exactly the codes: pre = x @ W_enc.T + b_enc + constant.
    W_enc = torch.randn_like(W_dec, dtype=torch.float64, requires_grad=True)
    b_enc = torch.zeros(len(W_dec), dtype=torch.float64, device=DEVICE, requires_grad=True)
    pre = x.double() @ W_enc.T + b_enc
    f = (pre + (codes.dense().double() - pre).detach()) * mask
    x_hat = f @ leaf[0]
    (x_hat - target.double()).square().sum().backward()
    slope = (2 * (x_hat - target.double())).detach().to(dtype)
    tiles = SMALL._replace(one_pass=one_pass)
    assert_close(triton_kernels.decode(codes, W_dec, tiles), x_hat.detach(), dtype)
    grads = triton_kernels.sparse_gradients(codes, W_dec, slope, x, torch.float32, tiles)
    # The slope is an input in `dtype`: its rounding is in the result, at the scale of the largest gradient.
    for found, expected in zip(grads, (W_enc.grad, leaf[0].grad, b_enc.grad), strict=True):
        scale = expected.abs().max()
        assert_close(found / scale, expected / scale, dtype)


@kernels
def test_products_of_nothing_are_zero():
    codes, _, W, y, x = skewed(torch.float32)
    none = Gate(codes.rows_N[:0], codes.cols_N[:0], torch.zeros(()))
    codes = Codes.of(codes.dense(), none)
    assert not triton_kernels.decode(codes, W, SMALL).any()
    assert triton_kernels.dot_pairs(codes, y, W, tiles=SMALL).shape == (0,)
    for one_pass in (False, True):
        grads = triton_kernels.sparse_gradients(codes, W, y, x, tiles=SMALL._replace(one_pass=one_pass))
        assert [bool(grad.any()) for grad in grads] == [False] * 3


@DTYPES
@kernels
def test_products_of_exactly_k_pairs_a_token(dtype):
    W, y = torch.randn(9, 21).to(DEVICE, dtype), torch.randn(5, 21).to(DEVICE, dtype)
    vals, cols = torch.rand(5, 9, device=DEVICE).to(dtype).topk(3, dim=1)
    dense = torch.zeros(5, 9, dtype=torch.float64, device=DEVICE).scatter_(1, cols, vals.double())
    assert_close(triton_kernels.decode_topk(vals, cols, W, SMALL), dense @ W.double(), dtype)
    dots = (y.double() @ W.double().T).gather(1, cols)
    assert_close(triton_kernels.dot_topk(y, cols, W, SMALL), dots, dtype)


@kernels
def test_padding_changes_nothing():
    codes, _, W, y, x = skewed(torch.float32)
    pre, n_pairs, tiles = codes.dense(), len(codes.rows_N), SMALL
    pre[0, 0] = 9.0  # where padding points to; not selected
    pad = torch.zeros(7, dtype=torch.int64, device=DEVICE)
    rows, cols = torch.cat([codes.rows_N, pad]), torch.cat([codes.cols_N, pad])
    none = torch.zeros((), device=DEVICE)
    padded = triton_selection.padded_codes(
        pre, triton_selection.Selected(rows, cols, codes.row_start_B1, none, none.long())
    )
    assert torch.equal(padded.latent_start_m1, codes.latent_start_m1)
    assert torch.equal(padded.by_latent_N[:n_pairs], codes.by_latent_N)
    assert torch.equal(triton_kernels.decode(padded, W, tiles), triton_kernels.decode(codes, W, tiles))
    dots = triton_kernels.dot_pairs(padded, y, W, tiles=tiles)
    assert torch.equal(dots[:n_pairs], triton_kernels.dot_pairs(codes, y, W, tiles=tiles))
    assert not dots[n_pairs:].any()
    found = triton_kernels.sparse_gradients(padded, W, y, x, tiles=tiles)
    for one, other in zip(found, triton_kernels.sparse_gradients(codes, W, y, x, tiles=tiles), strict=True):
        assert torch.equal(one, other)


# ---------------------------------------------------------------------- selection


def tied(n_rows, width, dtype, seed=0):
    """Few distinct values, so that most cuts fall inside a run of ties; one token without a positive value."""
    generator = torch.Generator().manual_seed(seed)
    pre = torch.randint(-9, 5, (n_rows, width), generator=generator) / 7
    pre[n_rows // 2] = -pre[n_rows // 2].abs()
    return pre.to(DEVICE, dtype)


def assert_same_pairs(selected, gate):
    count = int(selected.row_start_B1[-1])
    pairs = torch.stack([selected.rows_N, selected.cols_N])
    torch.testing.assert_close(pairs[:, :count], torch.stack([gate.rows_N, gate.cols_N]), rtol=0, atol=0)
    assert not pairs[:, count:].any(), "padding points to the first pair"
    per_row = torch.bincount(gate.rows_N, minlength=len(selected.row_start_B1) - 1)
    torch.testing.assert_close(selected.row_start_B1.diff(), per_row, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("dtype", "width", "k"),
    [
        (torch.float32, 40, 3),
        (torch.float32, 300, 2),  # 300 > 2 * 2 * 64: by groups, the last of them partial
        (torch.bfloat16, 600, 4),
        (torch.float16, 300, 2),
        (torch.float32, 7, 7),
    ],
)
@kernels
def test_topk_of_a_token_is_the_reference(dtype, width, k):
    for seed, pre in enumerate([tied(5, width, dtype), torch.randn(5, width).to(DEVICE, dtype)]):
        bias = torch.randn(width, device=DEVICE).to(dtype) if seed else torch.zeros(width, device=DEVICE, dtype=dtype)
        biased = pre + bias
        selected = triton_selection.select_topk(pre, k, Alone(), bias_m=bias)
        assert_close(pre, biased, dtype)  # in place; the interpreter rounds to bfloat16 otherwise than a GPU
        gate = selection.select_topk(pre.float(), k, Alone())
        assert_same_pairs(selected, gate)
        assert_close(selected.threshold, gate.threshold, dtype)


@pytest.mark.parametrize(
    ("dtype", "width", "n_keep"),
    [(torch.float32, 150, 11), (torch.float32, 70, 300), (torch.bfloat16, 150, 20)],
    ids=["ties", "more-than-are-positive", "bfloat16"],
)
@kernels
def test_topk_of_the_batch_is_the_reference(dtype, width, n_keep):
    for pre in (tied(6, width, dtype), torch.randn(6, width).to(DEVICE, dtype)):
        shard = Shard(0, 6, 0, width)
        gate = selection.select_batch_topk(pre.float(), n_keep, shard, Alone())
        selected = triton_selection.select_batch_topk(pre, n_keep, shard, Alone())
        assert_same_pairs(selected, gate)
        assert float(selected.threshold) == float(gate.threshold)


@kernels
def test_ties_that_lie_in_different_groups_of_latents_are_kept_in_order():
    pre = -torch.ones(3, 300, device=DEVICE)
    pre[:, ::64] = 0.5  # one in each of the five groups of a token
    shard = Shard(0, 3, 0, 300)
    batch = triton_selection.select_batch_topk(pre, 8, shard, Alone())
    assert_same_pairs(batch, selection.select_batch_topk(pre, 8, shard, Alone()))
    assert_same_pairs(triton_selection.select_topk(pre, 2, Alone()), selection.select_topk(pre, 2, Alone()))


@kernels
def test_nearly_equal_values_are_told_apart():
    pre = 1 + torch.finfo(torch.float32).eps * torch.randperm(400, device=DEVICE).float().view(4, 100)
    selected = triton_selection.select_batch_topk(pre, 123, Shard(0, 4, 0, 100), Alone())
    assert_same_pairs(selected, selection.select_batch_topk(pre, 123, Shard(0, 4, 0, 100), Alone()))


class Thread:
    """Collectives between threads, so that a selection can be run on a mesh in one process."""

    def __init__(self, tp, rank, barrier, board):
        self.tp, self.rank, self.barrier, self.board, self.tp_rank = tp, rank, barrier, board, rank % tp

    def _everyone(self, tensor):
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


@kernels
def test_selections_do_not_depend_on_the_mesh():
    dp, tp = 2, 2
    lock, launch = threading.Lock(), triton_kernels.launch

    def one_at_a_time(*args, **kwargs):  # the interpreter is not made for threads
        with lock:
            launch(*args, **kwargs)

    done = []

    def select(rank, n_keep, k):
        row, col = rank // tp * rows, rank % tp * width
        part = pre[row : row + rows, col : col + width].contiguous()
        collectives = Thread(tp, rank, barrier, board)
        shard = Shard(row, len(pre), col, pre.shape[1])
        found = (
            triton_selection.select_batch_topk(part, n_keep, shard, collectives),
            triton_selection.select_topk(part, k, collectives),
        )
        for mask, selected in zip(masks, found, strict=True):
            count = int(selected.row_start_B1[-1])
            mask[selected.rows_N[:count] + row, selected.cols_N[:count] + col] = True
            assert not selected.rows_N[count:].any(), "nothing is written after the last pair"
            assert not selected.cols_N[count:].any()
        done.append(rank)

    triton_selection.launch = one_at_a_time
    try:
        for seed, n_keep, k in ((0, 13, 3), (1, 500, 80)):
            pre = tied(4, 160, torch.bfloat16, seed)
            rows, width = 4 // dp, 160 // tp
            masks = torch.zeros(2, *pre.shape, dtype=torch.bool, device=DEVICE)
            barrier, board = threading.Barrier(dp * tp, timeout=60), [None] * (dp * tp)
            threads = [threading.Thread(target=select, args=(rank, n_keep, k)) for rank in range(dp * tp)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(done) == dp * tp, "a rank failed: see its thread's traceback"
            done.clear()
            by_batch = selection.select_batch_topk(pre.float(), n_keep, Shard(0, 4, 0, 160), Alone())
            for mask, gate in zip(masks, (by_batch, selection.select_topk(pre, k, Alone())), strict=True):
                expected = torch.zeros_like(mask)
                expected[gate.rows_N, gate.cols_N] = True
                assert torch.equal(mask, expected), f"seed {seed}: {int(mask.sum())} of {int(expected.sum())}"
    finally:
        triton_selection.launch = launch


@pytest.mark.parametrize("strict", [False, True])
@kernels
def test_a_threshold_gate_passes_what_reaches_it_and_reports_what_did_not_fit(strict):
    pre = tied(5, 60, torch.float32)
    theta = torch.randint(-1, 4, (60,), device=DEVICE) / 7  # on the values themselves
    passes = (pre > theta if strict else pre >= theta) & (pre > 0)
    gate = Gate(*passes.nonzero(as_tuple=True), theta)
    assert_same_pairs(triton_selection.select_above(pre, theta, 300, strict), gate)
    cut = triton_selection.select_above(pre, theta, 20, strict)
    assert int(cut.overflow) == len(gate.rows_N) - 20
    assert torch.equal(cut.cols_N, gate.cols_N[:20])
    assert int(cut.row_start_B1[-1]) == 20


# ---------------------------------------------------------------------- JumpReLU


@DTYPES
@kernels
def test_jumprelu_and_its_straight_through_gradients(dtype):
    eps, n_rows, width = 0.3, 70, 19  # 70 rows are two runs
    pre = torch.randn(n_rows, width).to(DEVICE, dtype).requires_grad_()
    theta = (torch.rand(width, device=DEVICE) + 0.05).requires_grad_()
    slope, weight = torch.randn(n_rows, width).to(DEVICE, dtype), torch.rand(n_rows, device=DEVICE)
    f, l0 = JumpReLU.apply(pre, theta, eps)
    active = pre > theta
    assert torch.equal(f, torch.where(active, pre, 0))
    assert torch.equal(l0, active.sum(1).float())
    by_pre, by_theta = torch.autograd.grad((f * slope).sum() + (l0 * weight).sum(), (pre, theta))
    near = ((pre.double() - theta.double()).abs() < eps / 2).double()
    assert_close(by_pre, slope * active, dtype)
    expected = -(near * (theta.double() * slope.double() + weight.double()[:, None])).sum(0) / eps
    assert_close(by_theta, expected)
    assert_close(jumprelu_backward(pre.detach(), theta, eps, slope, weight)[2], (slope.double() * active).sum(0))


# ---------------------------------------------------------------------- the training step


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka"])
@kernels
def test_a_training_step_in_kernels_equals_the_plain_one(architecture):
    from sae_ray.config import SAEConfig, TrainerConfig
    from sae_ray.trainer.collectives import Collectives
    from sae_ray.trainer.mesh import Mesh
    from sae_ray.trainer.sharded_sae import ShardedTrainer

    sae = SAEConfig(architecture=architecture, d_sae=64, k=3, aux_k=4, dead_after_tokens=30, groups=[0.3, 1.0])
    batches = [torch.randn(16, 12) for _ in range(3)]
    states = []
    plain = triton_kernels.usable
    for on_kernels in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if on_kernels:
                # The kernels take CPU tensors here, because they are interpreted.
                patch.setattr(triton_kernels, "usable", lambda *given: all(t.dtype == torch.float32 for t in given))
            else:
                patch.setattr(triton_kernels, "usable", lambda *given: False if DEVICE == "cpu" else plain(*given))
            trainer = ShardedTrainer(
                sae, TrainerConfig(tp=1, lr=1e-3, log_every=1), 12, 5, Collectives(Mesh.alone(DEVICE))
            )
            trainer.initialise(batches[0])
            for batch in batches:
                trainer.step(batch, len(batch))
            states.append(trainer.state() | {"fvu": torch.tensor([row["fvu"] for row in trainer.read_metrics()])})
    for name, expected in states[0].items():
        torch.testing.assert_close(states[1][name], expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


# ---------------------------------------------------------------------- what needs no kernel to run


def full_size(launch):
    """Every launcher on tensors without storage, d_sae 131072: reading a value on the host raises."""

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="meta")

    B, M, D, k = 8192, 131072, 4096, 64
    index = functools.partial(empty, dtype=torch.int64)
    with pytest.MonkeyPatch.context() as patch:
        for module in ("triton_kernels", "triton_selection", "triton_jumprelu"):
            patch.setattr(f"sae_ray.sae.{module}.launch", launch)
        pre, W, y = empty(B, M), empty(M, D), empty(B, D)
        triton_selection.padded_codes(pre, triton_selection.select_topk(pre, k, Alone(), empty(M)))
        batch = triton_selection.select_batch_topk(pre, B * k, Shard(0, B, 0, M), Alone(), empty(M))
        triton_selection.select_above(pre, empty(M), B * k)
        codes = triton_selection.padded_codes(pre, batch)
        triton_kernels.decode(codes, W)
        triton_kernels.decode_topk(empty(B, k), index(B, k), W)
        triton_kernels.dot_topk(y, index(B, k), W)
        triton_kernels.sum_by_latent(codes, codes.vals_N, y)
        triton_kernels.sum_scalars_by_latent(codes, codes.vals_N)
        for one_pass in (False, True):
            triton_kernels.sparse_gradients(codes, W, y, y, tiles=TILES._replace(one_pass=one_pass))
        JumpReLU.apply(pre, empty(M), 0.1)
        jumprelu_backward(pre, empty(M), 0.1, pre, empty(B))


@pytest.fixture
def triton_here(monkeypatch):
    if importlib.util.find_spec("triton") is None:
        monkeypatch.syspath_prepend(str(APART))


def test_no_size_is_read_on_the_host(triton_here):
    launched = []
    full_size(lambda kernel, grid, *args, **constants: launched.append((kernel, grid)))
    assert len(launched) > 30
    assert all(isinstance(size, int) and size > 0 for _, grid in launched for size in grid)


@pytest.mark.skipif(triton_kernels.interpreted(), reason="the interpreter replaces the compiler")
def test_every_kernel_compiles_for_a_gpu_that_is_not_here(triton_here, tmp_path, monkeypatch):
    """The interpreter accepts what the compiler refuses. Triton brings the whole tool chain, down to ptxas."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Hopper:
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

    compiled = {}

    def compile_only(kernel, grid, *args, **constants):
        small = {"SLOTS": 256, "REPEATS": 1} | ({"BLOCK": 128} if "MODE" in constants or "REPEATS" in constants else {})
        constants |= {name: value for name, value in small.items() if name in constants}
        key = (kernel.fn.__name__, constants.get("GATHER"), constants.get("BOTH"), constants.get("OWNED"))
        if key not in compiled:
            compiled[key] = kernel.warmup(*args, grid=grid, **constants).asm

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", Hopper())
    full_size(compile_only)
    assert {name for name, *_ in compiled} >= {"gather_sum", "dot_pairs", "row_topk", "emit_rows", "jumprelu_backward"}
    assert all(asm["cubin"] for asm in compiled.values())


def test_importing_the_wrappers_needs_neither_triton_nor_the_config_libraries():
    code = (
        "import sys; sys.modules.update(triton=None, pydantic=None, yaml=None, ray=None)\n"
        "from sae_ray.sae import triton_jumprelu, triton_kernels, triton_selection\n"
        "import torch; assert not triton_kernels.usable(torch.zeros(1))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
