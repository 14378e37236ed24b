"""Data sets as plain arrays: digits (embedded), MNIST, CIFAR-10 and CIFAR-100 (from their official files)."""

from jaxlimit.data.cifar import load_cifar10, load_cifar100
from jaxlimit.data.dataset import (
    CIFAR10_NORMALIZATION,
    CIFAR100_NORMALIZATION,
    MNIST_NORMALIZATION,
    Dataset,
    Normalization,
    flatten_channel_first,
    normalize,
)
from jaxlimit.data.digits import load_digits
from jaxlimit.data.files import data_folder
from jaxlimit.data.mnist import load_mnist

__all__ = [
    "CIFAR10_NORMALIZATION",
    "CIFAR100_NORMALIZATION",
    "MNIST_NORMALIZATION",
    "Dataset",
    "Normalization",
    "data_folder",
    "flatten_channel_first",
    "load_cifar10",
    "load_cifar100",
    "load_digits",
    "load_mnist",
    "normalize",
]
