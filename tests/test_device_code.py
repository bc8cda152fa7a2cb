"""The CUDA kernels as nvcc compiles them: without a warning, in registers, on tensor cores where they should be."""

import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import device_code
import pytest
from device_code import DTYPES, HOT, LARGE, PERSISTENT, PRODUCTS

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
ON_TENSOR_CORES = ("bfloat16", "float16", "tensor_float32")
OLDER = [("bfloat16", "80"), ("bfloat16", "89"), ("tensor_float32", "80"), ("tensor_float32", "89")]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Machine code of every dtype for sm_90a, of one of each size for others, two compilers at a time; its folder."""
    folder = tmp_path_factory.mktemp("device_code")
    with ThreadPoolExecutor(2) as pool:
        code = {dtype: pool.submit(device_code.kernels, dtype, "90a", folder) for dtype in DTYPES}
        older = {
            (dtype, architecture): pool.submit(device_code.kernels, dtype, architecture, folder)
            for dtype, architecture in OLDER
        }
        yield code, older, folder
        pool.shutdown(cancel_futures=True)


def hot_kernels(compiled, dtype):
    found = [kernel for kernel in compiled[0][dtype].result() if kernel.plain_name in HOT]
    assert {kernel.plain_name for kernel in found} == set(HOT)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_kernel_spills_or_has_a_stack(compiled, dtype):
    hot_kernels(compiled, dtype)
    assert [kernel for kernel in compiled[0][dtype].result() if kernel.spilled or kernel.stack] == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_on_tensor_cores_unless_the_dtype_is_wider(compiled, dtype):
    """A chunk is two steps in depth of eight products side by side; in a large tile of ten, of two fragments each."""
    expected = {"SmallTile": 16 if dtype in ON_TENSOR_CORES else 0, "LargeTile": 40}
    kernels = hot_kernels(compiled, dtype)
    for kernel in kernels:
        assert kernel.tensor_cores == expected[kernel.tile], kernel
    large = {kernel.plain_name for kernel in kernels if kernel.tile == "LargeTile"}
    assert large == (set(LARGE) if dtype in ("bfloat16", "float16") else set())


@pytest.mark.parametrize("architecture", ["80", "89"])
def test_large_tiles_fit_older_gpus(compiled, architecture, tmp_path):
    """In registers, and in the 99 kB of shared memory that a block has at most where it has least."""
    found = [kernel for kernel in compiled[1]["bfloat16", architecture].result() if kernel.tile == "LargeTile"]
    assert {kernel.plain_name for kernel in found} == set(LARGE)
    assert [kernel for kernel in found if kernel.spilled or kernel.stack] == []
    assert device_code.pool_bytes(tmp_path)["bfloat16", "LargeTile"] <= 99 * 1024


@pytest.mark.parametrize(("dtype", "architecture"), [*OLDER, *((dtype, "90a") for dtype in ON_TENSOR_CORES)])
def test_persistent_kernels_keep_everything_in_registers(compiled, dtype, architecture):
    """A block's threads share 65,536 registers, in the largest one to the last; products run on tensor cores."""
    code, older, _ = compiled
    found = (code[dtype] if architecture == "90a" else older[dtype, architecture]).result()
    assert [kernel for kernel in found if kernel.spilled or kernel.stack] == []
    expected = PERSISTENT if dtype == "tensor_float32" else PERSISTENT + PRODUCTS
    kernels = [kernel for kernel in found if kernel.plain_name in PERSISTENT + PRODUCTS]
    assert {kernel.plain_name for kernel in kernels} == set(expected)
    for kernel in kernels:
        assert kernel.registers * kernel.threads <= 65536, kernel
        assert kernel.tensor_cores > 0, kernel


@pytest.mark.parametrize("dtype", ON_TENSOR_CORES)
def test_words_travel_without_fences(compiled, dtype):
    """Relaxed accesses of the whole device, and nothing that orders or counts: what a word says arrives with it."""
    code, _, folder = compiled
    code[dtype].result()
    found = device_code.entries(device_code.intermediate(dtype, "90a", folder).read_text())
    persistent = [text for name, text in found.items() if any(kernel in name for kernel in PERSISTENT)]
    assert len(persistent) == (23 if dtype == "tensor_float32" else 30)
    for text in persistent:
        assert "ld.relaxed.gpu.b64" in text
        assert "st.relaxed.gpu.b64" in text
        assert not re.search(r"\b(membar|fence|atom|red|barrier\.cluster)\b|\.(acquire|release)\.", text)


def test_ptx_for_later_gpus_has_every_kernel(compiled, tmp_path):
    """Of a dtype that takes seconds; a wheel with PTX has that of all."""
    ptx = device_code.ptx("float32", "90", tmp_path)
    assert ".target sm_90\n" in ptx
    assert ptx.count(".entry ") == len(compiled[0]["float32"].result())
