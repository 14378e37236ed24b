"""Residual networks in the form for small images, as the experiments of the paper use them.

    block(x) = relu(F(x) + shortcut(x)),   F: convolutions with batch norm, ReLU between them

The shortcut is the identity, or a 1x1 convolution with batch norm where the shape changes. A 3x3 stem of 64
channels without a pool; four stages of 64, 128, 256 and 512 channels, the last three at half the resolution
of the one before; the mean over all pixels; one dense layer. Convolutions have no bias. Source: He et al.,
arXiv 1512.03385, with the stem of its section 4.2.
"""

import jax
from flax import nnx

from jaxlimit.models.convolutional import CIFAR_SHAPE, Convolution, batch_norm, convolution
from jaxlimit.models.fully_connected import kaiming_normal

# Blocks of each stage, by depth.
_BASIC = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
_BOTTLENECK = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
_EXPANSION = 4  # output channels of a bottleneck, over those of its 3x3 convolution


class Normalized(nnx.Module):
    """A convolution without bias, and batch norm."""

    def __init__(self, channels_in: int, layer: Convolution, *, rngs: nnx.Rngs):
        self.convolution = convolution(channels_in, layer, bias=False, rngs=rngs)
        self.norm = batch_norm(layer.channels, rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """(batch, height, width, channels in) to (batch, height', width', channels out)."""
        return self.norm(self.convolution(images))


class Block(nnx.Module):
    """A residual block: its layers one after the other, plus the shortcut.

    Args:
        channels_in: of the inputs.
        layers: the convolutions; the first whose strides are not 1 halves the resolution.
        rngs: random keys for the kernels.
    """

    def __init__(self, channels_in: int, layers: list[Convolution], *, rngs: nnx.Rngs):
        ends = [channels_in, *(layer.channels for layer in layers)]
        self.layers = nnx.List(
            Normalized(channels, layer, rngs=rngs) for channels, layer in zip(ends[:-1], layers, strict=True)
        )
        strides = max(layer.strides for layer in layers)
        changes = strides > 1 or channels_in != ends[-1]
        projection = Convolution(ends[-1], 1, strides=strides)
        self.shortcut = nnx.List([Normalized(channels_in, projection, rngs=rngs)] if changes else [])

    def __call__(self, images: jax.Array) -> jax.Array:
        """(batch, height, width, channels in) to (batch, height', width', channels out)."""
        *first, last = self.layers
        residual = images
        for layer in first:
            residual = nnx.relu(layer(residual))
        for projection in self.shortcut:
            images = projection(images)
        return nnx.relu(last(residual) + images)


class ResNet(nnx.Module):
    """ResNet with 18, 34, 50, 101 or 152 layers.

    With 10 classes ResNet18 has 11,164,352 kernel weights and 11,173,962 parameters, ResNet50 23,467,712 and
    23,520,842. Any image of at least one pixel with the channels given can be put in.

    Args:
        depth: 18 or 34 (two 3x3 convolutions a block), 50, 101 or 152 (bottlenecks of 1x1, 3x3 and 1x1).
        num_classes: number of logits.
        image_shape: (height, width, channels); only the channels matter.
        width: channels of the stem and of the first stage; 64 in the paper.
        rngs: random keys for the kernels.

    Raises:
        ValueError: another depth.

    Examples:
        >>> network = nnx.eval_shape(lambda: ResNet(50, rngs=nnx.Rngs(0)))
        >>> len(network.blocks), network.dense.kernel.shape
        (16, (2048, 10))
    """

    def __init__(
        self,
        depth: int,
        num_classes: int = 10,
        *,
        image_shape: tuple[int, int, int] = CIFAR_SHAPE,
        width: int = 64,
        rngs: nnx.Rngs,
    ):
        known = _BASIC | _BOTTLENECK
        if depth not in known:
            raise ValueError(f"depth must be one of {', '.join(map(str, known))}, got {depth}.")
        self.image_channels, self.num_blocks = image_shape[-1], known[depth]
        self.stem = Normalized(self.image_channels, Convolution(width, padding=1), rngs=rngs)
        blocks, channels = [], width
        for stage, count in enumerate(known[depth]):
            for number in range(count):
                strides = 2 if stage > 0 and number == 0 else 1
                layers = _layers(width * 2**stage, strides, bottleneck=depth in _BOTTLENECK)
                blocks.append(Block(channels, layers, rngs=rngs))
                channels = layers[-1].channels
        self.blocks = nnx.List(blocks)
        self.dense = nnx.Linear(channels, num_classes, kernel_init=kaiming_normal, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits (batch, classes) of images (batch, height, width, channels).

        Raises:
            ValueError: images of another number of dimensions or channels.
        """
        if images.ndim != 4 or images.shape[-1] != self.image_channels:
            raise ValueError(
                f"inputs must have shape (batch, height, width, {self.image_channels}), channels last, got "
                f"{images.shape}"
            )
        features = nnx.relu(self.stem(images))
        for block in self.blocks:
            features = block(features)
        return self.dense(features.mean((1, 2)))


def _layers(channels: int, strides: int, *, bottleneck: bool) -> list[Convolution]:
    """The convolutions of a block; the resolution falls at the 3x3 convolution."""
    wide = Convolution(channels, padding=1, strides=strides)
    if not bottleneck:
        return [wide, Convolution(channels, padding=1)]
    return [Convolution(channels, 1), wide, Convolution(channels * _EXPANSION, 1)]
