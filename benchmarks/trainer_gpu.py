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
from trainer_gpu_steps import Problem, dense_step, our_step, plain_codes, plain_step, problem, select, slope_of

from sae_ray.sae import triton_kernels, triton_selection
from sae_ray.sae.triton_kernels import TILES, LatentGradients, Tiles

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
    source = torch.rand((1 << 16) if args.tiny else (1 << 30), device=args.device)
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
        ("b_dec through W_enc", lambda: p.b_enc_m @ p.W_enc_mD, weights, weights),
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
        steps["ours, as a CUDA graph"] = steps["ours"]
    target = 1.4 * gemm_floor + gradient_floor
    print(f"{'step, without optimiser':28}{'ms':>9}{'to ours':>9}{'GEMM ceiling / step':>21}{'peak GB':>9}")
    ours = None
    for label, run in steps.items():
        try:
            if args.device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            if label.endswith("graph"):
                run = as_graph(run)
            ms = milliseconds(run, args.device, args.repeats)
            peak = torch.cuda.max_memory_allocated() / 1e9 if args.device == "cuda" else 0.0
        except (RuntimeError, NotImplementedError) as error:
            print(f"{label:28}  does not run: {str(error).splitlines()[0][:90]}")
            continue
        ours = ours or ms
        print(f"{label:28}{ms:9.2f}{ms / ours:8.2f}x{gemm_floor / ms:20.0%}{peak:9.1f}")
    print(f"target: 1.4 x {gemm_floor:.2f} (encoder GEMM at the ceiling) + {gradient_floor:.2f} (gradients)", end="")
    print(f" = {target:.2f} ms")


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


class Checks:
    """Comparisons, printed as they are made."""

    def __init__(self) -> None:
        self.good = True

    def close(self, name: str, found: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
        error = float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))
        self.true(f"{name}: relative error {error:.1e} (limit {limit:.0e})", error <= limit)

    def true(self, name: str, holds: bool) -> None:
        self.good &= holds  # NaN is not <= anything
        print(f"{'ok  ' if holds else 'FAIL'} {name}")


def check(args: argparse.Namespace) -> bool:
    """Every kernel against PyTorch on this device, twice (bitwise equal), and a step without a host sync."""
    small = argparse.Namespace(**vars(args))
    # Wide enough for selection by groups (d_sae > 2 * k * GROUP), no power of two.
    small.batch, small.d_sae, small.d_in, small.k = (3, 260, 20, 2) if args.tiny else (500, 20_000, 648, 32)
    checks = Checks()
    for small.dtype in ("float32", "bfloat16"):
        for small.select in ("topk", "batchtopk"):
            check_step(checks, problem(small), f"{small.dtype} {small.select}", args.device)
    return checks.good


def check_step(checks: Checks, p: Problem, name: str, device: str) -> None:
    limit = 1e-5 if p.x_BD.dtype == torch.float32 else 1e-2
    p.b_enc_m[7] += 4 * p.W_enc_mD.shape[1] ** 0.5  # one latent fires on all tokens: its sums are split
    centred_BD = p.x_BD - p.b_dec_D
    pre_Bm = torch.addmm(p.b_enc_m, centred_BD, p.W_enc_mD.T)
    codes = triton_selection.padded_codes(pre_Bm, select(p, pre_Bm))
    n_pairs = int(codes.row_start_B1[-1])
    trimmed = {part: getattr(codes, part)[:n_pairs] for part in ("rows_N", "cols_N", "vals_N", "by_latent_N")}
    live = codes._replace(**trimmed)
    # Which of equal values torch.topk takes is not defined, so values are compared.
    values = (live.vals_N.sort().values, plain_codes(p, pre_Bm).vals_N.sort().values)
    checks.true(f"{name}, selected values are torch.topk's", torch.equal(*values))
    f_Bm, W_dec_mD = live.dense().double(), p.W_dec_mD.double()
    decoded_BD = triton_kernels.decode(codes, p.W_dec_mD)
    checks.close(f"{name}, decode", decoded_BD, f_Bm @ W_dec_mD, limit)
    slope_BD = slope_of(p, decoded_BD)[1]
    d_pre_Bm = (slope_BD.double() @ W_dec_mD.T) * (f_Bm > 0)
    expected = (d_pre_Bm.T @ centred_BD.double(), f_Bm.T @ slope_BD.double(), d_pre_Bm.sum(0))
    for one_pass in (False, True):
        tiles = TILES._replace(one_pass=one_pass, long=16)
        runs = [triton_kernels.sparse_gradients(codes, p.W_dec_mD, slope_BD, centred_BD, tiles=tiles) for _ in range(2)]
        label = f"{name}, gradients in {'one kernel' if one_pass else 'two kernels'}"
        for part, found, right in zip(LatentGradients._fields, runs[0], expected, strict=True):
            checks.close(f"{label}, {part}", found, right, limit)
        same = all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
        checks.true(f"{label}, bitwise equal a second time", same)
    steps = [(fvu, *grads, by_b_dec) for fvu, grads, by_b_dec in (our_step(p), dense_step(p, live))]
    for part, found, right in zip(("FVU", *LatentGradients._fields, "b_dec_D"), *steps, strict=True):
        checks.close(f"{name}, step against dense autograd, {part}", found, right, 10 * limit)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            our_step(p)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        checks.true(f"{name}, a step never waits for the GPU", True)


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
        args.d_in, args.d_sae, args.k, args.batch, args.repeats = 24, 260, 2, 3, 1
    if args.check and not check(args):
        sys.exit("trainer_gpu.py: a kernel differs from its PyTorch form; see FAIL above.")
    report(args)
    if args.sweep:
        sweep(args)


if __name__ == "__main__":
    main()
