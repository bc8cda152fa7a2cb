"""Tests on a GPU: marked `cuda`, skipped with a reason where there is none or where no kernels were built for it.

A GPU that has met an illegal address answers every later call of the process with that error. The first test to see it
therefore ends its process: under pytest-xdist (`-n 4`) another takes over, without it the session stops.
"""

import os
import time
from pathlib import Path

import pytest
import torch
from tolerance import tensor_float

from gunn_ext import ops

HERE = Path(__file__).parent
DEVICE = "cuda"
_broken: list[str] = []


def missing() -> str | None:
    """Why nothing can run here."""
    if not torch.cuda.is_available():
        return "no CUDA device: torch.cuda.is_available() is false"
    build = ops.core_info()
    if not build["cuda"]:
        return f"gunn_ext was built without CUDA kernels: {build['cuda_reason']}"
    try:
        ops.CudaBackend().check(torch.device(DEVICE))
    except RuntimeError as error:
        return str(error)
    return None


def pytest_collection_modifyitems(items):
    reason = missing()
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.cuda)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def device():
    return torch.device(DEVICE)


@pytest.fixture(autouse=True)
def float32_is_float32():
    """torch multiplies the float32 of convolutions as TF32 unless told otherwise."""
    with tensor_float(False):
        yield


@pytest.fixture(autouse=True)
def errors_stay_with_the_test_that_caused_them(request):
    """What was launched has run when the test ends."""
    yield
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            _broken.append(f"{request.node.nodeid}: {error}")
            raise


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid):
    if not _broken:
        return
    if "PYTEST_XDIST_WORKER" in os.environ:
        time.sleep(0.5)  # the report is on its way
        os._exit(1)
    pytest.exit(f"the GPU can no longer be used by this process after {_broken[0]}", returncode=1)
