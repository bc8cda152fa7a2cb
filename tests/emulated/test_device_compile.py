"""The same kernel files compile with nvcc, without a warning, for GPUs with and without clusters."""

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize("program", ["grid", "tensor"])
def test_nvcc(program, tmp_path):
    architectures = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ("80", "90a")]
    includes = [f"-I{HERE.parents[1] / 'csrc'}", f"-I{HERE / 'kernels'}"]
    strict = ["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror"]
    source, target = HERE / "kernels" / f"{program}.cu", tmp_path / "program.o"
    command = ["nvcc", "-std=c++17", *architectures, *includes, *strict, "-c", str(source), "-o", str(target)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
