"""Handwritten digits of 8 x 8 pixels, embedded in scikit-learn: the data set that needs no files."""

from numbers import Integral

import numpy as np

from jaxlimit.data.dataset import Dataset

_NUM_TRAIN = 1438  # 80 % of 1,797, rounded


def load_digits(seed: int = 0) -> Dataset:
    """Load scikit-learn's 1,797 digits: 64 features in [0, 1], split 1,438 / 359 by a seeded permutation.

    The features are the 8 x 8 grey levels, which run from 0 to 16, divided by 16 and not normalised further.

    Args:
        seed: of `numpy.random.default_rng`, which draws the split. The split is part of the data set's
            definition, hence the default: every result on "digits" means seed 0 unless it says otherwise.

    Returns:
        float32 images of shapes (1438, 64) and (359, 64), int32 labels of 10 classes.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: the seed is not a non-negative integer.

    Examples:
        >>> load_digits()
        Dataset(digits: 1438 training and 359 test examples of shape (64,), 10 classes)
    """
    if not isinstance(seed, Integral) or seed < 0:
        raise ValueError(f"seed must be a non-negative integer, got {seed!r}")
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            'The digits data set comes with scikit-learn. Install it with: pip install "jaxlimit[cli]"'
        ) from error
    features, targets = datasets.load_digits(return_X_y=True)
    images, labels = np.asarray(features / 16, np.float32), np.asarray(targets, np.int32)
    order = np.random.default_rng(int(seed)).permutation(len(labels))
    train, test = order[:_NUM_TRAIN], order[_NUM_TRAIN:]
    return Dataset(images[train], labels[train], images[test], labels[test], num_classes=10, name="digits")
