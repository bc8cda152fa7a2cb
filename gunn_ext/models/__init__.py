"""The model zoo: a registry of specs, and the networks they describe.

    >>> from gunn_ext.models import create_model, list_models
    >>> list_models("gunn*")
    ['gunn15', 'gunn15_nores', 'gunn18', 'gunn24', 'gunn_tiny']
    >>> model = create_model("gunn15", num_classes=100)

A network of your own is one more spec::

    register_model("my_gunn", Spec(stem=32, channels=(48, 96), segments=(6, 12), shortcut=True))
"""

from gunn_ext.models.gunn import GunnNet as GunnNet
from gunn_ext.models.gunn import Spec as Spec
from gunn_ext.models.registry import ModelSpec as ModelSpec
from gunn_ext.models.registry import create_model as create_model
from gunn_ext.models.registry import list_models as list_models
from gunn_ext.models.registry import model_spec as model_spec
from gunn_ext.models.registry import register_model as register_model

__all__ = ["GunnNet", "ModelSpec", "Spec", "create_model", "list_models", "model_spec", "register_model"]
