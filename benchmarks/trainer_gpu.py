"""One training step of a large TopK or BatchTopK SAE on one GPU: ours against plain PyTorch and a dense step.

    PYTHONPATH=. python benchmarks/trainer_gpu.py [--select batchtopk] [--check] [--sweep]
    PYTHONPATH=. python benchmarks/trainer_gpu.py --device cpu --tiny --check     (interpreted: only that it runs)

Needs torch with CUDA and triton, nothing else. All three steps are the forward pass and every gradient, without
the optimiser, from the same weights and inputs. The rates that floors are computed from are measured first, in
the same run: a large bfloat16 product and a large copy. `--check` compares every kernel with its PyTorch form on
the device, and proves that a step never waits for the GPU; `--sweep` times other tile shapes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

if "cpu" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is first imported

import torch

from sae_ray.sae import sparse, triton_kernels, triton_selection
from sae_ray.sae.selection import Alone, Shard
from sae_ray.sae.triton_kernels import TILES, LatentGradients, Tiles

CHUNK_PAIRS = 65_536


class Problem(NamedTuple):
    x_BD: torch.Tensor
    W_enc_mD: torch.Tensor
    W_dec_mD: torch.Tensor
    b_enc_m: torch.Tensor
    b_dec_D: torch.Tensor
    k: int
    batchwise: bool


def problem(args: argparse.Namespace) -> Problem:
    generator = torch.Generator(args.device).manual_seed(0)
    dtype = getattr(torch, args.dtype)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=args.device, dtype=dtype)

    W_mD = normal(args.d_sae, args.d_in)
    W_mD /= W_mD.norm(dim=1, keepdim=True)
    bias = normal(args.d_sae) * 0.1
    b_dec_D = normal(args.d_in) * 0.1
    return Problem(normal(args.batch, args.d_in), W_mD, W_mD.clone(), bias, b_dec_D, args.k, args.select == "batchtopk")


# ---------------------------------------------------------------------- three steps


def slope_of(p: Problem, decoded_BD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FVU and its gradient by the reconstruction."""
    error_BD = decoded_BD + p.b_dec_D - p.x_BD
    power = (p.x_BD - p.x_BD.mean(0)).float().square().sum()
    return error_BD.float().square().sum() / power, (error_BD * (2 / power)).to(p.x_BD.dtype)


def select(p: Problem, pre_Bm: torch.Tensor) -> triton_selection.Selected:
    if p.batchwise:
        n_rows, width = pre_Bm.shape
        return triton_selection.select_batch_topk(pre_Bm, n_rows * p.k, Shard(0, n_rows, 0, width), Alone())
    found = triton_selection.select_topk(pre_Bm, p.k, Alone())
    assert found is not None, "k is too large for the row kernel"
    return found


def our_step(p: Problem, tiles: Tiles = TILES) -> tuple[torch.Tensor, LatentGradients, torch.Tensor]:
    centred_BD = p.x_BD - p.b_dec_D
    pre_Bm = torch.addmm(p.b_enc_m, centred_BD, p.W_enc_mD.T)
    codes = triton_selection.padded_codes(pre_Bm, select(p, pre_Bm))
    fvu, slope_BD = slope_of(p, triton_kernels.decode(codes, p.W_dec_mD, tiles))
    grads = triton_kernels.sparse_gradients(codes, p.W_dec_mD, slope_BD, centred_BD, tiles=tiles)
    by_b_dec = slope_BD.sum(0) - grads.b_enc_m.to(p.W_enc_mD.dtype) @ p.W_enc_mD
    return fvu, grads, by_b_dec


def plain_codes(p: Problem, pre_Bm: torch.Tensor) -> sparse.Codes:
    """`torch.topk` and `nonzero`, as a trainer without kernels selects."""
    if p.batchwise:
        flat_N = pre_Bm.view(-1).topk(len(pre_Bm) * p.k, sorted=False).indices.sort().values
        rows_N, cols_N = flat_N // pre_Bm.shape[1], flat_N % pre_Bm.shape[1]
    else:
        cols_N = pre_Bm.topk(p.k, dim=1, sorted=False).indices.sort(dim=1).values.view(-1)
        rows_N = torch.arange(len(pre_Bm), device=pre_Bm.device).repeat_interleave(p.k)
    vals_N = pre_Bm[rows_N, cols_N]
    live = vals_N > 0
    rows_N, cols_N, vals_N = rows_N[live], cols_N[live], vals_N[live]
    by_latent_N = torch.argsort(cols_N, stable=True)
    starts = [
        torch.cat([index.new_zeros(1), torch.bincount(index, minlength=size).cumsum(0)])
        for index, size in ((rows_N, pre_Bm.shape[0]), (cols_N, pre_Bm.shape[1]))
    ]
    return sparse.Codes(rows_N, cols_N, vals_N, starts[0], by_latent_N, starts[1])


def plain_dots(codes: sparse.Codes, y_BD: torch.Tensor, W_mD: torch.Tensor) -> torch.Tensor:
    parts = zip(codes.rows_N.split(CHUNK_PAIRS), codes.cols_N.split(CHUNK_PAIRS), strict=True)
    return torch.cat([(y_BD[rows] * W_mD[cols]).sum(1) for rows, cols in parts])


def plain_sum(index_N: torch.Tensor, starts: torch.Tensor, weight_N: torch.Tensor, src: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.embedding_bag(index_N, src, starts[:-1], mode="sum", per_sample_weights=weight_N)


def plain_step(p: Problem) -> tuple[torch.Tensor, LatentGradients, torch.Tensor]:
    centred_BD = p.x_BD - p.b_dec_D
    codes = plain_codes(p, torch.addmm(p.b_enc_m, centred_BD, p.W_enc_mD.T))
    fvu, slope_BD = slope_of(p, plain_sum(codes.cols_N, codes.row_start_B1, codes.vals_N, p.W_dec_mD))
    d_pre_N = plain_dots(codes, slope_BD, p.W_dec_mD)
    order = codes.by_latent_N
    rows_N, starts = codes.rows_N[order], codes.latent_start_m1
    by_W_enc = plain_sum(rows_N, starts, d_pre_N[order], centred_BD)
    by_W_dec = plain_sum(rows_N, starts, codes.vals_N[order], slope_BD)
    by_b_enc = torch.zeros_like(p.b_enc_m).index_add_(0, codes.cols_N, d_pre_N)
    return fvu, LatentGradients(by_W_enc, by_W_dec, by_b_enc), slope_BD.sum(0) - by_b_enc @ p.W_enc_mD


def dense_step(p: Problem) -> tuple[torch.Tensor, LatentGradients, torch.Tensor]:
    """Autograd through [B, d_sae]: two products forward, three backward (none by the inputs)."""
    leaves = [tensor.detach().requires_grad_() for tensor in (p.W_enc_mD, p.W_dec_mD, p.b_enc_m, p.b_dec_D)]
    W_enc_mD, W_dec_mD, b_enc_m, b_dec_D = leaves
    pre_Bm = torch.addmm(b_enc_m, p.x_BD - p.b_dec_D, W_enc_mD.T)
    with torch.no_grad():
        codes = plain_codes(p, pre_Bm.detach())
        mask = torch.zeros_like(pre_Bm, dtype=torch.bool)
        mask[codes.rows_N, codes.cols_N] = True
    x_hat_BD = torch.where(mask, pre_Bm, 0) @ W_dec_mD + b_dec_D
    power = (p.x_BD - p.x_BD.mean(0)).float().square().sum()
    fvu = (x_hat_BD - p.x_BD).float().square().sum() / power
    by_W_enc, by_W_dec, by_b_enc, by_b_dec = torch.autograd.grad(fvu, leaves)
    by_b_dec = by_b_dec - by_b_enc @ p.W_enc_mD
    return fvu.detach(), LatentGradients(by_W_enc, by_W_dec, by_b_enc), by_b_dec


# ---------------------------------------------------------------------- time


def milliseconds(work: Callable[[], object], device: str, repeats: int) -> float:
    """Median device time of one call; the first ones compile and warm up."""
    for _ in range(min(3, repeats)):
        work()
    times = []
    for _ in range(repeats):
        if device == "cuda":
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            work()
            last.record()
            last.synchronize()
            times.append(first.elapsed_time(last))
        else:
            began = time.perf_counter()
            work()
            times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


class Rates(NamedTuple):
    flops: float  # per millisecond
    bytes: float  # per millisecond, read and written


def measured_rates(args: argparse.Namespace) -> Rates:
    size = 64 if args.tiny else 8192
    dtype = getattr(torch, args.dtype)
    a, b = (torch.randn(size, size, device=args.device, dtype=dtype) for _ in range(2))
    product = milliseconds(lambda: a @ b, args.device, args.repeats)
    source = torch.ones((1 << 16) if args.tiny else (1 << 30), dtype=torch.float32, device=args.device)
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source), args.device, args.repeats)
    return Rates(2 * size**3 / product, 2 * source.numel() * 4 / copy)


def as_graph(work: Callable[[], object]) -> Callable[[], object]:
    """The step recorded once and replayed: possible only because nothing in it waits for the GPU."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def kernel_rows(p: Problem, rates: Rates, args: argparse.Namespace) -> list[tuple[str, float, float, float]]:
    """(name, ms, floor in ms if every input is read once, ms if every pair's row comes from memory)."""
    item = p.x_BD.element_size()
    (B, D), m = p.x_BD.shape, len(p.W_enc_mD)
    centred_BD = p.x_BD - p.b_dec_D
    pre_Bm = torch.addmm(p.b_enc_m, centred_BD, p.W_enc_mD.T)
    selected = select(p, pre_Bm)
    codes = triton_selection.padded_codes(pre_Bm, selected)
    N = int(codes.row_start_B1[-1])
    _, slope_BD = slope_of(p, triton_kernels.decode(codes, p.W_dec_mD))
    d_pre_N = triton_kernels.dot_pairs(codes, slope_BD, p.W_dec_mD, torch.float32)
    used = int((codes.latent_start_m1.diff() > 0).sum())
    row, tokens, weights = D * item, B * D * item, m * D * item

    def gemm() -> torch.Tensor:
        return torch.addmm(p.b_enc_m, centred_BD, p.W_enc_mD.T, out=pre_Bm)

    def both() -> LatentGradients:
        return triton_kernels.gradients_by_latent(codes, d_pre_N, slope_BD, centred_BD)

    def fused() -> LatentGradients:
        tiles = TILES._replace(one_pass=True)
        return triton_kernels.sparse_gradients(codes, p.W_dec_mD, slope_BD, centred_BD, tiles=tiles)

    work: list[tuple[str, Callable[[], object], float, float]] = [
        ("encoder GEMM + bias", gemm, 0, 0),
        ("selection", lambda: select(p, pre_Bm), B * m * item, B * m * item),
        ("codes (sort by latent)", lambda: triton_selection.padded_codes(pre_Bm, selected), 6 * N * 8, 6 * N * 8),
        ("decode", lambda: triton_kernels.decode(codes, p.W_dec_mD), used * row + tokens, N * row + tokens),
        (
            "pair products",
            lambda: triton_kernels.dot_pairs(codes, slope_BD, p.W_dec_mD, torch.float32),
            used * row + tokens,
            2 * N * row,
        ),
        ("gradients by latent", both, 2 * tokens + 2 * weights, 2 * N * row + 2 * weights),
        ("both in one kernel", fused, 2 * tokens + used * row + 2 * weights, 2 * N * row + used * row + 2 * weights),
        ("b_dec through W_enc", lambda: d_pre_N.new_zeros(m).to(p.x_BD.dtype) @ p.W_enc_mD, weights, weights),
    ]
    rows = []
    for name, run, once, gathered in work:
        floors = (2 * B * D * m / rates.flops,) * 2 if run is gemm else (once / rates.bytes, gathered / rates.bytes)
        rows.append((name, milliseconds(run, args.device, args.repeats), *floors))
    return rows


def report(args: argparse.Namespace) -> None:
    rates = measured_rates(args)
    p = problem(args)
    (B, D), m = p.x_BD.shape, len(p.W_enc_mD)
    name = (
        torch.cuda.get_device_name() if args.device == "cuda" else "CPU, Triton's interpreter: no timing means anything"
    )
    print(f"\n{name}; torch {torch.__version__}; {args.dtype}, d_in {D}, d_sae {m}, k {p.k} ({args.select}), batch {B}")
    print(f"measured ceilings: {rates.flops / 1e9:.0f} TFLOP/s, {rates.bytes / 1e9:.2f} TB/s (copy, read + written)\n")
    print(f"{'part of our step':26}{'ms':>9}{'floor':>9}{'of floor':>10}{'gathered':>10}")
    rows = kernel_rows(p, rates, args)
    for part, ms, floor, gathered in rows:
        print(f"{part:26}{ms:9.3f}{floor:9.3f}{ms / floor if floor else 0:9.2f}x{gathered:10.3f}")
    gemm_floor, gradient_floor = rows[0][2], rows[6][2]
    print("floor: inputs read once and outputs written once at the measured rates; gathered: a read per pair\n")

    steps: dict[str, Callable[[], object]] = {
        "ours": lambda: our_step(p),
        "ours, one gradient kernel": lambda: our_step(p, TILES._replace(one_pass=True)),
        "plain PyTorch": lambda: plain_step(p),
        "dense, autograd": lambda: dense_step(p),
    }
    if args.device == "cuda":
        steps["ours, as a CUDA graph"] = as_graph(lambda: our_step(p))
    target = 1.4 * gemm_floor + gradient_floor
    print(f"{'step, without optimiser':28}{'ms':>9}{'to ours':>9}{'GEMM ceiling / step':>21}{'peak GB':>9}")
    ours = None
    for label, run in steps.items():
        try:
            if args.device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            ms = milliseconds(run, args.device, args.repeats)
            peak = torch.cuda.max_memory_allocated() / 1e9 if args.device == "cuda" else 0.0
        except (RuntimeError, NotImplementedError) as error:
            print(f"{label:28}  does not run: {str(error).splitlines()[0][:90]}")
            continue
        ours = ours or ms
        print(f"{label:28}{ms:9.2f}{ms / ours:8.2f}x{gemm_floor / ms:20.0%}{peak:9.1f}")
    print(
        f"target: 1.4 x {gemm_floor:.2f} (encoder GEMM at the ceiling) + {gradient_floor:.2f} (gradients) = {target:.2f} ms"
    )


def sweep(args: argparse.Namespace) -> None:
    """Times of other tile shapes, fastest first. The defaults are `triton_kernels.TILES`."""
    p = problem(args)
    centred_BD = p.x_BD - p.b_dec_D
    pre_Bm = torch.addmm(p.b_enc_m, centred_BD, p.W_enc_mD.T)
    codes = triton_selection.padded_codes(pre_Bm, select(p, pre_Bm))
    _, slope_BD = slope_of(p, triton_kernels.decode(codes, p.W_dec_mD))
    d_pre_N = triton_kernels.dot_pairs(codes, slope_BD, p.W_dec_mD, torch.float32)
    blocks, pairs = ((32,), (2, 4)) if args.tiny else ((128, 256, 512, 1024, 2048), (2, 4, 8, 16))
    fields: dict[str, tuple[Callable[[Tiles], object], tuple[str, str]]] = {
        "decode": (lambda t: triton_kernels.decode(codes, p.W_dec_mD, t), ("sum_block", "sum_pairs")),
        "pair products": (
            lambda t: triton_kernels.dot_pairs(codes, slope_BD, p.W_dec_mD, torch.float32, t),
            ("dot_block", "dot_pairs"),
        ),
        "gradients by latent": (
            lambda t: triton_kernels.gradients_by_latent(codes, d_pre_N, slope_BD, centred_BD, tiles=t),
            ("gradient_block", "gradient_pairs"),
        ),
    }
    for name, (run, (block_field, pairs_field)) in fields.items():
        found = []
        for block in blocks:
            for count in pairs:
                for by_latent in (True, False) if name == "pair products" else (True,):
                    tiles = TILES._replace(**{block_field: block, pairs_field: count}, dot_by_latent=by_latent)
                    ms = milliseconds(lambda run=run, tiles=tiles: run(tiles), args.device, max(1, args.repeats // 3))
                    found.append((ms, f"{block_field}={block} {pairs_field}={count} dot_by_latent={by_latent}"))
        print(f"\n{name}")
        for ms, shape in sorted(found)[:6]:
            print(f"{ms:9.3f} ms  {shape}")


# ---------------------------------------------------------------------- check


def check(args: argparse.Namespace) -> bool:
    """Every kernel against PyTorch on this device, twice (bitwise equal), and a step without a host sync."""
    small = argparse.Namespace(**vars(args))
    # Wide enough for selection by groups (d_sae > 2 * k * GROUP), no power of two, one latent on all tokens.
    small.batch, small.d_sae, small.d_in, small.k = (5, 150, 20, 1) if args.tiny else (500, 20_000, 648, 32)
    good = True

    def compare(name: str, found: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
        nonlocal good
        error = float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))
        good &= error <= limit
        print(f"{'ok  ' if error <= limit else 'FAIL'} {name:58} relative error {error:.1e} (limit {limit:.0e})")

    for dtype, limit in (("float32", 1e-5), ("bfloat16", 1e-2)):
        for how in ("topk", "batchtopk"):
            small.dtype, small.select = dtype, how
            p = problem(small)
            p.b_enc_m[7] += 4
            centred_BD = p.x_BD - p.b_dec_D
            pre_Bm = torch.addmm(p.b_enc_m, centred_BD, p.W_enc_mD.T)
            codes = triton_selection.padded_codes(pre_Bm, select(p, pre_Bm))
            n_pairs = int(codes.row_start_B1[-1])
            wanted = plain_codes(p, pre_Bm)
            # torch.topk breaks ties as it likes: values are compared, and latents through the sums below.
            by_row = (codes.vals_N[:n_pairs], wanted.vals_N) if p.batchwise else (codes.vals_N, wanted.vals_N)
            compare(f"{dtype} {how}: selected values", *(v.sort().values for v in by_row), 0)
            dense = codes._replace(
                **{name: getattr(codes, name)[:n_pairs] for name in ("rows_N", "cols_N", "vals_N", "by_latent_N")}
            ).dense()
            compare(
                f"{dtype} {how}: decode",
                triton_kernels.decode(codes, p.W_dec_mD),
                dense.double() @ p.W_dec_mD.double(),
                limit,
            )
            _, slope_BD = slope_of(p, triton_kernels.decode(codes, p.W_dec_mD))
            active = dense > 0
            d_pre = (slope_BD.double() @ p.W_dec_mD.double().T) * active
            expected = (d_pre.T @ centred_BD.double(), dense.double().T @ slope_BD.double(), d_pre.sum(0))
            for one_pass in (False, True):
                tiles = TILES._replace(one_pass=one_pass, long=16)
                runs = [
                    triton_kernels.sparse_gradients(codes, p.W_dec_mD, slope_BD, centred_BD, tiles=tiles)
                    for _ in range(2)
                ]
                label = f"{dtype} {how}: {'one kernel' if one_pass else 'two kernels'}"
                for part, found, right in zip(LatentGradients._fields, runs[0], expected, strict=True):
                    compare(f"{label}, {part}", found, right, limit)
                same = all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
                good &= same
                print(f"{'ok  ' if same else 'FAIL'} {label}, a second run is bitwise equal")
            fvu, grads, by_b_dec = our_step(p)
            for part, found, right in zip(
                ("fvu", *LatentGradients._fields, "b_dec"), (fvu, *grads, by_b_dec), _flat(dense_step(p)), strict=True
            ):
                # A tie at the cut that torch.topk broke otherwise is another, equally good step.
                compare(
                    f"{dtype} {how}: whole step against dense autograd, {part}",
                    found,
                    right,
                    5 * limit if dtype == "float32" else 0.1,
                )
            if args.device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
                try:
                    our_step(p)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
                print(f"ok   {dtype} {how}: no host sync in a step")
    return good


def _flat(step: tuple[torch.Tensor, LatentGradients, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return (step[0], *step[1], step[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-in", type=int, default=4096)
    parser.add_argument("--d-sae", type=int, default=131_072)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--select", choices=["topk", "batchtopk"], default="topk")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that the interpreter gets through")
    parser.add_argument("--check", action="store_true", help="kernels against PyTorch on the device, before timing")
    parser.add_argument("--sweep", action="store_true", help="time other tile shapes too")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("trainer_gpu.py: no CUDA device here. `--device cpu --tiny` runs it in Triton's interpreter.")
    if args.device == "cpu" and not args.tiny:
        sys.exit("trainer_gpu.py: --device cpu is interpreted, for sizes that --tiny sets; give both.")
    if not triton_kernels.available():
        sys.exit("trainer_gpu.py: triton is not installed.")
    if args.tiny:
        args.d_in, args.d_sae, args.k, args.batch, args.repeats = 24, 150, 1, 4, 1
    if args.check and not check(args):
        sys.exit("trainer_gpu.py: a kernel differs from its PyTorch form; see FAIL above.")
    report(args)
    if args.sweep:
        sweep(args)


if __name__ == "__main__":
    main()
