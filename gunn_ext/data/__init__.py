"""Data sets that live on the training device, and their augmentation."""

from gunn_ext.data.augment import Augmentation, augment, cyclic_shift, mirror, shift_crop
from gunn_ext.data.dataset import ImageDataset, Split, batches
from gunn_ext.data.digits import load_digits
from gunn_ext.data.fake import make_fake
from gunn_ext.data.part import Part
from gunn_ext.data.shapes import make_shapes

__all__ = [
    "Augmentation",
    "ImageDataset",
    "Part",
    "Split",
    "augment",
    "batches",
    "cyclic_shift",
    "load_digits",
    "make_fake",
    "make_shapes",
    "mirror",
    "shift_crop",
]
