"""`GunnLayer`: the gradually updated layer as a module."""

from __future__ import annotations

from torch import Tensor

from gunn_ext import ops
from gunn_ext.parameters import StackedLayer
from gunn_ext.simultaneous import simultaneous_layer


class GunnLayer(StackedLayer):
    """Updates P segments of its N channels one after another, each from the current state of all channels.

    The paper's layer (Qiao et al. 2018, section 5.1) on fused kernels, with the reverse-order backward of its
    algorithm 1: for the backward it keeps its input, its output and the batch statistics, whatever P is.
    ``gradual=False`` is the simultaneous baseline (SUNN) and runs as grouped torch convolutions.
    """

    __doc__ = (__doc__ or "") + "\n\n" + (StackedLayer.__doc__ or "").split("\n\n", 1)[1]

    def forward(self, x: Tensor) -> Tensor:
        """Update the segments of a feature map.

        Args:
            x: ``(B, N, H, W)``; float64, float32, bfloat16 or float16; any strides. Not modified.

        Returns:
            ``(B, N, H, W)``, dtype and memory format of ``x``; under autocast, the autocast dtype.

        Raises:
            ValueError: Rank, channel count, size or dtype do not fit; one value per channel in training.
            RuntimeError: The batch norms of the layer are in mixed modes, or no kernel was built for the device.
        """
        self.check_input(x)
        if not self.gradual:
            return simultaneous_layer(x, self)
        return ops.gunn_layer(x, self)
