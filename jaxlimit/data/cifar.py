"""CIFAR-10 and CIFAR-100 from their official files."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxlimit.data.dataset import (
    CIFAR10_NORMALIZATION,
    CIFAR100_NORMALIZATION,
    Dataset,
    Normalization,
    check_labels,
    normalize,
)
from jaxlimit.data.files import check_sha256, check_size, data_folder, find_files, read_bytes, remedy
from jaxlimit.data.pickles import load_restricted

_PIXELS = 3 * 32 * 32
_REPICKLED = "Get the file again, or pass verify=False if it was written anew on purpose."


class _File(NamedTuple):
    name: str
    num_examples: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class _Version:
    """One published form of a data set; `labels_key` is None where the files are not pickles."""

    folder: str
    train: tuple[_File, ...]
    test: tuple[_File, ...]
    labels_key: bytes | None = None


_CIFAR10_BINARY = _Version(
    folder="cifar-10-batches-bin",
    train=tuple(
        _File(f"data_batch_{number}.bin", 10_000, 30_730_000, sha256)
        for number, sha256 in enumerate(
            (
                "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
                "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
                "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
                "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
                "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
            ),
            start=1,
        )
    ),
    test=(
        _File(
            "test_batch.bin",
            10_000,
            30_730_000,
            "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
        ),
    ),
)
_CIFAR10_PYTHON = _Version(
    folder="cifar-10-batches-py",
    train=tuple(
        _File(f"data_batch_{number}", 10_000, num_bytes, sha256)
        for number, num_bytes, sha256 in (
            (1, 31_035_704, "54636561a3ce25bd3e19253c6b0d8538147b0ae398331ac4a2d86c6d987368cd"),
            (2, 31_035_320, "766b2cef9fbc745cf056b3152224f7cf77163b330ea9a15f9392beb8b89bc5a8"),
            (3, 31_035_999, "0f00d98ebfb30b3ec0ad19f9756dc2630b89003e10525f5e148445e82aa6a1f9"),
            (4, 31_035_696, "3f7bb240661948b8f4d53e36ec720d8306f5668bd0071dcb4e6c947f78e9682b"),
            (5, 31_035_623, "d91802434d8376bbaeeadf58a737e3a1b12ac839077e931237e0dcd43adcb154"),
        )
    ),
    test=(
        _File(
            "test_batch",
            10_000,
            31_035_526,
            "f53d8d457504f7cff4ea9e021afcf0e0ad8e24a91f3fc42091b8adef61157831",
        ),
    ),
    labels_key=b"labels",
)
_CIFAR100_PYTHON = _Version(
    folder="cifar-100-python",
    train=(
        _File(
            "train",
            50_000,
            155_249_918,
            "735e79b04f092ca3d2e6d07f368c0a7d70d48c48d28865950cc24454cf45129b",
        ),
    ),
    test=(
        _File(
            "test",
            10_000,
            31_049_707,
            "4b67687d9933c4db8f0831104447f15b93774f4f464bd0516f0f0f2ac83b7864",
        ),
    ),
    labels_key=b"fine_labels",
)
# The binary version first: it needs no pickle.
_CIFAR10_VERSIONS = (_CIFAR10_BINARY, _CIFAR10_PYTHON)
_CIFAR100_VERSIONS = (_CIFAR100_PYTHON,)


def load_cifar10(folder: str | os.PathLike[str] | None = None, *, verify: bool = True) -> Dataset:
    """Load CIFAR-10, normalised with mean (.491, .482, .447) and standard deviation (.247, .243, .262).

    Reads the binary version or the Python version, whichever is there; of both, the binary one. Both hold
    the same images. Pickles are read without running any code that they might contain.
    Memory: 740 MB for the float32 images, about 1 GB at the peak.

    Args:
        folder: holds cifar-10-batches-bin or cifar-10-batches-py; default $JAXLIMIT_DATA/cifar10.
        verify: compare the size and SHA-256 of every file with the official one, before it is read further.
            Without it, for files changed on purpose, only the format, the number of examples (thus the size
            of the binary files) and the range of the labels are checked.

    Returns:
        float32 images of shapes (50000, 32, 32, 3) and (10000, 32, 32, 3), int32 labels of 10 classes.

    Raises:
        FileNotFoundError: the folder or a file is missing.
        ValueError: a file is truncated, corrupt, or not what its name says.

    Examples:
        >>> load_cifar10()                                                           # doctest: +SKIP
        Dataset(cifar10: 50000 training and 10000 test examples of shape (32, 32, 3), 10 classes)
    """
    return _load("cifar10", folder, _CIFAR10_VERSIONS, 10, CIFAR10_NORMALIZATION, verify)


def load_cifar100(folder: str | os.PathLike[str] | None = None, *, verify: bool = True) -> Dataset:
    """Load CIFAR-100, normalised with mean (.507, .487, .441) and standard deviation (.267, .256, .276).

    Reads the Python version, without running any code that its pickles might contain. The labels are the
    100 fine ones. Memory: 740 MB for the float32 images, about 1 GB at the peak.

    Args:
        folder: holds cifar-100-python; default $JAXLIMIT_DATA/cifar100.
        verify: as for load_cifar10.

    Returns:
        float32 images of shapes (50000, 32, 32, 3) and (10000, 32, 32, 3), int32 labels of 100 classes.

    Raises:
        FileNotFoundError: the folder or a file is missing.
        ValueError: a file is truncated, corrupt, or not what its name says.

    Examples:
        >>> load_cifar100()                                                          # doctest: +SKIP
        Dataset(cifar100: 50000 training and 10000 test examples of shape (32, 32, 3), 100 classes)
    """
    return _load("cifar100", folder, _CIFAR100_VERSIONS, 100, CIFAR100_NORMALIZATION, verify)


def _load(
    name: str,
    folder: str | os.PathLike[str] | None,
    versions: tuple[_Version, ...],
    num_classes: int,
    normalization: Normalization,
    verify: bool,
) -> Dataset:
    """Load the first of the versions whose folder exists."""
    folder = data_folder(name, folder)
    version = next((version for version in versions if (folder / version.folder).is_dir()), None)
    if version is None:
        wanted = " nor ".join(version.folder for version in versions)
        raise FileNotFoundError(f"{folder} holds no {wanted}. {remedy(name, folder)}")
    # All files are looked for before the first is read, so that the message names all that are missing.
    files = version.train + version.test
    paths = find_files(name, folder, [f"{version.folder}/{file.name}" for file in files])

    def split(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        batches = [
            _read_batch(path, file, version.labels_key, num_classes, verify)
            for path, file in zip(paths[start:stop], files[start:stop], strict=True)
        ]
        pixels = np.concatenate([pixels for pixels, _ in batches])
        images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        labels = np.concatenate([labels for _, labels in batches])
        return normalize(images, *normalization), labels.astype(np.int32)

    num_train = len(version.train)
    return Dataset(*split(0, num_train), *split(num_train, len(files)), num_classes=num_classes, name=name)


def _read_batch(
    path: Path, file: _File, labels_key: bytes | None, num_classes: int, verify: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Read the channel-first pixels, uint8 (N, 3072), and the labels (N,) of one file, and check them.

    Raises:
        ValueError: the file is truncated, corrupt, or not what its name says.
    """
    # A pickle of the same arrays may be longer or shorter; every other file's size follows from its format.
    sized = verify or labels_key is None
    content = read_bytes(path, limit=file.num_bytes + 1 if sized else None)
    if sized:
        check_size(path, content, file.num_bytes, _REPICKLED if labels_key else "Get the file again.")
    if verify:
        check_sha256(path, content, file.sha256)
    if labels_key is None:
        records = np.frombuffer(content, np.uint8).reshape(file.num_examples, 1 + _PIXELS)
        pixels, labels = records[:, 1:], records[:, 0]
    else:
        pixels, labels = _unpickle_batch(path, content, labels_key, file.num_examples)
    check_labels(labels, num_classes, where=f"{path}: labels")
    return pixels, labels


def _unpickle_batch(
    path: Path, content: bytes, labels_key: bytes, num_examples: int
) -> tuple[np.ndarray, np.ndarray]:
    """Take the pixels, uint8 (N, 3072), and the labels (N,) out of a pickled dictionary.

    Raises:
        ValueError: the content is no pickle, asks for more than arrays, or holds something else.
    """
    try:
        batch = load_restricted(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if isinstance(batch, dict):  # Python 3 writes texts as keys
        batch = {key.encode() if isinstance(key, str) else key: value for key, value in batch.items()}
    keys = list(batch) if isinstance(batch, dict) else type(batch).__name__
    if not isinstance(batch, dict) or b"data" not in batch or labels_key not in batch:
        raise ValueError(f"{path} must hold a dictionary with b'data' and {labels_key!r}, found {keys}")
    pixels = batch[b"data"]
    if (
        not isinstance(pixels, np.ndarray)
        or pixels.dtype != np.uint8
        or pixels.shape != (num_examples, _PIXELS)
    ):
        found = f"{pixels.dtype} {pixels.shape}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise ValueError(f"{path}: b'data' must be uint8 of shape {(num_examples, _PIXELS)}, found {found}")
    try:
        labels = np.asarray(batch[labels_key])
    except ValueError as error:
        raise ValueError(f"{path}: {labels_key!r} is not a list of integers ({error})") from error
    if labels.shape != (num_examples,):
        raise ValueError(f"{path}: {labels_key!r} must have shape {(num_examples,)}, found {labels.shape}")
    return pixels, labels
