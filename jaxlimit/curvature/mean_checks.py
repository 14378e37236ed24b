"""Whether a loss is the mean that it is taken for: over a batch's examples, or over what `weight_fn` counts.

    L = sum_b W_b l_b / sum_b W_b    must not depend on how the examples are cut into batches b.

So all examples are gone through twice: as the caller cut them, and in other batches of the sizes that the
products use, which hold examples from all over the data. A few examples of a first, a middle and a last batch
are compared in fours and in twos. Weights, losses and gradients have to agree, at weights that are moved a
little, for a loss that is 0 at the weights says nothing there.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlimit.core.batches import batch_length, examples_like, first_of
from jaxlimit.core.checks import NOT_FINITE_CAUSES
from jaxlimit.core.checksums import data_changed
from jaxlimit.core.cuts import Sampled, cut_otherwise, mixed, one_batch, samples
from jaxlimit.core.programs import Program
from jaxlimit.core.sums import ExampleSum
from jaxlimit.core.trees import PyTree
from jaxlimit.curvature.data_checks import not_a_mean, require_precise, require_same_weight
from jaxlimit.curvature.loss_trace import LossTrace
from jaxlimit.curvature.products import Loss, Product
from jaxlimit.curvature.scattered import moved_weights, norm, nudged_weights
from jaxlimit.curvature.small_batches import (
    GRADIENT_TOLERANCE,
    LEAST_LOSS,
    LOSS_TOLERANCE,
    NOISE,
    WEIGHT_TOLERANCE,
    differing_parts,
    in_parts,
    noise_in_parts,
)

# By how much the weights are moved, in units of their root mean square in each array.
MOVED = 0.02
OTHERWISE = "where the same examples are cut into other batches"


class _Means(NamedTuple):
    """Of all data: the loss at the weights, then at the moved weights, where the gradient is a sum yet."""

    loss: float
    moved_loss: float
    loss_size: float
    gradient_size: float
    gradient: PyTree
    weight: float


@dataclass(frozen=True)
class Checked:
    """What the checks know afterwards of all data.

    Attributes:
        num_examples: number of examples.
        total_weight: the same, or what `weight_fn` counts.
        loss: the mean loss at the weights.
    """

    num_examples: int
    total_weight: float
    loss: float


def check_loss(
    product: Product, weights: PyTree, rest: PyTree, groups: Iterable[PyTree], used: Iterable[PyTree]
) -> Checked:
    """Refuses a loss that is no mean, is not finite or not precise, and data that change, by ValueErrors.

    Cost: two gradients and two losses of all data. Streams are read twice.

    Args:
        product: of the loss.
        weights: the prunable weights.
        rest: the other parameters.
        groups: the data as the caller cut them.
        used: the data as the products have them.
    """
    check = _Check(product, weights, rest)
    first_pass, second_pass = Sampled(groups), Sampled(mixed(used))
    moved = moved_weights(weights, MOVED)
    first = check.means(first_pass, moved)
    check.look_into(first_pass.batches)
    if np.isfinite(first.loss) and not np.isfinite(first.moved_loss):
        moved = weights  # the loss is not defined everywhere around
        first = check.means(first_pass, moved)
    second = check.means(second_pass, moved)
    if not (np.isfinite(first.loss) or np.isfinite(second.loss)):
        raise ValueError(f"the mean loss is {first.loss}. {NOT_FINITE_CAUSES}")
    require_same_weight(None, first_pass.num_examples, second_pass.num_examples)
    found = differing(first, second, check.tolerance)
    if found and not isinstance(groups, list):
        check.require_same_data(first, check.means(groups, moved))
    if found and not check.is_rounding(groups, moved, first, second):
        check.refuse(found)
    check.sampled(first_pass.batches, moved)
    return Checked(first_pass.num_examples, first.weight, first.loss)


class _Check:
    """Means of one loss in several cuts."""

    def __init__(self, product: Product, weights: PyTree, rest: PyTree) -> None:
        self.product, self.weights, self.rest = product, weights, rest
        self.sum = ExampleSum(_LossAndGradient(product), product.weight)
        self.trace = LossTrace()

    def look_into(self, batches: list[tuple[PyTree, int]]) -> None:
        """Refuses what is not precise."""
        self.trace = require_precise(self.product.loss, self.weights, self.rest, batches[0][0])

    @property
    def tolerance(self) -> float:
        """Relative, of losses: they may be cast to few bits at the end."""
        return max(LOSS_TOLERANCE, 4 * self.trace.epsilon)

    def means(self, groups: Iterable[PyTree], moved: PyTree) -> _Means:
        """Of all data in this cut."""
        sums, weight = self.sum(groups, self.weights, moved, self.rest)
        loss, moved_loss, loss_size, gradient_size = (float(x) / weight for x in sums[:-1])
        return _Means(loss, moved_loss, loss_size, gradient_size, sums[-1], weight)

    def require_same_data(self, first: _Means, again: _Means) -> None:
        """Two passes over the batches as they are must agree."""
        require_same_weight(self.product.weight, first.weight, again.weight)
        if not np.isclose(first.loss, again.loss, rtol=1e-5, atol=1e-8):
            raise ValueError(data_changed(f"a mean loss of {first.loss:.8g}", f"{again.loss:.8g}"))

    def is_rounding(
        self, groups: Iterable[PyTree], moved: PyTree, first: _Means, second: _Means, copies: int = 1
    ) -> bool:
        """Whether two cuts differ by no more than a change of the weights in their last digits makes."""
        if differing_weights(first, second, copies):
            return False
        nudged = self.means(groups, nudged_weights(moved))
        loss = max(abs(second.moved_loss - first.moved_loss), abs(second.loss - first.loss))
        return loss <= max(
            NOISE * abs(nudged.moved_loss - first.moved_loss), LOSS_TOLERANCE * first.loss_size
        ) and distance(first, second) <= NOISE * distance(first, nudged)

    def refuse(self, found: str) -> None:
        """Says that the loss is no mean."""
        raise ValueError(not_a_mean("loss_fn", found, self.product.weight, self.trace))

    def sampled(self, batches: list[tuple[PyTree, int]], moved: PyTree) -> None:
        """A few examples of these batches, in fours and twos; or, if the loss takes no others, as many."""
        for small in samples(batches):
            size = next((n for n in (2, 1) if self._takes(small, n)), None)
            if size is None:
                self._sampled_as_they_are(batches, moved)
                continue
            found = dict(Program(partial(in_parts, self.product, size), once=True)(moved, self.rest, small))
            if differing_parts(found, self.tolerance):
                found |= Program(partial(noise_in_parts, self.product), once=True)(
                    moved, nudged_weights(moved), self.rest, small
                )
                found = differing_parts(found, self.tolerance)
                if found:
                    self.refuse(found)

    def _sampled_as_they_are(self, batches: list[tuple[PyTree, int]], moved: PyTree) -> None:
        for group, number in batches:
            one = one_batch(group, number)
            takes_size = partial(takes, self.product, self.weights, self.rest, first_of(one))
            others, copies = cut_otherwise(one, takes_size)
            first, second = self.means([one], moved), self.means([others], moved)
            found = differing(first, second, self.tolerance, copies)
            if found and not self.is_rounding([one], moved, first, second, copies):
                self.refuse(found)

    def _takes(self, small: PyTree, size: int) -> bool:
        """Whether the loss can be computed of small batches, and of parts of this size."""
        whole = batch_length(jax.eval_shape(first_of, small))
        return (
            size < whole
            and whole % size == 0
            and all(takes(self.product, self.weights, self.rest, first_of(small), n) for n in (whole, size))
        )


def takes(product: Product, weights: PyTree, rest: PyTree, arrays: PyTree, size: int) -> bool:
    """Whether a loss can be traced for batches of `size` examples like these: some are of one size only."""
    try:
        jax.eval_shape(Loss(product), weights, rest, examples_like(arrays, size))
    except Exception:  # whatever the caller's function raises
        return False
    return True


@dataclass(frozen=True, eq=False)
class _LossAndGradient:
    product: Product

    def __call__(self, weights: PyTree, moved: PyTree, rest: PyTree, batch: PyTree) -> tuple:
        loss_fn = Loss(self.product)
        loss, gradient = jax.value_and_grad(loss_fn)(moved, rest, batch)
        return loss_fn(weights, rest, batch), loss, jnp.abs(loss), norm(gradient), gradient


def differing(first: _Means, second: _Means, tolerance: float, copies: int = 1) -> str:
    """In which words two cuts differ, if they do; the second may hold every example several times."""
    if differing_weights(first, second, copies):
        return f"weight_fn adds up to {first.weight:.8g}, and to {second.weight / copies:.8g} {OTHERWISE}"
    allowed = tolerance * first.loss_size + LEAST_LOSS
    for one, other in ((first.loss, second.loss), (first.moved_loss, second.moved_loss)):
        both = np.isfinite([one, other])
        if both[0] != both[1] or (both[0] and abs(one - other) > allowed):
            return f"its mean is {one:.6g}, and {other:.6g} {OTHERWISE}"
    size = max(first.gradient_size, second.gradient_size)
    if np.isfinite(size) and not (apart := distance(first, second)) <= GRADIENT_TOLERANCE * size:
        share = apart / size
        return f"its gradient differs by {share:.2g} of its size {OTHERWISE}"
    return ""


def differing_weights(first: _Means, second: _Means, copies: int) -> bool:
    """Whether the weights of two cuts do not add up to the same."""
    return not np.isclose(first.weight, second.weight / copies, rtol=WEIGHT_TOLERANCE, atol=0)


def distance(first: _Means, second: _Means) -> float:
    """Between two mean gradients."""
    leaves = [jax.tree.leaves(x.gradient) for x in (first, second)]
    return float(_distance(*leaves, first.weight, second.weight))


_distance = Program(
    lambda first, second, of_first, of_second: norm(
        [x / of_first - y / of_second for x, y in zip(first, second, strict=True)]
    )
)
