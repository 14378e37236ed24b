"""MNIST from the four official idx files."""

import math
import os
from pathlib import Path

import numpy as np

from jaxlimit.data.dataset import MNIST_NORMALIZATION, Dataset, check_labels, normalize
from jaxlimit.data.files import check_sha256, check_size, data_folder, find_files, read_bytes

# File -> shape of its array of bytes and SHA-256 of its decompressed content: a checksum of the .gz would
# depend on who compressed it.
_TRAIN = {
    "train-images-idx3-ubyte": (
        (60_000, 28, 28),
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    ),
    "train-labels-idx1-ubyte": (
        (60_000,),
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    ),
}
_TEST = {
    "t10k-images-idx3-ubyte": (
        (10_000, 28, 28),
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    ),
    "t10k-labels-idx1-ubyte": (
        (10_000,),
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
}
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
    folder = data_folder("mnist", folder)
    files = _TRAIN | _TEST
    paths = find_files("mnist", folder, list(files), suffixes=("", ".gz"))
    train_images, train_labels, test_images, test_labels = (
        _read_idx(path, shape, sha256 if verify else None)
        for path, (shape, sha256) in zip(paths, files.values(), strict=True)
    )
    for path, labels in ((paths[1], train_labels), (paths[3], test_labels)):
        check_labels(labels, _NUM_CLASSES, where=f"{path}: labels")
    return Dataset(
        normalize(train_images[..., None], *MNIST_NORMALIZATION),
        train_labels.astype(np.int32),
        normalize(test_images[..., None], *MNIST_NORMALIZATION),
        test_labels.astype(np.int32),
        num_classes=_NUM_CLASSES,
        name="mnist",
    )


def _read_idx(path: Path, shape: tuple[int, ...], sha256: str | None) -> np.ndarray:
    """Read an idx file of unsigned bytes: the magic number, one big-endian uint32 per axis, the bytes.

    Args:
        path: plain, or compressed if it ends in .gz.
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
        found = f"a file of {_KIND[magic]}" if magic in _KIND else "no file of MNIST"
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
