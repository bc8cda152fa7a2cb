"""The choice of kernels: which GPUs they run on, and what is said where there are none."""

import pytest
import torch

from gunn_ext import ops

DEFAULT = "80-real;86-real;89-real;90a-real;90-virtual"


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("80-real", (8, 0), True),
        ("80-real", (8, 6), True),  # machine code: its own major version, from its own minor on
        ("86-real", (8, 0), False),
        ("80-real", (7, 5), False),
        ("80-real", (9, 0), False),
        ("90a-real", (9, 0), True),  # with a letter: exactly its own
        ("90a-real", (9, 1), False),
        ("90a", (9, 0), True),
        ("90a", (10, 0), False),
        ("90a-virtual", (10, 0), False),
        ("100f-real", (10, 0), True),
        ("80-virtual", (8, 0), True),  # PTX: everything that is not older
        ("80-virtual", (12, 0), True),
        ("86-virtual", (8, 0), False),
        ("80", (8, 0), True),  # both
        ("80", (9, 0), True),
        ("90", (8, 9), False),
        ("100-real", (10, 3), True),  # two digits of a major version
        ("120-virtual", (10, 0), False),
        (DEFAULT, (7, 5), False),
        (DEFAULT, (8, 0), True),
        (DEFAULT, (8, 7), True),
        (DEFAULT, (9, 0), True),
        (DEFAULT, (10, 0), True),
        (DEFAULT, (12, 1), True),
        ("", (9, 0), False),
        ("80-real;;90-real;", (9, 0), True),
    ],
)
def test_runs_on(architectures, capability, runs):
    assert ops.runs_on(architectures, capability) is runs


def test_a_gpu_that_was_not_built_for_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Test GPU")
    capabilities = {101: (9, 0), 102: (7, 0), 103: (8, 6)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.get)
    with pytest.raises(RuntimeError, match=r"built for 80-real, but cuda:101 \(Test GPU\) is sm_90: .*ARCHS=90"):
        ops._check_gpu(101, "80-real")
    with pytest.raises(RuntimeError, match=r"cuda:102 \(Test GPU\) is sm_70: the kernels need compute capability 8\.0"):
        ops._check_gpu(102, "80-real")
    ops._check_gpu(103, "80-real")


def test_backends_are_named():
    assert ops.backend("cpu", torch.float32).startswith("cpu/")
    assert ops.backend("cpu", torch.bfloat16) == ops.backend("cpu", torch.float32)
    with pytest.raises(TypeError, match="expected float64, float32, bfloat16 or float16, got torch.int8"):
        ops.backend("cpu", torch.int8)
    with pytest.raises(RuntimeError, match="built without kernels for xpu .* the input is on xpu.* Move the model"):
        ops.backend("xpu", torch.float32)
