"""The CPU core from C++, under the sanitizers."""

import subprocess
from pathlib import Path

import pytest

CLONE = Path(__file__).resolve().parent.parent
SANITIZERS = ["thread", "address,undefined"]


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_passes_on_three_threads_are_clean_and_repeatable(sanitizer, tmp_path):
    program = tmp_path / "threads"
    flags = ["-O1", "-g", "-std=c++17", "-pthread", "-Wno-psabi", "-Wno-ignored-attributes", "-DGUNN_VECTOR_BYTES=16"]
    source = CLONE / "tests/cpp/threads.cpp"
    sanitize = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    subprocess.run(["g++", *flags, *sanitize, f"-I{CLONE}/csrc", str(source), "-o", str(program)], check=True)
    found = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr[-4000:]
    assert found.stdout == "0 tensors differ between runs\n"
    assert found.stderr == ""
