"""Which weights of any function go together, found in what it does: labels for `groups=`.

The function is traced, and none of its operations is done. Every number in it has a label, which says

    LABEL >= 0   to which unit it belongs: the output of a dense layer or a convolution, at any pixel
    FREE         that it depends on the inputs, and belongs to no unit
    CONSTANT     that it does not depend on the inputs

A dense layer and a convolution make new units. Operations on every number by itself keep the unit, and where
numbers of two units meet (a residual stream, a gate) the two are one from there on. Reshapes, slices, pools
and concatenations move labels like the numbers themselves.

A unit can be taken out if it is constant once the weights that make it are zero. So a unit that meets a FREE
number cannot (layer norm, attention, the inputs themselves added to it), and what is not understood makes
all units that it reads unsure. Functions with such units are refused, but for those of the outputs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from jaxlimit.core.checks import require_problem
from jaxlimit.core.trees import Prunable, PyTree, frozen, is_kernel, leaf_paths, partition, thawed
from jaxlimit.models.labels import CONSTANT, FREE, MOVES, Labels, Value, along, filled, largest, moved

# On every number by itself; where it keeps 0, a weight stays a weight.
LINEAR = {"neg", "convert_element_type", "copy", "copy_p", "stop_gradient", "mul", "div", "reduce_precision"}
_OTHERS = """
abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp cos cosh digamma eq erf erf_inv
erfc exp exp2 expm1 floor ge gt integer_pow is_finite le lgamma log log1p logistic lt max min ne not or pow
rem round rsqrt select_n sign sin sinh sqrt square sub tan tanh xor
"""
ELEMENTWISE = LINEAR | {*_OTHERS.split()}
REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or"}
POOLS = {"reduce_window_sum", "reduce_window_max", "reduce_window_min"}
CALLS = {"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2"} | {
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
}
WITHOUT_INPUTS = {"iota", "rng_bit_generator", "random_seed", "random_wrap", "random_bits"}


def traced_labels(
    predict: Callable[..., PyTree], params: PyTree, *inputs: PyTree, prunable: Prunable = is_kernel
) -> PyTree:
    """Labels of the units of any function of dense layers, convolutions, and what is between them.

    A unit is a hidden unit, a channel of a convolution, or a channel of a residual stream. Its group is what
    makes it; weights that make an output belong to the unit that they read. Known are dense layers (also
    with several axes), convolutions, operations on every number by itself, batch norm in evaluation mode,
    pools, means over pixels, residual sums, gates, concatenations, padding, and moves of axes. Refused are
    layer norm, attention, embedding tables, loops and all else that is not understood.

    Cost: a trace, and a few integers for every number that the function computes: give a small batch.

    Args:
        predict: `predict(params, *inputs) -> outputs`, in evaluation mode; the outputs, and not their loss.
        params: its parameters.
        inputs: a batch, of which only shapes and dtypes are looked at.
        prunable: as for `hessian`. Weights that are left out hold a unit, too: it is not constant unless
            they are zero.

    Returns:
        Pytree of integers shaped like the prunable weights, for `groups=`.

    Raises:
        ValueError: a function whose units are not sure, with the operation that leaves them open.

    Examples:
        >>> import jax.numpy as jnp
        >>> def predict(w, x):
        ...     hidden = jax.nn.relu(x @ w[0])
        ...     return (hidden + hidden @ w[1]) @ w[2]
        >>> weights = [jnp.ones((4, 2)), jnp.ones((2, 2)), jnp.ones((2, 3))]
        >>> labels = traced_labels(predict, weights, jnp.ones((1, 4)))
        >>> [x.tolist() for x in labels[1:]]  # both layers add to the stream, which the last one reads
        [[[0, 1], [0, 1]], [[0, 0, 0], [1, 1, 1]]]
    """
    require_problem("traced_labels(predict, params, inputs)", params, predict=predict)
    held = frozen(params)
    jaxpr = jax.make_jaxpr(lambda params, *inputs: predict(thawed(params), *inputs))(held, *inputs)
    leaves, structure = jax.tree.flatten(held)
    sizes = [np.size(leaf) for leaf in leaves]
    trace = _Trace(sum(sizes))
    numbers = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    numbers = [number.reshape(np.shape(leaf)) for number, leaf in zip(numbers, leaves, strict=True)]
    values = [Value(filled(number.shape, CONSTANT), number) for number in numbers]
    values += [Value(filled(x.shape, FREE)) for x in jaxpr.in_avals[len(leaves) :]]  # pyright: ignore
    outputs = trace.run(jaxpr, values)
    found = trace.groups(outputs)
    parts = structure.unflatten([found[number] for number in numbers])
    weights, _ = partition(params, prunable)
    chosen = {*leaf_paths(weights)}
    labels = jax.tree_util.tree_map_with_path(lambda path, x: x if path in chosen else None, parts)
    for path, leaf in jax.tree_util.tree_leaves_with_path(labels):
        if (leaf < 0).any():
            raise ValueError(
                f"the units of this function are not sure: {trace.reasons[int(leaf.min())]} leaves open what "
                f"params{jax.tree_util.keystr(path)} makes. Give integer labels shaped like the weights, or "
                "choose other weights by prunable."
            )
    every = np.unique(np.concatenate([x.ravel() for x in jax.tree.leaves(labels)]))
    return jax.tree.map(lambda x: np.searchsorted(every, x), labels)


class _Trace:
    """Units that were found so far, which are one, and which are not sure.

    Attributes:
        root: (units,) the unit as which each is counted.
        makers: (parameters,) the unit that each makes, or CONSTANT.
        readers: (parameters,) the unit that each reads, or CONSTANT.
        unsure: units that cannot be taken out, with the operation.
        lost: parameters whose effect is not known, likewise.
        reasons: why a parameter belongs to no unit, by what stands in place of its label.
    """

    def __init__(self, num_params: int) -> None:
        self.root = np.zeros(0, np.int64)
        self.makers = np.full(num_params, CONSTANT)
        self.readers = np.full(num_params, CONSTANT)
        self.unsure: list[tuple[Labels, str]] = []
        self.lost: list[tuple[Labels, str]] = []
        self.reasons = {CONSTANT: "a use that is not known"}

    def run(self, closed: ClosedJaxpr | Jaxpr, values: Sequence[Value]) -> list[Value]:
        """What is known of the results of a program."""
        jaxpr, consts = (closed.jaxpr, closed.consts) if isinstance(closed, ClosedJaxpr) else (closed, [])
        known = dict(zip(jaxpr.invars, values, strict=True))
        fixed = (Value(filled(np.shape(x), CONSTANT)) for x in consts)
        known |= zip(jaxpr.constvars, fixed, strict=True)

        def read(x: Any) -> Value:
            return Value(filled(np.shape(x.val), CONSTANT)) if isinstance(x, Literal) else known[x]

        for eqn in jaxpr.eqns:
            known |= zip(eqn.outvars, self._results(eqn, [read(x) for x in eqn.invars]), strict=True)
        return [read(x) for x in jaxpr.outvars]

    def groups(self, outputs: Sequence[Value]) -> Labels:
        """(parameters,) the unit to which each belongs, below 0 where that is not sure."""
        of_outputs = np.unique(np.concatenate([self._roots(x.labels).ravel() for x in outputs] or [[]]))
        makers, readers = self._roots(self.makers), self._roots(self.readers)
        makes_output = np.isin(makers, of_outputs[of_outputs >= 0])
        found = np.where(makes_output, readers, makers)
        found[makes_output & np.isin(readers, of_outputs)] = CONSTANT
        doubts = [(np.isin(found, self._roots(units)), name) for units, name in self.unsure]
        doubts += [(np.isin(np.arange(found.size), ids), name) for ids, name in self.lost]
        for number, (open_ones, name) in enumerate(doubts):
            found[open_ones] = FREE - number
            self.reasons[FREE - number] = f"the operation {name}"
        return found

    def _results(self, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
        name, params = eqn.primitive.name, eqn.params
        shapes = [x.aval.shape for x in eqn.outvars]  # pyright: ignore[reportAttributeAccessIssue]
        if name in CALLS:
            inner = next(params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in params)
            return self.run(inner, values)
        if name in WITHOUT_INPUTS:
            return [Value(filled(shape, CONSTANT)) for shape in shapes]
        if name in ELEMENTWISE:
            return [self._elementwise(name, shapes[0], values)]
        if name in MOVES:
            return moved(eqn, values)
        if name in REDUCTIONS or name in POOLS:
            found = self._reduced(eqn, values[0])
        elif name == "dot_general":
            found = self._dense(eqn, *values)
        elif name == "conv_general_dilated":
            found = self._convolution(eqn, *values)
        else:
            found = None
        return [found] if found is not None else self._not_known(name, shapes, values)

    def _not_known(self, name: str, shapes: list[tuple], values: list[Value]) -> list[Value]:
        """All units that are read are unsure, and so are the weights."""
        for value in values:
            self._lose(value.source, name)
            self._doubt(value.labels, name)
        label = CONSTANT if all(value.is_constant for value in values) else FREE
        return [Value(filled(shape, label)) for shape in shapes]

    def _elementwise(self, name: str, shape: tuple[int, ...], values: list[Value]) -> Value:
        sources = [np.broadcast_to(x.source, shape) for x in values if x.source is not None]
        scaled = name in LINEAR and (name != "div" or values[0].source is not None)
        if scaled and len(sources) == 1 and all(x.is_constant for x in values):
            return Value(filled(shape, CONSTANT), sources[0])
        joined = filled(shape, CONSTANT)
        for value in values:
            joined = self._joined(name, joined, np.broadcast_to(value.labels, shape))
        for source in sources:
            if (joined >= 0).any():
                self._used(self.makers, source, joined)
            else:
                self._lose(source, name)
        return Value(joined)

    def _joined(self, name: str, one: Labels, other: Labels) -> Labels:
        """The labels of numbers that meet; units that meet are one."""
        one, other = self._roots(one), self._roots(other)
        free = (np.minimum(one, other) == FREE) & (np.maximum(one, other) >= 0)
        self._doubt(np.maximum(one, other)[free], name)
        both = (one >= 0) & (other >= 0) & (one != other)
        for pair in np.unique(np.stack([one[both], other[both]], 1), axis=0):
            a, b = self.root[pair]
            self.root[self.root == max(a, b)] = min(a, b)
        return np.where((one < 0) & (other < 0), np.minimum(one, other), np.maximum(one, other))

    def _reduced(self, eqn: JaxprEqn, value: Value) -> Value | None:
        """Numbers of one unit stay its own; a sum over units is of none, and their maximum is not known."""
        labels = self._roots(value.labels)
        if value.source is not None or (labels == CONSTANT).all():
            return None
        if eqn.primitive.name in POOLS:
            high = largest(labels, eqn.params)
            low = -largest(np.where(labels >= 0, -labels, -self.root.size), eqn.params)
            free = largest((labels == FREE).astype(np.int64), eqn.params) > 0
        else:
            axes = eqn.params["axes"]
            high, low = labels.max(axes), np.where(labels >= 0, labels, self.root.size).min(axes)
            free = (labels == FREE).any(axes)
        several = (high >= 0) & (low != high)
        if (several.any() and not eqn.primitive.name.endswith("sum")) or (free & (high >= 0)).any():
            return None
        return Value(np.where(several | (free & (high < 0)), FREE, np.maximum(high, CONSTANT)))

    def _dense(self, eqn: JaxprEqn, left: Value, right: Value) -> Value | None:
        (contracted, batched), shape = eqn.params["dimension_numbers"], eqn.outvars[0].aval.shape  # pyright: ignore
        kernel_is_right = right.source is not None
        kernel, value = (right, left) if kernel_is_right else (left, right)
        along, of_kernel = contracted if kernel_is_right else contracted[::-1]
        if left.is_constant and right.is_constant:
            return None
        if kernel.source is None:  # a matrix that is no parameter reads units, and makes none
            fixed = value.is_constant or kernel.is_constant
            return Value(filled(shape, FREE)) if fixed else None
        if value.source is not None or batched[0]:
            return None
        read = self._read(value.labels, along)
        if read is None:
            return None
        source = np.moveaxis(kernel.source, of_kernel, range(len(of_kernel)))
        inner, outer = source.shape[: len(of_kernel)], source.shape[len(of_kernel) :]
        made = self._new(outer)
        self._used(self.makers, source, np.broadcast_to(made, source.shape))
        read = read.reshape(*inner, *[1] * len(outer))
        self._used(self.readers, source, np.broadcast_to(read, source.shape))
        others = [1] * (len(shape) - len(outer))
        sides = (*others, *outer) if kernel_is_right else (*outer, *others)
        return Value(np.broadcast_to(made.reshape(sides), shape))

    def _convolution(self, eqn: JaxprEqn, value: Value, kernel: Value) -> Value | None:
        spec, shape = eqn.params["dimension_numbers"], eqn.outvars[0].aval.shape  # pyright: ignore
        if value.source is not None or value.is_constant or eqn.params["batch_group_count"] > 1:
            return None
        if kernel.source is None:
            return Value(filled(shape, FREE)) if kernel.is_constant else None
        read = self._read(value.labels, (spec.lhs_spec[1],))
        if read is None:
            return None
        source = np.moveaxis(kernel.source, spec.rhs_spec[:2], (0, 1))
        made = self._new(source.shape[:1])
        self._used(self.makers, source, along(made, 0, source.shape))
        if eqn.params["feature_group_count"] == 1:
            self._used(self.readers, source, along(read, 1, source.shape))
        return Value(along(made, spec.out_spec[1], shape))

    def _read(self, labels: Labels, axes: Sequence[int]) -> Labels | None:
        """The unit at each index along axes, a new one where there is none; None if others differ there."""
        moved = np.moveaxis(self._roots(labels), axes, range(len(axes)))
        flat = moved.reshape(*moved.shape[: len(axes)], -1)
        high, low = flat.max(-1), np.where(flat >= 0, flat, self.root.size).min(-1)
        if ((high >= 0) & (low != high)).any() or ((high >= 0) & (flat == FREE).any(-1)).any():
            return None
        return np.where(high >= 0, high, self._new(high.shape))

    def _new(self, shape: tuple[int, ...]) -> Labels:
        first, number = self.root.size, int(np.prod(shape, dtype=int))
        self.root = np.append(self.root, np.arange(first, first + number))
        return np.arange(first, first + number).reshape(shape)

    def _used(self, uses: Labels, source: Labels, labels: Labels) -> None:
        """Parameters make, or read, these units; with those of an earlier use they are one."""
        ids, units = source[source >= 0], labels[source >= 0]
        before = uses[ids]
        self._joined("", before, np.where((before >= 0) & (units >= 0), units, before))
        # A parameter that is used at many places makes all of them.
        order = np.argsort(ids, kind="stable")
        ids, units = ids[order], units[order]
        same = (ids[1:] == ids[:-1]) & (units[1:] >= 0) & (units[:-1] >= 0)
        self._joined("", units[1:][same], units[:-1][same])
        uses[ids[units >= 0]] = units[units >= 0]

    def _roots(self, labels: Labels) -> Labels:
        labels = np.asarray(labels, np.int64)
        return np.where(labels >= 0, self.root[np.maximum(labels, 0)], labels) if self.root.size else labels

    def _doubt(self, labels: Labels, name: str) -> None:
        units = np.unique(labels[labels >= 0])
        if units.size:
            self.unsure.append((units, name))

    def _lose(self, source: Labels | None, name: str) -> None:
        if source is not None:
            self.lost.append((np.unique(source), name))
