"""MNIST and Fashion-MNIST from their four official idx files, which have the same names and shapes."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxlimit.data.dataset import (
    FASHION_MNIST_NORMALIZATION,
    MNIST_NORMALIZATION,
    Dataset,
    Normalization,
    check_labels,
    normalize,
)
from jaxlimit.data.files import check_sha256, check_size, data_folder, find_files, read_bytes

# File -> shape of its array of bytes.
_SHAPES = {
    "train-images-idx3-ubyte": (60_000, 28, 28),
    "train-labels-idx1-ubyte": (60_000,),
    "t10k-images-idx3-ubyte": (10_000, 28, 28),
    "t10k-labels-idx1-ubyte": (10_000,),
}
# SHA-256 of the files' decompressed content, in the same order: a checksum of the .gz would depend on who
# compressed it.
_MNIST_SHA256 = (
    "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
)
_FASHION_MNIST_SHA256 = (
    "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
)
_NUM_CLASSES = 10
_MAGIC = {1: b"\x00\x00\x08\x01", 3: b"\x00\x00\x08\x03"}  # axes -> two zeros, 8 = unsigned bytes, axes
_KIND = {_MAGIC[1]: "labels", _MAGIC[3]: "images"}


def load_mnist(folder: str | os.PathLike[str] | None = None, *, verify: bool = True) -> Dataset:
    """Load MNIST, normalised with mean 0.1307 and standard deviation 0.3081.

    Memory: 220 MB for the float32 images, 275 MB at the peak.

    Args:
        folder: holds the four official files, plain or as .gz; default $JAXLIMIT_DATA/mnist.
        verify: compare the SHA-256 of every file's decompressed content with the official one. Without it,
            for files changed on purpose, only the format, the sizes and the range of the labels are checked.

    Returns:
        float32 images of shapes (60000, 28, 28, 1) and (10000, 28, 28, 1), int32 labels of 10 classes.

    Raises:
        FileNotFoundError: the folder or a file is missing.
        ValueError: a file is truncated, corrupt, or not what its name says.

    Examples:
        >>> load_mnist()                                                             # doctest: +SKIP
        Dataset(mnist: 60000 training and 10000 test examples of shape (28, 28, 1), 10 classes)
    """
    return _load("mnist", folder, _MNIST_SHA256, MNIST_NORMALIZATION, verify)


def load_fashion_mnist(folder: str | os.PathLike[str] | None = None, *, verify: bool = True) -> Dataset:
    """Load Fashion-MNIST, normalised with mean 0.2860 and standard deviation 0.3530.

    The two numbers are the mean and the standard deviation of all training pixels divided by 255, as they
    are commonly used; the paper has no experiment on this data set. Memory: as for load_mnist.

    Args:
        folder: holds the four official files, plain or as .gz; default $JAXLIMIT_DATA/fashion-mnist. They
            have the names of MNIST's files and need a folder of their own.
        verify: as for load_mnist.

    Returns:
        float32 images of shapes (60000, 28, 28, 1) and (10000, 28, 28, 1), int32 labels of 10 classes.

    Raises:
        FileNotFoundError: the folder or a file is missing.
        ValueError: a file is truncated, corrupt, or not what its name says.

    References:
        Xiao, Rasul and Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning
        Algorithms", arXiv 1708.07747.

    Examples:
        >>> load_fashion_mnist()                                                     # doctest: +SKIP
        Dataset(fashion-mnist: 60000 training and 10000 test examples of shape (28, 28, 1), 10 classes)
    """
    return _load("fashion-mnist", folder, _FASHION_MNIST_SHA256, FASHION_MNIST_NORMALIZATION, verify)


def _load(
    name: str,
    folder: str | os.PathLike[str] | None,
    official: Sequence[str],
    normalization: Normalization,
    verify: bool,
) -> Dataset:
    """Load the four files; `official` are their SHA-256."""
    paths = find_files(name, data_folder(name, folder), list(_SHAPES), _variants)
    train_images, train_labels, test_images, test_labels = (
        _read_idx(path, shape, sha256 if verify else None)
        for path, shape, sha256 in zip(paths, _SHAPES.values(), official, strict=True)
    )
    for path, labels in ((paths[1], train_labels), (paths[3], test_labels)):
        check_labels(labels, _NUM_CLASSES, where=f"{path}: labels")
    return Dataset(
        normalize(train_images[..., None], *normalization),
        train_labels.astype(np.int32),
        normalize(test_images[..., None], *normalization),
        test_labels.astype(np.int32),
        num_classes=_NUM_CLASSES,
        name=name,
    )


def _variants(file: str) -> list[str]:
    """The names under which a file is published: `-idx3` or `.idx3`, plain or as .gz."""
    return [f"{name}{end}" for name in (file, file.replace("-idx", ".idx")) for end in ("", ".gz")]


def _read_idx(path: Path, shape: tuple[int, ...], sha256: str | None) -> np.ndarray:
    """Read an idx file of unsigned bytes: the magic number, one big-endian uint32 per axis, the bytes.

    Args:
        path: plain, or compressed, whatever its name says.
        shape: the array it must hold.
        sha256: of the decompressed content; None asks for no such check.

    Returns:
        A read-only array of this shape.

    Raises:
        ValueError: the file holds anything else.
    """
    start = 4 + 4 * len(shape)
    num_bytes = start + math.prod(shape)
    content = read_bytes(path, limit=num_bytes + 1)
    if len(content) < start:
        check_size(path, content, num_bytes)
    magic, expected = content[:4], _MAGIC[len(shape)]
    if magic != expected:
        found = f"a file of {_KIND[magic]}" if magic in _KIND else "neither images nor labels"
        raise ValueError(
            f"{path} is not an idx file of {_KIND[expected]}: it must start with the magic number "
            f"0x{expected.hex()}, but starts with 0x{magic.hex()} ({found}). Get the file again."
        )
    found_shape = tuple(np.frombuffer(content, ">u4", count=len(shape), offset=4).tolist())
    if found_shape != shape:
        raise ValueError(f"{path} says that it holds an array of shape {found_shape}, expected {shape}.")
    check_size(path, content, num_bytes)
    check_sha256(path, content, sha256)
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
