"""Fully connected networks, as the experiments of the paper use them.

All layers have a bias, ReLU stands between layers, and the outputs are logits. Kernels start from an
untruncated Kaiming normal distribution (He et al. 2015, arXiv:1502.01852, equation 10), biases from zero:

    w ~ N(0, 2 / fan_in)

`jax.nn.initializers.he_normal` is not that: it cuts the normal distribution off at two standard deviations.
"""

from collections.abc import Sequence
from itertools import pairwise

import jax
from flax import nnx

kaiming_normal = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")

_DEEP = (1000, 900, 800, 750, 700, 650, 600, 500, 400)


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
            nnx.Linear(fan_in, fan_out, kernel_init=kaiming_normal, rngs=rngs)
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

    On 3072 inputs: 3,883,000 kernel weights, 3,885,010 parameters. Arguments and errors as for `fc2`.

    Examples:
        >>> fc5(3072, rngs=nnx.Rngs(0)).widths
        (3072, 1000, 600, 300, 100, 10)
    """
    return FullyConnected([in_features, 1000, 600, 300, 100, num_classes], rngs=rngs)


def fc12(in_features: int, num_classes: int = 10, *, rngs: nnx.Rngs) -> FullyConnected:
    """FC12 of the paper: in-1000-900-800-750-700-650-600-500-400-200-100-10.

    On 3072 inputs: 7,263,000 kernel weights, 7,269,610 parameters. Arguments and errors as for `fc2`.

    Examples:
        >>> len(nnx.eval_shape(lambda: fc12(64, rngs=nnx.Rngs(0))).layers)
        12
    """
    return FullyConnected([in_features, *_DEEP, 200, 100, num_classes], rngs=rngs)


def fc13(in_features: int, num_classes: int = 10, *, rngs: nnx.Rngs) -> FullyConnected:
    """FC13 of the paper's code: FC12 with a layer of 250 before that of 200.

    On 3072 inputs: 7,333,000 kernel weights, 7,339,860 parameters. Arguments and errors as for `fc2`.

    Examples:
        >>> len(nnx.eval_shape(lambda: fc13(64, rngs=nnx.Rngs(0))).layers)
        13
    """
    return FullyConnected([in_features, *_DEEP, 250, 200, 100, num_classes], rngs=rngs)


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
