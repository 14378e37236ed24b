"""Data sets as plain arrays: digits (embedded), others from their official files or the Hugging Face hub."""

from jaxlimit.data.augmentation import random_crop_and_flip
from jaxlimit.data.cifar import load_cifar10, load_cifar100
from jaxlimit.data.dataset import (
    CIFAR10_NORMALIZATION,
    CIFAR100_NORMALIZATION,
    FASHION_MNIST_NORMALIZATION,
    MNIST_NORMALIZATION,
    TINY_IMAGENET_NORMALIZATION,
    Dataset,
    Normalization,
    flatten_channel_first,
    normalize,
)
from jaxlimit.data.digits import load_digits
from jaxlimit.data.files import data_folder
from jaxlimit.data.hub import load_hub
from jaxlimit.data.mnist import load_fashion_mnist, load_mnist
from jaxlimit.data.tiny_imagenet import load_tiny_imagenet

__all__ = [
    "CIFAR10_NORMALIZATION",
    "CIFAR100_NORMALIZATION",
    "FASHION_MNIST_NORMALIZATION",
    "MNIST_NORMALIZATION",
    "TINY_IMAGENET_NORMALIZATION",
    "Dataset",
    "Normalization",
    "data_folder",
    "flatten_channel_first",
    "load_cifar10",
    "load_cifar100",
    "load_digits",
    "load_fashion_mnist",
    "load_hub",
    "load_mnist",
    "load_tiny_imagenet",
    "normalize",
    "random_crop_and_flip",
]
