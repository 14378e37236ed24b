"""A data set as four arrays, and the normalisation of its images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Normalization(NamedTuple):
    """Mean and standard deviation of every channel, for pixels in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


# As in the code of Zhang et al., "How Sparse Can We Prune A Deep Network", arXiv 2306.05857.
MNIST_NORMALIZATION = Normalization((0.1307,), (0.3081,))
"""Mean and standard deviation of the paper's code for MNIST."""
CIFAR10_NORMALIZATION = Normalization((0.491, 0.482, 0.447), (0.247, 0.243, 0.262))
"""Mean and standard deviation of the paper's code for CIFAR-10."""
CIFAR100_NORMALIZATION = Normalization((0.507, 0.487, 0.441), (0.267, 0.256, 0.276))
"""Mean and standard deviation of the paper's code for CIFAR-100."""
# The paper's code has none for the following.
FASHION_MNIST_NORMALIZATION = Normalization((0.2860,), (0.3530,))
"""Mean and standard deviation of the training pixels of Fashion-MNIST."""
TINY_IMAGENET_NORMALIZATION = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of ImageNet, which Tiny ImageNet is drawn from, as torchvision uses them."""


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Training and test examples of one classification task, in memory.

    Args:
        train_images: normalised, of shape (N, H, W, C), or (N, features) where there is no image plane.
        train_labels: class indices in [0, num_classes), of shape (N,).
        test_images: as train_images, of shape (M, ...).
        test_labels: as train_labels, of shape (M,).
        num_classes: number of classes.
        name: short name, such as "mnist".

    Raises:
        ValueError: images and labels differ in number, there are none, training and test examples differ in
            shape, or labels are not integers in [0, num_classes).

    Examples:
        >>> import numpy as np
        >>> images, labels = np.zeros((3, 4), np.float32), np.array([0, 1, 1], np.int32)
        >>> Dataset(images, labels, images[:2], labels[:2], num_classes=2, name="toy")
        Dataset(toy: 3 training and 2 test examples of shape (4,), 2 classes)
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    num_classes: int
    name: str

    def __post_init__(self):
        for split, images, labels in (
            ("train", self.train_images, self.train_labels),
            ("test", self.test_images, self.test_labels),
        ):
            if labels.ndim != 1 or len(images) != len(labels) or len(labels) == 0:
                raise ValueError(
                    f"{self.name}: {split}_images of shape {images.shape} and {split}_labels of shape "
                    f"{labels.shape} must hold the same number N > 0 of examples, labels with shape (N,)"
                )
            check_labels(labels, self.num_classes, where=f"{self.name}: {split}_labels")
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            raise ValueError(
                f"{self.name}: train_images and test_images must hold examples of one shape, "
                f"got {self.train_images.shape[1:]} and {self.test_images.shape[1:]}"
            )

    def __repr__(self):
        return (
            f"Dataset({self.name}: {len(self.train_labels)} training and {len(self.test_labels)} test "
            f"examples of shape {self.train_images.shape[1:]}, {self.num_classes} classes)"
        )


def check_labels(labels: np.ndarray, num_classes: int, *, where: str) -> None:
    """Raise ValueError, naming `where`, unless all labels are integers in [0, num_classes)."""
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{where} must be integers, got dtype {labels.dtype}")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"{where} must lie in [0, {num_classes}), found values from {labels.min()} to {labels.max()}"
        )


def normalize(images: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Scale bytes to [0, 1] and standardise every channel: (images / 255 - mean) / std.

    The three operations are done in this order in float32, as torchvision's ToTensor and Normalize do them.
    Memory: one float32 copy of the images (4 bytes a pixel), plus nothing else of that size.

    Args:
        images: bytes of shape (N, H, W, C).
        mean: one number per channel, on the scale of [0, 1].
        std: one positive number per channel, on the same scale.

    Returns:
        A new C-contiguous array of the images' shape.

    Raises:
        ValueError: images are not uint8 with four axes, or mean and std do not fit their channels.

    Examples:
        >>> import numpy as np
        >>> normalize(np.full((1, 1, 1, 1), 255, np.uint8), mean=(0.5,), std=(0.25,)).item()
        2.0
    """
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(
            f"images must be uint8 of shape (N, H, W, C), got {images.dtype} of shape {images.shape}"
        )
    center, scale = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    channels = images.shape[-1:]
    if center.shape != channels or scale.shape != channels:
        raise ValueError(
            f"mean and std must hold one number for each of the {channels[0]} channels, got {mean} and {std}"
        )
    if not (np.isfinite(center).all() and np.isfinite(scale).all() and (scale > 0).all()):
        raise ValueError(f"mean must be finite and std finite and positive, got {mean} and {std}")
    normalized = images.astype(np.float32, order="C")
    normalized /= 255
    normalized -= center
    normalized /= scale
    return normalized


def flatten_channel_first(images: np.ndarray) -> np.ndarray:
    """Flatten images channel by channel: entry (c H + h) W + w of a row is pixel (h, w) of channel c.

    This is the order in which networks written for channel-first images see a flattened input, so that
    their dense kernels can be used unchanged.

    Args:
        images: of shape (N, H, W, C) and any dtype.

    Returns:
        The pixels in shape (N, C H W); a copy where there is more than one channel.

    Raises:
        ValueError: images do not have four axes.

    Examples:
        >>> import numpy as np
        >>> image = np.array([[["r0", "g0"], ["r1", "g1"]]])     # 1 x 2 pixels, 2 channels
        >>> flatten_channel_first(image[None]).tolist()
        [['r0', 'r1', 'g0', 'g1']]
    """
    if images.ndim != 4:
        raise ValueError(f"images must have shape (N, H, W, C), got {images.shape}")
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)
