"""The persistent driver on a GPU: the values it must have, every block size, and CUDA graphs."""

import laws
import pytest
import torch
from laws import GUNN_15
from tolerance import Case, tensor_float

CASES = [
    *GUNN_15,
    Case(36, 3, batch=2, height=8, width=8),
    Case(9, 9, batch=3, height=6, width=6),
    Case(36, 3, batch=40, height=16, width=16),
    Case(24, 2, batch=1, height=33, width=17),
    Case(48, 4, batch=2, height=9, width=8),
    Case(120, 3, shortcut=False, batch=2, height=8, width=8),  # weights through a ring
    # More blocks than an exchange takes: they take turns.
    Case(36, 3, batch=300, height=8, width=8),
    Case(36, 3, batch=150, height=16, width=32),
    Case(120, 3, shortcut=False, batch=300, height=4, width=6),
    Case(108, 3, expansion=3, units=2, batch=2, height=12, width=16),  # two units
    Case(108, 3, expansion=3, units=2, batch=150, height=16, width=16),
    Case(240, 20, batch=64, height=32, width=32),  # half images, some channels streamed; several launches backward
]
LARGE = CASES[-1]


@pytest.fixture(autouse=True)
def persistent(monkeypatch):
    """Layers run on the persistent driver where it takes them."""
    monkeypatch.setenv("GUNN_CUDA_DRIVER", "persistent")


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "tf32"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", CASES[:-1], ids=str)
def test_values_and_gradients(case, mode, precision, device):
    case = Case(**{**vars(case), "mode": mode})
    laws.rule_holds(laws.sample_for(precision, case).to(device), precision)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_bits_every_run_and_replayed(case, device):
    layer = case.layer(laws.GunnLayer).to(device)
    size = (case.batch, case.channels, case.height, case.width)
    x, grad = torch.randn(2, *size, device=device, dtype=torch.bfloat16).unbind()
    x.requires_grad_()

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            y = layer(x)
        return [y.detach(), *torch.autograd.grad(y, (x, *layer.parameters()), grad)]

    def same(found):
        return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    expected = step()
    assert all(tensor.isfinite().all() for tensor in expected)
    assert all(same(step()) for _ in range(20))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(20):
        for tensor in captured:
            tensor.zero_()
        graph.replay()
        assert same(captured)


@pytest.mark.parametrize(("precision", "case"), [("bfloat16", CASES[0]), ("tf32", CASES[3])], ids=str)
def test_recomputation_changes_no_bit(device, precision, case):
    dtype, fast = laws.PRECISIONS[precision]
    values = laws.sample_for(precision, case).to(device)
    with tensor_float(fast):
        laws.recomputation_changes_no_bit(values, dtype)


def test_it_agrees_with_the_staged_driver(monkeypatch, device):
    """Forward, and backward up to ReLUs that flip, at full size: whatever differs is rounding."""
    layer = LARGE.layer(laws.GunnLayer).to(device)
    size = (LARGE.batch, LARGE.channels, LARGE.height, LARGE.width)
    x, grad = torch.randn(2, *size, device=device, dtype=torch.bfloat16).unbind()
    x.requires_grad_()

    def step(driver):
        monkeypatch.setenv("GUNN_CUDA_DRIVER", driver)
        with torch.autocast("cuda", torch.bfloat16):
            y = layer(x)
        return [y.detach(), *torch.autograd.grad(y, (x, *layer.parameters()), grad)]

    for persistent, staged in zip(step("persistent"), step("staged"), strict=True):
        assert (persistent.double() - staged.double()).norm() < 0.1 * staged.double().norm()
