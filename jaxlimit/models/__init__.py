"""Flax NNX networks of the paper's experiments, and the step from any NNX model to a pure function."""

from jaxlimit.models.functional import from_nnx
from jaxlimit.models.networks import FullyConnected, LeNet, digits_net, fc2, fc5

__all__ = ["FullyConnected", "LeNet", "digits_net", "fc2", "fc5", "from_nnx"]
