"""`GunnLayer`: the gradually updated layer as a module."""

from __future__ import annotations

from torch import Tensor

from gunn_ext import ops
from gunn_ext.parameters import StackedLayer
from gunn_ext.simultaneous import simultaneous_layer
from gunn_ext.synchronized import synchronized_layer


class GunnLayer(StackedLayer):
    """Updates P segments of its N channels one after another, each from the current state of all channels.

    The paper's layer (Qiao et al. 2018, section 5.1) on fused kernels, with the reverse-order backward of its
    algorithm 1: for the backward it keeps its input, its output and the batch statistics, whatever P is.
    Neither may be changed in place before the backward (a ReLU after the layer must not be ``inplace``).
    ``gradual=False`` is the simultaneous baseline (SUNN) and runs as grouped torch convolutions.
    """

    __doc__ = (__doc__ or "") + "\n\n" + (StackedLayer.__doc__ or "").split("\n\n", 1)[1]

    def update(self, x: Tensor) -> Tensor:
        """Compute the layer on a checked input, autocast already applied."""
        if not self.gradual:
            return simultaneous_layer(x, self)
        ranks = self.sharing_ranks()
        return ops.gunn_layer(x, self) if ranks is None else synchronized_layer(x, self, ranks)
