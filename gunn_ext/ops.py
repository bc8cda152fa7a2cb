"""The only door to the compiled core: checks, allocation, dispatch, and what torch must know about the layer.

`gunn_layer` is an ``autograd.Function`` over two ``torch.library`` operators that are functional at the boundary: no
input is overwritten, batch statistics come back as an output, and Python updates the running buffers once. Memory,
workspace included, comes from torch.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

try:
    import gunn_ext._core as _core
except ImportError as error:
    raise ImportError(
        "gunn_ext is not built here: this folder holds its sources, without the compiled module gunn_ext._core "
        f"({error}). Run `pip install -e .` in the clone to build it in place, or `pip install .` and start Python "
        "from another folder."
    ) from error

from gunn_ext.choice import choose_driver
from gunn_ext.parameters import LAYER_DTYPES, STATISTICS_DTYPES, StackedBatchNorm, StackedLayer, Unit
from gunn_ext.reference import memory_format_of

# P, K, M, shortcut, residual, eps: what the operators take beside tensors.
LayerOptions = tuple[int, int, int, bool, bool, float]

# Below this many multiply-adds one thread is faster than waking a second.
_SERIAL_WORK = 1_000_000


def core_info() -> dict[str, Any]:
    """What the compiled module says of its build, and the instruction set chosen on this machine."""
    return {**_core.build_info(), "simd": _core.simd_level()}


def multiply_adds(rounds: int) -> float:
    """Multiply float32 registers ``rounds`` times on every thread of torch; returns the FLOPs, for a yardstick."""
    return float(_core.multiply_adds(torch.get_num_threads(), rounds))


# --- The backends --------------------------------------------------------------------------------------------------


class CpuBackend:
    """The CPU kernels."""

    core = _core
    device_options: dict[str, Any] = {}

    def name(self, device: torch.device) -> str:
        """What computes, for people."""
        return f"cpu/{self.core.simd_level()}"

    def placement(self, x: Tensor, expansion: int, tensor_float: bool) -> dict[str, Any]:
        """Options of the core that say where and how to run."""
        batch, channels, height, width = x.shape
        work = batch * channels * height * width * channels * expansion
        return {"threads": 1 if work < _SERIAL_WORK else torch.get_num_threads()}

    def check(self, device: torch.device) -> None:
        """Raise a RuntimeError if ``device`` cannot run the kernels."""

    def allows_tensor_float(self) -> bool:
        """Whether torch's switches let convolutions of float32 run as TF32."""
        return False

    def kept_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What pre-activations of a layer of ``dtype`` are kept in for the backward."""
        return _wide(dtype)


@torch.compiler.assume_constant_result
def _convolutions_may_use_tensor_float() -> bool:
    # A compiled model keeps what the switch said when it was compiled: dynamo cannot trace the switch itself.
    return bool(torch.backends.cudnn.conv.fp32_precision == "tf32")  # type: ignore[attr-defined]


class CudaBackend:
    """The CUDA kernels of ``core``: on the tensor's GPU, in torch's current stream there."""

    device_options: dict[str, Any] = {"device": 0}

    def __init__(self, core: Any = _core) -> None:
        """``core`` is the compiled module, or one like it whose CUDA kernels are emulated."""
        self.core = core

    def name(self, device: torch.device) -> str:
        """What computes, for people; `drivers` says which of the drivers takes a layer."""
        return f"cuda/{os.environ.get('GUNN_CUDA_DRIVER') or 'chosen'}"

    def placement(self, x: Tensor, expansion: int, tensor_float: bool) -> dict[str, Any]:
        """Options of the core that say where and how to run."""
        options = {"threads": 1, "device": 0, "tensor_float": tensor_float}
        if x.is_cuda:
            options |= {"device": x.device.index, "stream": torch.cuda.current_stream(x.device).cuda_stream}
        return options

    def check(self, device: torch.device) -> None:
        """Raise a RuntimeError if ``device`` is a GPU the kernels were not built for."""
        if device.type == "cuda" and not torch.compiler.is_compiling():
            index = torch.cuda.current_device() if device.index is None else device.index
            _check_gpu(index, self.core.build_info()["cuda_architectures"])

    def allows_tensor_float(self) -> bool:
        """Whether torch's switches let convolutions of float32 run as TF32."""
        return _convolutions_may_use_tensor_float()

    def kept_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What pre-activations of a layer of ``dtype`` are kept in for the backward."""
        return dtype


def runs_on(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether kernels built for ``architectures`` run on a GPU of this compute capability.

    Args:
        architectures: As CMake lists them: ``80;86-real;90a-real;90-virtual``. Machine code runs on its own major
            version from its own minor on, with a letter on exactly its own; PTX (not ``-real``) on everything newer.
        capability: Major and minor, as ``torch.cuda.get_device_capability`` gives them.
    """
    for architecture in filter(None, architectures.split(";")):
        number, _, kind = architecture.partition("-")
        special = not number.isdigit()
        built = int(number.rstrip("af")) // 10, int(number.rstrip("af")) % 10
        if special:
            if built == capability:
                return True
            continue
        if kind != "virtual" and built[0] == capability[0] and built[1] <= capability[1]:
            return True
        if kind != "real" and built <= capability:
            return True
    return False


@functools.cache
def _check_gpu(index: int, architectures: str) -> None:
    capability = torch.cuda.get_device_capability(index)
    if runs_on(architectures, capability):
        return
    version = "{}{}".format(*capability)
    advice = (
        f"rebuild with GUNN_CUDA_ARCHS={version}"
        if capability >= (8, 0)
        else "the kernels need compute capability 8.0; move the model to the CPU, or use ReferenceGunnLayer"
    )
    raise RuntimeError(
        f"gunn_ext's CUDA kernels were built for {architectures}, but cuda:{index} "
        f"({torch.cuda.get_device_name(index)}) is sm_{version}: {advice}. `gunn info` shows the build."
    )


# By device type. A backend here serves every tensor of its device.
_BACKENDS: dict[str, CpuBackend | CudaBackend] = {"cpu": CpuBackend()}
if _core.build_info()["cuda"]:
    _BACKENDS["cuda"] = CudaBackend()


def _backend_of(device: torch.device) -> CpuBackend | CudaBackend:
    """What serves a device; tensors without data are treated as the CPU's.

    Raises:
        RuntimeError: Nothing here serves it.
    """
    found = _BACKENDS.get("cpu" if device.type == "meta" else device.type)
    if found is None:
        reason = _core.build_info()["cuda_reason"]
        rebuild = "Rebuild with GUNN_CUDA=ON, move" if device.type == "cuda" else "Move"
        raise RuntimeError(
            f"gunn_ext was built without kernels for {device.type} ({reason}), but the input is on {device}. {rebuild} "
            "the model and its input to the CPU, or use gunn_ext.reference.ReferenceGunnLayer. `gunn info` shows the "
            "build."
        )
    return found


def may_use_tensor_float(x: Tensor) -> bool:
    """Whether a GPU may multiply a layer on ``x`` as TF32; asked once for both passes, which must compute alike."""
    return x.dtype == torch.float32 and _backend_of(x.device).allows_tensor_float()


def backend(device: torch.device | str, dtype: torch.dtype) -> str:
    """Name what computes a gradual layer: ``cpu/avx512``, ``cuda/staged``.

    On the CPU the instruction set; on a GPU the driver that GUNN_CUDA_DRIVER asks for, or ``cuda/chosen`` by the table
    of what was measured; `drivers` says which one takes a layer.

    Raises:
        RuntimeError: Nothing here serves ``device``.
        TypeError: ``dtype`` is not a floating dtype of the layer.
    """
    found = _backend_of(torch.device(device))
    if dtype not in LAYER_DTYPES:
        raise TypeError(f"GunnLayer: expected float64, float32, bfloat16 or float16, got {dtype}; convert the input.")
    return found.name(torch.device(device))


@functools.cache
def _gpu_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def _persistent(x: Tensor, segments: int, training: bool) -> bool:
    """Whether the table of measured drivers wants the persistent one for a layer."""
    batch, channels, height, width = x.shape
    driver = choose_driver(
        _gpu_name(x.device.index),
        _name(x.dtype),
        training,
        batch=batch,
        channels=channels,
        pixels=height * width,
        segments=segments,
    )
    return driver == "persistent"


# --- The arguments of the core -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """One layer at one input shape, as the core wants it."""

    backend: CpuBackend | CudaBackend
    shape: _core.LayerShape
    options: _core.Options
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return _name(self.dtype)

    def workspaces(self, keep: bool) -> tuple[int, int]:
        """Bytes that a forward and a backward need."""
        return self.backend.core.sizes(self.shape, self.options, self.name, keep)[2:]


def _layer_shape(
    core: Any, sizes: Sequence[int], segments: int, expansion: int, units: int, shortcut: bool, residual: bool
) -> _core.LayerShape:
    batch, channels, height, width = (int(size) for size in sizes)
    return core.LayerShape(
        batch=batch,
        channels=channels,
        height=height,
        width=width,
        segments=segments,
        expansion=expansion,
        units=units,
        shortcut=shortcut,
        residual=residual,
    )


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _workspace(size: int, x: Tensor) -> Tensor:
    return _in_large_pages(torch.empty(size, dtype=torch.uint8, device=x.device))


def _in_large_pages(fresh: Tensor) -> Tensor:
    """Memory that the CPU kernels will run through again and again."""
    if fresh.device.type == "cpu":
        _core.prefer_large_pages(fresh.data_ptr(), fresh.numel() * fresh.element_size())
    return fresh


def _name(dtype: torch.dtype) -> str:
    """As the core calls it."""
    return str(dtype).removeprefix("torch.")


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and sums: float32 at least."""
    return dtype if dtype in STATISTICS_DTYPES else torch.float32


def _wide_parameters(parameters: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [tensor.to(_wide(dtype)).contiguous() for tensor in parameters]


def _pixel_major(*tensors: Tensor) -> bool:
    """Whether the CUDA kernels read and write these where they lie, and need no room for copies."""
    return all(
        t.shape[1] % 8 == 0 and t.is_contiguous(memory_format=torch.channels_last) and t.data_ptr() % 16 == 0
        for t in tensors
    )


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))


def _statistics_shape(x: Tensor, segments: int, expansion: int, units: int, shortcut: bool) -> tuple[int, int, int]:
    shape = _layer_shape(_core, (1, x.shape[1], 1, 1), segments, expansion, units, shortcut, True)
    return 2, segments, shape.rows


def _saved_shape(x: Tensor, segments: int, expansion: int, units: int, shortcut: bool) -> tuple[int, int, int, int]:
    found = _backend_of(x.device)
    shape = _layer_shape(found.core, (1, *x.shape[1:]), segments, expansion, units, shortcut, True)
    options = found.core.Options(shape, batch_statistics=False, eps=1.0, threads=1, **found.device_options)
    rows, pixels, *_ = found.core.sizes(shape, options, _name(x.dtype), True)
    return segments, x.shape[0], rows, pixels


def _kept(x: Tensor, segments: int, expansion: int, units: int, shortcut: bool, keep: bool) -> Tensor:
    """Where a forward leaves its pre-activations; empty unless they are kept."""
    shape = _saved_shape(x, segments, expansion, units, shortcut) if keep else (0,)
    return x.new_empty(shape, dtype=_backend_of(x.device).kept_dtype(x.dtype))


def _check_operands(
    x: Tensor,
    parameters: Sequence[Tensor],
    segments: int,
    expansion: int,
    units: int,
    shortcut: bool,
    **others: tuple[Tensor | None, Sequence[int]],
) -> None:
    """Check every tensor whose address the core is given: the operators can be called by anyone.

    Raises:
        ValueError: A shape, dtype or device that does not fit ``x`` and the sizes.
    """
    if x.dim() != 4 or segments < 1 or expansion < 1 or units < 1 or x.shape[1] % segments:
        raise ValueError(
            f"gunn_ext: x {tuple(x.shape)} must be (B, N, H, W) with N divisible by segments ({segments}), and "
            f"expansion ({expansion}) and units ({units}) at least 1."
        )
    found = _backend_of(x.device)
    if x.dtype not in LAYER_DTYPES:
        names = ", ".join(map(_name, LAYER_DTYPES))
        raise TypeError(f"gunn_ext: the {x.device.type} kernels take {names}, got {x.dtype}; convert the tensors.")
    wide = _wide(x.dtype)
    s = x.shape[1] // segments
    k = expansion * s
    shapes: list[tuple[int, ...]] = []
    for m in range(units):
        n = x.shape[1] if m == 0 else s
        convs: list[tuple[int, ...]] = [(k, n), (k, k, 3, 3), (s, k)]
        if m == 0 and shortcut:
            convs.insert(1, (s, n))
        for conv in convs:
            shapes += [(segments, *conv), (segments, conv[0]), (segments, conv[0])]
    if len(parameters) != len(shapes):
        raise ValueError(f"gunn_ext: expected {len(shapes)} parameters for these options, got {len(parameters)}.")
    named: list[tuple[str, Tensor | None, Sequence[int], set[torch.dtype]]] = [
        (f"parameters[{index}]", p, shape, {x.dtype, wide})
        for index, (p, shape) in enumerate(zip(parameters, shapes, strict=True))
    ]
    own = {"statistics": wide, "saved": found.kept_dtype(x.dtype)}
    for name, (tensor, shape) in others.items():
        named.append((name, tensor, shape, {own.get(name, x.dtype)}))
    for name, tensor, shape, dtypes in named:
        if tensor is None:
            continue
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"gunn_ext: {name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}.")
        if tensor.dtype not in dtypes or tensor.device != x.device:
            allowed = " or ".join(sorted(map(str, dtypes)))
            raise ValueError(
                f"gunn_ext: {name} must be {allowed} on {x.device} beside x, got {tensor.dtype} on {tensor.device}."
            )


def _call(
    x: Tensor,
    segments: int,
    expansion: int,
    units: int,
    shortcut: bool,
    residual: bool,
    tensor_float: bool,
    **options: Any,
) -> _Call:
    found = _backend_of(x.device)
    shape = _layer_shape(found.core, x.shape, segments, expansion, units, shortcut, residual)
    placement = found.placement(x, expansion, tensor_float)
    if x.is_cuda:
        placement["persistent"] = _persistent(x, segments, options["batch_statistics"])
    placed = found.core.Options(shape, **placement, **options)
    return _Call(found, shape, placed, x.dtype)


class Drivers(NamedTuple):
    """What computes a layer.

    Attributes:
        forward: ``fused`` on the CPU; ``staged`` or ``persistent`` on a GPU.
        backward: The same.
        large_tiles: Kernels of the staged driver that take them, names with commas between; none on the CPU.
        turns: Passes of the persistent driver, ``forward`` and ``backward``, for whose pixels a GPU has not room at
            once; none on the CPU.
    """

    forward: str
    backward: str
    large_tiles: str
    turns: str


def drivers(
    x: Tensor,
    segments: int,
    expansion: int,
    units: int,
    shortcut: bool,
    residual: bool,
    *,
    batch_statistics: bool,
    keep: bool,
) -> Drivers:
    """Name what would compute a gradual layer's forward and backward for ``x`` now: of several drivers the one taken.

    Args:
        x: Input; its shape, dtype and device count, its values do not.
        segments: P.
        expansion: K.
        units: M.
        shortcut: Whether unit 0 has a projection shortcut.
        residual: Whether updates are added.
        batch_statistics: Whether the batch's own statistics normalise.
        keep: Whether the forward keeps pre-activations for the backward.

    Raises:
        RuntimeError: Nothing here serves the device of ``x``.
    """
    found = _backend_of(x.device)
    tensor_float = may_use_tensor_float(x)
    options = {"batch_statistics": batch_statistics, "eps": 1.0}
    call = _call(x, segments, expansion, units, shortcut, residual, tensor_float, **options)
    asked = (call.shape, call.options, call.name, keep)
    return Drivers(*found.core.drivers(*asked))


# --- The two operators ---------------------------------------------------------------------------------------------


@torch.library.custom_op("gunn_ext::layer_forward", mutates_args=(), device_types=("cpu", "cuda"))
def layer_forward(
    x: Tensor,
    parameters: list[Tensor],
    statistics: Tensor | None,
    segments: int,
    expansion: int,
    units: int,
    shortcut: bool,
    residual: bool,
    eps: float,
    keep: bool,
    tensor_float: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradual layer's forward.

    Args:
        x: ``(B, N, H, W)``; float64, float32, bfloat16 or float16; any strides.
        parameters: As `parameter_list` gives them, float32 or in the dtype of ``x``.
        statistics: ``(2, P, rows)`` mean and biased variance to normalise with, float32 at least; None takes the
            batch's own.
        segments: P.
        expansion: K.
        units: M.
        shortcut: Whether unit 0 has a projection shortcut.
        residual: Add the update to the segment, or replace it.
        eps: Added to the variance.
        keep: Return the pre-activations.
        tensor_float: A GPU may multiply float32 as TF32.

    Returns:
        y like ``x``; the batch's statistics ``(2, P, rows)``, empty where they were given; the pre-activations
        ``(P, B, rows, pixels)`` in the layout and dtype of the kernels, empty unless ``keep``.
    """
    sizes = (segments, expansion, units, shortcut)
    _check_operands(x, parameters, *sizes, statistics=(statistics, _statistics_shape(x, *sizes)))
    y = _in_large_pages(_empty_like(x))
    batch_statistics = statistics is None
    used = statistics
    if used is None:
        used = x.new_empty(_statistics_shape(x, *sizes), dtype=_wide(x.dtype))
    saved = _in_large_pages(_kept(x, *sizes, keep))
    if x.numel():
        call = _call(
            x,
            *sizes,
            residual,
            tensor_float,
            batch_statistics=batch_statistics,
            eps=eps,
            pixel_major=_pixel_major(x, y),
        )
        contiguous = _wide_parameters(parameters, x.dtype)
        used = used.contiguous()
        workspace = _workspace(call.workspaces(keep)[0], x)
        call.backend.core.forward(
            call.shape,
            call.options,
            call.name,
            x=x.data_ptr(),
            x_strides=x.stride(),
            y=y.data_ptr(),
            y_strides=y.stride(),
            parameters=_addresses(contiguous),
            statistics=used.data_ptr(),
            saved=saved.data_ptr() if keep else 0,
            workspace=workspace.data_ptr(),
        )
    return y, used if batch_statistics else x.new_empty(0, dtype=_wide(x.dtype)), saved


@layer_forward.register_fake
def _(
    x: Tensor,
    parameters: list[Tensor],
    statistics: Tensor | None,
    segments: int,
    expansion: int,
    units: int,
    shortcut: bool,
    residual: bool,
    eps: float,
    keep: bool,
    tensor_float: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    batch = _statistics_shape(x, segments, expansion, units, shortcut) if statistics is None else (0,)
    saved = _kept(x, segments, expansion, units, shortcut, keep)
    return _empty_like(x), x.new_empty(batch, dtype=_wide(x.dtype)), saved


@torch.library.custom_op("gunn_ext::layer_backward", mutates_args=(), device_types=("cpu", "cuda"))
def layer_backward(
    grad_y: Tensor,
    x: Tensor,
    y: Tensor,
    parameters: list[Tensor],
    statistics: Tensor,
    saved: Tensor | None,
    segments: int,
    expansion: int,
    units: int,
    shortcut: bool,
    residual: bool,
    eps: float,
    training: bool,
    need_input: bool,
    need_parameters: bool,
    tensor_float: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """The gradual layer's backward, in reverse order of the segments (paper, algorithm 1).

    Args:
        grad_y: Gradient of ``y``, any strides. Not modified.
        x: The forward's input.
        y: The forward's output.
        parameters: The forward's.
        statistics: ``(2, P, rows)``: what the forward normalised with.
        saved: The forward's pre-activations; None or empty to recompute them.
        segments: P.
        expansion: K.
        units: M.
        shortcut: As in the forward.
        residual: As in the forward.
        eps: As in the forward.
        training: The statistics were the batch's own, so gradients flow through them.
        need_input: Return the gradient of ``x``.
        need_parameters: Return the gradients of ``parameters``.
        tensor_float: As in the forward.

    Returns:
        The gradient of ``x`` (empty unless needed) and those of ``parameters`` (an empty list unless needed).
    """
    sizes = (segments, expansion, units, shortcut)
    if saved is not None and saved.numel() == 0:
        saved = None
    _check_operands(
        x,
        parameters,
        *sizes,
        grad_y=(grad_y, x.shape),
        y=(y, x.shape),
        statistics=(statistics, _statistics_shape(x, *sizes)),
        saved=(saved, () if saved is None else _saved_shape(x, *sizes)),
    )
    grad_x = _in_large_pages(_empty_like(x)) if need_input else x.new_empty(0)
    wide = _wide(x.dtype)
    grads = [torch.empty(p.shape, dtype=wide, device=p.device) for p in parameters] if need_parameters else []
    if x.numel() == 0:
        return grad_x, [torch.zeros_like(p, memory_format=torch.contiguous_format) for p in parameters[: len(grads)]]
    if saved is not None:
        # As the forward left it: dense, and aligned to the 16 bytes that are read at once.
        saved = saved.contiguous()
        saved = saved.clone() if saved.data_ptr() % 16 else saved
    call = _call(
        x,
        *sizes,
        residual,
        tensor_float,
        batch_statistics=training,
        eps=eps,
        need_input=need_input,
        need_parameters=need_parameters,
        pixel_major=_pixel_major(x, y, *([grad_x] if need_input else [])),
    )
    contiguous = _wide_parameters(parameters, x.dtype)
    used = statistics.contiguous()
    workspace = _workspace(call.workspaces(saved is not None)[1], x)
    call.backend.core.backward(
        call.shape,
        call.options,
        call.name,
        grad_y=grad_y.data_ptr(),
        grad_y_strides=grad_y.stride(),
        x=x.data_ptr(),
        x_strides=x.stride(),
        y=y.data_ptr(),
        y_strides=y.stride(),
        grad_x=grad_x.data_ptr() if need_input else 0,
        grad_x_strides=grad_x.stride() if need_input else (0, 0, 0, 0),
        parameters=_addresses(contiguous),
        grads=_addresses(grads),
        statistics=used.data_ptr(),
        saved=saved.data_ptr() if saved is not None else 0,
        workspace=workspace.data_ptr(),
    )
    grads = [grad.to(p.dtype) for grad, p in zip(grads, parameters[: len(grads)], strict=True)]
    return grad_x, grads


@layer_backward.register_fake
def _(
    grad_y: Tensor,
    x: Tensor,
    y: Tensor,
    parameters: list[Tensor],
    statistics: Tensor,
    saved: Tensor | None,
    segments: int,
    expansion: int,
    units: int,
    shortcut: bool,
    residual: bool,
    eps: float,
    training: bool,
    need_input: bool,
    need_parameters: bool,
    tensor_float: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    grads = [torch.empty_like(p, memory_format=torch.contiguous_format) for p in parameters] if need_parameters else []
    return (_empty_like(x) if need_input else x.new_empty(0)), grads


# --- Step by step --------------------------------------------------------------------------------------------------


class _Steps:
    """What the steps of both passes share: the checked operands, as the core takes them."""

    def __init__(
        self,
        x: Tensor,
        parameters: Sequence[Tensor],
        static: LayerOptions,
        tensor_float: bool,
        others: dict[str, tuple[Tensor | None, Sequence[int]]],
        **options: Any,
    ) -> None:
        """Check everything that is given."""
        segments, expansion, units, shortcut, residual, eps = static
        if x.dtype not in LAYER_DTYPES or x.numel() == 0:
            raise ValueError(
                "steps of a layer run on the kernels: expected a non-empty tensor, float64, float32, bfloat16 or "
                f"float16, got {tuple(x.shape)} {x.dtype}."
            )
        self._parameters = [tensor.detach().resolve_neg() for tensor in parameters]
        _check_operands(x, self._parameters, segments, expansion, units, shortcut, **others)
        self._parameters = _wide_parameters(self._parameters, x.dtype)
        self._x = x.detach().resolve_neg()
        options |= {"batch_statistics": True, "eps": eps, "stepwise": True}
        self._call = _call(x, segments, expansion, units, shortcut, residual, tensor_float, **options)
        self._segments = segments

    def _rows(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.zeros((2, self._segments, self._call.shape.rows), dtype=dtype, device=x.device)


class ForwardSteps(_Steps):
    """The training forward in steps, for callers that put something between them, such as statistics of many ranks.

    ``begin``; then for every segment and unit in order ``reduce``, ``spatial``, ``project``; then ``finish``. After
    ``reduce`` the rows of the reduce and shortcut batch norms stand in ``statistics``, after ``spatial`` and
    ``project`` theirs. Whoever changes them there, in place, changes what the next step normalises with.

    Args:
        x: The input, not empty; one value per channel is allowed.
        parameters: As `parameter_list` gives them.
        static: As `layer_options` gives them.
        tensor_float: As in `layer_forward`.

    Raises:
        ValueError: A shape, dtype or device that does not fit.
    """

    def __init__(
        self, x: Tensor, parameters: Sequence[Tensor], static: LayerOptions, tensor_float: bool = False
    ) -> None:
        """Check and allocate everything; arguments as the class says."""
        super().__init__(x, parameters, static, tensor_float, {})
        self._workspace = _workspace(self._call.workspaces(False)[0], x)
        self._y = _empty_like(self._x)
        self._statistics = self._rows(x, _wide(x.dtype))

    @property
    def y(self) -> Tensor:
        """The output, complete after ``finish``."""
        return self._y

    @property
    def statistics(self) -> Tensor:
        """``(2, P, rows)``: mean and biased variance."""
        return self._statistics

    def step(self, name: str, segment: int = 0, unit: int = 0) -> None:
        """Run one step on the whole batch."""
        self._call.backend.core.forward(
            self._call.shape,
            self._call.options,
            self._call.name,
            x=self._x.data_ptr(),
            x_strides=self._x.stride(),
            y=self._y.data_ptr(),
            y_strides=self._y.stride(),
            parameters=_addresses(self._parameters),
            statistics=self._statistics.data_ptr(),
            saved=0,
            workspace=self._workspace.data_ptr(),
            step=name,
            segment=segment,
            unit=unit,
        )


class BackwardSteps(_Steps):
    """The training backward in steps, as `ForwardSteps`.

    ``begin``; for every segment and unit in reverse ``project``, ``spatial``, ``reduce``, ``input``; ``finish``. After
    ``project``, ``spatial`` and ``reduce`` the rows of their batch norms (after ``project`` also the shortcut's) stand
    in ``sums``; whoever changes them there, in place, changes what the next step sees.

    Args:
        grad_y: Gradient of the output.
        x: The forward's input.
        y: The forward's output.
        parameters: The forward's.
        statistics: What the forward normalised with.
        static: The forward's.
        tensor_float: The forward's.
        count: Values per channel behind ``sums`` when the next step reads them; 0 for those of this batch.
        need_input: As in `layer_backward`.
        need_parameters: As in `layer_backward`.

    Raises:
        ValueError: A shape, dtype or device that does not fit.
    """

    def __init__(
        self,
        grad_y: Tensor,
        x: Tensor,
        y: Tensor,
        parameters: Sequence[Tensor],
        statistics: Tensor,
        static: LayerOptions,
        tensor_float: bool = False,
        *,
        count: int = 0,
        need_input: bool = True,
        need_parameters: bool = True,
    ) -> None:
        """Check and allocate everything; arguments as the class says."""
        shape = _statistics_shape(x, *static[:4])
        others: dict[str, tuple[Tensor | None, Sequence[int]]] = {
            "grad_y": (grad_y, x.shape),
            "y": (y, x.shape),
            "statistics": (statistics, shape),
        }
        needs = {"need_input": need_input, "need_parameters": need_parameters}
        super().__init__(x, parameters, static, tensor_float, others, count=count, **needs)
        self._grad_y, self._y = grad_y.detach().resolve_neg(), y.detach().resolve_neg()
        self._statistics = statistics.detach().resolve_neg().contiguous()
        self._workspace = _workspace(self._call.workspaces(False)[1], x)
        self._grad_x = _empty_like(self._x) if need_input else x.new_empty(0)
        self._grads = [torch.empty_like(p) for p in self._parameters] if need_parameters else []
        self._sums = self._rows(x, torch.float64)

    @property
    def grad_x(self) -> Tensor:
        """Gradient of ``x``, complete after ``finish``; empty unless needed."""
        return self._grad_x

    @property
    def grads(self) -> list[Tensor]:
        """Gradients in the order of `parameter_list`, from this batch alone, complete after ``finish``, if needed."""
        return list(self._grads)

    @property
    def sums(self) -> Tensor:
        """``(2, P, rows)`` float64: sums of d and of d (z - mean), d the gradient of the batch norm's output."""
        return self._sums

    def step(self, name: str, segment: int = 0, unit: int = 0) -> None:
        """Run one step on the whole batch."""
        has_input = self._grad_x.numel() > 0
        self._call.backend.core.backward(
            self._call.shape,
            self._call.options,
            self._call.name,
            grad_y=self._grad_y.data_ptr(),
            grad_y_strides=self._grad_y.stride(),
            x=self._x.data_ptr(),
            x_strides=self._x.stride(),
            y=self._y.data_ptr(),
            y_strides=self._y.stride(),
            grad_x=self._grad_x.data_ptr() if has_input else 0,
            grad_x_strides=self._grad_x.stride() if has_input else (0, 0, 0, 0),
            parameters=_addresses(self._parameters),
            grads=_addresses(self._grads),
            statistics=self._statistics.data_ptr(),
            saved=0,
            workspace=self._workspace.data_ptr(),
            sums=self._sums.data_ptr(),
            step=name,
            segment=segment,
            unit=unit,
        )


# --- Autograd ------------------------------------------------------------------------------------------------------


class _GunnFunction(torch.autograd.Function):
    """Ties y to x and the parameters. Saves x, y, the parameters, the statistics; pre-activations where kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        statistics: Tensor,
        saved: Tensor | None,
        static: tuple[Any, ...],
        mode: tuple[bool, bool],
        *parameters: Tensor,
    ) -> Tensor:
        ctx.static = static
        ctx.training, ctx.tensor_float = mode
        ctx.save_for_backward(x, y, statistics, saved, *parameters)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, y, statistics, saved, *parameters = ctx.saved_tensors
        need_input, need_parameters = ctx.needs_input_grad[0], ctx.needs_input_grad[6:]
        needs = (need_input, any(need_parameters))
        grad_x, grads = layer_backward(
            grad_y, x, y, parameters, statistics, saved, *ctx.static, ctx.training, *needs, ctx.tensor_float
        )
        wanted = [
            grad if needed else None
            for grad, needed in zip(grads or [None] * len(parameters), need_parameters, strict=True)
        ]
        return grad_x if need_input else None, None, None, None, None, None, *wanted


def _batch_norms(unit: Unit) -> list[StackedBatchNorm]:
    """The batch norms of a unit in the row order of the statistics."""
    first = [unit.reduce_bn] if unit.shortcut_bn is None else [unit.reduce_bn, unit.shortcut_bn]
    return [*first, unit.spatial_bn, unit.project_bn]


def parameter_list(layer: StackedLayer) -> list[Tensor]:
    """The parameters of ``layer`` in the order of the core.

    Per unit: reduce, shortcut (where there is one), spatial, project; of each the weight, then weight and bias of its
    batch norm.
    """
    ordered: list[Tensor] = []
    for unit in layer.unit_list():
        convs = [unit.reduce, unit.spatial, unit.project]
        if unit.shortcut is not None:
            convs.insert(1, unit.shortcut)
        for conv, bn in zip(convs, _batch_norms(unit), strict=True):
            ordered += [conv.weight, bn.weight, bn.bias]
    return ordered


def layer_options(layer: StackedLayer) -> LayerOptions:
    """The options of ``layer`` in the order of the operators."""
    return layer.segments, layer.expansion, layer.num_units, layer.shortcut, layer.residual, layer.eps


def _running_statistics(layer: StackedLayer, dtype: torch.dtype) -> Tensor:
    norms = [bn for unit in layer.unit_list() for bn in _batch_norms(unit)]
    mean = torch.cat([bn.running_mean for bn in norms], dim=1)
    var = torch.cat([bn.running_var for bn in norms], dim=1)
    return torch.stack([mean, var]).to(dtype)


def update_running_statistics(layer: StackedLayer, statistics: Tensor, count: int | Tensor) -> None:
    """Take a training batch into the running statistics.

    Args:
        layer: Holds them.
        statistics: ``(2, P, rows)``: mean and biased variance of the batch.
        count: Values per channel behind them.
    """
    with torch.no_grad():
        layer.num_batches_tracked.add_(1)
        mean, var = statistics[0], statistics[1] * (count / (count - 1))
        row = 0
        for unit in layer.unit_list():
            for bn in _batch_norms(unit):
                rows = slice(row, row + bn.running_mean.shape[1])
                row = rows.stop
                for running, new in ((bn.running_mean, mean[:, rows]), (bn.running_var, var[:, rows])):
                    # As a tensor, the cumulative average's factor needs no value from the device.
                    factor = (
                        1.0 / layer.num_batches_tracked.to(running.dtype) if layer.momentum is None else layer.momentum
                    )
                    running.lerp_(new.to(running.dtype), factor)


def gunn_layer(x: Tensor, layer: StackedLayer) -> Tensor:
    """Update the segments of ``x`` one after another on the fused kernels (Qiao et al. 2018, eq. 4-5).

    Args:
        x: Feature map ``(B, N, H, W)``; float64, float32, bfloat16 or float16; any strides; checked by the layer. Not
            modified.
        layer: Holds parameters, options and batch-norm modes; its running statistics are updated in training.

    Returns:
        ``(B, N, H, W)``, dtype and memory format of ``x``. The backward needs it: while gradients are wanted it must
        not be changed in place.

    Raises:
        RuntimeError: No kernel serves the device, or none was built for this GPU.
        NotImplementedError: Forward-mode differentiation.
    """
    parameters = parameter_list(layer)
    check_call(x, parameters)
    training = layer.uses_batch_statistics()
    given = None if training else _running_statistics(layer, _wide(x.dtype))
    static = layer_options(layer)
    tensor_float = may_use_tensor_float(x)
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in parameters))
    keep = needs_grad and not layer.recompute
    with torch.no_grad():
        y, batch_statistics, saved = layer_forward(x, parameters, given, *static, keep, tensor_float)
    if training:
        # Before autograd saves anything: activation checkpointing may stop a second forward right after that, and
        # the running statistics shall count it as those of ordinary batch norms do.
        update_running_statistics(layer, batch_statistics, x.shape[0] * x.shape[2] * x.shape[3])
    if not needs_grad:
        return y
    statistics = batch_statistics if given is None else given
    return _GunnFunction.apply(x, y, statistics, saved if keep else None, static, (training, tensor_float), *parameters)


def check_call(x: Tensor, parameters: Sequence[Tensor]) -> None:
    """Check that the kernels can serve a call.

    Raises:
        RuntimeError: None were built for the device.
        NotImplementedError: Forward-mode differentiation.
    """
    _backend_of(x.device).check(x.device)
    if torch.compiler.is_compiling():
        return
    # Its tangents would be lost without a word.
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in (x, *parameters)):
        raise NotImplementedError(
            "GunnLayer: forward-mode differentiation (torch.func.jvp, dual tensors) is not supported; use reverse "
            "mode, or gunn_ext.ReferenceGunnLayer, which takes the same state dict."
        )
