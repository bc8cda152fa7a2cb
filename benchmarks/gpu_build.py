"""Build the compiled module in place for this machine's GPU, with g++ and nvcc alone: no pip, no CMake, no network.

    python benchmarks/gpu_build.py [--arch 90a] [--jobs 16] [--log build.log]

The sources and flags are those of CMakeLists.txt, for one architecture. pybind11 is taken from its package, or from
torch's headers. Objects are kept in build/gpu and reused while nothing in csrc/ changes. The log lists what every
kernel needs, spills first.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc"
MODULE = ROOT / "gunn_ext" / f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"
COMMON = ["-std=c++17", "-O3", "-DNDEBUG", f"-I{SOURCES}"]
CXX = ["-fPIC", "-fvisibility=hidden", "-fopenmp", "-Wall", "-Wextra"]
LEVEL = ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-Wno-ignored-attributes"]
AVX512 = ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mavx2", "-mfma", "-mprefer-vector-width=512"]
LEVELS = {
    "baseline": (16, []),
    "avx2": (32, ["-mavx2", "-mfma"]),
    "avx512": (64, AVX512),
    "avx512bf16": (64, [*AVX512, "-mavx512bf16"]),
}


def fail(message: str) -> None:
    raise SystemExit(f"gpu_build: {message}")


def find_nvcc() -> str:
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    found = [shutil.which("nvcc"), *(shutil.which("nvcc", path=f"{home}/bin") for home in homes if home)]
    return next(filter(None, found), None) or fail("no nvcc on PATH, in $CUDA_HOME/bin or in /usr/local/cuda/bin")


def find_architecture() -> str:
    """Of the first GPU, as nvcc writes it, with the letter that unlocks a chip's own instructions."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout
        major, minor = re.findall(r"(\d+)\.(\d+)", answer)[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        fail(f"nvidia-smi does not tell the GPU's compute capability ({error}); give it with --arch")
    return f"{major}{minor}" + "a" * (int(major) >= 9)


def include_folders() -> list[str]:
    python = Path(sysconfig.get_path("include"))
    if not (python / "Python.h").exists():
        fail(f"no Python.h in {python}: install the headers of this Python")
    if spec := importlib.util.find_spec("pybind11"):
        from pybind11 import get_include

        pybind = Path(get_include())
    elif spec := importlib.util.find_spec("torch"):
        pybind = Path(spec.submodule_search_locations[0]) / "include"
    else:
        fail("neither pybind11 nor torch, which carries it, is installed")
    if not (pybind / "pybind11" / "pybind11.h").exists():
        fail(f"no pybind11/pybind11.h in {pybind}")
    return [f"-I{python}", f"-I{pybind}"]


@dataclass
class Unit:
    """One object file: its name, its command but for the output, and how that went."""

    name: str
    command: list[str]
    seconds: float = 0.0
    output: str = ""
    code: int = 0


def version_of(compiler: str) -> str:
    text = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    return (re.findall(r"V(\d[\d.]*)", text) or re.findall(r"\d+\.\d+[\d.]*", text))[0]


def units(nvcc: str, architecture: str) -> list[Unit]:
    """Everything to compile, the slowest first."""
    x86 = platform.machine() in ("x86_64", "AMD64")
    host = ",".join(["-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"])
    device = f"--generate-code=arch=compute_{architecture},code=sm_{architecture}"
    # Few files, many cores: the largest one alone would take most of the time.
    cuda = [nvcc, *COMMON, device, "-lineinfo", "-Xptxas=-v", "--split-compile=4", f"-Xcompiler={host}"]
    work = [Unit(path.stem, [*cuda, "-c", str(path)]) for path in sorted(SOURCES.glob("cuda/*.cu"))]
    for name, (size, flags) in LEVELS.items():
        if x86 or name == "baseline":
            defines = [f"-DGUNN_LEVEL={name}", f"-DGUNN_VECTOR_BYTES={size}"]
            source = str(SOURCES / "cpu" / "level.cpp")
            work.append(Unit(f"cpu_{name}", ["g++", *COMMON, *CXX, *LEVEL, *flags, *defines, "-c", source]))
    strings = {
        "VERSION": tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"],
        "COMPILER": f"GNU {version_of('g++')}",
        "CUDA_REASON": "",
        "CUDA_ARCHITECTURES": f"{architecture}-real",
        "CUDA_TOOLKIT": version_of(nvcc),
    }
    defines = [f'-DGUNN_{name}="{value}"' for name, value in strings.items()]
    defines += ["-DGUNN_WITH_CUDA", *(["-DGUNN_X86"] if x86 else [])]
    for path in (SOURCES / "bindings.cpp", SOURCES / "cpu" / "dispatch.cpp"):
        work.append(Unit(path.stem, ["g++", *COMMON, *CXX, *defines, *include_folders(), "-c", str(path)]))
    return work


def compile_unit(unit: Unit, folder: Path) -> Unit:
    target, start = folder / f"{unit.name}.o", time.monotonic()
    half_made = target.with_suffix(".partial.o")
    done = subprocess.run([*unit.command, "-o", str(half_made)], capture_output=True, text=True, check=False)
    unit.seconds, unit.code, unit.output = time.monotonic() - start, done.returncode, done.stdout + done.stderr
    if unit.code == 0:
        half_made.replace(target)
    target.with_suffix(".log").write_text(unit.output)
    return unit


RESOURCES = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def without_parameters(name: str) -> str:
    """``void f<(E)0>(int, g(int))`` as ``f<(E)0>``."""
    depth = 0
    for at in range(len(name) - 1, -1, -1):
        depth += (name[at] == ")") - (name[at] == "(")
        if depth == 0:
            return name[: at if name.endswith(")") else None].removeprefix("void ")
    return name


def resource_table(text: str) -> list[str]:
    """A line for each kernel: registers, static shared memory, stack, spills, name; spills and registers first."""
    found = [match.groupdict() for match in RESOURCES.finditer(text)]
    names = [kernel["name"] for kernel in found]
    if shutil.which("c++filt"):
        names = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True).stdout.splitlines()
    rows = []
    for kernel, name in zip(found, names, strict=True):
        shared = re.search(r"(\d+) bytes smem", kernel["rest"])
        spills = int(kernel["stores"]) + int(kernel["loads"])
        numbers = (spills, int(kernel["registers"]), int(kernel["stack"]), int(shared[1]) if shared else 0)
        rows.append((*numbers, without_parameters(name)))
    header = "spill bytes  registers  stack  static shared  kernel"
    return [header, *(f"{a:11}  {b:9}  {c:5}  {d:13}  {name}" for a, b, c, d, name in sorted(rows, reverse=True))]


def main() -> None:
    parser = argparse.ArgumentParser(description="Build gunn_ext/_core in place for this machine's GPU.")
    parser.add_argument("--arch", help="as nvcc writes it, such as 90a (default: that of the first GPU)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--log", type=Path, help="write the compilers' output and the kernels' resources here")
    args = parser.parse_args()
    start = time.monotonic()
    nvcc, architecture = find_nvcc(), args.arch or find_architecture()
    work = units(nvcc, architecture)
    digest = hashlib.sha256(repr([unit.command for unit in work]).encode())
    for path in sorted(path for path in SOURCES.rglob("*") if path.is_file()):
        digest.update(str(path).encode() + path.read_bytes())
    folder = ROOT / "build" / "gpu" / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    todo = [unit for unit in work if not (folder / f"{unit.name}.o").exists()]
    print(f"{len(todo)} of {len(work)} files to compile for sm_{architecture}, {args.jobs} at a time", flush=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        for unit in pool.map(lambda unit: compile_unit(unit, folder), todo):
            print(f"  {unit.name:16} {unit.seconds:6.1f} s  {'ok' if unit.code == 0 else 'FAILED'}", flush=True)
    logs = {unit.name: folder / f"{unit.name}.log" for unit in work}
    texts = {name: path.read_text() for name, path in logs.items() if path.exists()}
    failed = [unit for unit in todo if unit.code]
    linked = None
    if not failed:
        objects = [str(folder / f"{unit.name}.o") for unit in work]
        half_made = MODULE.with_suffix(".partial")
        command = [nvcc, "-shared", "-cudart=static", "-Xcompiler=-fopenmp", "-o", str(half_made), *objects]
        linked = subprocess.run(command, capture_output=True, text=True, check=False)
        if linked.returncode == 0:
            half_made.replace(MODULE)
    if args.log:
        table = resource_table("\n".join(texts.values()))
        messages = [f"== {name}\n{text}" for name, text in texts.items() if re.search("warning|error", text)]
        commands = [" ".join(unit.command) for unit in work]
        link_text = [linked.stdout + linked.stderr] if linked else []
        args.log.write_text("\n".join([*table, *messages, "== commands", *commands, *link_text]) + "\n")
    if failed:
        for unit in failed:
            print(f"== {unit.name}\n{unit.output[:3000]}")
        fail(f"{len(failed)} files failed to compile")
    if linked and linked.returncode:
        fail(f"linking failed\n{linked.stderr[:3000]}")
    print(f"{MODULE.relative_to(ROOT)} built in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
