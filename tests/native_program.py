"""Builds the CPU kernels' own test program with g++ under sanitizers, from copies whose barriers can be left out."""

import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CPU = ROOT / "csrc" / "cpu"
PROGRAM = ROOT / "tests" / "native" / "passes.cpp"
COMMON = [
    "g++",
    "-std=c++17",
    "-g1",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-psabi",
    "-Wno-ignored-attributes",
    "-Wno-unused-function",
]
VECTORS = {  # flags of the processor, of the compiler
    "avx512": ({"avx512f", "avx512vl", "avx512bw", "avx512dq"}, ["-march=x86-64-v4", "-DGUNN_VECTOR_BYTES=64"]),
    "avx2": ({"avx2", "fma"}, ["-march=x86-64-v3", "-DGUNN_VECTOR_BYTES=32"]),
    "baseline": (set(), ["-DGUNN_VECTOR_BYTES=16"]),
}
SANITIZERS = {
    "address": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-fsanitize=thread"],
}
BARRIER = re.compile(r"team\.barrier\(\);")


def barriers() -> list[str]:
    """Where the passes wait for each other, as ``file:line``."""
    return [
        f"{path.name}:{number}"
        for path in sorted(CPU.glob("*.h"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if BARRIER.search(line)
    ]


def _write_sources(folder: Path) -> None:
    for path in CPU.glob("*.h"):
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines, 1):
            asks = f'planted("{path.name}:{number}") ? void() : team.barrier();'
            lines[number - 1] = BARRIER.sub(asks, line)
        (folder / path.name).write_text("\n".join(lines) + "\n")


class Native:
    """The program in its flavours, each built once."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "cpu").mkdir()
        _write_sources(folder / "cpu")
        with open("/proc/cpuinfo") as cpuinfo:
            flags = set(next(line for line in cpuinfo if line.startswith("flags")).split())
        self.widest = next(level for level, (needed, _) in VECTORS.items() if needed <= flags)
        self.pool = ThreadPoolExecutor(2)
        wanted = {("thread", self.widest), ("address", self.widest), ("address", "baseline")}
        self.programs = {key: self.pool.submit(self._compile, *key) for key in wanted}

    def _compile(self, sanitizer: str, level: str) -> Path:
        target = self.folder / f"passes-{sanitizer}-{level}"
        command = [*COMMON, f"-I{self.folder}", f"-I{ROOT / 'csrc'}", *VECTORS[level][1], *SANITIZERS[sanitizer]]
        subprocess.run([*command, str(PROGRAM), "-pthread", "-o", str(target)], check=True)
        return target

    def run(self, sanitizer: str, level: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        program = str(self.programs[sanitizer, level].result())
        environment = {"TSAN_OPTIONS": "atexit_sleep_ms=0"} | os.environ  # 1 s otherwise
        return subprocess.run(
            [program, *arguments], capture_output=True, text=True, check=False, env=environment, timeout=300
        )
