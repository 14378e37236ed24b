"""A grammar of strangers: losses, batches, precisions, libraries and layouts that jaxlimit did not write.

`border.py` draws from it. Each stranger is a network 5-6-3 of 48 weights, with 48 examples.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from jaxlimit import models, training

EXAMPLES, FEATURES, HIDDEN, CLASSES, TOKENS, PADDING = 48, 5, 6, 3, 4, 16
PENALTY = 0.05
CLASS_WEIGHTS = np.array([1.0, 3.0, 0.5])

# What is written twice is drawn twice as often.
AXES = {
    "loss": "mean mean sum sum/len sum/all masked unguarded tokens class_weighted l2 broadcast squared "
    "sigmoid drift drift_sum contrastive norm_train norm_eval packaged packaged",
    "batching": "size_1 odd divisor full list list_uneven list_ones first_one list_padded stream generator",
    "dtype": "float32 float32 float32 float64 bf16_compute f16_compute bf16_kernels f16_loss numpy64",
    "framework": "bare nnx linen equinox haiku",
    "layout": "one one one auto explicit model_auto model_explicit replicated mixed",
    "inside": "nothing nothing nothing constraint shard_map",
    "weights": "normal zeros equal l1",
    "labels": "fine fine fine minus_one minus_100 beyond float",
    "counted": "weight_fn weight_fn examples",
    "curvature": "hessian hessian gauss_newton",
    "question": "loss gradient product dense mean_loss loss_statistics sparsity_sweep finetuned_sweep "
    "limit_dense limit_dense limit_lanczos limit_one_shot",
}
WEIGHTED = ("masked", "unguarded", "tokens", "class_weighted")
NO_MEAN = ("sum", "sum/all", "drift_sum", "broadcast", "contrastive", "norm_train")
REGRESSION = ("broadcast", "squared", "sigmoid")
DIVIDED = ("auto", "explicit", "model_auto", "model_explicit", "mixed")
BAD_LABELS = {"minus_one": -1, "minus_100": -100, "beyond": CLASSES}
HALF = {"bf16_compute": jnp.bfloat16, "f16_compute": jnp.float16}


@dataclass(frozen=True)
class Stranger:
    """One combination; every field is a value of its axis."""

    loss: str
    batching: str
    dtype: str
    framework: str
    layout: str
    inside: str
    weights: str
    labels: str
    counted: str
    curvature: str
    question: str

    def __str__(self) -> str:
        return " ".join(str(getattr(self, field.name)) for field in fields(self))


def draw(seed: int, index: int) -> Stranger:
    """The combination of that number; what means nothing together is changed."""
    rng = np.random.default_rng((seed, index))
    drawn = Stranger(**{name: str(rng.choice(values.split())) for name, values in AXES.items()})
    if drawn.layout == "mixed":
        drawn = replace(drawn, batching="list_uneven")
    if drawn.loss not in ("masked", "unguarded") and drawn.batching == "list_padded":
        drawn = replace(drawn, batching="list_uneven")
    whole = drawn.batching in ("divisor", "full", "list", "list_padded", "stream")
    if drawn.layout not in DIVIDED or not whole:  # JAX itself divides no other batches over eight devices
        drawn = replace(drawn, inside="nothing")
    if drawn.loss == "l2":  # a term of the weights is no function of the outputs
        drawn = replace(drawn, curvature="hessian")
    if drawn.loss not in WEIGHTED:
        drawn = replace(drawn, counted="examples")
    if drawn.loss != "packaged":  # what another loss makes of its labels is its author's business
        drawn = replace(drawn, labels="fine")
    return drawn


def refusal(stranger: Stranger) -> str | None:
    """Why it may be refused, as docs/trust.md says; None of what is documented as supported."""
    reasons = {
        "no mean over examples": stranger.loss in NO_MEAN,
        "no weight_fn": stranger.loss in WEIGHTED and stranger.counted == "examples",
        "a batch of padding alone is 0 / 0": stranger.loss == "unguarded",
        "labels that are no classes": stranger.labels != "fine",
        "weights of fewer than 32 bits": stranger.dtype == "bf16_kernels",
        "half precision on the way to the loss": stranger.dtype in HALF or stranger.dtype == "f16_loss",
        "shard_map on explicit axes": "explicit" in stranger.layout and stranger.inside == "shard_map",
        "not convex in the outputs": stranger.loss == "sigmoid" and stranger.curvature == "gauss_newton",
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


class Plain(NamedTuple):
    """Parameters as arrays: kernels of shape (inputs, outputs), and biases."""

    w1: Any
    b1: Any
    w2: Any
    b2: Any


def forward(params: Plain, x: Any) -> Any:
    """The network, written out."""
    return jnp.tanh(x @ params.w1 + params.b1) @ params.w2 + params.b2


class NnxNet(nnx.Module):
    """The network in Flax NNX."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.hidden = nnx.Linear(FEATURES, HIDDEN, rngs=rngs)
        self.out = nnx.Linear(HIDDEN, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(jnp.tanh(self.hidden(x)))


class EquinoxNet(eqx.Module):
    """The network in Equinox, for one example or its tokens."""

    hidden: Any
    out: Any

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = jnp.tanh(x @ self.hidden.weight.T + self.hidden.bias)
        return hidden @ self.out.weight.T + self.out.bias


def library(name: str) -> tuple[Callable, Any, Callable[[Any], Plain]]:
    """`predict(params, x)`, parameters of some values, and these as `Plain`."""
    x, key = jnp.ones((1, FEATURES)), jax.random.key(0)
    layers, kernel, bias = ("hidden", "out"), "kernel", "bias"
    if name == "nnx":
        predict, params = models.from_nnx(NnxNet())
    elif name == "linen":
        net = linen.Sequential([linen.Dense(HIDDEN), jnp.tanh, linen.Dense(CLASSES)])
        predict, params = models.from_linen(net, net.init(key, x))
        layers = "layers_0", "layers_2"
    elif name == "equinox":
        hidden = eqx.nn.Linear(FEATURES, HIDDEN, key=key)
        predict, params = models.from_equinox(EquinoxNet(hidden, eqx.nn.Linear(HIDDEN, CLASSES, key=key)))
        kernel = "weight"
    elif name == "haiku":
        net = hk.without_apply_rng(
            hk.transform(lambda x: hk.nets.MLP([HIDDEN, CLASSES], activation=jnp.tanh)(x))
        )
        predict, params = net.apply, net.init(key, x)
        layers, kernel, bias = ("mlp/~/linear_0", "mlp/~/linear_1"), "w", "b"
    else:
        sizes = {"w1": (FEATURES, HIDDEN), "b1": HIDDEN, "w2": (HIDDEN, CLASSES), "b2": CLASSES}
        params = {name: np.zeros(size) for name, size in sizes.items()}
        return lambda params, x: forward(Plain(**params), x), params, lambda params: Plain(**params)

    def plain(params: Any) -> Plain:
        first, second = (params[layer] for layer in layers)
        kernels = [layer[kernel].T if name == "equinox" else layer[kernel] for layer in (first, second)]
        return Plain(kernels[0], first[bias], kernels[1], second[bias])

    return predict, params, plain


def per_example(name: str, z: Any, data: dict[str, Any]) -> tuple[Any, Any]:
    """Losses l and what they count W, of every example or token: the mean loss is sum(W l) / sum(W)."""
    y = data["y"]
    ones = jnp.ones(z.shape[:-1], z.dtype)
    if name in REGRESSION:
        output = jax.nn.sigmoid(z[:, 0]) if name == "sigmoid" else z[:, 0]
        return (output - y) ** 2, ones
    if name in ("drift", "drift_sum"):
        return jnp.sum((z - data["z0"]) ** 2, -1), ones
    if name == "norm_eval":
        z = (z - 0.1) / 1.3
    losses = -jnp.take_along_axis(jax.nn.log_softmax(z), y[..., None], -1)[..., 0]
    losses = jnp.where((y >= 0) & (y < CLASSES), losses, jnp.nan)
    if name in ("masked", "unguarded"):
        return losses, data["mask"].astype(z.dtype)
    if name == "tokens":
        return losses, (jnp.arange(TOKENS) < data["lengths"][:, None]).astype(z.dtype)
    if name == "class_weighted":
        return losses, jnp.asarray(CLASS_WEIGHTS, z.dtype)[y]
    return losses, ones


def output_loss(name: str, z: Any, batch: dict[str, Any]) -> Any:
    """The loss of a batch as its author wrote it."""
    if name == "packaged":
        return training.cross_entropy(z, batch["y"])
    if name == "broadcast":  # (n, 1) against (n,)
        return jnp.mean((z[:, :1] - batch["y"]) ** 2)
    if name == "contrastive":
        unit = z / jnp.linalg.norm(z, axis=-1, keepdims=True)
        return -jnp.mean(jnp.diagonal(jax.nn.log_softmax(2 * unit @ unit.T)))
    if name == "norm_train":
        z = (z - z.mean(0)) / jnp.sqrt(z.var(0) + 1e-3)
    losses, counted = per_example(name, z, batch)
    if name in WEIGHTED:
        total = jnp.sum(counted)
        return jnp.sum(counted * losses) / (total if name == "unguarded" else jnp.maximum(total, 1e-6))
    if name in ("sum", "drift_sum"):
        return jnp.sum(losses)
    if name == "sum/len":
        return jnp.sum(losses) / len(losses)
    return jnp.sum(losses) / EXAMPLES if name == "sum/all" else jnp.mean(losses)


def penalty(params: Any) -> Any:
    """An L2 term, for "l2"."""
    return PENALTY * sum(jnp.sum(x**2) for x in jax.tree.leaves(params) if x.ndim > 1)


def counted(name: str) -> Callable[[dict[str, Any]], Any]:
    """The `weight_fn` of a loss."""

    def weight(batch: dict[str, Any]) -> Any:
        if name == "tokens":
            return jnp.sum(batch["lengths"])
        return jnp.sum(jnp.asarray(CLASS_WEIGHTS)[batch["y"]] if name == "class_weighted" else batch["mask"])

    return weight


def parameters(like: Any, style: str, rng: np.random.Generator) -> Any:
    """Values for the leaves of a tree, float64, small enough for the network to be curved."""

    def values(x: Any) -> Any:
        found = rng.standard_normal(np.shape(x)) * 0.6
        if found.ndim > 1:
            if style == "zeros":
                found = np.where(rng.random(found.shape) < 0.3, 0, found)
            elif style == "equal":
                found = 0.4 * np.sign(found)
            elif style == "l1":
                found = np.where(rng.random(found.shape) < 0.7, 1e-3 * found, 2 * found)
        return found.astype(np.float32).astype(np.float64)  # the same numbers in both precisions

    return jax.tree.map(values, like)


def examples(stranger: Stranger, outputs: Callable, rng: np.random.Generator) -> dict[str, Any]:
    """Data of a loss, float64 and integers: examples that differ in size along the data set."""
    count = EXAMPLES + (PADDING if stranger.loss in ("masked", "unguarded") else 0)
    shape = (count, TOKENS, FEATURES) if stranger.loss == "tokens" else (count, FEATURES)
    x = rng.standard_normal(shape) * np.linspace(0.5, 2, count).reshape(-1, *[1] * (len(shape) - 1))
    data: dict[str, Any] = {"x": x.astype(np.float32).astype(np.float64)}
    data["y"] = np.sort(rng.integers(0, CLASSES, shape[:-1]), axis=0).astype(np.int32)
    if stranger.loss in REGRESSION:
        data["y"] = rng.random(count).astype(np.float32).astype(np.float64)
    if stranger.loss in ("masked", "unguarded"):
        data["mask"] = (np.arange(count) < EXAMPLES) & (rng.random(count) < 0.8)
    if stranger.loss == "tokens":
        data["lengths"] = np.sort(rng.integers(1, TOKENS + 1, count)).astype(np.int32)
    if stranger.loss.startswith("drift"):
        data["z0"] = outputs(data["x"])
    if stranger.labels in BAD_LABELS:
        data["y"][3::10] = BAD_LABELS[stranger.labels]
    return data | ({"y": data["y"].astype(np.float32)} if stranger.labels == "float" else {})


class Stream:
    """Batches that are made anew in every pass."""

    def __init__(self, batches: list) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        yield from self.batches


def sizes(batching: str, count: int) -> list[int]:
    """How many examples the batches hold, in order."""
    wanted = {
        "size_1": [1],
        "list_ones": [1],
        "odd": [7],
        "full": [count],
        "first_one": [1, 8],
        "list_uneven": [24, 8, 11],
        "list_padded": [32],
    }.get(batching, [16])
    found: list[int] = []
    while sum(found) < count:
        found.append(min(wanted[min(len(found), len(wanted) - 1)], count - sum(found)))
    return found


def cut(data: dict[str, Any], stranger: Stranger) -> list[dict[str, Any]]:
    """The data as a list of batches."""
    ends = np.cumsum(sizes(stranger.batching, len(data["x"])))[:-1]
    parts = {name: np.split(x, ends) for name, x in data.items()}
    return [dict(zip(parts, batch, strict=True)) for batch in zip(*parts.values(), strict=True)]
