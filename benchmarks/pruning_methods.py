"""Ways to readjust a pruned network, at known costs: those of benchmarks/pruning.py.

The unit of cost is one gradient over all the data. What a Gauss-Newton product and a loss cost in this unit
is measured for each network; an epoch of minibatches counts as one gradient, and their tuning as nothing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from predicted_vs_measured import Case, Problem

from jaxlimit.core.trees import PyTree, partition
from jaxlimit.curvature.operator import Curvature
from jaxlimit.geometry.magnitude import magnitude_order, num_removed
from jaxlimit.pruning import prune as path_of_masks
from jaxlimit.pruning import trust_region
from jaxlimit.pruning.readjustable import Readjustable, readjustable
from jaxlimit.pruning.trust_region import Point, Settings
from jaxlimit.pruning.windows import LEAST_EXAMPLES, window
from jaxlimit.training.losses import cross_entropy

# Probes of the diagonal of G, on the share of the data that the curvature comes from.
PROBES = 20
Curve = list[dict[str, float]]


@dataclass(frozen=True)
class Variant:
    """How jaxlimit prunes; the defaults are those of `prune`.

    Attributes:
        curvature_share: of the data, for the products.
        everything: whether biases and norms move, too.
        gradient_share: of the data, for gradient and loss.
        step_products: at most, in a step.
        kept: share of the weights that a stage keeps of those before; 0 for one cut.
        second_order: whether weights go by |w| sqrt(G_ii) instead of |w|.
    """

    curvature_share: float = 0.1
    everything: bool = False
    gradient_share: float = 1.0
    step_products: int = 20
    kept: float = 0.8
    second_order: bool = False


class Subject:
    """A trained network, the data whose loss is to be low, and the test data."""

    def __init__(self, case: Case, problem: Problem, params: PyTree):
        self.params, self.problem, self.loss_fn = params, problem, problem.loss
        self.arrays = tuple(jnp.asarray(x[: case.num_examples]) for x in problem.train)
        self.num_examples = len(self.arrays[1])
        inputs, labels = (jnp.concatenate(x) for x in zip(*problem.test_batches, strict=True))
        self.test_error: Callable[[PyTree], jax.Array] = jax.jit(
            lambda params: jnp.mean(problem.predict(params, inputs).argmax(-1) == labels)
        )
        self.mean_loss: Callable[[PyTree], jax.Array] = jax.jit(
            lambda params: problem.loss(params, self.arrays)
        )

    @cached_property
    def factor_probe(self) -> Callable[[PyTree, jax.Array, jax.Array], PyTree]:
        """J^T S z for random signs z, where S S^T is the matrix of the cross entropy in the logits.

        The mean of its squares is the diagonal of G, times the number of examples; it cannot be negative.
        """

        @jax.jit
        def probe(params: PyTree, inputs: jax.Array, key: jax.Array) -> PyTree:
            logits, pull_back = jax.vjp(lambda params: self.problem.predict(params, inputs), params)
            shares = jax.nn.softmax(logits)
            signs = jax.random.rademacher(key, logits.shape, logits.dtype) * jnp.sqrt(shares)
            return pull_back(signs - shares * jnp.sum(signs, 1, keepdims=True))[0]

        return probe

    @cached_property
    def kernels(self) -> PyTree:
        """The weights that may be pruned, None for everything else."""
        return partition(self.params)[0]

    def removed(self, sparsity: float) -> int:
        """How many weights go."""
        return int(num_removed(magnitude_order(self.kernels).dim, sparsity))

    def magnitude_mask(self, sparsity: float) -> PyTree:
        """Of the trained network."""
        return magnitude_order(self.kernels).mask(self.removed(sparsity))

    def readjustable(self, variant: Variant) -> Readjustable:
        """As `prune` sees the network."""
        return readjustable(
            lambda params, batch: self.problem.predict(params, batch[0]),
            lambda logits, batch: cross_entropy(logits, batch[1]),
            self.params,
            self.problem.batches,
            trainable=(lambda path, leaf: True) if variant.everything else None,
            settings=Settings(variant.step_products, variant.curvature_share, variant.gradient_share),
        )

    def share_of_products(self, variant: Variant) -> float:
        """Of the data: few examples are never cut into parts."""
        return max(variant.curvature_share, min(LEAST_EXAMPLES / self.num_examples, 1.0))

    def measured(self, params: PyTree, cost: float) -> dict[str, float]:
        """A point of a curve."""
        loss, accuracy = float(self.mean_loss(params)), float(self.test_error(params))
        return {
            "cost": round(cost, 2),
            "loss": loss if math.isfinite(loss) else 1e30,
            "test_accuracy": accuracy,
        }


def window_share(part: Curvature, whole: Curvature) -> float:
    """Of the data."""
    return part.total_weight / whole.total_weight


def count_with(seconds: dict[str, float], curvature_share: float) -> float:
    """Makes jaxlimit count with the measured shares; what one of its products costs in gradients."""
    name = "product" if curvature_share > 0.5 else "product_with_a_tenth"
    product = seconds[name] / seconds["gradient"]
    trust_region.GRADIENT = 1 / product
    trust_region.LOSS = seconds["loss"] / seconds["gradient"] / product
    return product


def pruned_path(
    subject: Subject, sparsity: float, variant: Variant, product: float, max_cost: float
) -> Curve:
    """What `prune` does, every network with all the zeros measured; `product`: cost of one in gradients."""
    problem = subject.readjustable(variant)
    last, curve = subject.removed(sparsity), []

    def record(point: Point) -> None:
        params = problem.params(point)
        curve.append(subject.measured(params, product * float(point.num_products)))

    point, mask = problem.start, None
    for count in _stages(problem.dim, last, variant.kept):
        point, mask = _chosen(subject, problem, point, count, variant)
        point = problem.cut(point, mask)
        if count == last or point.loss > problem.curvature.loss:
            if count == last:
                record(point)
            point = problem.step(point, mask)
    record(point)
    done = [False]
    while product * point.num_products < max_cost and not all(done[-2:]):
        before, point = point, problem.step(point, mask)
        done.append(path_of_masks.settled(problem, before, point))
        record(point)
    return curve


def _stages(dim: int, last: int, kept: float) -> list[int]:
    return path_of_masks.path(dim, last, kept) if kept > 0 else [last]


def _chosen(
    subject: Subject, problem: Readjustable, point: Point, count: int, variant: Variant
) -> tuple[Point, PyTree]:
    """The mask of a stage, and the point with what choosing it cost."""
    if not variant.second_order:
        return point, problem.mask(point.weights, count)
    settings, number = problem.settings, int(point.number)
    part = window(problem.curvature, settings.curvature_share, number)
    total = jax.tree.map(jnp.zeros_like, point.weights)
    for probe in range(PROBES):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), number), probe)
        found = [
            subject.factor_probe(problem.params(point), inputs.reshape(-1, *inputs.shape[2:]), key)
            for inputs, _ in part.groups
        ]
        every = partition(jax.tree.map(lambda *x: sum(x), *found), lambda path, _: True)[0]
        total = jax.tree.map(
            lambda s, x: None if s is None else s + x**2, total, every, is_leaf=lambda x: x is None
        )
    scores = jax.tree.map(
        lambda w, d: np.abs(np.asarray(w)) * np.sqrt(np.asarray(d)),
        problem.prunable(point.weights),
        problem.prunable(total),
    )
    cost = PROBES * trust_region.GRADIENT * window_share(part, problem.curvature)
    mask = magnitude_order(scores).mask(count)
    return point._replace(num_products=point.num_products + cost), mask
