r"""The order of Wanda: the magnitude of a weight times the root mean square of what it multiplies.

    score_ij = |w_ij| sqrt(mean of x_i^2),   the mean over all examples and places where w is used

Where inputs and weights meet is found in the traced network: every product y = B(x, W) of JAX, of matrices or
convolutions, is linear in each. What each entry of W multiplies, squared and summed, is therefore the
derivative of sum B(x^2, W) by it, whatever the layout of W. Source: Sun, Liu, Bair and Kolter, "A Simple and
Effective Pruning Approach for Large Language Models", ICLR 2024, arXiv 2306.11695, equation 1. It compares
weights of one output; here all are compared.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun

from jaxlimit.core.batches import grouped
from jaxlimit.core.jaxprs import called
from jaxlimit.core.sums import ExampleSum, mean_of_sum
from jaxlimit.core.trees import Prunable, PyTree, combine, is_kernel, leaf_names, partition
from jaxlimit.core.widening import CALLS

# What only moves the entries of a kernel, or leaves some of them out.
MOVES = (
    "convert_element_type",
    "copy",
    "copy_p",
    "expand_dims",
    "reshape",
    "rev",
    "slice",
    "squeeze",
    "stop_gradient",
    "transpose",
)


class _Moved(NamedTuple):
    """A kernel as an operand: which one, and how it became that."""

    number: int
    move: Callable[[jax.Array], jax.Array]


def wanda_scores(
    predict_fn: Callable[[PyTree, PyTree], PyTree],
    params: PyTree,
    batches: Iterable[PyTree],
    *,
    prunable: Prunable = is_kernel,
) -> PyTree:
    """|w| times the root mean square of its inputs, of any network.

    Zeros that pad an image count as inputs where the network pads it before its convolution, and where the
    convolution does. A kernel that is used several times has the mean over all its uses. Cost: a forward
    pass, and one gradient of each product by its kernel.

    Args:
        predict_fn: `predict_fn(params, batch) -> outputs`, in evaluation mode.
        params: pytree of parameters.
        batches: as for `hessian`.
        prunable: as for `hessian`.

    Returns:
        Pytree like the prunable weights, float64 on the host, for `scores=`.

    Raises:
        ValueError: a kernel that is not an operand of matrix products and convolutions alone: a table of
            embeddings that is looked up, a kernel that is scaled first, or is used in a loop.

    Examples:
        >>> from jaxlimit import batched
        >>> data = batched(jnp.array([[3.0, 0.0], [4.0, 1.0]]), 2)
        >>> wanda_scores(lambda w, x: x @ w, jnp.array([[2.0], [-1.0]]), data).round(3).tolist()
        [[7.071], [0.707]]
    """
    weights, rest = partition(params, prunable)
    total, weight = ExampleSum(partial(_mean_squares, predict_fn))(grouped(batches), weights, rest)

    def score(w: Any, square: Any) -> np.ndarray:
        return np.abs(np.asarray(w, np.float64)) * np.sqrt(np.asarray(square, np.float64))

    return jax.tree.map(score, weights, mean_of_sum(total, weight))


def _mean_squares(
    predict_fn: Callable[[PyTree, PyTree], PyTree], weights: PyTree, rest: PyTree, batch: PyTree
) -> PyTree:
    """What the kernels multiply in a batch: mean squares, a tree like the weights."""
    leaves, structure = jax.tree.flatten(weights)
    names = leaf_names(weights)

    def outputs(*leaves: jax.Array) -> PyTree:
        return predict_fn(combine(structure.unflatten(leaves), rest), batch)

    closed = jax.make_jaxpr(outputs)(*leaves)
    walk = _Walk(leaves, names)
    walk.through(closed.jaxpr, closed.consts, leaves, [_Moved(n, lambda w: w) for n in range(len(leaves))])
    for name, uses in zip(names, walk.uses, strict=True):
        if not uses:
            raise ValueError(
                f"wanda_scores finds no product of inputs with {name}: leave it out by prunable, or give it "
                "another order."
            )
    return structure.unflatten([_mean(uses) for uses in walk.uses])


def _mean(uses: list[tuple[jax.Array, int]]) -> jax.Array:
    squares, counts = zip(*uses, strict=True)
    return jnp.sum(jnp.stack(squares), 0) / sum(counts)


class _Walk:
    """A walk through a traced network on its values, which notes what kernels multiply.

    Args:
        kernels: values.
        names: for refusals.
    """

    def __init__(self, kernels: Sequence[jax.Array], names: Sequence[str]) -> None:
        self._kernels, self._names = kernels, names
        self.uses: list[list[tuple[jax.Array, int]]] = [[] for _ in kernels]

    def through(
        self, jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], moved: Sequence[_Moved | None]
    ) -> tuple[list[Any], list[_Moved | None]]:
        """Values of the results, and which of them are kernels."""
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
        kernels = {x: m for x, m in zip(jaxpr.invars, moved, strict=True) if m is not None}

        def value(x: Any) -> Any:
            return x.val if isinstance(x, Literal) else values[x]

        def kernel(x: Any) -> _Moved | None:
            return None if isinstance(x, Literal) else kernels.get(x)

        for eqn in jaxpr.eqns:
            args, marks = list(map(value, eqn.invars)), list(map(kernel, eqn.invars))
            found, marks = self._equation(jaxpr, eqn, args, marks)
            values.update(zip(eqn.outvars, found, strict=True))
            kernels.update((x, m) for x, m in zip(eqn.outvars, marks, strict=True) if m is not None)
        return list(map(value, jaxpr.outvars)), list(map(kernel, jaxpr.outvars))

    def _equation(
        self, jaxpr: Jaxpr, eqn: JaxprEqn, args: list[Any], moved: list[_Moved | None]
    ) -> tuple[Sequence[Any], Sequence[_Moved | None]]:
        name, inner = eqn.primitive.name, called(eqn)
        if name in CALLS and inner:
            closed = [x for x in eqn.params.values() if hasattr(x, "consts")]
            return self.through(inner[0], closed[0].consts if closed else (), args, moved)
        results = _alone(jaxpr, eqn, args)
        marks: list[_Moved | None] = [None] * len(results)
        used = [m for m in moved if m is not None]
        if len(used) == 1 and (name == "dot_general" or (name == "conv_general_dilated" and moved[1])):
            self._note(eqn, args, moved)
        elif used and name in MOVES:
            (one,) = used
            marks = [_Moved(one.number, lambda w: eqn.primitive.bind(one.move(w), **eqn.params))]
        elif used:
            names = " and ".join(self._names[m.number] for m in used)
            raise ValueError(
                f"wanda_scores takes kernels that multiply inputs in matrix products and convolutions, but "
                f"{names} is used by {name}: leave it out by prunable, or give another order."
            )
        return results, marks

    def _note(self, eqn: JaxprEqn, args: list[Any], moved: list[_Moved | None]) -> None:
        """What a kernel multiplies in one product: the sum of squares for each entry, and of how many."""
        side = 0 if moved[0] is not None else 1
        one: Any = moved[side]
        inputs = args[1 - side]
        if np.iscomplexobj(inputs):
            raise ValueError(
                f"wanda_scores takes real inputs, but complex ones meet {self._names[one.number]}: give "
                "another order."
            )
        # Squares are large, and sums of them long: too much for half precision.
        wide = jnp.promote_types(inputs.dtype, jnp.float32)
        squares = jnp.square(inputs.astype(wide))
        params = {**eqn.params, "preferred_element_type": None}

        def summed(w: jax.Array) -> jax.Array:
            kernel = one.move(w).astype(wide)
            pair = (kernel, squares) if side == 0 else (squares, kernel)
            return eqn.primitive.bind(*pair, **params).sum()

        count = math.prod(eqn.outvars[0].aval.shape) // _num_outputs(eqn, side, args[side].shape)  # pyright: ignore[reportAttributeAccessIssue]
        self.uses[one.number].append((jax.grad(summed)(self._kernels[one.number].astype(wide)), count))


def _alone(jaxpr: Jaxpr, eqn: JaxprEqn, args: list[Any]) -> Sequence[Any]:
    """Results of one operation."""
    if not called(eqn):
        results = eqn.primitive.bind(*args, **eqn.params)
        return results if eqn.primitive.multiple_results else [results]
    given = {x: arg for x, arg in zip(eqn.invars, args, strict=True) if not isinstance(x, Literal)}
    alone = jaxpr.replace(constvars=[], invars=list(given), outvars=eqn.outvars, eqns=[eqn])
    return jaxpr_as_fun(ClosedJaxpr(alone, []))(*given.values())


def _num_outputs(eqn: JaxprEqn, side: int, shape: tuple[int, ...]) -> int:
    """How many results each place has: the axes of the kernel that are not summed over."""
    if eqn.primitive.name == "conv_general_dilated":
        return shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    contracted = eqn.params["dimension_numbers"][0][side]
    return math.prod(size for axis, size in enumerate(shape) if axis not in contracted)
