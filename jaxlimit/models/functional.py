"""From a model of Flax NNX, Flax Linen or Equinox to a pure function of its parameters.

The parameters are nested dictionaries for every library, so that all of jaxlimit takes them, and so that
files of weights name them as the model does.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import errors, linen, nnx, traverse_util
from flax.core import unfreeze

from jaxlimit.models.evaluation import evaluated

if TYPE_CHECKING:
    import equinox as eqx

Params = dict[str, Any]
Predict = Callable[[Params, jax.Array], jax.Array]


def from_nnx(model: nnx.Module) -> tuple[Predict, Params]:
    """Splits a model into a pure function and its parameters.

        predict(params, inputs) == model(inputs), with the model in evaluation mode

    The parameters are all `nnx.Param` of the model. Everything else it holds (running statistics of batch
    norm, random keys) is carried along unchanged inside `predict`, which runs in evaluation mode: batch norm
    uses its running statistics and dropout passes its inputs through. The model itself is not changed: what
    it writes while it runs (the state of a recurrent network, a cache, intermediate values) is dropped after
    the call, so that every call starts from the model as it was. Costs no copy of any array.

    Args:
        model: any NNX model that is called with one array, trained or not, in either mode.

    Returns:
        `predict(params, inputs) -> outputs`, to be used freely under jit, grad and vmap; it raises a
        ValueError where the names in `params` are not those of the model, or where the model draws random
        numbers or changes running statistics all the same. And `params`, nested dictionaries with the
        attributes of the model as keys and arrays as leaves. List positions are keys too, as
        strings: `params["layers"]["0"]["kernel"]`. `nnx.update(model, nnx.restore_int_paths(params))` writes
        parameters back into a model.

    Raises:
        ValueError: no NNX model, or one without any `nnx.Param`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxlimit.models import FullyConnected
        >>> predict, params = from_nnx(FullyConnected([4, 8, 3], rngs=nnx.Rngs(0)))
        >>> jax.tree.map(jnp.shape, params["layers"]["1"])
        {'bias': (3,), 'kernel': (8, 3)}
        >>> jax.jit(predict)(params, jnp.ones((5, 4))).shape
        (5, 3)
    """
    if not isinstance(model, nnx.Module):
        raise ValueError(f"model must be an NNX module, got {model!r:.60}; see from_linen, from_equinox")
    model = nnx.clone(model)
    model.eval()
    graphdef, trainable, rest = nnx.split(model, nnx.Param, ...)
    flat = traverse_util.flatten_dict(nnx.to_pure_dict(trainable))
    if not flat:
        raise ValueError(f"model must hold at least one nnx.Param, got a {type(model).__name__} without any")
    paths = {tuple(map(str, path)): path for path in flat}

    params = traverse_util.unflatten_dict({name: flat[path] for name, path in paths.items()})
    return NnxPredict(rest, graphdef, tuple(paths.items())), params


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["rest"],
    meta_fields=["graphdef", "paths"],
)
@dataclass(frozen=True, eq=False)
class NnxPredict:
    """What `from_nnx` returns: what the model holds beside its parameters, its graph, and their names."""

    rest: Any
    graphdef: Any
    paths: tuple

    def __call__(self, params: Params, inputs: jax.Array) -> jax.Array:
        """The outputs of a batch."""
        given = _named(params, (name for name, _ in self.paths))
        state = traverse_util.unflatten_dict({path: given[name] for name, path in self.paths})
        return evaluated(lambda rest: nnx.merge(self.graphdef, state, rest, copy=True), self.rest, inputs)


def from_linen(
    module: linen.Module, variables: Mapping[str, Any], /, **call_kwargs: Any
) -> tuple[Predict, Params]:
    """Splits the variables of a module into its parameters and a pure function of them.

        predict(params, inputs) == module.apply(variables, inputs, **call_kwargs)

    The parameters are the collection "params". The other collections (running statistics of batch norm)
    are carried along unchanged inside `predict`. A Linen module takes its mode as an argument of the call,
    under a name of its own: pass what selects evaluation mode, as in
    `from_linen(module, variables, train=False)`. Costs no copy of any array.

    Args:
        module: any Linen module that is called with one array.
        variables: what `module.init` returned, or the same after training; a FrozenDict too.
        call_kwargs: arguments of every call that select evaluation mode: `train=False`, `training=False`,
            `deterministic=True`, `use_running_average=True`, or whatever the module calls it.

    Returns:
        `predict(params, inputs) -> outputs`, to be used freely under jit, grad and vmap; it raises a
        ValueError where the module runs in training mode or the names in `params` are not those of the
        module. And `params`, the collection "params" as nested dictionaries of arrays, without metadata of
        partitioning: `module.apply({**variables, "params": params}, inputs)` takes them back.

    Raises:
        ValueError: if variables holds no parameters.

    Examples:
        >>> import jax.numpy as jnp
        >>> module = linen.Sequential([linen.Dense(8), linen.tanh, linen.Dense(3)])
        >>> predict, params = from_linen(module, module.init(jax.random.key(0), jnp.ones((1, 4))))
        >>> jax.tree.map(jnp.shape, params["layers_2"])
        {'bias': (3,), 'kernel': (8, 3)}
        >>> jax.jit(predict)(params, jnp.ones((5, 4))).shape
        (5, 3)
    """
    if not isinstance(module, linen.Module):
        raise ValueError(f"module must be a module of Flax Linen, got {module!r:.80}: see from_nnx")
    rest = unfreeze(dict(linen.unbox(variables)))
    params = rest.pop("params", None)
    if not params:
        raise ValueError(
            'variables must be what module.init returns, with parameters in the collection "params"; '
            f"got the collections: {', '.join(variables) or 'none'}"
        )
    names = tuple(traverse_util.flatten_dict(params))
    return LinenPredict(rest, module, names, tuple(call_kwargs.items())), params


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["rest"],
    meta_fields=["module", "names", "call_kwargs"],
)
@dataclass(frozen=True, eq=False)
class LinenPredict:
    """What `from_linen` returns: the other collections, the module, its parameters' names, and its mode."""

    rest: Any
    module: linen.Module
    names: tuple
    call_kwargs: tuple

    def __call__(self, params: Params, inputs: jax.Array) -> jax.Array:
        """The outputs of a batch."""
        _named(params, self.names)
        try:
            variables = {"params": params, **self.rest}
            outputs: Any = self.module.apply(variables, inputs, **dict(self.call_kwargs))
        except (errors.ModifyScopeVariableError, errors.InvalidRngError) as error:
            raise ValueError(
                f"{type(self.module).__name__} seems to run in training mode: pass its argument for "
                "evaluation mode to from_linen, as in from_linen(module, variables, train=False). "
                f"Flax says: {error}"
            ) from error
        return outputs


def from_equinox(model: "eqx.Module", state: "eqx.nn.State | None" = None) -> tuple[Predict, Params]:
    """Splits a model into a pure function of a batch and its parameters.

        predict(params, inputs)[i] == model(inputs[i])              with the model in inference mode,
        predict(params, inputs)[i] == model(inputs[i], state)[0]    if it has a state

    Equinox models take one example; `predict` takes a batch of them, by vmap. The parameters are all
    floating-point arrays of the model (`equinox.is_inexact_array`). Everything else it holds, and the state
    (running statistics of batch norm), is carried along unchanged inside `predict`, which runs in inference
    mode. The model itself is not changed. Costs no copy of any array.

    The biases of Equinox's convolutions have shape (channels, 1, 1), so that the default of `prunable` would
    count them as kernels. This leaves them out:

        jaxlimit.hessian(..., prunable=lambda path, x: jaxlimit.is_kernel(path, x) and path[-1].key != "bias")

    Args:
        model: any model that is called with one array, and with the state if there is one.
        state: the state of a stateful model, as `equinox.nn.make_with_state` or training returns it.

    Returns:
        `predict(params, inputs) -> outputs`, both with a leading axis of examples, to be used freely under
        jit, grad and vmap; it raises a ValueError where the names in `params` are not those of the model.
        And `params`, nested dictionaries with the attributes of the model as keys and arrays as leaves. List
        positions are keys too, as strings: `params["layers"]["0"]["weight"]`. To write parameters back:

            flat = flax.traverse_util.flatten_dict(params, sep="/")
            name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
            model = jax.tree.map_with_path(lambda path, leaf: flat.get(name(path), leaf), model)

    Raises:
        ImportError: Equinox is not installed.
        ValueError: if the model has no floating-point array.

    Examples:
        >>> import equinox as eqx, jax.numpy as jnp
        >>> predict, params = from_equinox(eqx.nn.MLP(4, 3, 8, depth=1, key=jax.random.key(0)))
        >>> jax.tree.map(jnp.shape, params["layers"]["1"])
        {'bias': (3,), 'weight': (3, 8)}
        >>> jax.jit(predict)(params, jnp.ones((5, 4))).shape
        (5, 3)
    """
    try:
        import equinox as eqx
    except ImportError as error:
        raise ImportError('from_equinox needs Equinox: pip install "jaxlimit[equinox]"') from error
    if not isinstance(model, eqx.Module):
        raise ValueError(f"model must be a module of Equinox, got {model!r:.80}: see from_nnx, from_linen")
    model = eqx.nn.inference_mode(eqx.nn.delete_init_state(model))
    trainable, rest = eqx.partition(model, eqx.is_inexact_array)
    leaves, structure = jax.tree.flatten_with_path(trainable)
    if not leaves:
        raise ValueError(f"model must hold a floating-point array, got a {type(model).__name__} without one")
    flat = {tuple(jax.tree_util.keystr((key,), simple=True) for key in path): leaf for path, leaf in leaves}
    arrays, fixed = eqx.partition((rest, state), lambda x: isinstance(x, (jax.Array, np.ndarray)))
    values, tree = jax.tree.flatten(fixed)
    predict = EquinoxPredict(arrays, (tuple(values), tree), structure, tuple(flat))
    return predict, traverse_util.unflatten_dict(flat)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["arrays"],
    meta_fields=["fixed", "structure", "names"],
)
@dataclass(frozen=True, eq=False)
class EquinoxPredict:
    """What `from_equinox` returns.

    Attributes:
        arrays: of the model, without its parameters, and of its state.
        fixed: what else these hold: values and their tree.
        structure: of the parameters.
        names: of the parameters.
    """

    arrays: Any
    fixed: tuple[tuple, Any]
    structure: Any
    names: tuple

    def __call__(self, params: Params, inputs: jax.Array) -> jax.Array:
        """The outputs of a batch."""
        import equinox as eqx

        given = _named(params, self.names)
        values, tree = self.fixed
        rest, state = eqx.combine(self.arrays, tree.unflatten(values))
        model = eqx.combine(self.structure.unflatten([given[name] for name in self.names]), rest)
        return jax.vmap(lambda x: model(x) if state is None else model(x, state)[0])(inputs)


def _named(params: Params, names: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], Any]:
    """The leaves of params by name, if they are the model's."""
    given, expected = traverse_util.flatten_dict(params), set(names)
    if given.keys() != expected:
        missing, unknown = expected - given.keys(), given.keys() - expected
        raise ValueError(
            f"params must hold the names of the model's parameters; missing: {_list(missing)}; "
            f"not of this model: {_list(unknown)}"
        )
    return given


def _list(names: set[tuple[str, ...]]) -> str:
    return ", ".join(sorted("/".join(name) for name in names)) or "none"
