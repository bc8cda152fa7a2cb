"""What a figure depends on beside the code, for every row of a result."""

from __future__ import annotations

import hashlib
import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch

import gunn_ext

ROOT = Path(__file__).resolve().parents[1]


def answer(*command: str) -> str:
    """What a command prints; nothing where it fails or does not exist."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """As git tells it, or GUNN_COMMIT where the sources came without their history."""
    return os.environ.get("GUNN_COMMIT") or answer("git", "describe", "--always", "--dirty") or "unknown"


def sources() -> str:
    """A digest of everything that computes: csrc/ and the Python package."""
    digest = hashlib.sha256()
    for path in sorted([*(ROOT / "csrc").rglob("*"), *(ROOT / "gunn_ext").rglob("*.py")]):
        if path.is_file():
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def processor() -> str:
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{names[0] if names else 'unknown'} ({len(names)} logical cores)"


def environment() -> dict[str, str]:
    """What a figure depends on beside the code."""
    return {
        "device": processor(),
        "torch": torch.__version__,
        "gunn_ext": gunn_ext.__version__,
        "simd": gunn_ext.info()["simd"],
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def gpu_environment(device: str = "cuda") -> dict[str, str]:
    """`environment` for what ran on a GPU; without one, for rehearsals, it says that it was none."""
    if device == "cpu":
        return environment() | {"sources": sources()}
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "driver": answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        "gunn_ext": gunn_ext.__version__,
        "architectures": str(gunn_ext.info()["cuda_architectures"]),
        "toolkit": str(gunn_ext.info()["cuda_toolkit"]),
        "commit": commit(),
        "sources": sources(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


STATE = "pstate,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,temperature.gpu,memory.used"


def gpu_state() -> dict[str, str]:
    """Clocks, power and temperature at this moment, as nvidia-smi tells them."""
    values = answer("nvidia-smi", f"--query-gpu={STATE}", "--format=csv,noheader").split("\n")[0].split(", ")
    return dict(zip(STATE.split(","), values, strict=False))
