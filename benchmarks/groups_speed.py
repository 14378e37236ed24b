"""Milliseconds of our networks, dense and without the units that are gone: a stage of benchmarks/groups.py.

The weights are random, and the units that go are drawn at random, in every layer about the same share: for
the time it makes no difference. minilm has the encoder of all-MiniLM-L6-v2 and a table of 1,000 tokens.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import common
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import sparse

import jaxlimit
from jaxlimit import models
from jaxlimit.core.jaxprs import multiplications
from jaxlimit.core.trees import is_kernel, partition


class Timed(NamedTuple):
    """A network that is timed: how it is made, the shape of a batch, and at which sparsities."""

    make: Callable[..., Any]
    shape: tuple[int, ...]
    sparsities: tuple[float, ...] = (0.5, 0.8, 0.9)


def _minilm(rngs: nnx.Rngs) -> models.SentenceEncoder:
    sizes = {"width": 384, "num_heads": 12, "num_layers": 6, "inner": 1536}
    return models.SentenceEncoder(1000, 64, **sizes, rngs=rngs)


CIFAR = (32, 32, 3)
LEFT = ("parameters", "multiplications")
NETWORKS = {
    "fc5": Timed(partial(models.fc5, 784), (128, 784), (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)),
    "lenet": Timed(models.LeNet, (128, *CIFAR)),
    "resnet18-8": Timed(partial(models.ResNet, 18, width=8), (16, *CIFAR)),
    "minilm": Timed(_minilm, (8, 16), (0.5, 0.9)),
    "vgg16": Timed(partial(models.VGG, 16), (4, *CIFAR), (0.5, 0.9)),
}


def measured(name: str) -> dict[str, Any]:
    """The stage `speed`, of one network."""
    make, shape, sparsities = NETWORKS[name]
    model = make(rngs=nnx.Rngs(0))
    predict, params = models.from_nnx(model)
    weights, _ = partition(params, _in_layers if name == "minilm" else is_kernel)
    labels, key = models.unit_labels(model, weights), jax.random.key(0)
    inputs = jax.random.randint(key, shape, 1, 1000) if name == "minilm" else jax.random.normal(key, shape)
    chosen = np.random.default_rng(0).random(max(int(x.max()) for x in jax.tree.leaves(labels)) + 1)
    scores, rows = jax.tree.map(lambda x: chosen[x], labels), []
    for s in sparsities:
        mask = jaxlimit.magnitude_mask(weights, s, scores=scores, groups=labels)
        small = jaxlimit.shrink(model, params, mask)
        zeros = jaxlimit.apply_mask(params, jaxlimit.magnitude_mask(weights, s))
        calls = {
            "dense": partial(jax.jit(predict), params, inputs),
            "zeros": partial(jax.jit(predict), zeros, inputs),
            "shrunk": partial(jax.jit(small.predict), small.params, inputs),
        }
        if name == "fc5":
            layers = [zeros["layers"][str(i)] for i in range(len(zeros["layers"]))]
            stored = [(sparse.BCOO.fromdense(x["kernel"].T), x["bias"]) for x in layers]
            calls["BCOO"] = partial(jax.jit(sparse_predict), stored, inputs)
            np.testing.assert_allclose(calls["BCOO"](), calls["zeros"](), rtol=1e-3, atol=1e-3)
        whole = jax.jit(predict)(jaxlimit.apply_mask(params, mask), inputs)
        difference = jnp.max(jnp.abs(calls["shrunk"]() - whole)) / jnp.max(jnp.abs(whole))
        counts = {"dense": (predict, params), "shrunk": (small.predict, small.params)}
        rows.append(
            {
                "sparsity": s,
                "difference": float(difference),
                "milliseconds": {call: 1e3 * x for call, x in common.in_turns(calls).items()},
                "parameters": {"dense": small.dense_num_params, "shrunk": small.num_params},
                "multiplications": {call: multiplications(*x, inputs) for call, x in counts.items()},
            }
        )
    return {"batch": shape[0], "rows": rows, "environment": common.environment()}


def _in_layers(path: tuple, leaf: Any) -> bool:
    return common.kernel_in(path) and path[0].key == "layers"


def sparse_predict(layers: list[tuple[sparse.BCOO, jax.Array]], images: jax.Array) -> jax.Array:
    """A fully connected network whose kernels (outputs, inputs) are stored as BCOO."""
    hidden = images.T
    for number, (kernel, bias) in enumerate(layers):
        hidden = kernel @ hidden + bias[:, None]
        hidden = hidden if number == len(layers) - 1 else jax.nn.relu(hidden)
    return hidden.T


def table(found: dict[str, Any]) -> str:
    """Of every network: milliseconds, and what is left of it without its units."""
    names, rows = ("dense", "zeros", "shrunk", "BCOO"), []
    for network, result in found.items():
        for row in result["rows"]:
            left = [f"{row[what]['shrunk'] / row[what]['dense']:.3f}" for what in LEFT]
            cells = [f"{row['milliseconds'][x]:.2f}" if x in row["milliseconds"] else "-" for x in names]
            rows.append([network, f"{row['sparsity']:.2f}", *left, *cells])
    heads = ["network", "sparsity", *(f"{what} left" for what in LEFT), *(f"{name}, ms" for name in names)]
    return common.markdown(heads, rows)
