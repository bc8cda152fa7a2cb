"""Data sets, on the training device or decoded on the way there, and their augmentation."""

from gunn_ext.data.arrays import load_arrays
from gunn_ext.data.augment import Augmentation, augment, cyclic_shift, mirror, shift_crop
from gunn_ext.data.cifar import CIFAR10, CIFAR100, load_cifar
from gunn_ext.data.dataset import Dataset, ImageDataset, Split, batches
from gunn_ext.data.digits import load_digits
from gunn_ext.data.fake import make_fake
from gunn_ext.data.folder import FolderDataset, load_folder
from gunn_ext.data.holdout import hold_out
from gunn_ext.data.part import Part
from gunn_ext.data.shapes import make_shapes

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "Augmentation",
    "Dataset",
    "FolderDataset",
    "ImageDataset",
    "Part",
    "Split",
    "augment",
    "batches",
    "cyclic_shift",
    "hold_out",
    "load_arrays",
    "load_cifar",
    "load_digits",
    "load_folder",
    "make_fake",
    "make_shapes",
    "mirror",
    "shift_crop",
]
