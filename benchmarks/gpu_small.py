"""Run small layers on the GPU, forward and backward, against the reference: a smoke test, and what sanitizers watch.

python benchmarks/gpu_small.py [--few] [--driver persistent]
"""

from __future__ import annotations

import argparse
import os

import torch

from gunn_ext import GunnLayer, ReferenceGunnLayer

CASES = [
    # channels, segments, units, shortcut, batch, height, width
    (36, 3, 1, True, 3, 8, 8),
    (9, 9, 1, True, 2, 6, 7),
    (24, 2, 2, False, 2, 9, 8),
    (80, 2, 1, False, 1, 12, 11),
    (24, 2, 1, True, 300, 8, 8),  # in turns
]
ERRORS = {torch.float64: 1e-9, torch.float32: 2e-2, torch.bfloat16: 0.15, torch.float16: 4e-2}


def run(kind: type, dtype: torch.dtype, case: tuple, training: bool, state: dict | None) -> tuple[list, dict]:
    channels, segments, units, shortcut, batch, height, width = case
    torch.manual_seed(0)
    layer = kind(channels, segments, 2, units, shortcut=shortcut).cuda().to(dtype).train(training)
    if state:
        layer.load_state_dict(state)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = torch.randn(batch, channels, height, width, device="cuda").to(dtype).requires_grad_()
    y = layer(x)
    gradients = torch.autograd.grad(y, (x, *layer.parameters()), torch.ones_like(y) + x.detach())
    return [y.detach(), *gradients], before


def main() -> None:
    """Take the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--few", action="store_true", help="one case of each dtype, once")
    parser.add_argument("--driver", default="staged", choices=("staged", "persistent"), help="where it takes a case")
    arguments = parser.parse_args()
    os.environ["GUNN_CUDA_DRIVER"] = arguments.driver
    run_all(arguments.few)


def run_all(few: bool) -> None:
    """Run every case; the first wrong one ends the program."""
    for dtype, allowed in ERRORS.items():
        for case in CASES[:1] if few else CASES:
            for training in (True,) if few else (True, False):
                ours, state = run(GunnLayer, dtype, case, training, None)
                if not few:
                    again, _ = run(GunnLayer, dtype, case, training, None)
                    if not all(torch.equal(a, b) for a, b in zip(ours, again, strict=True)):
                        raise SystemExit(f"{case} {dtype}: two runs differ")
                expected, _ = run(ReferenceGunnLayer, torch.float64, case, training, state)
                # Forward only: gradients of random values meet ReLUs that fall on the other side.
                error = ((ours[0].double() - expected[0]).norm() / expected[0].norm()).item()
                finite = all(bool(tensor.isfinite().all()) for tensor in ours)
                print(f"{case} {dtype} {'training' if training else 'evaluation'}: relative error {error:.1e}")
                if not (finite and error < allowed):
                    raise SystemExit(f"{case} {dtype}: wrong, allowed {allowed:.0e}, finite gradients: {finite}")


if __name__ == "__main__":
    main()
