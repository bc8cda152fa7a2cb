"""Studies of models: what they cost, and how long their layers should take (`performance`)."""

from gunn_ext.analysis.cost import ModelCost as ModelCost
from gunn_ext.analysis.cost import layer_flops as layer_flops
from gunn_ext.analysis.cost import model_cost as model_cost

__all__ = ["ModelCost", "layer_flops", "model_cost"]
