"""What the package gets of a stranger, and what it should find: float64, and the definition of the mean."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import strangers
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray
from strangers import HALF, HIDDEN, Plain, Stranger

import jaxlimit
from jaxlimit import training

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """One stranger, ready to be handed over.

    Attributes:
        loss_fn, predict_fn, output_loss: the functions of the package's documentation.
        params, batches: as they lie on their devices.
        keywords: `weight_fn`, where the stranger has one.
        data: all examples, and the same in the stranger's batches: NumPy.
        plain: from parameters to `Plain`.
        values: the parameters, float64.
    """

    loss_fn: Callable
    predict_fn: Callable
    output_loss: Callable
    params: Any
    batches: Any
    keywords: dict[str, Any]
    data: dict[str, Any]
    parts: list[dict[str, Any]]
    plain: Callable[[Any], Plain]
    values: Any


def case(stranger: Stranger, rng: np.random.Generator) -> Case:
    """The stranger's code and data."""
    predict, like, plain = strangers.library(stranger.framework)
    values = strangers.parameters(like, stranger.weights, rng)

    def exact(x: Array) -> Array:
        with jax.enable_x64(True):
            return np.asarray(strangers.forward(plain(values), x))

    data = strangers.examples(stranger, exact, rng)
    parts = strangers.cut(data, stranger)
    mesh = _mesh(stranger.layout)

    def predict_fn(params: Any, batch: Any) -> jax.Array:
        x = batch["x"]
        if stranger.dtype in HALF:
            params, x = jax.tree.map(lambda leaf: leaf.astype(HALF[stranger.dtype]), (params, x))
        z = _inside(stranger.inside, predict(params, x), mesh)
        return z.astype(jnp.float32) if stranger.dtype in HALF else z

    def output_loss(z: jax.Array, batch: Any) -> jax.Array:
        found = strangers.output_loss(stranger.loss, z, batch)
        return found.astype(jnp.float16) if stranger.dtype == "f16_loss" else found

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        if stranger.loss == "packaged":
            loss = training.classification_loss(lambda params, x: predict_fn(params, {"x": x}))
            found = loss(params, (batch["x"], batch["y"]))
            return found.astype(jnp.float16) if stranger.dtype == "f16_loss" else found
        found = output_loss(predict_fn(params, batch), batch)
        return found + strangers.penalty(params) if stranger.loss == "l2" else found

    keywords = {"weight_fn": strangers.counted(stranger.loss)} if stranger.counted == "weight_fn" else {}
    params = _params(values, stranger, mesh)
    batches = _batches(data, parts, stranger, mesh)
    return Case(loss_fn, predict_fn, output_loss, params, batches, keywords, data, parts, plain, values)


def _mesh(layout: str) -> Mesh | None:
    if layout == "one":
        return None
    axis = AxisType.Explicit if layout.endswith("explicit") else AxisType.Auto
    shape = {"data": 4, "model": 2} if layout.startswith("model") else {"data": 8}
    return jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=(axis,) * len(shape))


def _inside(inside: str, z: jax.Array, mesh: Mesh | None) -> jax.Array:
    """What a loss may say of where its outputs lie."""
    if inside == "nothing" or mesh is None:
        return z
    spec = PartitionSpec("data")
    if inside == "shard_map":
        return jax.shard_map(lambda z: 1.0 * z, mesh=mesh, in_specs=spec, out_specs=spec)(z)
    if AxisType.Explicit in mesh.axis_types:
        return jax.sharding.reshard(z, NamedSharding(mesh, spec))
    return jax.lax.with_sharding_constraint(z, NamedSharding(mesh, spec))


def _params(values: Any, stranger: Stranger, mesh: Mesh | None) -> Any:
    def placed(x: Array) -> jax.Array:
        dtype = jnp.float64 if stranger.dtype == "float64" else jnp.float32
        if stranger.dtype == "bf16_kernels" and x.ndim > 1:
            dtype = jnp.bfloat16
        if mesh is None or stranger.layout == "auto":  # where JAX puts them
            return jnp.asarray(x, dtype)
        spec = [None] * x.ndim
        if stranger.layout == "model_auto":
            spec = ["model" if size == HIDDEN else None for size in x.shape]
        return jax.device_put(jnp.asarray(x, dtype), NamedSharding(mesh, PartitionSpec(*spec)))

    params = jax.tree.map(placed, values)
    if stranger.layout == "model_explicit" and stranger.framework == "bare":
        sharding = NamedSharding(mesh, PartitionSpec(None, "model"))  # pyright: ignore[reportArgumentType]
        params["w1"] = jax.device_put(params["w1"], sharding)
    return params


def _batches(data: dict, parts: list[dict], stranger: Stranger, mesh: Mesh | None) -> Any:
    def placed(x: Any) -> Any:
        if x.dtype == np.float64 and stranger.dtype != "numpy64":
            x = x.astype(np.float64 if stranger.dtype == "float64" else np.float32)
        if mesh is None:
            return x if stranger.dtype == "numpy64" else jnp.asarray(x)
        parted = stranger.layout != "replicated" and len(x) % mesh.shape["data"] == 0
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec("data" if parted else None)))

    if stranger.batching in ("size_1", "odd", "divisor", "full"):
        size = len(parts[0]["x"])
        return jaxlimit.batched(jax.tree.map(placed, data), size)
    batches = jax.tree.map(placed, parts)
    if stranger.batching == "stream":
        return strangers.Stream(batches)
    return (lambda: iter(batches)) if stranger.batching == "generator" else batches


def works(case: Case) -> bool:
    """Whether JAX alone computes the stranger's gradient, on its own batches or on all of the data."""
    batches = case.batches() if callable(case.batches) else case.batches
    found: Any = [batches.arrays] if isinstance(batches, jaxlimit.Batches) else batches
    gradient = jax.jit(jax.grad(case.loss_fn))
    try:
        jax.block_until_ready([gradient(case.params, batch) for batch in found])
    except Exception:  # whatever JAX raises
        return False
    return True


class Truth:
    """What is true of a case, from all its examples at once."""

    def __init__(self, stranger: Stranger, case: Case) -> None:
        self.name, self.kind = stranger.loss, stranger.curvature
        leaves, self.structure = jax.tree.flatten(case.values)
        self.shapes = [np.shape(leaf) for leaf in leaves]
        self.weights = np.concatenate([np.ravel(leaf) for leaf in leaves if np.ndim(leaf) > 1])
        numbers = iter(range(len(self.weights)))
        places = [
            np.array([next(numbers) for _ in range(x.size)]).reshape(x.shape) if x.ndim > 1 else x
            for x in leaves
        ]
        plain = case.plain(self.structure.unflatten(places))
        self.order = np.concatenate([np.ravel(plain.w1), np.ravel(plain.w2)]).astype(int)
        self.biases = case.plain(case.values).b1, case.plain(case.values).b2
        self.data = (
            case.data if case.data["y"].dtype != np.float32 else case.data | {"y": case.data["y"].astype(int)}
        )
        self.parts = case.parts

    def loss(self, weights: Array, data: dict[str, Any] | None = None) -> float:
        """The mean loss at other weights."""
        with jax.enable_x64(True):
            arguments = jax.tree.map(jnp.asarray, (weights[self.order], self.biases, data or self.data))
            return float(_mean_loss(self.name, *arguments))

    @property
    def quadratic(self) -> tuple[Array, Array]:
        """Gradient and matrix at the weights."""
        with jax.enable_x64(True):
            arguments = jax.tree.map(jnp.asarray, (self.weights[self.order], self.biases, self.data))
            gradient, matrix = _quadratic(self.name, self.kind)(*arguments)
        back = np.argsort(self.order)
        return np.asarray(gradient)[back], np.asarray(matrix)[np.ix_(back, back)]

    def kept(self, sparsity: float) -> NDArray[np.bool_]:
        """Which weights magnitude pruning keeps."""
        kept = np.ones(len(self.weights), bool)
        kept[np.argsort(np.abs(self.weights), kind="stable")[: int(sparsity * len(kept) + 1e-9)]] = False
        return kept

    def tuned(self, sparsity: float, num_steps: int, rate: float) -> float:
        """The lowest loss of a few steps of Adam on the weights that are kept."""
        kept, losses = self.kept(sparsity), []
        with jax.enable_x64(True):
            optimizer, weights = optax.adam(rate), jnp.asarray(self.weights * kept)
            state = optimizer.init(weights)
            for _ in range(num_steps + 1):
                losses.append(self.loss(np.asarray(weights)))
                arguments = jax.tree.map(jnp.asarray, (self.biases, self.data))
                gradient = _gradient(self.name)(weights[self.order], *arguments)
                updates, state = optimizer.update(kept * gradient[np.argsort(self.order)], state)
                weights: Any = optax.apply_updates(weights, updates)
        return min(losses)


def _outputs(weights: Any, biases: tuple, data: dict[str, Any]) -> Any:
    count = strangers.FEATURES * HIDDEN
    w1 = weights[:count].reshape(strangers.FEATURES, HIDDEN)
    return strangers.forward(Plain(w1, biases[0], weights[count:].reshape(HIDDEN, -1), biases[1]), data["x"])


def _loss_of_outputs(name: str, z: Any, data: dict[str, Any]) -> Any:
    if name in ("contrastive", "norm_train"):
        return strangers.output_loss(name, z, data)
    losses, counted = strangers.per_example(name, z, data)
    return jnp.sum(jnp.where(counted > 0, counted * losses, 0)) / jnp.sum(counted)


def _mean_loss(name: str, weights: Any, biases: tuple, data: dict[str, Any]) -> Any:
    found = _loss_of_outputs(name, _outputs(weights, biases, data), data)
    return found + strangers.PENALTY * jnp.sum(weights**2) if name == "l2" else found


@cache
def _gradient(name: str) -> Callable:
    return jax.jit(jax.grad(partial(_mean_loss, name)))


@cache
def _quadratic(name: str, kind: str) -> Callable:
    """Gradient and dense matrix: jax.hessian, or J^T B J from dense J and B."""

    @jax.jit
    def both(weights: Any, biases: tuple, data: dict[str, Any]) -> tuple[Any, Any]:
        gradient = jax.grad(partial(_mean_loss, name))(weights, biases, data)
        if kind == "hessian":
            return gradient, jax.hessian(partial(_mean_loss, name))(weights, biases, data)
        z = _outputs(weights, biases, data)
        jacobian = jax.jacfwd(lambda w: jnp.ravel(_outputs(w, biases, data)))(weights)
        curve = jax.hessian(lambda z: _loss_of_outputs(name, z.reshape(shape), data))
        shape = z.shape
        return gradient, jacobian.T @ curve(jnp.ravel(z)) @ jacobian

    return both
