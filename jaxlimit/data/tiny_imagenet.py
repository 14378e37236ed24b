"""Tiny ImageNet from its official folder of JPEG files."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxlimit.data.dataset import TINY_IMAGENET_NORMALIZATION, Dataset, normalize
from jaxlimit.data.files import data_folder, find_files, remedy
from jaxlimit.data.images import decode_image

_NAME = "tiny-imagenet"
_ROOT = "tiny-imagenet-200"
_NUM_CLASSES = 200
_NUM_TRAIN, _NUM_TEST = 500, 50  # images of every class
_SIZE = (64, 64)

_Files = Mapping[str, Sequence[Path]]  # class -> its images


def load_tiny_imagenet(
    folder: str | os.PathLike[str] | None = None, *, num_classes: int | None = None, verify: bool = True
) -> Dataset:
    """Load Tiny ImageNet, normalised with ImageNet's mean and standard deviation.

    The mean (.485, .456, .406) and standard deviation (.229, .224, .225) are those that torchvision's
    pretrained networks use. The test examples are the official validation set: the labels of the official
    test set are not published. The index of a class is its position among the sorted lines of wnids.txt.
    Examples are the first image of every class by file name, then the second, and so on, so that consecutive
    ones form mixed batches. Grey images are repeated in the three channels.

    Memory: 5.4 GB for the float32 images of all classes, 6.1 GB at the peak; in proportion for fewer.

    Args:
        folder: holds tiny-imagenet-200; default $JAXLIMIT_DATA/tiny-imagenet.
        num_classes: load only the first classes; default all.
        verify: require the official 200 classes, each with 500 training and 50 validation images. Without
            it, for a folder changed on purpose, every class must have at least one of each. There are no
            checksums of the files.

    Returns:
        float32 images of shapes (100000, 64, 64, 3) and (10000, 64, 64, 3), int32 labels of 200 classes.

    Raises:
        ImportError: Pillow is not installed.
        FileNotFoundError: the folder or a file is missing.
        ValueError: num_classes is not among the classes there are, the number of classes or images is not
            the official one, a validation image is not annotated with a class of wnids.txt, or an image is
            truncated, corrupt, or not of 64 x 64 pixels.

    Examples:
        >>> load_tiny_imagenet()                                                     # doctest: +SKIP
        Dataset(tiny-imagenet: 100000 training and 10000 test examples of shape (64, 64, 3), 200 classes)
    """
    folder = data_folder(_NAME, folder)
    list_of_classes, annotations = find_files(
        _NAME, folder, [f"{_ROOT}/wnids.txt", f"{_ROOT}/val/val_annotations.txt"]
    )
    classes = sorted(set(_read_text(list_of_classes).split()))
    if verify:
        _check_count(len(classes), _NUM_CLASSES, f"{list_of_classes}: classes")
    if num_classes is not None and num_classes not in range(1, len(classes) + 1):
        raise ValueError(f"num_classes must be an integer in [1, {len(classes)}], got {num_classes!r}")
    chosen = classes[:num_classes]
    validation = _validation_files(annotations, classes)
    train = {wnid: sorted((folder / _ROOT / "train" / wnid / "images").glob("*.JPEG")) for wnid in chosen}
    test = {wnid: sorted(validation[wnid]) for wnid in chosen}
    # All files are looked for before the first is read: reading them takes minutes.
    for split, files, official in (("train", train, _NUM_TRAIN), ("val", test, _NUM_TEST)):
        for wnid, paths in files.items():
            if not paths:
                raise FileNotFoundError(
                    f"{folder / _ROOT / split} holds no images of {wnid}. {remedy(_NAME, folder)}"
                )
            if verify:
                _check_count(len(paths), official, f"{folder / _ROOT / split}: images of {wnid}")
    return Dataset(*_read_split(train), *_read_split(test), num_classes=len(chosen), name=_NAME)


def _validation_files(annotations: Path, classes: Sequence[str]) -> dict[str, set[Path]]:
    """Find the validation images of every class in lines "file, tab, class, tab, ..."."""
    files: dict[str, set[Path]] = {wnid: set() for wnid in classes}
    for number, line in enumerate(_read_text(annotations).splitlines(), start=1):
        fields = line.split("\t")
        if len(fields) < 2 or fields[1] not in files:
            raise ValueError(
                f"{annotations}, line {number}: expected a file and a class of wnids.txt, found {line!r}"
            )
        path = annotations.parent / "images" / fields[0]
        if not path.is_file():
            raise FileNotFoundError(f"{annotations}, line {number}: there is no file {path}")
        files[fields[1]].add(path)
    return files


def _read_split(files: _Files) -> tuple[np.ndarray, np.ndarray]:
    """Read the images of all classes, normalised, the first of every class, then the second, ..."""
    examples = sorted(
        (number, label, path)
        for label, paths in enumerate(files.values())
        for number, path in enumerate(paths)
    )
    images = np.stack(
        [
            np.broadcast_to(decode_image(path.read_bytes(), where=str(path), size=_SIZE), (*_SIZE, 3))
            for _, _, path in examples
        ]
    )
    labels = np.array([label for _, label, _ in examples], np.int32)
    return normalize(images, *TINY_IMAGENET_NORMALIZATION), labels


def _read_text(path: Path) -> str:
    # What is not text names no class, and is reported as such.
    return path.read_text("utf-8", errors="replace")


def _check_count(found: int, official: int, what: str) -> None:
    if found != official:
        raise ValueError(
            f"{what}: found {found}, expected {official}. Get the data set again, or pass verify=False if it "
            "was changed on purpose."
        )
