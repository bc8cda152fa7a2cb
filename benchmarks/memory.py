"""Measure the memory of one GUNN-15 training step on the CPU: fused layers, fused without recomputation, eager layers.

    python benchmarks/memory.py --batch 64 --json benchmarks/results/memory.json

Every variant runs in a process of its own. "Saved" is what autograd keeps between forward and backward (unique
storages, parameters included); "peak" is the growth of the resident set over a whole step, optimizer included.
The paper's figure is GPU memory at batch 64, so beside ours it is a landmark, not a comparison.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
from pathlib import Path

import torch
from environment import environment
from torch import nn

from gunn_ext import GunnLayer, ReferenceGunnLayer
from gunn_ext.models import create_model

VARIANTS = ("fused", "fused, recompute=False", "eager")
PAPER_GB = 2.485


def replaced(layer: GunnLayer, variant: str) -> nn.Module:
    """The layer as ``variant`` has it, with the same parameters."""
    if variant != "eager":
        layer.recompute = variant == "fused"
        return layer
    reference = ReferenceGunnLayer(**layer.arguments())
    reference.load_state_dict(layer.state_dict())
    return reference


def network(variant: str) -> nn.Module:
    """GUNN-15 with its gradual layers replaced."""
    torch.manual_seed(0)
    model = create_model("gunn15", num_classes=10)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, GunnLayer):
                setattr(parent, name, replaced(child, variant))
    return model.train()


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (highest since the last reset), in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: int) -> int:
    """One training step; returns the bytes autograd saved."""
    images, labels = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    optimizer.zero_grad(set_to_none=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    return sum(storages.values())


def measure(variant: str, batch: int) -> dict[str, float | int | str]:
    """One step in this process, after a step of two images that loads libraries and starts threads."""
    model = network(variant)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    step(model, optimizer, 2)
    ctypes.CDLL(None).malloc_trim(0)  # what that step freed goes back to the system
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = resident("VmRSS")
    saved = step(model, optimizer, batch)
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "variant": variant,
        "batch": batch,
        "saved_bytes": saved,
        "parameter_bytes": parameters,
        "peak_bytes": resident("VmHWM") - before,
        "threads": torch.get_num_threads(),
        **environment(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the memory of one GUNN-15 training step on the CPU.")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the rows to this file")
    parser.add_argument("--variant", choices=VARIANTS, help="measure this one in this process and print its row")
    args = parser.parse_args()
    if args.variant:
        print(json.dumps(measure(args.variant, args.batch)))
        return
    rows = []
    print(f"GUNN-15, 3x32x32, batch {args.batch}, float32; the paper: {PAPER_GB} GB at batch 64, on its GPUs")
    for variant in VARIANTS:
        command = [sys.executable, __file__, "--variant", variant, "--batch", str(args.batch)]
        row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        rows.append(row | {"paper_gb_at_batch_64": PAPER_GB})
        print(
            f"  {variant:24} saved {row['saved_bytes'] / 1e9:6.3f} GB  peak {row['peak_bytes'] / 1e9:6.3f} GB",
            flush=True,
        )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
