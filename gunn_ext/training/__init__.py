"""Training as a library: a configuration in, a trained network and its run directory out.

>>> from gunn_ext.training import Config, train
>>> result = train(Config(epochs=16, output="runs/first"))  # doctest: +SKIP
>>> result.test_accuracy  # doctest: +SKIP
"""

from gunn_ext.training.checkpoint import load_checkpoint, load_weights, save_checkpoint
from gunn_ext.training.config import AugmentConfig, Config, load_config, save_config
from gunn_ext.training.data_config import (
    CifarConfig,
    DigitsConfig,
    FakeConfig,
    FolderConfig,
    ShapesConfig,
    ValidationConfig,
)
from gunn_ext.training.datasets import load_data
from gunn_ext.training.errors import (
    CheckpointError,
    ConfigError,
    DivergenceError,
    RunDirectoryError,
    TrainingInterrupted,
)
from gunn_ext.training.evaluation import Ensemble, Evaluation, evaluate
from gunn_ext.training.optimization_config import OptimizerConfig, ScheduleConfig
from gunn_ext.training.progress import BarReporter, LineReporter, Reporter, SilentReporter, make_reporter
from gunn_ext.training.result import Result
from gunn_ext.training.runs import Trained, evaluate_run, load_run
from gunn_ext.training.schedule import learning_rate, step_learning_rate
from gunn_ext.training.trainer import train

__all__ = [
    "AugmentConfig",
    "BarReporter",
    "CheckpointError",
    "CifarConfig",
    "Config",
    "ConfigError",
    "DigitsConfig",
    "DivergenceError",
    "Ensemble",
    "Evaluation",
    "FakeConfig",
    "FolderConfig",
    "LineReporter",
    "OptimizerConfig",
    "Reporter",
    "Result",
    "RunDirectoryError",
    "ScheduleConfig",
    "ShapesConfig",
    "SilentReporter",
    "Trained",
    "TrainingInterrupted",
    "ValidationConfig",
    "evaluate",
    "evaluate_run",
    "learning_rate",
    "load_checkpoint",
    "load_config",
    "load_data",
    "load_run",
    "load_weights",
    "make_reporter",
    "save_checkpoint",
    "save_config",
    "step_learning_rate",
    "train",
]
