"""What every method returns, and the few things that methods do to a model."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from flax import nnx

from jaxlimit.baselines.masks import count, layer_counts, size
from jaxlimit.core.trees import PyTree, partition
from jaxlimit.geometry.magnitude import apply_mask
from jaxlimit.models import from_nnx
from jaxlimit.training.recipe import Folder

Model = TypeVar("Model", bound=nnx.Module)


@dataclass(frozen=True)
class SparseNetwork:
    """A pruned and trained network.

    Attributes:
        model: the network; every weight that is False in `mask` is exactly 0.
        mask: pytree of booleans like `params`, True = kept, None for parameters that are not pruned.
        rounds: how many weights were alive at first and after each cut.

    Examples:
        >>> from jaxlimit.models import FullyConnected
        >>> import numpy as np
        >>> nothing = {"layers": {"0": {"kernel": np.zeros((2, 1), bool), "bias": None}}}
        >>> network = cut(FullyConnected([2, 1], rngs=nnx.Rngs(0)), nothing)
        >>> network.num_kept, network.sparsity, network.collapsed
        (0, 1.0, ['layers.0.kernel'])
    """

    model: nnx.Module
    mask: PyTree
    rounds: tuple[int, ...]

    @cached_property
    def _functional(self) -> tuple[Callable[..., Any], dict[str, Any]]:
        return from_nnx(self.model)

    @property
    def predict(self) -> Callable[..., Any]:
        """`predict(params, inputs) -> logits`, in evaluation mode."""
        return self._functional[0]

    @property
    def params(self) -> dict[str, Any]:
        """The parameters, for `predict` and for `jaxlimit.hessian`."""
        return self._functional[1]

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """By layer, how many weights it keeps and how many it has."""
        return layer_counts(self.mask)

    @property
    def num_kept(self) -> int:
        """Number of weights that are kept."""
        return count(self.mask)

    @property
    def sparsity(self) -> float:
        """Share of the prunable weights that are removed."""
        return 1 - self.num_kept / size(self.mask)

    @property
    def collapsed(self) -> list[str]:
        """Layers that keep nothing: what comes before them no longer reaches the output through them."""
        return [name for name, (kept, _) in self.layers.items() if kept == 0]


def kernels(model: nnx.Module) -> PyTree:
    """The prunable weights, named as by `models.from_nnx`, with None for all other parameters."""
    return partition(from_nnx(model)[1])[0]


def with_params(model: Model, params: PyTree) -> Model:
    """A copy of the model with these parameters, named as by `models.from_nnx`."""
    model = nnx.clone(model)
    nnx.update(model, nnx.restore_int_paths(params))
    return model


def cut(model: nnx.Module, mask: PyTree) -> SparseNetwork:
    """The model with its weights cut once, and nothing done after."""
    pruned = with_params(model, apply_mask(from_nnx(model)[1], mask))
    return SparseNetwork(pruned, mask, (size(mask), count(mask)))


def bare(model: Model, *, biases: bool) -> Model:
    """A copy of the model whose batch norm has no scale and shift, and without other biases unless `biases`.

    Examples:
        >>> from jaxlimit.models import CNet
        >>> network = bare(nnx.eval_shape(lambda: CNet(rngs=nnx.Rngs(0))), biases=False)
        >>> network.norms[0].scale, network.convolutions[0].bias
        (None, None)
    """
    model = nnx.clone(model)
    for _, module in nnx.iter_modules(model):
        layer: Any = module
        if isinstance(module, nnx.BatchNorm):
            layer.scale, layer.use_scale = None, False
        if isinstance(module, nnx.BatchNorm) or (not biases and hasattr(module, "use_bias")):
            layer.bias, layer.use_bias = None, False
    return model


def subfolder(checkpoint: Folder, name: str) -> Path | None:
    """A folder within a checkpoint's for one of several trainings; None where nothing is kept."""
    return None if checkpoint is None else Path(checkpoint) / name
