"""How are the networks trained whose limits are asked for? Gradient descent with momentum and an L1 term.

Here are also the losses and metrics of classification, and the curvature of their mean.
"""

from jaxlimit.training.classifier import PureClassifier, pure_classifier, train, train_model
from jaxlimit.training.losses import (
    classification_curvature,
    classification_loss,
    classification_metrics,
    cross_entropy,
    l1_norm,
)
from jaxlimit.training.schedule import learning_rate_schedule, steps_per_epoch

__all__ = [
    "PureClassifier",
    "classification_curvature",
    "classification_loss",
    "classification_metrics",
    "cross_entropy",
    "l1_norm",
    "learning_rate_schedule",
    "pure_classifier",
    "steps_per_epoch",
    "train",
    "train_model",
]
