"""What is in the package, and what an unbuilt clone says."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import gunn_ext

CLONE = Path(__file__).resolve().parent.parent


def test_version_stands_in_one_place():
    assert gunn_ext.__version__ == metadata.version("gunn-ext")
    assert f'version = "{gunn_ext.__version__}"' in (CLONE / "pyproject.toml").read_text()
    assert gunn_ext.info()["gunn_ext"] == gunn_ext.__version__


def test_info_names_backends_and_why_one_is_missing():
    info = gunn_ext.info()
    assert "cpu" in info["backends"]
    assert info["simd"] in ("avx512bf16", "avx512", "avx2", "baseline")
    assert info["threads"] >= 1
    if not info["cuda_kernels"]:
        assert "cuda" not in info["backends"]
        assert "CUDA" in info["cuda_kernels_missing"]


def test_a_folder_without_the_compiled_module_says_what_to_do(tmp_path):
    """As in a clone that was never built: the sources alone, first on the path."""
    package = tmp_path / "gunn_ext"
    package.mkdir()
    for source in (CLONE / "gunn_ext").glob("*.py"):
        (package / source.name).write_text(source.read_text())
    # -S and an explicit path: no import hook of an editable install steps in.
    site = [entry for entry in sys.path if entry.endswith("site-packages")]
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}]; sys.path += {site!r}; import gunn_ext"
    found = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode != 0
    assert "gunn_ext is not built here" in found.stderr
    assert "pip install -e ." in found.stderr


def test_wheel_carries_types_and_data():
    installed = {str(file) for file in metadata.files("gunn-ext") or []}
    if not any(name.startswith("gunn_ext/") and name.endswith("py.typed") for name in installed):
        pytest.skip("an editable install: its files are those of the clone")
    for name in (
        "gunn_ext/data/digits.npz",
        "gunn_ext/data/DIGITS.md",
        "gunn_ext/_core.pyi",
        "gunn_ext/ops.py",
        "gunn_ext/training/recipes/gunn15-cifar10.yaml",
    ):
        assert name in installed, name
    assert not any(name.startswith(("tests/", "benchmarks/", "csrc/")) for name in installed)


def test_no_function_of_the_standard_library_is_compiled_for_one_instruction_set(tmp_path):
    """The linker would keep one copy for all machines; see csrc/cpu/simd.h."""
    flags = ["-O3", "-std=c++17", "-fopenmp", "-fPIC", "-Wno-psabi", "-Wno-ignored-attributes", f"-I{CLONE}/csrc"]
    level = ["-DGUNN_LEVEL=baseline", "-DGUNN_VECTOR_BYTES=16"]
    made = tmp_path / "level.o"
    subprocess.run(["g++", *flags, *level, "-c", str(CLONE / "csrc/cpu/level.cpp"), "-o", str(made)], check=True)
    symbols = subprocess.run(["nm", "-C", str(made)], capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line for line in symbols if line[17:18] in ("W", "V", "u")] == []  # weak: any object's copy may win
    assert any("kernels_baseline" in line for line in symbols)


def test_the_python_example_of_the_readme_runs():
    names: dict = {}
    example = (CLONE / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(compile(example, "README.md", "exec"), names)
    assert names["y"].shape == (16, 240, 32, 32)
    assert names["logits"].shape == (8, 100)
    assert [tuple(stage.shape[1:]) for stage in names["stages"]] == [(240, 32, 32), (300, 16, 16), (360, 8, 8)]
