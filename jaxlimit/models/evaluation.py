"""A run of an NNX model that leaves the model as it is, and the same function at every call."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.interpreters import partial_eval


def evaluated(rebuild: Callable[[Any], Any], rest: Any, inputs: Any) -> Any:
    """The outputs of `rebuild(rest)`, if what it writes into itself does not change the function.

    A recurrent network draws a key for its first state even where that is zero; that is no harm, as the
    outputs do not depend on it. Outputs that do depend on random numbers are another function at the next
    call, and so is batch norm that changes its running statistics.

    Args:
        rebuild: `rebuild(rest) -> model`, with variables of its own.
        rest: all that the model holds beside its parameters.
        inputs: of the model.

    Raises:
        ValueError: the model draws random numbers, or changes running statistics.
    """
    model = rebuild(rest)
    before = _values(model)
    outputs = model(inputs)
    written = {path for path, value in _values(model).items() if value is not before.get(path, value)}
    variables = dict(nnx.to_flat_state(nnx.state(model)))
    name = type(model).__name__
    if any(isinstance(variables[path], nnx.BatchStat) for path in written):
        raise ValueError(
            f"{name} changes running statistics in evaluation mode: batch norm must use them as they are, "
            "nnx.BatchNorm(use_running_average=True), or obey model.eval()."
        )
    drawn = any(isinstance(variables[path], nnx.RngState) for path in written)
    if drawn and _is_random(rebuild, rest, inputs):
        raise ValueError(
            f"{name} draws random numbers in evaluation mode: dropout must be off, "
            "nnx.Dropout(deterministic=True), or obey model.eval()."
        )
    return outputs


def _values(model: Any) -> dict[Any, Any]:
    """The arrays of all variables that are no parameters, and those that are no variables."""
    leaves = nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.Param)))
    return {path: x.get_value() if isinstance(x, nnx.Variable) else x for path, x in leaves}


def _is_random(rebuild: Callable[[Any], Any], rest: Any, inputs: Any) -> bool:
    """Whether the outputs depend on the random keys that the model holds."""
    random, others = nnx.split_state(rest, nnx.RngState, ...)
    leaves, structure = jax.tree.flatten(random)

    def outputs(*leaves: Any) -> Any:
        return rebuild(nnx.merge_state(structure.unflatten(leaves), others))(inputs)

    jaxpr = jax.make_jaxpr(outputs)(*leaves).jaxpr
    _, used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return any(used)
