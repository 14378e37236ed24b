"""Fully connected networks and LeNet, as the experiments of the paper use them.

All layers have a bias, ReLU stands between layers, and the outputs are logits. Kernels start from an
untruncated Kaiming normal distribution (He et al. 2015, arXiv:1502.01852, equation 10), biases from zero:

    w ~ N(0, 2 / fan_in)

`jax.nn.initializers.he_normal` is not that: it cuts the normal distribution off at two standard deviations.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import jax
from flax import nnx

_kaiming_normal = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")

_LENET_INPUT = (32, 32, 3)
_LENET_FEATURES = 5 * 5 * 32  # 32 -> 28 -> 14 -> 10 -> 5 pixels a side, 32 channels


class FullyConnected(nnx.Module):
    """Dense layers with bias and ReLU between them.

        h_0 = inputs,   h_{l+1} = relu(h_l W_l + b_l),   logits = h_{L-1} W_{L-1} + b_{L-1}

    With widths n_0, ..., n_L there are sum_l n_l n_{l+1} kernel weights and sum_l n_{l+1} biases. The kernel
    of layer l is `layers[l].kernel`, of shape (n_l, n_{l+1}).

    Args:
        widths: the width of the inputs, of each hidden layer, and of the logits, in this order.
        rngs: random keys for the kernels.

    Raises:
        ValueError: if there are fewer than two widths, or one is below 1.

    Examples:
        >>> import jax.numpy as jnp
        >>> network = FullyConnected([4, 8, 3], rngs=nnx.Rngs(0))
        >>> network(jnp.ones((5, 4))).shape
        (5, 3)
    """

    def __init__(self, widths: Sequence[int], *, rngs: nnx.Rngs):
        if len(widths) < 2 or min(widths) < 1:
            raise ValueError(f"widths must be at least two numbers, each 1 or more, got {list(widths)}")
        self.widths = tuple(widths)
        self.layers = nnx.List(
            nnx.Linear(fan_in, fan_out, kernel_init=_kaiming_normal, rngs=rngs)
            for fan_in, fan_out in pairwise(widths)
        )

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Computes the logits.

        Args:
            inputs: array of shape (batch, widths[0]); nothing is flattened here.

        Returns:
            Logits of shape (batch, widths[-1]).

        Raises:
            ValueError: if the inputs have another shape.
        """
        if inputs.ndim != 2 or inputs.shape[1] != self.widths[0]:
            raise ValueError(
                f"inputs must have shape (batch, {self.widths[0]}), got {inputs.shape}; "
                "images are flattened first: images.reshape(len(images), -1)"
            )
        *hidden, last = self.layers
        for layer in hidden:
            inputs = nnx.relu(layer(inputs))
        return last(inputs)


def fc2(in_features: int, num_classes: int = 10, *, rngs: nnx.Rngs) -> FullyConnected:
    """FC2 of the paper's code: in-100-10.

    On 784 inputs: 784 * 100 + 100 * 10 = 79,400 kernel weights, 79,510 parameters.

    Args:
        in_features: number of inputs; 784 for MNIST, 3072 for CIFAR-10.
        num_classes: number of logits; 10, the classes of both.
        rngs: random keys for the kernels.

    Returns:
        The network at its random start.

    Raises:
        ValueError: if a width is below 1.

    Examples:
        >>> fc2(784, rngs=nnx.Rngs(0)).widths
        (784, 100, 10)
    """
    return FullyConnected([in_features, 100, num_classes], rngs=rngs)


def fc5(in_features: int, num_classes: int = 10, *, rngs: nnx.Rngs) -> FullyConnected:
    """FC5 of the paper: in-1000-600-300-100-10.

    On 3072 inputs: 3,883,000 kernel weights, 3,885,010 parameters.

    Args:
        in_features: number of inputs; 3072 for CIFAR-10, 784 for MNIST.
        num_classes: number of logits; 10, the classes of both.
        rngs: random keys for the kernels.

    Returns:
        The network at its random start.

    Raises:
        ValueError: if a width is below 1.

    Examples:
        >>> fc5(3072, rngs=nnx.Rngs(0)).widths
        (3072, 1000, 600, 300, 100, 10)
    """
    return FullyConnected([in_features, 1000, 600, 300, 100, num_classes], rngs=rngs)


def digits_net(*, rngs: nnx.Rngs) -> FullyConnected:
    """A network small enough for its dense Hessian: 64-48-24-10, for the 8x8 images of scikit-learn.

    64 * 48 + 48 * 24 + 24 * 10 = 4,464 kernel weights, 4,546 parameters: in float64 the Hessian of the
    kernel weights takes 160 MB, so that every estimate can be compared with its exact value.

    Args:
        rngs: random keys for the kernels.

    Returns:
        The network at its random start.

    Examples:
        >>> digits_net(rngs=nnx.Rngs(0)).widths
        (64, 48, 24, 10)
    """
    return FullyConnected([64, 48, 24, 10], rngs=rngs)


class LeNet(nnx.Module):
    """LeNet of the paper's code, for colour images of 32x32 pixels.

    Convolution 5x5 to 16 channels, ReLU, max pool 2; convolution 5x5 to 32 channels, ReLU, max pool 2 (both
    convolutions without padding); then dense 800-120-84-10. With 10 classes there are 1,200 + 12,800 +
    96,000 + 10,080 + 840 = 120,920 kernel weights and 121,182 parameters.

    The features are flattened in the order (height, width, channel), so the first dense kernel has its rows
    in another order than a channel-first network.

    Args:
        num_classes: number of logits; 10, the classes of CIFAR-10.
        rngs: random keys for the kernels.

    Raises:
        ValueError: if num_classes is below 1.

    Examples:
        >>> import jax.numpy as jnp
        >>> LeNet(rngs=nnx.Rngs(0))(jnp.ones((2, 32, 32, 3))).shape
        (2, 10)
    """

    def __init__(self, num_classes: int = 10, *, rngs: nnx.Rngs):
        self.conv1 = _convolution(_LENET_INPUT[-1], 16, rngs)
        self.conv2 = _convolution(16, 32, rngs)
        self.dense = FullyConnected([_LENET_FEATURES, 120, 84, num_classes], rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Computes the logits.

        Args:
            inputs: images of shape (batch, 32, 32, 3), channels last.

        Returns:
            Logits of shape (batch, num_classes).

        Raises:
            ValueError: if the inputs have another shape.
        """
        if inputs.shape[1:] != _LENET_INPUT:
            raise ValueError(f"inputs must have shape (batch, 32, 32, 3), channels last, got {inputs.shape}")
        for convolution in (self.conv1, self.conv2):
            inputs = nnx.max_pool(nnx.relu(convolution(inputs)), (2, 2), strides=(2, 2))
        return self.dense(inputs.reshape(len(inputs), math.prod(inputs.shape[1:])))


def _convolution(channels_in: int, channels_out: int, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(
        channels_in, channels_out, (5, 5), padding="VALID", kernel_init=_kaiming_normal, rngs=rngs
    )
