"""What a pass keeps and what it needs at its peak; of a network's step on the CPU also what the process grows by."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gunn_ext.bench.networks import VARIANTS, network

PAPER_GB = 2.485  # GUNN-15 at batch 64, on the paper's GPUs: a landmark, not a comparison


def saved_bytes(forward: Callable[[], Any]) -> int:
    """Bytes autograd keeps from ``forward`` for its backward: every storage once, parameters included."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()  # held, so that no storage is given back and counted twice
    del result
    return sum(storages.values())


def peak_bytes(work: Callable[[], Any], device: str) -> int:
    """The most that ``work`` allocates from torch at a time, beyond what there was before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would announce itself
    with torch.autograd.profiler.profile(use_kineto=True, profile_memory=True) as recorded:
        work()
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def _resident(field: str) -> int:
    """VmRSS (now) or VmHWM (highest since the last reset), in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def _training_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: int, size: int) -> int:
    """One training step; returns the bytes autograd saved."""
    images, labels = torch.randn(batch, 3, size, size), torch.randint(10, (batch,))
    loss = torch.empty(())

    def forward() -> Tensor:
        nonlocal loss
        loss = nn.functional.cross_entropy(model(images), labels)
        return loss

    optimizer.zero_grad(set_to_none=True)
    saved = saved_bytes(forward)
    loss.backward()
    optimizer.step()
    return saved


def measure_here(name: str, variant: str, batch: int, size: int) -> dict[str, Any]:
    """One step in this process, after a step of two images that loads libraries and starts threads."""
    model = network(name, variant).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    _training_step(model, optimizer, 2, size)
    ctypes.CDLL(None).malloc_trim(0)  # what that step freed goes back to the system
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _resident("VmRSS")
    saved = _training_step(model, optimizer, batch, size)
    return {
        "model": name,
        "peer": variant,
        "batch": batch,
        "size": size,
        "pass": "training",
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "saved_bytes": saved,
        "parameter_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "resident_bytes": _resident("VmHWM") - before,
    }


def measure_memory(name: str, batch: int, size: int) -> list[dict[str, Any]]:
    """A row for every variant, each measured in a process of its own."""
    rows = []
    for variant in VARIANTS:
        call = f"measure_here{(name, variant, batch, size)}"
        code = f"import json; from {__name__} import measure_here; print(json.dumps({call}))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            rows.append({"model": name, "peer": variant, "batch": batch, "size": size, "error": last[:500]})
            continue
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    return rows
