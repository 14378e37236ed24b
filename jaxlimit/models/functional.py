"""From a Flax NNX model to a pure function of its parameters."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx, traverse_util

Params = dict[str, Any]


def from_nnx(model: nnx.Module) -> tuple[Callable[[Params, jax.Array], jax.Array], Params]:
    """Splits a model into a pure function and its parameters.

        predict(params, inputs) == model(inputs), with the model in evaluation mode

    The parameters are all `nnx.Param` of the model. Everything else it holds (running statistics of batch
    norm, random keys) is carried along unchanged inside `predict`, which runs in evaluation mode: batch norm
    uses its running statistics and dropout passes its inputs through. The model itself is not changed.
    Costs no copy of any array.

    Args:
        model: any NNX model that is called with one array, trained or not, in either mode.

    Returns:
        `predict(params, inputs) -> outputs`, to be used freely under jit, grad and vmap; it raises a
        ValueError where the names in `params` are not those of the model. And `params`, nested dictionaries
        with the attributes of the model as keys and arrays as leaves. List positions are keys too, as
        strings: `params["layers"]["0"]["kernel"]`. `nnx.update(model, nnx.restore_int_paths(params))` writes
        parameters back into a model.

    Raises:
        ValueError: if the model has no `nnx.Param`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxlimit.models import FullyConnected
        >>> predict, params = from_nnx(FullyConnected([4, 8, 3], rngs=nnx.Rngs(0)))
        >>> jax.tree.map(jnp.shape, params["layers"]["1"])
        {'bias': (3,), 'kernel': (8, 3)}
        >>> jax.jit(predict)(params, jnp.ones((5, 4))).shape
        (5, 3)
    """
    model = nnx.clone(model)
    model.eval()
    graphdef, trainable, rest = nnx.split(model, nnx.Param, ...)
    flat = traverse_util.flatten_dict(nnx.to_pure_dict(trainable))
    if not flat:
        raise ValueError(f"model must hold at least one nnx.Param, got a {type(model).__name__} without any")
    paths = {tuple(map(str, path)): path for path in flat}

    def predict(params: Params, inputs: jax.Array) -> jax.Array:
        given = traverse_util.flatten_dict(params)
        if given.keys() != paths.keys():
            missing, unknown = paths.keys() - given.keys(), given.keys() - paths.keys()
            raise ValueError(
                f"params must hold the names that from_nnx returned; missing: {_names(missing)}; "
                f"not of this model: {_names(unknown)}"
            )
        state = traverse_util.unflatten_dict({path: given[name] for name, path in paths.items()})
        return nnx.merge(graphdef, state, rest)(inputs)

    return predict, traverse_util.unflatten_dict({name: flat[path] for name, path in paths.items()})


def _names(paths: set[tuple[str, ...]]) -> str:
    return ", ".join(sorted("/".join(path) for path in paths)) or "none"
