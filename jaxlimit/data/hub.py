"""Image classification data sets of the Hugging Face hub, read by its library `datasets`."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxlimit.data.dataset import Dataset, Normalization, normalize
from jaxlimit.data.images import decode_image

if TYPE_CHECKING:
    import datasets


def load_hub(
    name: "str | os.PathLike[str] | datasets.DatasetDict",
    *,
    splits: tuple[str, str] = ("train", "test"),
    image: str = "image",
    label: str = "label",
    config: str | None = None,
    revision: str | None = None,
    normalization: Normalization | None = None,
) -> Dataset:
    """Load an image classification data set of the Hugging Face hub, of a folder, or an opened one.

    Images that are all grey have one channel; otherwise all have three, and grey ones are repeated in them.
    No code of the data set is run. Memory: all images as float32 (4 bytes a pixel and channel), and as
    bytes twice while they are read.

    Args:
        name: on the hub, such as "ylecun/mnist", which downloads it at first use; or a folder (of images, or
            written by `save_to_disk`); or a `datasets.DatasetDict`.
        splits: the training split and the test split. Some data sets call the latter "validation" or "valid".
        image: column of the images.
        label: column of the labels, a ClassLabel or integers from 0.
        config: which of the data set's configurations, where it has several.
        revision: branch, tag or commit on the hub; give a commit for results that can be repeated.
        normalization: of pixels in [0, 1]; by default the mean and standard deviation of every channel over
            the training images.

    Returns:
        float32 images of shapes (N, H, W, C) and (M, H, W, C), int32 labels; as many classes as the
        ClassLabel has, or one more than the largest integer. Examples keep the data set's order.

    Raises:
        ImportError: `datasets` or Pillow is not installed.
        ValueError: a split or column is missing, empty or of another kind; the two splits name their classes
            differently; an image is truncated, corrupt, or not of the first one's size.

    Examples:
        >>> load_hub("ylecun/mnist")                                                 # doctest: +SKIP
        Dataset(ylecun/mnist: 60000 training and 10000 test examples of shape (28, 28, 1), 10 classes)
    """
    opened = _open(name, config, revision)
    name = "hub" if isinstance(name, dict) else os.fspath(name)
    train, test = _read_splits(opened, splits, name)
    train_where, test_where = (f"{name}, split {split!r}" for split in splits)

    train_labels, test_labels = _read_labels(train, label, train_where), _read_labels(test, label, test_where)
    names = _class_names(train, test, label, name)
    num_classes = len(names) if names else int(max(train_labels.max(), test_labels.max())) + 1

    train_images = _read_images(train, image, train_where)
    test_images = _read_images(test, image, test_where, train_images[0].shape[:2])
    channels = max(pixels.shape[-1] for pixels in train_images + test_images)
    stacked_train, stacked_test = _stack(train_images, channels), _stack(test_images, channels)
    normalization = normalization or _statistics(stacked_train)
    return Dataset(
        normalize(stacked_train, *normalization),
        train_labels,
        normalize(stacked_test, *normalization),
        test_labels,
        num_classes=num_classes,
        name=name,
    )


def _open(
    name: "str | os.PathLike[str] | datasets.DatasetDict", config: str | None, revision: str | None
) -> "datasets.DatasetDict":
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "Data sets of the Hugging Face hub are read by the library `datasets`. "
            'Install it with: pip install "jaxlimit[data]"'
        ) from error
    if isinstance(name, datasets.DatasetDict):
        return name
    if (Path(name) / "dataset_dict.json").is_file():
        return datasets.DatasetDict.load_from_disk(name)
    return datasets.load_dataset(os.fspath(name), config, revision=revision)


def _read_splits(
    opened: "datasets.DatasetDict", splits: tuple[str, str], name: str
) -> tuple["datasets.Dataset", "datasets.Dataset"]:
    """The training and the test split, neither of them empty."""
    if splits[0] == splits[1]:
        raise ValueError(f"splits must be two: test examples that are trained on, as {splits}, test nothing.")
    empty = [split for split in splits if split not in opened or len(opened[split]) == 0]
    if empty:
        found = ", ".join(f"{split} ({len(part)})" for split, part in opened.items())
        raise ValueError(f"{name} has no examples in split {', '.join(empty)}; splits there are: {found}")
    train, test = (opened[split].with_format(None) for split in splits)
    return train, test


def _class_names(
    train: "datasets.Dataset", test: "datasets.Dataset", label: str, name: str
) -> list[str] | None:
    """The names of the classes, the same in both splits; None for labels that are bare integers."""
    names, test_names = (getattr(split.features[label], "names", None) for split in (train, test))
    if names != test_names:
        raise ValueError(f"{name}: the splits name their classes differently: {names} and {test_names}")
    return names


def _feature(part: "datasets.Dataset", column: str, where: str) -> Any:
    if column not in part.features:
        raise ValueError(f"{where} has no column {column!r}; columns there are: {', '.join(part.features)}")
    return part.features[column]


def _read_labels(part: "datasets.Dataset", column: str, where: str) -> np.ndarray:
    """Read the labels as int32."""
    feature, labels = _feature(part, column, where), part[column][:]
    if not str(getattr(feature, "dtype", None)).startswith(("int", "uint")) or None in labels:
        raise ValueError(
            f"{where}: column {column!r} must hold integers or ClassLabels, without gaps, found {feature}; "
            f"strings become a ClassLabel with class_encode_column({column!r}) of the opened data set."
        )
    return np.asarray(labels, np.int32)


def _read_images(
    part: "datasets.Dataset", column: str, where: str, size: tuple[int, int] | None = None
) -> list[np.ndarray]:
    """Decode the images, all of this (height, width), by default the first one's."""
    import datasets  # load_hub has found it

    feature = _feature(part, column, where)
    if not isinstance(feature, datasets.Image):
        raise ValueError(f"{where}: column {column!r} must hold images, found {feature}")
    images = []
    for index, encoded in enumerate(part.cast_column(column, datasets.Image(decode=False))[column]):
        if encoded is None:
            raise ValueError(f"{where}: image {index} is missing")
        content = encoded["bytes"] or Path(encoded["path"]).read_bytes()
        images.append(decode_image(content, where=f"{where}: image {index}", size=size))
        size = size or images[0].shape[:2]
    return images


def _stack(images: Sequence[np.ndarray], channels: int) -> np.ndarray:
    return np.stack([np.broadcast_to(pixels, (*pixels.shape[:2], channels)) for pixels in images])


def _statistics(images: np.ndarray) -> Normalization:
    """Compute the mean and standard deviation of every channel from sums of integers, which are exact."""
    count = images[..., 0].size
    mean = images.sum(axis=(0, 1, 2), dtype=np.int64) / count
    mean_square = np.einsum("nhwc,nhwc->c", images, images, dtype=np.int64) / count
    std = np.sqrt(mean_square - mean**2)
    return Normalization(tuple((mean / 255).tolist()), tuple((std / 255).tolist()))
