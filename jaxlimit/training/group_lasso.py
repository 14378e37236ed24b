r"""Group lasso: an L1 term on the norms of groups of weights, which drives whole groups to zero.

    lambda * sum_g sqrt(n_g) * ||w_g||_2,      g the groups, n_g the number of weights of one

Without the factor sqrt(n_g) large groups would be favoured. With a group for each weight it is the L1 term of
the prunable weights. Source: Yuan and Lin, Model selection and estimation in regression with grouped
variables (2006), equation 2.1; for channels Wen et al., arXiv 1608.03665.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlimit.core.checks import as_real, require_range
from jaxlimit.core.trees import PyTree, flatten, partition
from jaxlimit.geometry.groups import group_labels


class GroupLasso(NamedTuple):
    """The term, as a pytree of arrays, so that another lambda compiles nothing.

    Attributes:
        strength: lambda.
        labels: like the prunable weights, from 0 on without gaps.
        roots: (groups,) sqrt(n_g).
    """

    strength: jax.Array
    labels: PyTree
    roots: jax.Array

    def __call__(self, params: PyTree) -> jax.Array:
        """Its value; the gradient of a group that is zero is zero."""
        weights, _ = partition(params)
        leaves = zip(jax.tree.leaves(weights), jax.tree.leaves(self.labels), strict=True)
        squares = jnp.zeros_like(self.roots)
        for weight, label in leaves:
            squares = squares.at[label].add(weight.astype(squares.dtype) ** 2)
        positive = squares > 0  # the derivative of the root at 0 is infinite
        norms = jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1.0)), 0.0)
        return self.strength * jnp.sum(self.roots * norms)


def group_lasso_of(params: PyTree, strength: float, groups: Any) -> GroupLasso | None:
    """The term on the prunable weights of `params`; None where lambda is 0.

    Args:
        params: pytree of parameters.
        strength: lambda, 0 or more.
        groups: as for `group_labels`.

    Raises:
        ValueError: lambda out of range; groups that do not match, or none at all.

    Examples:
        >>> term = group_lasso_of(jnp.array([[3.0, 1.0], [4.0, 0.0]]), 0.1, "output_channels")
        >>> round(float(term(jnp.array([[3.0, 1.0], [4.0, 0.0]]))), 4)  # .1 sqrt(2) (5 + 1)
        0.8485
    """
    require_range("group_lasso", strength, 0 <= as_real(strength) < math.inf, "finite and at least 0")
    if strength == 0:
        return None
    if groups is None:
        raise ValueError(
            f'group_lasso={strength:g} has no groups to act on: give groups, as "output_channels", or use l1 '
            "for single weights."
        )
    weights, _ = partition(params)
    leaves, structure = jax.tree.flatten(group_labels(weights, groups))
    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(weights))
    _, numbers, sizes = np.unique(flatten(leaves), return_inverse=True, return_counts=True)
    parts = np.split(numbers.astype(np.int32), np.cumsum([x.size for x in leaves])[:-1])
    labels = [jnp.asarray(part.reshape(x.shape)) for part, x in zip(parts, leaves, strict=True)]
    roots = jnp.sqrt(jnp.asarray(sizes, dtype))
    return GroupLasso(jnp.asarray(strength, dtype), structure.unflatten(labels), roots)
