"""Compiles the CUDA kernels for real GPUs and reads what the compiler says of them. By hand, for a table:

    python tests/device_code.py [ARCHITECTURE…]      those of a default build unless named; 90-virtual: PTX

Needs nvcc (and g++, for c++filt and the sizes of shared memory), no GPU.
"""

import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent / "csrc"
PRECISIONS = {
    "bfloat16": "Float16Bits<BFloat16>",
    "float16": "Float16Bits<Float16>",
    "tensor_float32": "TensorFloat32",
    "float32": "Float32",
    "float64": "Float64",
}
DTYPES = tuple(PRECISIONS)
HOT = ("reduce", "spatial", "project", "project_backward", "spatial_backward", "input_backward", "weight_gradient")
WEIGHTS = ("reduce", "spatial", "project")  # enum Which
LATER = {("0", "true"): ", unit 0", ("0", "false"): ", units 1…"}
ONE_BAND = ("persistent_forward", "persistent_backward")  # <k and s in eights, warps, fragments of pixels, streams>
TURNS = ("forward_turns", "backward_turns")  # <k and s in eights, warps, fragments of pixels, units>
PERSISTENT = ONE_BAND + TURNS
PRODUCTS = ("input_weights", "hidden_weights")
WITH_POOL = (*HOT, "unit_gradient")  # whose tile lies in dynamic shared memory
TILES = ("SmallTile", "LargeTile")
LARGE = ("reduce", "spatial", "spatial_backward", "input_backward", "weight_gradient")  # which large tiles serve too
FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", f"-I{CSRC}", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror"]
TENSOR_CORE = 0x23C  # opcode of HMMA, every kind, sm_75 to sm_90


@dataclass(frozen=True)
class Kernel:
    name: str  # with its template arguments but for the dtype
    registers: int
    static_shared: int  # bytes, as all that follow
    stack: int
    spilled: int  # stores and loads
    tensor_cores: int  # instructions

    @property
    def plain_name(self) -> str:
        return self.name.split("<")[0]

    @property
    def threads(self) -> int:
        """Of a block."""
        if self.plain_name in PERSISTENT:
            return 32 * int(self.name.split(", ")[2])
        return 256 if self.plain_name in PRODUCTS or self.tile == "LargeTile" else 128

    @property
    def tile(self) -> str:
        """Of a product, or of an element-wise kernel."""
        return TILES["LargeTile" in self.name]


def entries(text: str) -> dict[str, str]:
    """The kernels of a PTX file by their mangled names."""
    return {part.split("(")[0].strip(): part for part in re.split(r"\.entry ", text)[1:]}


def run(*command: str, text: str | None = None) -> str:
    """What a command says on both streams; raises with it if the command fails."""
    result = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


def ptx(dtype: str, architecture: str, folder: Path) -> str:
    """The PTX of one dtype; ``architecture`` is that of the virtual GPU, e.g. 90."""
    target = folder / f"{dtype}-{architecture}.ptx"
    said = run("nvcc", *FLAGS, f"-arch=compute_{architecture}", "-ptx", f"{CSRC}/cuda/{dtype}.cu", "-o", str(target))
    assert said == "", said
    return target.read_text()


def intermediate(dtype: str, architecture: str, folder: Path) -> Path:
    """The PTX on the way to the machine code of `kernels`."""
    return folder / f"{dtype}-{architecture}" / f"{dtype}.ptx"


def kernels(dtype: str, architecture: str, folder: Path) -> list[Kernel]:
    """The kernels of one dtype in machine code. A warning of the compiler raises."""
    target = folder / f"{dtype}-{architecture}.cubin"
    kept = intermediate(dtype, architecture, folder)
    kept.parent.mkdir()
    options = [*("-Xptxas", "-v"), f"-gencode=arch=compute_{architecture},code=sm_{architecture}"]
    keep = ["--keep", "--keep-dir", str(kept.parent)]
    said = run("nvcc", *FLAGS, *options, *keep, "-cubin", f"{CSRC}/cuda/{dtype}.cu", "-o", str(target))
    instructions = dict(count_instructions(target.read_bytes(), TENSOR_CORE))
    return sorted(read_report(said, PRECISIONS[dtype], instructions), key=lambda kernel: kernel.name)


def read_report(said: str, precision: str, tensor_cores: dict[str, int]) -> Iterator[Kernel]:
    """Kernels from the lines of ``ptxas -v``."""
    pattern = (
        r"Function properties for (\w+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\s+"
        r"ptxas info\s*: Used (\d+) registers(.*)"
    )
    for symbol, stack, stores, loads, registers, rest in re.findall(pattern, said):
        shared = re.search(r"(\d+) bytes smem", rest)
        yield Kernel(
            name=readable(symbol, precision),
            registers=int(registers),
            static_shared=int(shared[1]) if shared else 0,
            stack=int(stack),
            spilled=int(stores) + int(loads),
            tensor_cores=tensor_cores[symbol],
        )


def readable(symbol: str, precision: str) -> str:
    """E.g. ``weight_gradient<reduce, unit 0>`` of a mangled name."""
    plain = run("c++filt", "-p", symbol).strip().replace("gunn::", "").replace(" >", ">").replace(" >", ">")
    plain = re.sub(r"\(Which\)(\d), (\w+)", lambda m: WEIGHTS[int(m[1])] + LATER.get((m[1], m[2]), ""), plain)
    for short in (f"<{precision}>", f"{precision}, "):
        plain = plain.replace(short, "")
    return plain


def count_instructions(cubin: bytes, opcode: int) -> Iterator[tuple[str, int]]:
    """How often each kernel has an instruction. One has 16 bytes, its opcode in the lowest 12 bits (sm_70 to sm_90)."""
    (headers_at,) = struct.unpack_from("<Q", cubin, 40)  # of an ELF file
    size, count, names = struct.unpack_from("<3H", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, headers_at + i * size) for i in range(count)]
    names_at = headers[names][4]
    for name_at, _, _, _, offset, length in headers:
        name = cubin[names_at + name_at : cubin.index(b"\0", names_at + name_at)].decode()
        if name.startswith(".text."):
            words = (word for word, _ in struct.iter_unpack("<QQ", cubin[offset : offset + length]))
            yield name.removeprefix(".text."), sum(word & 0xFFF == opcode for word in words)


def pool_bytes(folder: Path) -> dict[tuple[str, str], int]:
    """The dynamic shared memory of a kernel with a tile, for each dtype and tile."""
    keys = [(dtype, tile) for dtype in DTYPES for tile in TILES]
    sizes = "".join(f'std::printf("%zu ", sizeof(Pool<{PRECISIONS[dtype]}, {tile}>));' for dtype, tile in keys)
    source = f'#include "cuda/tile.cuh"\nusing namespace gunn;\nint main() {{ {sizes} }}\n'
    # The sizes need no link with the emulator: nothing of it is called.
    run("g++", "-std=c++17", "-O1", f"-I{CSRC}", "-x", "c++", "-", "-o", f"{folder}/sizes", text=source)
    return dict(zip(keys, map(int, run(f"{folder}/sizes").split()), strict=True))


def default_architectures() -> list[str]:
    cmake = (CSRC.parent / "CMakeLists.txt").read_text()
    return re.search(r'GUNN_CUDA_ARCHS "([^"]*)"', cmake)[1].split(";")


def print_table(architectures: Iterable[str]) -> int:
    """Prints a row for each kernel; returns how many spill or have a stack frame."""
    bad = 0
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        folder = Path(name)
        shared = pool_bytes(folder)
        code = {}
        for architecture in architectures:
            number, _, virtual = architecture.partition("-")
            for dtype in DTYPES:
                code[architecture, dtype] = pool.submit(ptx if virtual else kernels, dtype, number, folder)
        print(f"{'arch':10} {'dtype':14} {'kernel':52} registers  shared  stack  spilled  HMMA")
        for (architecture, dtype), made in code.items():
            if isinstance(made.result(), str):
                print(f"{architecture:10} {dtype:14} {made.result().count('.entry')} kernels of PTX", flush=True)
                continue
            for kernel in made.result():
                memory = kernel.static_shared + (shared[dtype, kernel.tile] if kernel.plain_name in WITH_POOL else 0)
                bad += kernel.stack > 0 or kernel.spilled > 0
                print(
                    f"{architecture:10} {dtype:14} {kernel.name:52} {kernel.registers:9} {memory:7} {kernel.stack:6} "
                    f"{kernel.spilled:8} {kernel.tensor_cores:5}",
                    flush=True,
                )
    print(f"{bad} kernels spill or have a stack frame")
    return bad


if __name__ == "__main__":
    sys.exit(print_table(sys.argv[1:] or default_architectures()) > 0)
