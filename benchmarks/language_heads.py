"""How much memory does a product take where the vocabulary is large: of the logits, which everything has?

    python benchmarks/language_heads.py
    python benchmarks/language_heads_peers.py   # before, for the PyTorch libraries

A hidden layer of 128 units and a head over 50,000 words, 512 tokens. Memory of jaxlimit's programs is read
from what XLA compiled, without running it: `anew` is a product that linearises in every call, `kept` what a
linearised batch keeps beside the weights, and `product` what a product with it takes beside. Every row is one
way to write the cross entropy. The PyTorch libraries' is by how much a process of its own grows in one call.

Results are in results/language_heads.json and language_heads.md, in units of one array of logits (98 MiB).
"""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import common
import jax
import jax.numpy as jnp
import optax

from jaxlimit.curvature.linearizing import num_bytes
from jaxlimit.curvature.products import GaussNewtonProduct, Gradient, HessianProduct
from jaxlimit.training import cross_entropy

NAME = "language_heads"
VOCABULARY, TOKENS, UNITS = 50_000, 512, 128


def _picked(values: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values, labels[..., None], -1)[..., 0]


LOSSES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "jaxlimit.training.cross_entropy": cross_entropy,
    "optax, integer labels": lambda z, y: jnp.mean(optax.softmax_cross_entropy_with_integer_labels(z, y)),
    "jax.nn.log_softmax": lambda z, y: -jnp.mean(_picked(jax.nn.log_softmax(z), y)),
    "jax.nn.logsumexp": lambda z, y: jnp.mean(jax.nn.logsumexp(z, -1) - _picked(z, y)),
    "optax, one-hot labels": lambda z, y: jnp.mean(
        optax.softmax_cross_entropy(z, jax.nn.one_hot(y, z.shape[-1]))
    ),
}


def predict(params: Any, batch: Any) -> jax.Array:
    """Logits of tokens (1, tokens, units)."""
    return jnp.tanh(batch[0] @ params["hidden"]) @ params["head"]


def problem(vocabulary: int = VOCABULARY, tokens: int = TOKENS, units: int = UNITS) -> tuple[Any, Any, Any]:
    """Shapes of parameters, of a batch and of one vector."""
    shape = jax.ShapeDtypeStruct
    params = {"hidden": shape((units, units), jnp.float32), "head": shape((units, vocabulary), jnp.float32)}
    batch = shape((1, tokens, units), jnp.float32), shape((1, tokens), jnp.int32)
    return params, batch, jax.tree.map(lambda x: shape((1, *x.shape), x.dtype), params)


def memory(loss: Callable[[jax.Array, jax.Array], jax.Array], *sizes: int) -> dict[str, float]:
    """Of a gradient and of both products, in arrays of logits."""
    params, batch, vectors = problem(*sizes)
    rest = jax.tree.map(lambda _: None, params)
    logits = num_bytes(jax.eval_shape(predict, params, batch))
    weights = num_bytes(params)

    def temporary(function: Callable[..., Any], *args: Any) -> float:
        analysis: Any = jax.jit(function).lower(*args).compile().memory_analysis()
        return analysis.temp_size_in_bytes / logits

    hessian = HessianProduct(lambda params, batch: loss(predict(params, batch), batch[1]), "highest")
    gauss_newton = GaussNewtonProduct(predict, lambda z, batch: loss(z, batch[1]), "highest")
    found = {"gradient": temporary(Gradient(hessian), params, rest, batch)}
    for name, product in {"hessian": hessian, "gauss_newton": gauss_newton}.items():
        linear = product.linearize.shape(params, rest, batch)
        found[f"{name} anew"] = temporary(product, params, rest, vectors, batch)
        found[f"{name} kept"] = (num_bytes(linear) - weights) / logits
        found[f"{name} product"] = temporary(product.apply, linear, vectors)
    return found


def table(losses: Mapping[str, Mapping[str, float]], peers: Mapping[str, Mapping[str, float]]) -> str:
    """Arrays of logits, by cross entropy or library."""
    heads = list(next(iter(losses.values())))
    lines = [[name, *(f"{row[head]:.1f}" for head in heads)] for name, row in losses.items()]
    for name, row in peers.items():
        lines.append([name, *(f"{row[head]:.1f}" if head in row else "" for head in heads)])
    return common.markdown(["cross entropy, or library", *heads], lines)


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    losses = {name: memory(loss) for name, loss in LOSSES.items()}
    peers = common.read_document(f"{NAME}_peers").get("peers", {})
    document = {"command": f"python benchmarks/{NAME}.py", "arrays_of_logits": losses}
    common.write(NAME, document, table(losses, peers))


if __name__ == "__main__":
    main()
