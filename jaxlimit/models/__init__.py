"""Flax NNX networks of the paper's experiments, and the step from any NNX model to a pure function."""

from jaxlimit.models.convolutional import VGG, AlexNet, CNet, Convolution, ConvolutionalNetwork, LeNet, Pool
from jaxlimit.models.fully_connected import FullyConnected, digits_net, fc2, fc5, fc12, fc13
from jaxlimit.models.functional import from_nnx
from jaxlimit.models.resnet import ResNet
from jaxlimit.models.torch_state import load_torch_state

__all__ = [
    "VGG",
    "AlexNet",
    "CNet",
    "Convolution",
    "ConvolutionalNetwork",
    "FullyConnected",
    "LeNet",
    "Pool",
    "ResNet",
    "digits_net",
    "fc2",
    "fc5",
    "fc12",
    "fc13",
    "from_nnx",
    "load_torch_state",
]
