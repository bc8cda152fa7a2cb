"""Data sets that live on the training device, and their augmentation."""

from gunn_ext.data.arrays import load_arrays
from gunn_ext.data.augment import Augmentation, augment, cyclic_shift, mirror, shift_crop
from gunn_ext.data.cifar import CIFAR10, CIFAR100, load_cifar
from gunn_ext.data.dataset import ImageDataset, Split, batches
from gunn_ext.data.digits import load_digits
from gunn_ext.data.fake import make_fake
from gunn_ext.data.shapes import make_shapes

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "Augmentation",
    "ImageDataset",
    "Split",
    "augment",
    "batches",
    "cyclic_shift",
    "load_arrays",
    "load_cifar",
    "load_digits",
    "make_fake",
    "make_shapes",
    "mirror",
    "shift_crop",
]
