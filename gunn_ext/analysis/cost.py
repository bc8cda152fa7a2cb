"""What a model costs for one image: parameters, floating-point operations, bytes kept for the backward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gunn_ext.models import create_model, model_spec
from gunn_ext.parameters import StackedLayer


@dataclass(frozen=True)
class ModelCost:
    """The cost of one image of size ``input_size``; for a batch, multiply FLOPs and activation bytes by its size.

    Attributes:
        input_size: Channels, height and width.
        parameters: Trainable values, those of batch norm included.
        flops: Of one forward pass, see `model_cost`.
        activation_bytes: Kept from forward to backward in training, see `model_cost`.
        uncounted: Paths of modules that hold parameters but whose kind `model_cost` does not know; empty for the
            models of this package.
    """

    input_size: tuple[int, int, int]
    parameters: int
    flops: int
    activation_bytes: int
    uncounted: tuple[str, ...] = ()


def layer_flops(layer: StackedLayer, height: int, width: int) -> int:
    """Floating-point operations of a GUNN or SUNN layer's forward for one image; its backward does twice as many.

    A backward that recomputes does three times as many.
    """
    n, s, k = layer.channels, layer.width, layer.hidden
    per_pixel = layer.segments * (k * n + 9 * k * k + s * k)
    if layer.shortcut:
        per_pixel += n * n
    per_pixel += layer.segments * (layer.num_units - 1) * (2 * s * k + 9 * k * k)
    return 2 * height * width * per_pixel


def _layer_extra_elements(layer: StackedLayer, height: int, width: int) -> int:
    """Elements kept for the backward of one image beside the layer's input and output."""
    n, hidden = layer.channels, layer.segments * layer.hidden
    shortcut = n if layer.shortcut else 0
    if not layer.gradual:
        # Ordinary convolutions: the input of every batch norm, the output of every ReLU, the input of every later unit.
        channels = layer.num_units * (4 * hidden + n) + shortcut + (layer.num_units - 1) * n
    elif layer.recompute:
        channels = 0
    else:
        channels = layer.num_units * (2 * hidden + n) + shortcut
    return channels * height * width


@dataclass
class _Count:
    """Running totals of one forward pass."""

    flops: int = 0
    extra_bytes: int = 0
    kept: dict[int, Tensor] = field(default_factory=dict)

    def keep(self, x: Tensor) -> None:
        # By storage, so that a tensor kept by two modules, or a view of it, counts once. The dict holds on to the
        # tensors, or a later one could take the place, and the key, of one that was freed.
        self.kept[x.untyped_storage()._cdata] = x

    def activation_bytes(self) -> int:
        return self.extra_bytes + sum(x.untyped_storage().nbytes() for x in self.kept.values())


def _stacked_layer(count: _Count, layer: StackedLayer, x: Tensor, y: Tensor) -> None:
    height, width = x.shape[2:]
    count.flops += layer_flops(layer, height, width)
    count.extra_bytes += _layer_extra_elements(layer, height, width) * x.element_size()
    count.keep(x)
    if layer.gradual:
        count.keep(y)


def _convolution(count: _Count, module: nn.Module, x: Tensor, y: Tensor) -> None:
    weight = module.weight
    assert isinstance(weight, Tensor)
    count.flops += 2 * y.numel() * weight[0].numel()
    count.keep(x)


def _keep_input(count: _Count, module: nn.Module, x: Tensor, y: Tensor) -> None:
    count.keep(x)


def _keep_output(count: _Count, module: nn.Module, x: Tensor, y: Tensor) -> None:
    count.keep(y)


def _max_pool(count: _Count, module: nn.Module, x: Tensor, y: Tensor) -> None:
    count.keep(x)
    count.extra_bytes += y.numel() * torch.int64.itemsize


_Rule = Callable[[_Count, Any, Tensor, Tensor], None]
_RULES: tuple[tuple[tuple[type[nn.Module], ...], _Rule], ...] = (
    ((StackedLayer,), _stacked_layer),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear), _convolution),
    ((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.AvgPool2d), _keep_input),
    ((nn.MaxPool2d,), _max_pool),
    ((nn.ReLU,), _keep_output),
)


def _attach(count: _Count, rule: _Rule, module: nn.Module) -> RemovableHandle:
    return module.register_forward_hook(lambda module, args, y: rule(count, module, args[0], y))


def _meta_copy(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode whose tensors have shapes and no memory."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo).eval()


def _full_size(model: nn.Module, input_size: tuple[int, ...] | None) -> tuple[int, int, int]:
    size = tuple(getattr(getattr(model, "spec", None), "input_size", ())) if input_size is None else tuple(input_size)
    if len(size) == 2:
        size = (getattr(model, "in_chans", 3), *size)
    if len(size) != 3:
        raise ValueError(
            f"model_cost: input_size must be (height, width) or (channels, height, width), got {input_size}"
            + (f"; a {type(model).__name__} does not say its own." if input_size is None else ".")
        )
    return size


def model_cost(model: nn.Module | str, input_size: tuple[int, ...] | None = None, **options: Any) -> ModelCost:
    """Count what one image costs a model, from shapes alone: nothing is computed, and ``model`` stays as it is.

    FLOPs are those of convolutions, linear layers and GUNN layers in one forward pass, a multiply-add counting as
    two; biases, batch norm, ReLU and pooling count nothing.

    Activation bytes are what autograd keeps from the forward to the backward of training, in the dtype of the model:
    every input of a convolution, linear layer, batch norm or pooling and every output of a ReLU, each tensor once,
    with the indices of max pooling, and of each GUNN layer

    * its input and output, and nothing more, with ``recompute``;
    * without it, also the output of every convolution in it;
    * for SUNN (``gradual=False``) its input, the output of every convolution and ReLU in it, and the input of every
      unit but the first.

    Parameters and batch statistics (two values per channel and batch norm) are not included, nor is the workspace of
    any operation. What a model does outside of modules, by functions, is not seen.

    Args:
        model: A model, or the name of a registered one.
        input_size: ``(height, width)`` or ``(channels, height, width)``; None takes the model's own.
        **options: For `create_model`, where ``model`` is a name.

    Returns:
        The counts.

    Raises:
        ValueError: An unknown name, or a size that is missing or does not fit the model.
        TypeError: Options with a model that is built already.
    """
    if isinstance(model, str):
        input_size = model_spec(model).input_size if input_size is None else input_size
        model = create_model(model, **{**options, "device": "meta"})
    elif options:
        raise TypeError(f"model_cost: {', '.join(options)} can be chosen for a model given by name only.")

    size = _full_size(model, input_size)
    copied = _meta_copy(model)
    count = _Count()
    uncounted = []
    inside: tuple[str, ...] = ()
    for path, module in copied.named_modules():
        if inside and path.startswith(inside):
            continue
        rule = next((rule for kinds, rule in _RULES if isinstance(module, kinds)), None)
        if rule is not None:
            _attach(count, rule, module)
        elif next(module.parameters(recurse=False), None) is not None:
            uncounted.append(path)
        if isinstance(module, StackedLayer):
            inside += (f"{path}." if path else "",)
    dtype = next((p.dtype for p in copied.parameters() if p.is_floating_point()), torch.get_default_dtype())
    with torch.no_grad():
        copied(torch.empty((1, *size), device="meta", dtype=dtype))
    return ModelCost(
        input_size=size,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        flops=count.flops,
        activation_bytes=count.activation_bytes(),
        uncounted=tuple(uncounted),
    )
