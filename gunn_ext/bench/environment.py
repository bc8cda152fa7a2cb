"""What a figure depends on beside the code, for every result."""

from __future__ import annotations

import hashlib
import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch

from gunn_ext._info import info

PACKAGE = Path(__file__).resolve().parents[1]
ROOT = PACKAGE.parent  # of the clone; of an installed package the folder that holds it


def answer(*command: str) -> str:
    """What a command prints; nothing where it fails or does not exist."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """As git tells it, or GUNN_COMMIT where the sources came without their history."""
    given = os.environ.get("GUNN_COMMIT")
    if given or not (ROOT / "csrc").is_dir():  # installed: a repository around it is another one
        return given or "unknown"
    return answer("git", "describe", "--always", "--dirty") or "unknown"


def sources() -> str:
    """A digest of everything that computes: csrc/, where it is at hand, and the Python package."""
    digest = hashlib.sha256()
    for path in sorted([*(ROOT / "csrc").rglob("*"), *PACKAGE.rglob("*.py")]):
        if path.is_file():
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def processor() -> str:
    """The CPU's name and logical cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return f"{names[0] if names else 'unknown'} ({len(names) or os.cpu_count()} logical cores)"


def environment(device: str) -> dict[str, str]:
    """Device, versions, build, commit and sources, and the time.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
    """
    facts = info()
    found = {"device": processor(), "simd": str(facts["simd"])}
    if device == "cuda":
        found = {
            "device": torch.cuda.get_device_name(),
            "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version()),
            "driver": answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
            "architectures": str(facts["cuda_architectures"]),
            "toolkit": str(facts["cuda_toolkit"]),
        }
    return found | {
        "torch": torch.__version__,
        "gunn_ext": str(facts["gunn_ext"]),
        "commit": commit(),
        "sources": sources(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


STATE = "pstate,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,temperature.gpu,memory.used"


def gpu_state() -> dict[str, str]:
    """Clocks, power and temperature at this moment, as nvidia-smi tells them."""
    values = answer("nvidia-smi", f"--query-gpu={STATE}", "--format=csv,noheader").split("\n")[0].split(", ")
    return dict(zip(STATE.split(","), values, strict=False))
