"""What a figure depends on beside the code, for every row of a result."""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch

import gunn_ext


def environment() -> dict[str, str]:
    """What a figure depends on beside the code."""
    cpu = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "device": f"{cpu[0] if cpu else 'unknown'} ({len(cpu)} logical cores)",
        "torch": torch.__version__,
        "gunn_ext": gunn_ext.__version__,
        "simd": gunn_ext.info()["simd"],
        "commit": git.stdout.strip() or "unknown",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
