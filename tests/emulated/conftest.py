"""Builds the test kernels with g++ and the emulator, once a session and in the background, and runs them.

Each program is a small executable, not a Python module: a sanitizer then needs no LD_PRELOAD. The emulator's own files
are never sanitized (csrc/emulator/emulator.h says why), so all flavours share their objects. The layer's kernels are
built as a Python module as well, a twin of gunn_ext._core; their programs, from sources with faults to choose from.
"""

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import faults
import pybind11
import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = Path(__file__).resolve().parent / "kernels"
PROGRAMS = ("bugs", "block", "warp", "grid", "tensor", "order")  # in the order they are built
COMMON = ["g++", "-std=c++17", "-g1", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}", f"-I{KERNELS}"]
FLAVOURS = {
    "plain": ["-O1"],
    "address": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-fsanitize=thread"],
    "portable": ["-O1"],  # on ucontext fibers, as on machines that are not x86-64
}
# Of gunn_ext._core, the slowest to compile first. Only the CUDA kernels are meant to run: the rest is not optimised.
MODULE = {
    "bindings.cpp": [
        *("-O0", "-fopenmp", f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}", "-DGUNN_WITH_CUDA"),
        *(f'-DGUNN_{name}="{value}"' for name, value in {"VERSION": "0", "COMPILER": "g++", "CUDA_REASON": ""}.items()),
        *('-DGUNN_CUDA_ARCHITECTURES="emulated"', '-DGUNN_CUDA_TOOLKIT=""'),
    ],
    **{f"cuda/{source.name}": ["-O1"] for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))},
    "cpu/level.cpp": ["-O0", "-fopenmp", "-Wno-psabi", "-DGUNN_LEVEL=baseline", "-DGUNN_VECTOR_BYTES=16"],
    "cpu/dispatch.cpp": ["-O0"],
}
SETTINGS = [f"GUNN_EMULATOR_{name}" for name in ("SEED", "WORKERS", "SLOW", "STACK_KB", "SHARED_KB", "PROCESSORS")]


class Emulated:
    def __init__(self, folder: Path):
        self.folder = folder
        self.pool = ThreadPoolExecutor(2)
        self.emulators = {"own": self.pool.submit(self._compile_emulator, "own", [])}
        self.objects = [self.pool.submit(self._compile_object, source, flags) for source, flags in MODULE.items()]
        self.emulators["portable"] = self.pool.submit(self._compile_emulator, "portable", ["-DGUNN_EMULATOR_UCONTEXT"])
        self.programs: dict[tuple[str, str], Future[Path]] = {}
        faults.write_sources(folder / "faults")

    def _compile_emulator(self, name: str, flags: list[str]) -> list[str]:
        objects = []
        for source in sorted((ROOT / "csrc" / "emulator").glob("*.cpp")):
            objects.append(str(self.folder / f"{name}-{source.stem}.o"))
            subprocess.run([*COMMON, "-O2", "-fPIC", *flags, "-c", str(source), "-o", objects[-1]], check=True)
        return objects

    def _compile_object(self, source: str, flags: list[str]) -> str:
        target = self.folder / f"core-{source.replace('/', '-')}.o"
        own = ["-g0", "-fPIC", "-fvisibility=hidden", *flags]
        subprocess.run([*COMMON, *own, "-x", "c++", "-c", str(ROOT / "csrc" / source), "-o", str(target)], check=True)
        return str(target)

    def module(self):
        """gunn_ext._core, with CUDA kernels that run on the CPU."""
        path = self.folder / "_core.so"
        objects = [*self.emulators["own"].result(), *(built.result() for built in self.objects)]
        subprocess.run(["g++", "-shared", "-fopenmp", *objects, "-pthread", "-o", str(path)], check=True)
        spec = importlib.util.spec_from_file_location("_core", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def _compile(self, program: str, flavour: str) -> Path:
        target = self.folder / f"{program}-{flavour}"
        objects = self.emulators["portable" if flavour == "portable" else "own"].result()
        source = ["-x", "c++", str(KERNELS / f"{program}.cu"), "-x", "none"]
        compiler, *flags = COMMON
        first = [f"-I{self.folder / 'faults'}"] if program.startswith("layer_") else []
        command = [compiler, *first, *flags, *FLAVOURS[flavour], *source, *objects, "-pthread", "-o", str(target)]
        subprocess.run(command, check=True)
        return target

    def build(self, program: str, flavour: str) -> Future[Path]:
        key = program, flavour
        if key not in self.programs:
            self.programs[key] = self.pool.submit(self._compile, *key)
        return self.programs[key]

    def run(self, program: str, flavour: str, *cases: str, **settings: int) -> subprocess.CompletedProcess[str]:
        """Runs cases in one process; ``seed``, ``workers``, ``slow`` and so on become the emulator's variables."""
        environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
        environment |= {f"GUNN_EMULATOR_{name.upper()}": str(value) for name, value in settings.items()}
        environment.setdefault("TSAN_OPTIONS", "atexit_sleep_ms=0")  # 1 s otherwise
        command = [str(self.build(program, flavour).result()), *cases]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)

    def cases(self, program: str, flavour: str) -> list[str]:
        return self.run(program, flavour, "--list").stdout.split()


@pytest.fixture(scope="session")
def emulated(tmp_path_factory, request):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not on PATH: the emulated kernels cannot be built")
    emulated = Emulated(tmp_path_factory.mktemp("emulated"))
    for program in PROGRAMS:
        for flavour in ("plain",) if program == "order" else ("plain", "thread", "address"):
            emulated.build(program, flavour)
    if any(item.path.name.startswith("test_sanitized") for item in request.session.items):
        for flavour in ("thread", "address", "plain"):
            emulated.build("layer_bfloat16", flavour)  # minutes each, while other tests run
    yield emulated
    emulated.pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def core(emulated):
    """A twin of gunn_ext._core whose CUDA kernels are emulated."""
    return emulated.module()
