"""Builds the test kernels with g++ and the emulator, once a session and in the background, and runs them.

Each program is a small executable, not a Python module: a sanitizer then needs no LD_PRELOAD. The emulator's own files
are never sanitized (csrc/emulator/emulator.h says why), so all flavours share their objects. The layer's programs are
built from sources with faults to choose from, and the plain ones together are a Python module, a twin of
gunn_ext._core: their kernels take minutes to compile, which is done once.
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
    "plain": ["-O1", "-fPIC"],
    "address": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-fsanitize=thread"],
    "portable": ["-O1"],  # on ucontext fibers, as on machines that are not x86-64
}
LAYERS = tuple(f"layer_{dtype}" for dtype in ("bfloat16", "float16", "float32", "tensor_float32", "float64"))
# Of gunn_ext._core, what is not in these programs. Only the CUDA kernels are meant to run: the rest is not optimised.
MODULE = {
    "bindings.cpp": [
        *("-fopenmp", f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}", "-DGUNN_WITH_CUDA"),
        *(f'-DGUNN_{name}="{value}"' for name, value in {"VERSION": "0", "COMPILER": "g++", "CUDA_REASON": ""}.items()),
        *('-DGUNN_CUDA_ARCHITECTURES="emulated"', '-DGUNN_CUDA_TOOLKIT=""'),
    ],
    "cpu/level.cpp": ["-fopenmp", "-Wno-psabi", "-DGUNN_LEVEL=baseline", "-DGUNN_VECTOR_BYTES=16"],
    "cpu/dispatch.cpp": [],
}
SETTINGS = [f"GUNN_EMULATOR_{name}" for name in ("SEED", "WORKERS", "SLOW", "STACK_KB", "SHARED_KB", "PROCESSORS")]


class Emulated:
    def __init__(self, folder: Path):
        self.folder = folder
        self.pool = ThreadPoolExecutor(2)
        faults.write_sources(folder / "faults")
        self.emulators = {"own": self.pool.submit(self._compile_emulator, "own", [])}
        self.objects: dict[tuple[str, str], Future[Path]] = {}
        for program in LAYERS:
            self.compile(program, "plain")
        self.rest = [self.pool.submit(self._compile_rest, source, flags) for source, flags in MODULE.items()]
        self.emulators["portable"] = self.pool.submit(self._compile_emulator, "portable", ["-DGUNN_EMULATOR_UCONTEXT"])

    def _compile_emulator(self, name: str, flags: list[str]) -> list[str]:
        objects = []
        for source in sorted((ROOT / "csrc" / "emulator").glob("*.cpp")):
            objects.append(str(self.folder / f"{name}-{source.stem}.o"))
            subprocess.run([*COMMON, "-O2", "-fPIC", *flags, "-c", str(source), "-o", objects[-1]], check=True)
        return objects

    def _compile_rest(self, source: str, flags: list[str]) -> str:
        target = self.folder / f"core-{source.replace('/', '-')}.o"
        own = ["-O0", "-g0", "-fPIC", "-fvisibility=hidden", *flags]
        subprocess.run([*COMMON, *own, "-c", str(ROOT / "csrc" / source), "-o", str(target)], check=True)
        return str(target)

    def _compile(self, program: str, flavour: str) -> Path:
        target = self.folder / f"{program}-{flavour}.o"
        compiler, *flags = COMMON
        first = [f"-I{self.folder / 'faults'}"] if program in LAYERS else []
        command = [compiler, *first, *flags, *FLAVOURS[flavour], "-x", "c++", "-c", str(KERNELS / f"{program}.cu")]
        subprocess.run([*command, "-o", str(target)], check=True)
        return target

    def compile(self, program: str, flavour: str) -> Future[Path]:
        key = program, flavour
        if key not in self.objects:
            self.objects[key] = self.pool.submit(self._compile, *key)
        return self.objects[key]

    def module(self):
        """gunn_ext._core, with CUDA kernels that run on the CPU."""
        path = self.folder / "_core.so"
        kernels = [str(self.compile(program, "plain").result()) for program in LAYERS]
        objects = [*self.emulators["own"].result(), *kernels, *(built.result() for built in self.rest)]
        subprocess.run(["g++", "-shared", "-fopenmp", *objects, "-pthread", "-o", str(path)], check=True)
        spec = importlib.util.spec_from_file_location("_core", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def program(self, name: str, flavour: str) -> Path:
        target = self.folder / f"{name}-{flavour}"
        if not target.exists():
            objects = self.emulators["portable" if flavour == "portable" else "own"].result()
            compiled = str(self.compile(name, flavour).result())
            subprocess.run(["g++", *FLAVOURS[flavour], compiled, *objects, "-pthread", "-o", str(target)], check=True)
        return target

    def run(self, program: str, flavour: str, *cases: str, **settings: int) -> subprocess.CompletedProcess[str]:
        """Runs cases in one process; ``seed``, ``workers``, ``slow`` and so on become the emulator's variables."""
        environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
        environment |= {f"GUNN_EMULATOR_{name.upper()}": str(value) for name, value in settings.items()}
        environment.setdefault("TSAN_OPTIONS", "atexit_sleep_ms=0")  # 1 s otherwise
        command = [str(self.program(program, flavour)), *cases]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)

    def cases(self, program: str, flavour: str) -> list[str]:
        return self.run(program, flavour, "--list").stdout.split()


@pytest.fixture(scope="session")
def emulated(tmp_path_factory, request):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not on PATH: the emulated kernels cannot be built")
    emulated = Emulated(tmp_path_factory.mktemp("emulated"))
    for program in PROGRAMS:
        for flavour in ("plain",) if program == "order" else ("plain", "thread", "address"):
            emulated.compile(program, flavour)
    if any(item.path.name.startswith("test_sanitized") for item in request.session.items):
        for flavour in ("thread", "address"):
            emulated.compile("layer_bfloat16", flavour)  # minutes each, while other tests run
    yield emulated
    emulated.pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def core(emulated):
    """A twin of gunn_ext._core whose CUDA kernels are emulated."""
    return emulated.module()
