"""Flax NNX networks of the paper's experiments, and the step from a library's model to a pure function.

`from_nnx`, `from_linen` and `from_equinox` give `(predict, params)`. Haiku's functions are pure already: of
`hk.without_apply_rng(hk.transform(f))`, `apply` is `predict`, and `init` gives `params`.
"""

from jaxlimit.models.bert import SentenceEncoder, load_sentence_encoder
from jaxlimit.models.convolutional import VGG, AlexNet, CNet, Convolution, ConvolutionalNetwork, LeNet, Pool
from jaxlimit.models.couplings import unit_labels
from jaxlimit.models.fully_connected import FullyConnected, digits_net, fc2, fc5, fc12, fc13
from jaxlimit.models.functional import from_equinox, from_linen, from_nnx
from jaxlimit.models.resnet import ResNet
from jaxlimit.models.torch_state import load_torch_state, save_torch_state, torch_state_dict
from jaxlimit.models.traced_couplings import traced_labels

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
    "SentenceEncoder",
    "digits_net",
    "fc2",
    "fc5",
    "fc12",
    "fc13",
    "from_equinox",
    "from_linen",
    "from_nnx",
    "load_sentence_encoder",
    "load_torch_state",
    "save_torch_state",
    "torch_state_dict",
    "traced_labels",
    "unit_labels",
]
