"""GFLOP/s of matrix products in float32 at a model's shapes, by torch's own route and by oneDNN.

python benchmarks/products.py [--threads 2] [--d-model 384]

A product with weights (x W^T), with their transpose (y W), and that of a gradient (y^T x). With
`ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2` before it both are held to what older
processors can do; with the library of docs/explanation/speed.md in LD_PRELOAD the first column
changes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from pretrain.compat import onednn_linear

ROWS = 4096


def gigaflops(product: Callable[[], torch.Tensor], flops: int) -> float:
    """The best of a dozen."""
    seconds = []
    for _ in range(13):
        began = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - began)
    return flops / min(seconds) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--d-model", type=int, default=384)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    d = args.d_model
    print(f"{'':24}{'torch':>8}{'oneDNN':>8}   GFLOP/s, {args.threads} threads")
    for narrow, wide in ((d, d), (d, 4 * d), (4 * d, d)):
        x, y = torch.randn(ROWS, narrow), torch.randn(ROWS, wide)
        w = torch.randn(wide, narrow)
        pairs: dict[str, tuple[Callable[[], torch.Tensor], ...]] = {
            "x W^T": (lambda x=x, w=w: x @ w.T, lambda x=x, w=w: onednn_linear(x, w)),
            "y W": (lambda y=y, w=w: y @ w, lambda y=y, w=w: onednn_linear(y, w.T)),
            "y^T x": (
                lambda y=y, x=x: y.T @ x,
                lambda y=y, x=x: onednn_linear(y.T.contiguous(), x.T),
            ),
        }
        for name, routes in pairs.items():
            speeds = [gigaflops(route, 2 * ROWS * narrow * wide) for route in routes]
            print(f"{narrow:6} x {wide:<6} {name:8}" + "".join(f"{s:8.0f}" for s in speeds))


if __name__ == "__main__":
    main()
