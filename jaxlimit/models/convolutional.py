"""LeNet, CNet, AlexNet and the VGG networks, as the experiments of the paper use them.

Convolutions, each followed by batch norm (where the network has it) and ReLU, and max pools; then the
features, flattened in the order (height, width, channel), go through dense layers. Images have their channels
last. Kernels start Kaiming normal, biases and shifts from 0, scales from 1.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlimit.models.fully_connected import FullyConnected, kaiming_normal

CIFAR_SHAPE = (32, 32, 3)


class Convolution(NamedTuple):
    """A layer of `size` x `size` kernels; `padding` pixels of zeros on every side."""

    channels: int
    size: int = 3
    padding: int = 0
    strides: int = 1


class Pool(NamedTuple):
    """The maximum over `size` x `size` pixels."""

    size: int = 2
    strides: int = 2


Layer = Convolution | Pool


def batch_norm(channels: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    """With the running averages of PyTorch: a tenth of each batch, 1e-5 added to the variance."""
    return nnx.BatchNorm(channels, momentum=0.9, epsilon=1e-5, rngs=rngs)


def convolve(
    images: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **options: Any,
) -> jax.Array:
    """`jax.lax.conv_general_dilated`; on a CPU as one matrix product with the patches of the images.

    XLA's own gradient is about ten times slower on a CPU inside a loop, where training and curvature need it,
    than outside (jax-ml/jax#12868).

    Args:
        images: (batch, height, width, channels).
        kernel: (rows, columns, channels in, channels out).
        strides: down and across.
        padding: (before, after) of both axes.
        options: for XLA.
    """
    if jax.default_backend() != "cpu":
        return jax.lax.conv_general_dilated(images, kernel, strides, padding, **options)
    images = jnp.pad(images, ((0, 0), *padding, (0, 0)))
    rows, columns, _, channels = kernel.shape
    down, across = strides
    height, width = images.shape[1] - rows + 1, images.shape[2] - columns + 1
    shifts = [(i, j) for i in range(rows) for j in range(columns)]
    patches = jnp.concatenate(
        [images[:, i : i + height : down, j : j + width : across] for i, j in shifts], axis=-1
    )
    products = patches.reshape(-1, patches.shape[-1]) @ kernel.reshape(-1, channels)
    return products.reshape(*patches.shape[:-1], channels)


def max_pool(images: jax.Array, pool: Pool) -> jax.Array:
    """`nnx.max_pool`; on a CPU, if windows do not overlap, as a maximum over axes: faster to differentiate.

    Where several pixels of a window are the maximum, they then share its derivative. After a ReLU these are
    its zeros, whose derivative is 0.
    """
    size, strides = pool
    if size != strides or jax.default_backend() != "cpu":
        return nnx.max_pool(images, (size, size), strides=(strides, strides))
    count, height, width, channels = images.shape
    height, width = height // size, width // size
    windows = images[:, : height * size, : width * size]
    return windows.reshape(count, height, size, width, size, channels).max(axis=(2, 4))


def convolution(channels_in: int, layer: Convolution, *, bias: bool = True, rngs: nnx.Rngs) -> nnx.Conv:
    """The layer, with a Kaiming normal kernel."""
    return nnx.Conv(
        channels_in,
        layer.channels,
        (layer.size, layer.size),
        strides=layer.strides,
        padding=layer.padding,
        use_bias=bias,
        kernel_init=kaiming_normal,
        conv_general_dilated=convolve,
        rngs=rngs,
    )


class ConvolutionalNetwork(nnx.Module):
    """Convolutions and pools, then dense layers.

    `convolutions[i].kernel` has shape (size, size, channels in, channels out); `norms` is empty or has one
    batch norm for each convolution; `dense` is a `FullyConnected`.

    Args:
        layers: convolutions and pools, in order.
        hidden: widths of the hidden dense layers.
        num_classes: number of logits.
        image_shape: (height, width, channels) of an image.
        normalize: batch norm between each convolution and its ReLU.
        enlarge: every pixel becomes a square of so many, before the first layer.
        rngs: random keys for the kernels.

    Raises:
        ValueError: the image is too small for the layers, or a width is below 1.

    Examples:
        >>> network = ConvolutionalNetwork(
        ...     [Convolution(4), Pool()], [], 3, image_shape=(8, 8, 1), rngs=nnx.Rngs(0)
        ... )
        >>> network(jnp.ones((2, 8, 8, 1))).shape, network.dense.widths
        ((2, 3), (36, 3))
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        hidden: Sequence[int],
        num_classes: int,
        *,
        image_shape: tuple[int, int, int] = CIFAR_SHAPE,
        normalize: bool = False,
        enlarge: int = 1,
        rngs: nnx.Rngs,
    ):
        self.layers, self.image_shape, self.enlarge = tuple(layers), tuple(image_shape), enlarge
        *sides, channels = self.image_shape
        sides = [side * enlarge for side in sides]
        convolutions, norms = [], []
        for layer in layers:
            padding = layer.padding if isinstance(layer, Convolution) else 0
            sides = [(side + 2 * padding - layer.size) // layer.strides + 1 for side in sides]
            if min(sides) < 1:
                raise ValueError(f"image_shape {self.image_shape} is too small for this network.")
            if isinstance(layer, Convolution):
                convolutions.append(convolution(channels, layer, rngs=rngs))
                norms += [batch_norm(layer.channels, rngs)] if normalize else []
                channels = layer.channels
        self.convolutions, self.norms = nnx.List(convolutions), nnx.List(norms)
        self.features = (*sides, channels)
        self.dense = FullyConnected([math.prod(self.features), *hidden, num_classes], rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Computes the logits.

        Args:
            images: (batch, height, width, channels).

        Returns:
            Logits of shape (batch, classes).

        Raises:
            ValueError: images of another shape.
        """
        if images.shape[1:] != self.image_shape:
            raise ValueError(
                f"inputs must have shape (batch, {', '.join(map(str, self.image_shape))}), channels last, "
                f"got {images.shape}"
            )
        if self.enlarge > 1:
            images = jnp.repeat(jnp.repeat(images, self.enlarge, axis=1), self.enlarge, axis=2)
        number = 0
        for layer in self.layers:
            if isinstance(layer, Pool):
                images = max_pool(images, layer)
                continue
            images = self.convolutions[number](images)
            images = nnx.relu(self.norms[number](images) if self.norms else images)
            number += 1
        return self.dense(images.reshape(len(images), -1))


class LeNet(ConvolutionalNetwork):
    """LeNet of the paper's code: 5x5 convolutions to 16 and 32 channels, each with a pool; dense 120-84.

    For images of 32x32x3 and 10 classes 1,200 + 12,800 + 96,000 + 10,080 + 840 = 120,920 kernel weights and
    121,182 parameters. Arguments and errors as for `ConvolutionalNetwork`.

    Examples:
        >>> LeNet(rngs=nnx.Rngs(0))(jnp.ones((2, 32, 32, 3))).shape
        (2, 10)
    """

    def __init__(
        self, num_classes: int = 10, *, image_shape: tuple[int, int, int] = CIFAR_SHAPE, rngs: nnx.Rngs
    ):
        layers = [Convolution(16, 5), Pool(), Convolution(32, 5), Pool()]
        super().__init__(layers, [120, 84], num_classes, image_shape=image_shape, rngs=rngs)


class CNet(ConvolutionalNetwork):
    """CNet of the paper's code: 5x5 convolutions to 64, 64, 32 and 16 channels with batch norm; dense 120-84.

    One pool after the convolutions. For images of 32x32x3 and 10 classes 305,000 kernel weights and 305,742
    parameters. Arguments and errors as for `ConvolutionalNetwork`.

    Examples:
        >>> nnx.eval_shape(lambda: CNet(rngs=nnx.Rngs(0))).dense.widths
        (1024, 120, 84, 10)
    """

    def __init__(
        self, num_classes: int = 10, *, image_shape: tuple[int, int, int] = CIFAR_SHAPE, rngs: nnx.Rngs
    ):
        layers = [*(Convolution(channels, 5) for channels in (64, 64, 32, 16)), Pool()]
        super().__init__(layers, [120, 84], num_classes, image_shape=image_shape, normalize=True, rngs=rngs)


_ALEXNET = (
    Convolution(96, 11, padding=1, strides=4),
    Pool(3),
    Convolution(256, 5, padding=2),
    Pool(3),
    Convolution(384, padding=1),
    Convolution(384, padding=1),
    Convolution(256, padding=1),
    Pool(3),
)


class AlexNet(ConvolutionalNetwork):
    """AlexNet of the paper's code: images enlarged 7 times, five convolutions, dense 4096-4096.

    For images of 32x32x3 (enlarged to 224x224) and 10 classes 46,778,400 kernel weights and 46,787,978
    parameters. Arguments and errors as for `ConvolutionalNetwork`.

    Examples:
        >>> nnx.eval_shape(lambda: AlexNet(rngs=nnx.Rngs(0))).features
        (5, 5, 256)
    """

    def __init__(
        self, num_classes: int = 10, *, image_shape: tuple[int, int, int] = CIFAR_SHAPE, rngs: nnx.Rngs
    ):
        super().__init__(_ALEXNET, [4096, 4096], num_classes, image_shape=image_shape, enlarge=7, rngs=rngs)


_VGG = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class VGG(ConvolutionalNetwork):
    """VGG with 11, 13, 16 or 19 layers, in the form for small images: batch norm, one dense layer.

    Stages of 64, 128, 256, 512 and 512 channels with a pool after each. For images of 32x32x3 and 10 classes
    VGG16 has 14,715,584 kernel weights and 14,728,266 parameters. Source: Simonyan and Zisserman, arXiv
    1409.1556, configurations A, B, D and E. Arguments and errors as for `ConvolutionalNetwork`.

    Args:
        depth: 11, 13, 16 or 19.

    Examples:
        >>> nnx.eval_shape(lambda: VGG(11, rngs=nnx.Rngs(0))).dense.widths
        (512, 10)
    """

    def __init__(
        self,
        depth: int,
        num_classes: int = 10,
        *,
        image_shape: tuple[int, int, int] = CIFAR_SHAPE,
        rngs: nnx.Rngs,
    ):
        if depth not in _VGG:
            raise ValueError(f"depth must be one of {', '.join(map(str, _VGG))}, got {depth}.")
        layers: list[Layer] = []
        for channels, count in zip((64, 128, 256, 512, 512), _VGG[depth], strict=True):
            layers += [*[Convolution(channels, padding=1)] * count, Pool()]
        super().__init__(layers, [], num_classes, image_shape=image_shape, normalize=True, rngs=rngs)
