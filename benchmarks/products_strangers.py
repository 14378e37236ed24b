"""How long does a Hessian product take for networks that are not ours, as users of any library write them?

    taskset -c 0 python benchmarks/products_strangers.py [--networks "GRU by scan"]

In seconds of processor time on one core: from `batched(..., 128)`, from a list of such batches and from one
batch of all examples, against what anybody writes, jitted `jvp(grad)` of the full batch, and the same
linearised once. All take turns. Each network is a mean loss of parameters and a batch, with its data:
scikit-learn's 1,797 digits, or random numbers, on which the time of a product does not depend. All parameters
are in the matrix. Networks that are not measured anew keep their rows, and each row is written when it is
there: beside those of products.py in results/products.json, and in products_strangers.md.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import common
import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import sklearn.datasets
from flax import linen, nnx
from jax.flatten_util import ravel_pytree

import jaxlimit
from jaxlimit import models
from jaxlimit.core.trees import PyTree

Loss = Callable[[PyTree, PyTree], jax.Array]
Stranger = tuple[Loss, PyTree, tuple[np.ndarray, np.ndarray]]
CLASSES = 10


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Its mean."""
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1))


def classifier(predict: Callable[[PyTree, jax.Array], jax.Array]) -> Loss:
    """The loss of a function that gives logits."""
    return lambda params, batch: cross_entropy(predict(params, batch[0]), batch[1])


def digits() -> tuple[np.ndarray, np.ndarray]:
    """1,797 images of 8x8x1, and their labels."""
    found: Any = sklearn.datasets.load_digits()
    return (found.images[..., None] / 16).astype(np.float32), found.target.astype(np.int32)


def random_inputs(*shape: int) -> tuple[np.ndarray, np.ndarray]:
    """Normal inputs with random labels."""
    rng = np.random.default_rng(0)
    return rng.standard_normal(shape, np.float32), rng.integers(0, CLASSES, shape[0]).astype(np.int32)


def normal(seed: int, *shape: int) -> jax.Array:
    """Weights whose outputs are about as large as their inputs."""
    return jax.random.normal(jax.random.key(seed), shape) / np.prod(shape[:-1]) ** 0.5


def convolve(images: jax.Array, kernel: jax.Array, **options: Any) -> jax.Array:
    """As anybody writes it."""
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=numbers, **options)


def pooled(images: jax.Array, kind: str) -> jax.Array:
    """The largest or the mean of 2x2 pixels."""
    window = (1, 2, 2, 1)
    if kind == "max":
        return jax.lax.reduce_window(images, -jnp.inf, jax.lax.max, window, window, "VALID")
    if kind == "mean":
        return jax.lax.reduce_window(images, 0.0, jax.lax.add, window, window, "VALID") / 4
    count, height, width, channels = images.shape
    return images.reshape(count, height // 2, 2, width // 2, 2, channels).max((2, 4))


def bare_cnn(kind: str) -> Stranger:
    """Two 3x3 convolutions to 8 and 16 channels, a pool, a dense layer."""
    params = {"a": normal(0, 3, 3, 1, 8), "b": normal(1, 3, 3, 8, 16), "out": normal(2, 256, CLASSES)}

    def predict(params: PyTree, images: jax.Array) -> jax.Array:
        hidden = jax.nn.relu(convolve(jax.nn.relu(convolve(images, params["a"])), params["b"]))
        return pooled(hidden, kind).reshape(len(images), -1) @ params["out"]

    return classifier(predict), params, digits()


def three_convolutions() -> Stranger:
    """Without a pool, on 512 images of 16x16x3."""
    params = {str(i): normal(i, 3, 3, *pair) for i, pair in enumerate([(3, 16), (16, 16), (16, 16)])}
    params["out"] = normal(3, 16, CLASSES)

    def predict(params: PyTree, hidden: jax.Array) -> jax.Array:
        for i in range(3):
            hidden = jax.nn.relu(convolve(hidden, params[str(i)]))
        return hidden.mean((1, 2)) @ params["out"]

    return classifier(predict), params, random_inputs(512, 16, 16, 3)


def separable() -> Stranger:
    """Each channel with a 3x3 kernel of its own, then 1x1, twice."""
    params = {"stem": normal(0, 3, 3, 3, 16), "out": normal(1, 16, CLASSES)}
    for i in range(2):
        params |= {f"depth{i}": normal(2 + i, 3, 3, 1, 16) * 3, f"point{i}": normal(4 + i, 1, 1, 16, 16)}

    def predict(params: PyTree, images: jax.Array) -> jax.Array:
        hidden = jax.nn.relu(convolve(images, params["stem"]))
        for i in range(2):
            hidden = convolve(hidden, params[f"depth{i}"], feature_group_count=16)
            hidden = jax.nn.relu(convolve(hidden, params[f"point{i}"]))
        return hidden.mean((1, 2)) @ params["out"]

    return classifier(predict), params, random_inputs(256, 16, 16, 3)


class NnxCnn(nnx.Module):
    """Batch norm in evaluation mode, and `nnx.max_pool`."""

    def __init__(self, rngs: nnx.Rngs):
        self.a, self.b = nnx.Conv(1, 8, (3, 3), rngs=rngs), nnx.Conv(8, 16, (3, 3), rngs=rngs)
        self.norm_a = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.norm_b = nnx.BatchNorm(16, use_running_average=True, rngs=rngs)
        self.out = nnx.Linear(64, CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        for conv, norm in ((self.a, self.norm_a), (self.b, self.norm_b)):
            images = nnx.max_pool(nnx.relu(norm(conv(images))), (2, 2), strides=(2, 2))
        return self.out(images.reshape(len(images), -1))


def nnx_cnn() -> Stranger:
    """As an NNX module."""
    predict, params = models.from_nnx(NnxCnn(nnx.Rngs(0)))
    return classifier(predict), params, digits()


class ResidualBlocks(linen.Module):
    """A stem, two blocks of two convolutions with group norm, the mean of all pixels."""

    @linen.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        hidden = linen.Conv(16, (3, 3))(images)
        for strides in (1, 2):
            inner = linen.relu(linen.GroupNorm(4)(hidden))
            inner = linen.Conv(16, (3, 3), strides=strides)(inner)
            inner = linen.Conv(16, (3, 3))(linen.relu(linen.GroupNorm(4)(inner)))
            hidden = inner + (hidden if strides == 1 else linen.Conv(16, (1, 1), strides=strides)(hidden))
        return linen.Dense(CLASSES)(hidden.mean((1, 2)))


def linen_resnet() -> Stranger:
    """As a Linen module."""
    inputs = random_inputs(256, 16, 16, 3)
    module = ResidualBlocks()
    params = module.init(jax.random.key(0), inputs[0][:1])
    return classifier(module.apply), params, inputs  # pyright: ignore[reportArgumentType]


class EquinoxCnn(eqx.Module):
    """Of one image, channels first."""

    layers: list

    def __init__(self, key: jax.Array):
        keys = jax.random.split(key, 3)
        self.layers = [
            eqx.nn.Conv2d(1, 8, 3, padding=1, key=keys[0]),
            jax.nn.relu,
            eqx.nn.MaxPool2d(2, 2),
            eqx.nn.Conv2d(8, 16, 3, padding=1, key=keys[1]),
            jax.nn.relu,
            eqx.nn.AvgPool2d(2, 2),
            jnp.ravel,
            eqx.nn.Linear(64, CLASSES, key=keys[2]),
        ]

    def __call__(self, image: jax.Array) -> jax.Array:
        for layer in self.layers:
            image = layer(image)
        return image


def equinox_cnn() -> Stranger:
    """Vmapped over images."""
    params, static = eqx.partition(EquinoxCnn(jax.random.key(0)), eqx.is_inexact_array)
    images, labels = digits()

    def predict(params: PyTree, images: jax.Array) -> jax.Array:
        return jax.vmap(eqx.combine(params, static))(images)

    return classifier(predict), params, (images.transpose(0, 3, 1, 2), labels)


def lstm_outputs(units: int) -> tuple[Callable[[PyTree, jax.Array], jax.Array], PyTree, Any]:
    """An LSTM over 16 steps and a dense layer, unrolled by Haiku in a scan: outputs, parameters, data."""

    def network(sequences: jax.Array) -> jax.Array:
        core = hk.LSTM(units)
        state = core.initial_state(len(sequences))
        outputs, _ = hk.dynamic_unroll(core, sequences, state, time_major=False)
        return hk.Linear(CLASSES)(outputs[:, -1])  # pyright: ignore

    inputs = random_inputs(512, 16, 8)
    transformed = hk.without_apply_rng(hk.transform(network))
    params = transformed.init(jax.random.key(0), inputs[0][:1])
    return transformed.apply, params, inputs  # pyright: ignore[reportReturnType]


def haiku_lstm() -> Stranger:
    """32 units."""
    predict, params, inputs = lstm_outputs(32)
    return classifier(predict), params, inputs


def gru_by_scan() -> Stranger:
    """32 units over 16 steps."""
    params = {"gates": normal(0, 40, 64), "new": normal(1, 40, 32), "out": normal(2, 32, CLASSES)}

    def predict(params: PyTree, sequences: jax.Array) -> jax.Array:
        def step(hidden: jax.Array, x: jax.Array) -> tuple[jax.Array, None]:
            update, reset = jnp.split(jax.nn.sigmoid(jnp.concatenate([x, hidden], 1) @ params["gates"]), 2, 1)
            new = jnp.tanh(jnp.concatenate([x, reset * hidden], 1) @ params["new"])
            return update * hidden + (1 - update) * new, None

        start = jnp.zeros((len(sequences), 32))
        return jax.lax.scan(step, start, sequences.transpose(1, 0, 2))[0] @ params["out"]

    return classifier(predict), params, random_inputs(512, 16, 8)


class Vit(linen.Module):
    """4x4 patches of 16x16 pixels, two layers of width 32 with 4 heads."""

    @linen.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        hidden = linen.Conv(32, (4, 4), strides=4)(images).reshape(len(images), -1, 32)
        hidden = hidden + self.param("positions", linen.initializers.normal(0.02), hidden.shape[1:])
        for _ in range(2):
            inner = linen.LayerNorm()(hidden)
            hidden = hidden + linen.MultiHeadDotProductAttention(4)(inner, inner)
            hidden = hidden + linen.Dense(32)(linen.gelu(linen.Dense(128)(linen.LayerNorm()(hidden))))
        return linen.Dense(CLASSES)(hidden.mean(1))


def vit() -> Stranger:
    """A vision transformer in Linen."""
    inputs = random_inputs(256, 16, 16, 3)
    module = Vit()
    params = module.init(jax.random.key(0), inputs[0][:1])
    return classifier(module.apply), params, inputs  # pyright: ignore[reportArgumentType]


STRANGERS: dict[str, Callable[[], Stranger]] = {
    "bare CNN, max pool": lambda: bare_cnn("max"),
    "bare CNN, mean pool": lambda: bare_cnn("mean"),
    "bare CNN, max over axes": lambda: bare_cnn("axes"),
    "three convolutions": three_convolutions,
    "depthwise separable": separable,
    "NNX CNN, batch norm": nnx_cnn,
    "Linen residual blocks": linen_resnet,
    "Equinox CNN": equinox_cnn,
    "Haiku LSTM": haiku_lstm,
    "GRU by scan": gru_by_scan,
    "Linen ViT": vit,
}


def measure(name: str) -> dict[str, Any]:
    """Processor seconds of a Hessian product in jaxlimit and as anybody writes it, all in turns."""
    loss, params, arrays = STRANGERS[name]()
    rng = np.random.default_rng(0)
    vector = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)), params)
    whole = jax.tree.map(jnp.asarray, arrays)

    def gradient(weights: PyTree, batch: PyTree) -> PyTree:
        return jax.grad(lambda w: loss(w, batch))(weights)

    plain = jax.jit(lambda w, v, batch: jax.jvp(lambda w: gradient(w, batch), (w,), (v,))[1])
    linear = jax.jit(lambda w, batch: jax.linearize(lambda w: gradient(w, batch), w)[1])(params, whole)
    apply = jax.jit(lambda linear, v: linear(v))
    batches = {"batched": jaxlimit.batched(arrays, 128)}
    batches |= {"list of 128s": list(batches["batched"]), "list of one": [whole]}
    functions: dict[str, Callable[[], Any]] = {
        "plain": lambda: plain(params, vector, whole),
        "linearized once": lambda: apply(linear, vector),
    }
    difference = {}
    num_weights = sum(x.size for x in jax.tree.leaves(params))
    for kind, data in batches.items():
        curvature = jaxlimit.hessian(loss, params, data, prunable=lambda path, leaf: True)
        functions[f"jaxlimit, {kind}"] = partial(curvature.matvec, vector)
        found, expected = (
            ravel_pytree(x)[0] for x in (curvature.matvec(vector), plain(params, vector, whole))
        )
        difference[kind] = float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))
    times = common.in_turns(functions, budget=0.5, clock=time.process_time)
    return {"network": name, "num_weights": num_weights, "seconds": times, "difference": difference}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Milliseconds of a product, and how many times as long the quicker one of the usual ways takes."""
    names = list(rows[0]["seconds"])
    lines = []
    for row in rows:
        times = row["seconds"]
        ratio = min(times["plain"], times["linearized once"]) / times["jaxlimit, batched"]
        lines.append([row["network"], *[f"{1e3 * times[name]:.1f} ms" for name in names], f"{ratio:.1f}"])
    return common.markdown(["network", *names, "quicker of the first two / batched"], lines)


def add(row: dict[str, Any]) -> None:
    """Writes a row with those that are there, in the place of the one before, with the machine it ran on."""
    name = "products" if common.on_cpu() else f"products_{jax.default_backend()}"
    document = common.read_document(name)
    before = document.get("strangers", {}).get("rows", [])
    measured = {one["network"]: one for one in (*before, row)}
    rows = [measured[network] for network in STRANGERS if network in measured]
    command = {"command": "taskset -c 0 python benchmarks/products_strangers.py", "rows": rows}
    common.write_document(name, document | {"strangers": command | {"environment": common.environment()}})
    common.write_table(f"{name}_strangers", table(rows))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=list(STRANGERS), choices=STRANGERS)
    for name in parser.parse_args().networks:
        add(measure(name))


if __name__ == "__main__":
    main()
