"""GUNN and SUNN networks (Qiao et al. 2018, tables 1 and 2): the specs, and the one module that all of them are."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from gunn_ext.layers import GunnLayer
from gunn_ext.models.registry import register_model

LAYOUTS = ("cifar", "imagenet")


def _check_count(owner: str, name: str, value: Any, least: int, remark: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{owner}: {name} must be an integer of at least {least}{remark}, got {value!r}.")


@dataclass(frozen=True)
class Spec:
    """A GUNN or SUNN network, as data; every field is plain and goes into JSON or YAML as it is.

    Args:
        stem: Channels after the first convolution.
        channels: N of each stage's layer.
        segments: P of each stage's layer.
        expansion: K of every update unit.
        units: M, the stacked units of an update.
        shortcut: The projection beside the first unit (the CIFAR models).
        gradual: False makes it SUNN.
        residual: False makes it NoRes (table 5).
        layout: ``"cifar"`` or ``"imagenet"``, see `GunnNet`.
        num_classes: Where a model is built without saying how many.
        input_size: Height and width the network was designed for.

    Raises:
        ValueError: A field is out of range, or channels and segments differ in length.
    """

    stem: int
    channels: tuple[int, ...]
    segments: tuple[int, ...]
    expansion: int = 2
    units: int = 1
    shortcut: bool = False
    gradual: bool = True
    residual: bool = True
    layout: str = "cifar"
    num_classes: int = 10
    input_size: tuple[int, int] = (32, 32)

    def __post_init__(self) -> None:
        """Check the fields and turn lists, as read from a file, into tuples."""
        for name in ("channels", "segments", "input_size"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.channels or len(self.channels) != len(self.segments):
            raise ValueError(
                f"Spec: channels and segments need one entry for each stage, got channels={self.channels} and "
                f"segments={self.segments}."
            )
        if self.layout not in LAYOUTS:
            raise ValueError(f"Spec: layout must be {' or '.join(map(repr, LAYOUTS))}, got {self.layout!r}.")
        if len(self.input_size) != 2:
            raise ValueError(f"Spec: input_size must be (height, width), got {self.input_size}.")
        _check_count("Spec", "stem", self.stem, 1)
        _check_count("Spec", "num_classes", self.num_classes, 0)

    def build(
        self,
        *,
        num_classes: int | None = None,
        in_chans: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        recompute: bool = True,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
    ) -> GunnNet:
        """The network of this spec; arguments as in `GunnNet`."""
        return GunnNet(
            self, num_classes, in_chans, device=device, dtype=dtype, recompute=recompute, eps=eps, momentum=momentum
        )


GUNN_15 = Spec(stem=64, channels=(240, 300, 360), segments=(20, 25, 30), expansion=2, units=1, shortcut=True)
GUNN_24 = Spec(stem=64, channels=(720, 900, 1080), segments=(20, 25, 30), expansion=3, units=2, shortcut=True)
GUNN_15_NARROW = replace(GUNN_15, stem=16, channels=(48, 60, 72), segments=(8, 10, 12))  # for studies on a CPU
GUNN_TINY = Spec(stem=32, channels=(32, 48, 64), segments=(4, 6, 8), expansion=2, units=1, shortcut=True)
GUNN_18 = Spec(
    stem=64,
    channels=(400, 800, 1600, 2000),
    segments=(10, 20, 40, 50),
    layout="imagenet",
    num_classes=1000,
    input_size=(224, 224),
)
WIDE_GUNN_18 = replace(GUNN_18, channels=(1200, 1600, 2000, 2000), segments=(30, 40, 50, 50))

MODELS = {
    "gunn15": GUNN_15,
    "gunn24": GUNN_24,
    "gunn18": GUNN_18,
    "wide_gunn18": WIDE_GUNN_18,
    "sunn15": replace(GUNN_15, gradual=False),
    "sunn24": replace(GUNN_24, gradual=False),
    "sunn18": replace(GUNN_18, gradual=False),
    "gunn15_nores": replace(GUNN_15, residual=False),
    "gunn15_narrow": GUNN_15_NARROW,
    "sunn15_narrow": replace(GUNN_15_NARROW, gradual=False),
    "gunn15_narrow_nores": replace(GUNN_15_NARROW, residual=False),
    "gunn_tiny": GUNN_TINY,
}


class GlobalAveragePool(nn.Module):
    """The mean over height and width: ``(B, C, H, W)`` to ``(B, C)``."""

    pool_type = "avg"

    def forward(self, x: Tensor) -> Tensor:
        """Average ``x`` over its last two dimensions."""
        return x.mean((2, 3))


def _check_input(x: Tensor, in_chans: int, smallest: int, training: bool) -> None:
    shape = tuple(x.shape)
    if x.dim() != 4:
        raise ValueError(f"GunnNet: expected a 4-D input (B, {in_chans}, H, W), got shape {shape}.")
    if x.shape[1] != in_chans:
        raise ValueError(
            f"GunnNet: expected {in_chans} input channels, got {x.shape[1]} (input shape {shape}); "
            f"build the model with in_chans={x.shape[1]}, or convert the images."
        )
    if not x.is_floating_point():
        raise TypeError(f"GunnNet: expected a floating-point input, got {x.dtype}; convert and normalise it first.")
    if min(x.shape[2:]) < smallest:
        raise ValueError(
            f"GunnNet: an input of {x.shape[2]}x{x.shape[3]} is too small for the poolings of this model; "
            f"the smallest that works is {smallest}x{smallest}."
        )
    if training and x.shape[0] == 0:
        raise ValueError(
            f"GunnNet: an empty batch (input shape {shape}) has no batch statistics to train on; skip it, or call "
            "eval()."
        )


torch.fx.wrap("_check_input")  # a symbolic trace records the call and does not look into it


class GunnNet(nn.Module):
    """A network of gradually (GUNN) or simultaneously (SUNN) updated layers.

    Conv is a convolution without bias, followed by batch norm and ReLU. Each stage begins with its own way down, so
    that its output is a feature map of its own:

    * layout ``"cifar"``: stem Conv 3x3; stages Conv 1x1, AvgPool 2 (from the second on), GUNN layer; final Conv 1x1;
    * layout ``"imagenet"``: stem Conv 7x7 / 2; stages MaxPool 3 / 2 (the first) or AvgPool 2, Conv 1x1, GUNN layer;

    then global average pooling and a linear classifier. Children, in order of execution: ``stem``, ``stages``,
    ``final`` (cifar only), ``global_pool``, ``classifier``. Images of any size the poolings allow are accepted;
    where a size is odd, AvgPool drops the last row or column.

    Args:
        spec: Widths and options of the network.
        num_classes: Outputs of the classifier; 0 puts an identity in its place; None takes ``spec.num_classes``.
        in_chans: Channels of the input images.
        device: Of the parameters.
        dtype: Of the parameters.
        recompute: As in `GunnLayer`; True needs less memory, False less time.
        eps: Of every batch norm.
        momentum: Of every batch norm; None keeps cumulative averages.

    Attributes:
        num_features: Channels before the classifier.
        smallest_size: Height and width of the smallest image the poolings allow.
        feature_info: For the stem and each stage a dict of ``num_chs``, ``reduction`` (of height and width against
            the input) and ``module`` (the path whose output it is).

    Raises:
        ValueError: ``num_classes`` or ``in_chans`` is no possible count, or a layer refuses its sizes.
    """

    def __init__(
        self,
        spec: Spec,
        num_classes: int | None = None,
        in_chans: int = 3,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        recompute: bool = True,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
    ) -> None:
        """Build the network; arguments as in the class."""
        super().__init__()
        _check_count("GunnNet", "in_chans", in_chans, 1)
        self.spec = spec
        self.in_chans = in_chans
        self.num_features = spec.channels[-1]
        imagenet = spec.layout == "imagenet"
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        norm: dict[str, Any] = {"eps": eps, "momentum": momentum}

        def conv(fan_in: int, fan_out: int, kernel: int, stride: int = 1) -> OrderedDict[str, nn.Module]:
            convolution = nn.Conv2d(fan_in, fan_out, kernel, stride, kernel // 2, bias=False, **place)
            nn.init.normal_(convolution.weight, std=math.sqrt(2.0 / (kernel * kernel * fan_out)))
            batch_norm = nn.BatchNorm2d(fan_out, **norm, **place)
            return OrderedDict(conv=convolution, bn=batch_norm, act=nn.ReLU())

        def stage(i: int, fan_in: int) -> nn.Sequential:
            transition = conv(fan_in, spec.channels[i], 1)
            pool: nn.Module | None
            if imagenet:
                pool = nn.MaxPool2d(3, 2, padding=1) if i == 0 else nn.AvgPool2d(2)
                modules = OrderedDict(pool=pool) | transition
            else:
                modules = transition | (OrderedDict(pool=nn.AvgPool2d(2)) if i else {})
            modules["layer"] = GunnLayer(
                spec.channels[i],
                spec.segments[i],
                spec.expansion,
                spec.units,
                shortcut=spec.shortcut,
                gradual=spec.gradual,
                residual=spec.residual,
                recompute=recompute,
                **norm,
                **place,
            )
            return nn.Sequential(modules)

        fans_in = (spec.stem, *spec.channels)
        self.stem = nn.Sequential(conv(in_chans, spec.stem, 7, 2) if imagenet else conv(in_chans, spec.stem, 3))
        self.stages = nn.Sequential(*(stage(i, fans_in[i]) for i in range(len(spec.channels))))
        self.final = None if imagenet else nn.Sequential(conv(self.num_features, self.num_features, 1))
        self.global_pool = GlobalAveragePool()
        self.classifier: nn.Module = nn.Identity()
        self.num_classes = 0
        self.reset_classifier(spec.num_classes if num_classes is None else num_classes)

        first = 4 if imagenet else 1  # height of the input over that of the first stage, rounded up
        halvings = len(spec.channels) - 1  # by average pooling, rounded down
        self.smallest_size = first * (2**halvings - 1) + 1
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": spec.stem, "reduction": 2 if imagenet else 1, "module": "stem.act"},
            *(
                {"num_chs": channels, "reduction": first * 2**i, "module": f"stages.{i}"}
                for i, channels in enumerate(spec.channels)
            ),
        ]

    def get_classifier(self) -> nn.Module:
        """The last linear layer, or the identity in its place."""
        return self.classifier

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new classifier in place of the old one, on the same device and of the same dtype.

        Args:
            num_classes: Its outputs; 0 for an identity, the model then returns the pooled features.

        Raises:
            ValueError: ``num_classes`` is no possible count.
        """
        _check_count("GunnNet", "num_classes", num_classes, 0, " (0 for no classifier)")
        like = next(iter([*self.classifier.parameters(), *self.parameters()]))
        self.num_classes = num_classes
        if num_classes == 0:
            self.classifier = nn.Identity()
        else:
            self.classifier = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            nn.init.zeros_(self.classifier.bias)
        self.classifier.train(self.training)

    def features(self, x: Tensor) -> list[Tensor]:
        """The output of each stage, finest first.

        Args:
            x: Images ``(B, in_chans, H, W)``.

        Returns:
            One feature map for each stage, described by ``feature_info[1:]``: the outputs of the GUNN layers, without
            activation. None of them is written into by what follows it.

        Raises:
            ValueError: As `forward` does.
        """
        _check_input(x, self.in_chans, self.smallest_size, self.training)
        x = self.stem(x)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map before pooling, ``(B, num_features, H / reduction, W / reduction)``."""
        _check_input(x, self.in_chans, self.smallest_size, self.training)
        x = self.stages(self.stem(x))
        return x if self.final is None else self.final(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify the result of `forward_features`.

        Args:
            x: Feature map ``(B, num_features, H, W)``.
            pre_logits: Return the pooled features ``(B, num_features)``, unclassified.

        Returns:
            ``(B, num_classes)``; with no classifier, the pooled features.
        """
        x = self.global_pool(x)
        return x if pre_logits else self.classifier(x)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images.

        Args:
            x: Images ``(B, in_chans, H, W)``, floating point. An empty batch is welcome in evaluation only.

        Returns:
            Logits ``(B, num_classes)``.

        Raises:
            ValueError: Rank, channels or size do not fit; in training, an empty batch or one value per channel.
            TypeError: The images are not floating point.
        """
        return self.forward_head(self.forward_features(x))


for _name, _spec in MODELS.items():
    register_model(_name, _spec)
