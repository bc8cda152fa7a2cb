"""What only a GPU shows: streams, graphs, compiled models, memory, other devices, errors, very large tensors."""

from dataclasses import replace

import laws
import pytest
import torch
from laws import PRECISIONS, SMALL
from tolerance import Case, run, run_sample, sample, tensor_float

from gunn_ext import GunnLayer, ReferenceGunnLayer, ops

MEDIUM = Case(60, 5, batch=5, height=29, width=24)
DTYPES = [torch.float32, torch.bfloat16]
A_WHILE = 400_000_000  # clock cycles: a fifth of a second


def on(values, dtype):
    """A layer with float32 parameters, and input and gradient in ``dtype``."""
    return laws.layer_of(values), values.x.to(dtype, copy=True), values.grad.to(dtype, copy=True)


def step(layer, x, grad):
    """One training step: the output, the gradients of input and parameters."""
    x = x.requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], grad)]


def equal(ours, expected):
    return len(ours) == len(expected) and all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


# --- streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("mode", "momentum"), [("train", 0.1), ("train", None), ("eval", 0.1), ("frozen", 0.1)])
def test_nothing_waits_for_the_gpu(mode, momentum, dtype, recompute, device):
    """The GPU is kept busy; a training step is over for the host before the GPU has begun with it."""
    values = sample(replace(SMALL, mode=mode)).to(device)
    layer, x, grad = on(values, dtype)
    layer.recompute, layer.momentum = recompute, momentum
    for _ in range(2):  # loads the kernels, fills the allocator's cache
        step(layer, x, grad)
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(A_WHILE)
        step(layer, x, grad)
        done.record()
        over = done.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not over, "the step came back after the GPU was done with it"


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_work_is_queued_in_the_current_stream(precision, mode, device):
    """Input and gradient are ready only after a long kernel of that stream, and nobody waits for it."""
    dtype, fast = PRECISIONS[precision]
    values = sample(replace(SMALL, mode=mode)).to(device)
    with tensor_float(fast):
        expected = run_sample(values, GunnLayer, dtype)
        layer = laws.layer_of(values, dtype)
        ready_x, ready_grad = values.x.to(dtype), values.grad.to(dtype)
        x, grad = (torch.full_like(ready_x, float("nan")) for _ in range(2))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(A_WHILE)
            x.copy_(ready_x)
            grad.copy_(ready_grad)
            ours = run(layer, x, grad)
        stream.synchronize()
    assert ours.equal(expected)


def test_the_same_bits_in_two_streams_at_once(device):
    cases = [MEDIUM, replace(MEDIUM, segments=4, batch=4)]
    samples = [sample(case).to(device) for case in cases]
    expected = [run_sample(values, GunnLayer, torch.float32) for values in samples]
    layers = [laws.layer_of(values) for values in samples]
    streams = [torch.cuda.Stream() for _ in samples]
    torch.cuda.synchronize()
    results = []
    for _ in range(10):
        for stream, layer, values, wanted in zip(streams, layers, samples, expected, strict=True):
            with torch.cuda.stream(stream):
                results.append((run(layer, values.x, values.grad), wanted))
    torch.cuda.synchronize()
    for ours, wanted in results:
        assert torch.equal(ours.y, wanted.y)
        assert all(torch.equal(ours.gradients[name], gradient) for name, gradient in wanted.gradients.items())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_same_bits_under_load(precision, device):
    dtype, fast = PRECISIONS[precision]
    values = sample(MEDIUM).to(device)
    with tensor_float(fast):
        quiet = run_sample(values, GunnLayer, dtype)
        matrix, product = (torch.randn(4096, 4096, device=device, dtype=torch.bfloat16) for _ in range(2))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        busy = []
        for _ in range(20):
            with torch.cuda.stream(stream):
                for _ in range(300):  # of 0.2 ms on an H100
                    torch.mm(matrix, matrix, out=product)
            ours = run_sample(values, GunnLayer, dtype)
            busy.append(not stream.query())
            assert ours.equal(quiet)
        assert any(busy), "the load was over before the layer"
        stream.synchronize()


# --- captured and compiled --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", [SMALL, replace(MEDIUM, units=2), replace(SMALL, mode="frozen")], ids=str)
def test_replays_of_a_captured_training_step_equal_eager(case, precision, recompute, device):
    dtype, fast = PRECISIONS[precision]
    values = sample(case).to(device)
    layer, eager = (laws.layer_of(values, dtype, recompute=recompute) for _ in range(2))
    x, grad = values.x.to(dtype, copy=True), values.grad.to(dtype)
    inputs = [values.x.to(dtype), values.x.flip(0).to(dtype), (2 * values.x).to(dtype)]
    with tensor_float(fast):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step(layer, x, grad)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = step(layer, x, grad)
        layer.load_state_dict(values.state)
        for value in (*inputs, *inputs):
            with torch.no_grad():
                x.copy_(value)
            graph.replay()
            assert equal(outputs, step(eager, value, grad))
            assert equal(list(layer.buffers()), list(eager.buffers()))


def test_replays_of_a_captured_evaluation_equal_eager(device):
    values = sample(replace(MEDIUM, mode="eval")).to(device)
    layer, x = laws.layer_of(values), values.x.clone()
    with torch.no_grad():
        layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        for value in (values.x, -values.x):
            x.copy_(value)
            graph.replay()
            assert torch.equal(y, layer(value))


def close(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    return True


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_compiled_layer_equals_eager(mode, recompute, device):
    pytest.importorskip("triton")
    values = sample(replace(SMALL, mode=mode)).to(device)
    laws.compiled_layer_equals_eager(values, recompute, close)


def test_layer_compiled_to_graphs_equals_eager(device):
    """mode="reduce-overhead" captures CUDA graphs by itself, unless something in the layer forbids it."""
    pytest.importorskip("triton")
    skips = torch._dynamo.utils.counters["inductor"]
    skips.clear()
    laws.compiled_layer_equals_eager(sample(SMALL).to(device), True, close, rounds=3, mode="reduce-overhead")
    assert skips["cudagraph_skips"] == 0


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["train", "frozen"])
@pytest.mark.parametrize("case", [SMALL, replace(SMALL, units=2, shortcut=False)], ids=str)
def test_bytes_saved_for_backward(case, mode, dtype, device):
    laws.input_output_parameters_and_statistics_are_saved(sample(replace(case, mode=mode)).to(device), dtype)


def peak_of(function):
    """Bytes that a call needs at its peak beside what was there."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    return torch.cuda.max_memory_allocated() - before


def stated_peak(layer, x):
    """Output and gradients, what is kept for the backward, and the workspace the kernels ask for."""
    sizes = (layer.segments, layer.expansion, layer.num_units, layer.shortcut)
    call = ops._call(x, *sizes, layer.residual, False, batch_statistics=True, eps=layer.eps)
    forward, backward = call.workspaces(not layer.recompute)
    statistics = 4 * 2 * layer.segments * call.shape.rows
    saved = 0 if layer.recompute else torch.Size(ops._saved_shape(x, *sizes)).numel() * x.element_size()
    kept = x.nbytes + statistics + saved
    gradients = x.nbytes + sum(p.nbytes for p in layer.parameters())
    return kept + max(forward + 8 * statistics, gradients + backward) + (1 << 20)  # the rest: rounding, small tensors


def train(layer, x, grad):
    x.grad = None
    layer.zero_grad(set_to_none=True)
    layer(x).backward(grad)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_peak_memory_is_as_stated_and_below_eager(dtype, recompute, channels_last, device):
    layer = GunnLayer(240, 20, shortcut=True, recompute=recompute, device=device)
    eager = ReferenceGunnLayer(240, 20, shortcut=True, device=device)
    x, grad = (torch.randn(16, 240, 32, 32, device=device, dtype=dtype) for _ in range(2))
    if channels_last:
        x, grad = (t.to(memory_format=torch.channels_last) for t in (x, grad))
    x.requires_grad_()
    peaks = []
    for module in (layer, eager):
        train(module, x, grad)  # what libraries keep for good
        x.grad = None
        module.zero_grad(set_to_none=True)
        peaks.append(peak_of(lambda module=module: train(module, x, grad)))
    stated = stated_peak(layer, x)
    print(f"peak {peaks[0] / 2**20:.1f} MiB, stated {stated / 2**20:.1f}, eager {peaks[1] / 2**20:.1f}")
    assert peaks[0] <= stated
    if recompute:
        assert peaks[0] < peaks[1]


def test_nothing_is_left_behind(device):
    layer = GunnLayer(24, 3, device=device)
    x, grad = (torch.randn(4, 24, 16, 16, device=device) for _ in range(2))
    levels = []
    for _ in range(4):
        step(layer, x, grad)
        torch.cuda.synchronize()
        levels.append(torch.cuda.memory_allocated())
    assert levels[1:] == levels[:1] * 3


# --- devices ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize("where", [0, 1])
def test_the_tensor_s_device_counts_not_the_current_one(where, current):
    values = sample(SMALL)
    expected = run_sample(values.to("cuda:0"), GunnLayer, torch.float32)
    with torch.cuda.device(current):
        ours = run_sample(values.to(f"cuda:{where}"), GunnLayer, torch.float32)
        assert torch.cuda.current_device() == current
    assert ours.y.device == torch.device("cuda", where)
    assert ours.to("cpu").equal(expected.to("cpu"))


# --- errors -----------------------------------------------------------------------------------------------------------


def test_a_gpu_the_kernels_were_not_built_for_is_named(monkeypatch, device):
    layer, x = SMALL.layer(GunnLayer, device=device), torch.randn(2, 12, 4, 4, device=device)
    ops._check_gpu.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    try:
        with pytest.raises(RuntimeError, match=r"(?s)were built for .*cuda:0 .* is sm_75: .*compute capability 8\.0"):
            layer(x)
    finally:
        ops._check_gpu.cache_clear()


def test_a_launch_that_fails_names_kernel_and_shape_and_leaves_nothing_behind(monkeypatch, device):
    values = sample(SMALL).to(device)
    expected = run_sample(values, GunnLayer, torch.float32)
    placement = ops.CudaBackend.placement
    with monkeypatch.context() as patch:
        patch.setattr(ops.CudaBackend, "placement", lambda *given: placement(*given) | {"device": 99})
        with pytest.raises(
            ops._core.CoreError,
            match=r"(?s)\w+: cudaSetDevice failed: .*invalid device.*layer \(3, 12, 6, 10\), segments 3",
        ):
            laws.layer_of(values)(values.x)
    torch.cuda.synchronize()
    assert run_sample(values, GunnLayer, torch.float32).equal(expected)


# --- large tensors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True])
def test_offsets_beyond_31_bits(channels_last, device):
    """2.2 billion elements; pixels are independent of each other in frozen mode, so parts of the batch tell the whole.

    The pre-activations of one segment are more than 2^31 elements, too.
    """
    case = Case(16, 2, expansion=1, batch=130, height=1024, width=1024, mode="frozen")
    shape = (case.batch, case.channels, case.height, case.width)
    layer = case.layer(GunnLayer, device=device)
    with torch.no_grad():
        for bn in layer.batch_norms():
            bn.bias.uniform_(-0.5, 0.5)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    meta = torch.empty(shape, device="meta", dtype=torch.bfloat16)
    sizes = (case.segments, case.expansion, case.units, case.shortcut, case.residual)
    placed = torch.empty(0, device=device, dtype=torch.bfloat16)
    needed = 6 * meta.nbytes + max(_workspaces(placed, shape, sizes))
    free = torch.cuda.mem_get_info()[0]
    if free < 1.1 * needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} are free")
    x, grad = (
        torch.empty(shape, device=device, dtype=torch.bfloat16, memory_format=layout).normal_() for _ in range(2)
    )
    assert x.numel() > 2**31
    y, grad_x, *whole = step(layer, x, grad)

    for image in (0, 1, 63, 64, 127, 128, 129):  # element 2^31 is the first of image 128
        part = slice(image, image + 1)
        part_y, part_grad_x, *_ = step(layer, x.detach()[part], grad[part])
        assert torch.equal(part_y, y[part])
        assert torch.equal(part_grad_x, grad_x[part])
    del y, grad_x
    parts = [step(layer, a, b)[2:] for a, b in zip(x.detach().split(13), grad.split(13), strict=True)]
    for gradient, of_parts in zip(whole, zip(*parts, strict=True), strict=True):
        expected = sum(part.double() for part in of_parts)
        assert (gradient - expected).norm() <= 1e-3 * expected.norm()


def _workspaces(x, shape, sizes):
    """Of forward and backward for a tensor of another shape on the device of ``x``."""
    found = ops._backend_of(x.device)
    layer_shape = ops._layer_shape(found.core, shape, *sizes)
    options = found.core.Options(layer_shape, batch_statistics=False, eps=1e-5, threads=1, **found.device_options)
    return found.core.sizes(layer_shape, options, str(x.dtype).removeprefix("torch."), False)[-2:]
