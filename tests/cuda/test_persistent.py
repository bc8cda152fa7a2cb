"""The persistent forward on a GPU: the values it must have, every block size, and CUDA graphs."""

import laws
import pytest
import torch
from laws import GUNN_15
from tolerance import Case

CASES = [
    *GUNN_15,
    Case(36, 3, batch=2, height=8, width=8),
    Case(9, 9, batch=3, height=6, width=6),
    Case(36, 3, batch=40, height=16, width=16),
    Case(24, 2, batch=1, height=33, width=17),
    Case(48, 4, batch=2, height=9, width=8),
    Case(240, 20, batch=64, height=32, width=32),  # half images, some channels streamed
]


@pytest.fixture(autouse=True)
def persistent(monkeypatch):
    """Layers run on the persistent driver where it takes them."""
    monkeypatch.setenv("GUNN_CUDA_DRIVER", "persistent")


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", CASES[:-1], ids=str)
def test_values_and_gradients(case, mode, precision, device):
    case = Case(**{**vars(case), "mode": mode})
    laws.rule_holds(laws.sample_for(precision, case).to(device), precision)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_bits_every_run_and_replayed(case, device):
    layer = case.layer(laws.GunnLayer).to(device)
    x = torch.randn(case.batch, case.channels, case.height, case.width, device=device, dtype=torch.bfloat16)

    def forward():
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            return layer(x)

    expected = forward()
    assert expected.isfinite().all()
    assert all(torch.equal(forward(), expected) for _ in range(20))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = forward()
    for _ in range(20):
        y.zero_()
        graph.replay()
        assert torch.equal(y, expected)


def test_it_agrees_with_the_staged_driver(monkeypatch, device):
    """On values whose ReLUs do not flip: whatever differs is rounding."""
    case = Case(300, 25, batch=8, height=16, width=16, mode="eval")
    values = laws.sample_for("bfloat16", case).to(device)
    layer = values.layer(laws.GunnLayer, torch.bfloat16).to(device)
    with torch.no_grad():
        persistent = layer(values.x.bfloat16()).double()
        monkeypatch.setenv("GUNN_CUDA_DRIVER", "staged")
        staged = layer(values.x.bfloat16()).double()
    assert (persistent - staged).norm() < 0.02 * staged.norm()
