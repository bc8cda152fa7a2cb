"""The settings of a run: frozen dataclasses that check themselves, and their form as YAML.

Every field is plain (numbers, strings, booleans, tuples of them), so a configuration goes to YAML, into a checkpoint
and back without loss. The command line is made from the same classes, see `gunn_ext.cli`.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from gunn_ext.training import checks
from gunn_ext.training.data_config import (
    DATASETS,
    FILES,
    LARGEST_SEED,
    NATURAL,
    CifarConfig,
    DigitsConfig,
    FakeConfig,
    FolderConfig,
    ShapesConfig,
    ValidationConfig,
)
from gunn_ext.training.errors import ConfigError
from gunn_ext.training.optimization_config import OptimizerConfig, ScheduleConfig
from gunn_ext.training.precision import PRECISIONS

C = TypeVar("C")


@dataclass(frozen=True)
class AugmentConfig:
    """What is done to training images.

    Args:
        mirror: Mirror with probability 1/2; null: where the data set allows it (digits and arrays do not).
        crop_padding: Shift by up to this many pixels, filling with the mean colour; null: an eighth of the height on
            natural images, a sixteenth on digits, 0 on arrays
            and on files, which are cropped anyway.
        cyclic_shift: With probability 2/3, roll by a uniform offset along one axis.
    """

    mirror: bool | None = None
    crop_padding: int | None = None
    cyclic_shift: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        if self.mirror is not None:
            checks.boolean("augment.mirror", self.mirror)
        if self.crop_padding is not None:
            checks.integer("augment.crop_padding", self.crop_padding, least=0)
        checks.boolean("augment.cyclic_shift", self.cyclic_shift)


@dataclass(frozen=True)
class Config:
    """Settings of a run.

    Args:
        model: A registered model; `gunn models` lists them.
        data: Data set: digits, shapes, cifar10, cifar100, arrays, folder, imagenet or fake.
        data_path: File or folder of a data set that is read from disk; null: the folder data.
        epochs: Passes over the training split.
        batch_size: Images of a training step, of all processes together.
        eval_batch_size: Images at a time in evaluation.
        lr: Learning rate of the beginning.
        seed: Of initial weights, order and augmentation.
        device: auto, cpu, cuda or cuda:N; auto takes a GPU where there is one that the package has kernels for.
        output: Run directory; null: runs/<model>-<data>-seed<seed>.
        max_steps: The run ends after so many training steps, wherever it is; null: when its epochs are done.
        accumulate: Equal parts that the gradients of a batch are computed in, one after another.
        clip_norm: Gradients of a larger norm are scaled down to it; null: none are.
        label_smoothing: Share of the label that is spread over all classes.
        ema: Decay of a moving average of the weights, which is then evaluated in their place; 0 is off.
        precision: float32, bfloat16 or float16, the last two by autocast; weights stay float32.
        channels_last: Lay images and weights of convolutions out channels last.
        compile: Compile the network with torch.compile.
        cuda_graph: Replay forward and backward from a CUDA graph.
        sync_batch_norm: Of several processes, take batch statistics over the batches of all.
        optimizer: Of the weights.
        schedule: Of the learning rate.
        augment: Augmentation of the training images.
        digits: Options of the data set digits.
        shapes: Options of the data set shapes.
        cifar: Options of the data sets cifar10 and cifar100.
        folder: Options of the data sets folder and imagenet.
        fake: Options of the data set fake.
        validation: A split held out of the training images.

    Raises:
        ConfigError: A value is of the wrong type, not finite or out of range.
    """

    model: str = "gunn_tiny"
    data: str = "digits"
    data_path: str | None = None
    epochs: int = 16
    batch_size: int = 32
    eval_batch_size: int = 256
    lr: float = 0.1
    seed: int = 0
    device: str = "auto"
    output: str | None = None
    max_steps: int | None = None
    accumulate: int = 1
    clip_norm: float | None = None
    label_smoothing: float = 0.0
    ema: float = 0.0
    precision: str = "float32"
    channels_last: bool = False
    compile: bool = False
    cuda_graph: bool = False
    sync_batch_norm: bool = False
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    digits: DigitsConfig = field(default_factory=DigitsConfig)
    shapes: ShapesConfig = field(default_factory=ShapesConfig)
    cifar: CifarConfig = field(default_factory=CifarConfig)
    folder: FolderConfig = field(default_factory=FolderConfig)
    fake: FakeConfig = field(default_factory=FakeConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def __post_init__(self) -> None:
        """Check the values, and those that depend on each other."""
        checks.string("model", self.model)
        checks.choice("data", self.data, DATASETS)
        if self.data_path is not None:
            checks.string("data_path", self.data_path)
        if self.cifar.coarse and self.data != "cifar100":
            raise ConfigError(f"cifar.coarse belongs to data=cifar100, got data={self.data}; leave it out.")
        checks.integer("epochs", self.epochs, least=1)
        checks.integer("batch_size", self.batch_size, least=1)
        checks.integer("eval_batch_size", self.eval_batch_size, least=1)
        checks.number("lr", self.lr, above=0)
        checks.integer("seed", self.seed, least=0, most=LARGEST_SEED)
        checks.string("device", self.device)
        if self.device != "auto":
            try:
                torch.device(self.device)
            except RuntimeError:
                raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, got {self.device!r}.") from None
        if self.output is not None:
            checks.string("output", self.output)
        if self.max_steps is not None:
            checks.integer("max_steps", self.max_steps, least=1)
        checks.integer("accumulate", self.accumulate, least=1)
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"batch_size ({self.batch_size}) must be divisible by accumulate ({self.accumulate}): a batch is "
                "computed in equal parts."
            )
        if self.clip_norm is not None:
            checks.number("clip_norm", self.clip_norm, above=0)
        checks.number("label_smoothing", self.label_smoothing, least=0, below=1)
        checks.number("ema", self.ema, least=0, below=1)
        checks.choice("precision", self.precision, PRECISIONS)
        for switch in ("channels_last", "compile", "cuda_graph", "sync_batch_norm"):
            checks.boolean(switch, getattr(self, switch))
        if self.compile and self.cuda_graph:
            raise ConfigError("compile and cuda_graph exclude each other; set one of them to false.")
        for group in dataclasses.fields(self):
            default = group.default_factory
            if default is not dataclasses.MISSING and not isinstance(getattr(self, group.name), default):  # type: ignore[arg-type]
                raise ConfigError(
                    f"{group.name} must be a {default.__name__}, got {getattr(self, group.name)!r}."  # type: ignore[attr-defined]
                )
        self.schedule.check_epochs(self.epochs)
        if self.data == "arrays" and self.data_path is None:
            raise ConfigError("data=arrays needs data_path: a file .npz, .h5 or .hdf5, or a folder of files .npy.")
        padding, shape = self.augment.crop_padding, self.image_shape
        if padding is not None and shape is not None and padding > min(shape[1:]):
            raise ConfigError(
                f"augment.crop_padding ({padding}) must not exceed the image size ({min(shape[1:])}); lower it or "
                "enlarge the images."
            )

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """(C, H, W) of the images of this data set; None where only its files know."""
        if self.data == "arrays":
            return None
        if self.data == "fake":
            return self.fake.shape
        channels, size = {
            "digits": (1, self.digits.image_size),
            **dict.fromkeys(FILES, (3, self.folder.image_size)),
        }.get(self.data, (3, 32))
        return channels, size, size

    @property
    def run_directory(self) -> Path:
        """``output``, or the default made of model, data and seed."""
        return Path(self.output or f"runs/{self.model}-{self.data}-seed{self.seed}")

    def resolved(self) -> Config:
        """The same settings with every null replaced by what it stands for; the device stays as it was asked for."""
        natural, shape = self.data in NATURAL, self.image_shape
        padding = 0 if shape is None or self.data in FILES else min(shape[1:]) // (8 if natural else 16)
        augment = replace(
            self.augment,
            mirror=natural if self.augment.mirror is None else self.augment.mirror,
            crop_padding=padding if self.augment.crop_padding is None else self.augment.crop_padding,
        )
        return replace(self, output=str(self.run_directory), augment=augment)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings, as written to YAML and into checkpoints."""
        return _plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """Build a configuration from nested mappings; what is not named keeps its default.

        Raises:
            ConfigError: A key is unknown (the message suggests the nearest) or a value is wrong.
        """
        check_keys(values)
        return _build(cls, values)


def differences(ours: Config, theirs: Config) -> dict[str, tuple[Any, Any]]:
    """The settings in which two configurations differ, by dotted name.

    What does not change a result is left out: where a run and its data lie, on what it ran, with how many workers.
    """
    flat_ours, flat_theirs = (flattened(config.resolved().to_dict()) for config in (ours, theirs))
    return {
        name: (value, flat_theirs[name])
        for name, value in flat_ours.items()
        if value != flat_theirs[name] and name not in ("output", "device", "data_path", "folder.workers")
    }


def load_config(path: Path | str) -> Config:
    """Read a configuration from a YAML file.

    Raises:
        ConfigError: The file is missing or no YAML, a key is unknown, or a value is wrong; the message names the file.
    """
    try:
        return Config.from_dict(read_yaml(path))
    except ConfigError as error:
        raise error if str(error).startswith(str(path)) else ConfigError(f"{path}: {error}") from None


def save_config(config: Config, path: Path | str) -> None:
    """Write a configuration as YAML."""
    import yaml

    Path(path).write_text(yaml.safe_dump(config.to_dict(), sort_keys=False), encoding="utf-8")


def read_yaml(path: Path | str) -> dict[str, Any]:
    """Read a mapping of settings and check its keys; the values are not checked yet.

    Raises:
        ConfigError: The file is missing or no YAML, or a key is unknown; the message names the file.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); expected a YAML file of settings.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    try:
        check_keys(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return values


def check_keys(values: Any, cls: type = Config, prefix: str = "") -> None:
    """Check that a nested mapping holds no keys but those of a configuration.

    Raises:
        ConfigError: It does; the message suggests the nearest key.
    """
    if not isinstance(values, Mapping):
        name = f"{prefix.rstrip('.')} must be" if prefix else "expected"
        raise ConfigError(f"{name} a mapping of settings to values, got {values!r}.")
    known = [f.name for f in dataclasses.fields(cls)]
    for key, value in values.items():
        if key not in known:
            raise ConfigError(unknown_key(f"{prefix}{key}"))
        nested = _groups(cls).get(key)
        if nested is not None:
            check_keys(value, nested, f"{prefix}{key}.")


def unknown_key(name: str) -> str:
    """The message for a setting that does not exist, with the nearest that does."""
    names = list(flattened(Config().to_dict()))
    near = difflib.get_close_matches(name, names, n=1)
    if not near:  # the right name in the wrong group
        near = [full for full in names if full.rpartition(".")[2] == name.rpartition(".")[2]]
    hint = f" Did you mean {near[0]!r}?" if near else f" Known settings: {', '.join(names)}."
    return f"unknown setting {name!r}.{hint}"


def _groups(cls: type) -> dict[str, type]:
    """The fields of ``cls`` that are configurations themselves."""
    return {
        f.name: f.default_factory  # type: ignore[misc]
        for f in dataclasses.fields(cls)
        if isinstance(f.default_factory, type) and is_dataclass(f.default_factory)
    }


def _build(cls: type[C], values: Mapping[str, Any]) -> C:
    groups, built = _groups(cls), {}
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        if f.name in values:
            value = values[f.name]
            built[f.name] = _build(groups[f.name], value) if f.name in groups else _as_number(value, f.default)
    return cls(**built)


def _as_number(value: Any, default: Any) -> Any:
    """YAML takes 1e-3 for a text (it wants 1.0e-3): a text that is a number is one where a float is expected."""
    if isinstance(default, float) and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
