"""Convolutions on a CPU: XLA's own, as a product with patches, and with patches that adjacent pixels share.

    python benchmarks/convolutions.py

What `jaxlimit.models.convolutional.convolve` does, and its bound on the channels that lie side by side in a
patch (0: XLA's own convolution; 1: no pixels share). Two networks on CIFAR-10's shapes at their random start:
a step of training on 128 images, inside a compiled loop as `train_model` has it, and a product with the
Hessian over 256 images. All take turns, and the fastest call of each counts. Results are in
results/convolutions.json and .md.
"""

from collections.abc import Callable
from typing import Any

import common
import jax
import jax.numpy as jnp

from jaxlimit.batches import batched
from jaxlimit.losses import classification_curvature, classification_loss
from jaxlimit.models import convolutional, from_nnx
from jaxlimit.presets import build_network, find_preset

NAME = "convolutions"
NETWORKS = ("cifar10-lenet", "cifar10-resnet18-8")
CHANNELS = (0, 1, 16, 32, 64, 128)
BATCH_SIZE = 128


def runs(name: str, channels: int) -> dict[str, Callable[[], Any]]:
    """A step of training and a Hessian product, compiled with that bound."""
    usual = convolutional.convolve, convolutional.SHARED_CHANNELS
    convolutional.SHARED_CHANNELS = channels
    if channels == 0:
        convolutional.convolve = jax.lax.conv_general_dilated
    try:
        predict, params = from_nnx(build_network(find_preset(name), seed=0))
        shape = (2 * BATCH_SIZE, *convolutional.CIFAR_SHAPE)
        images = jax.random.normal(jax.random.key(0), shape)
        labels = jnp.arange(len(images)) % 10
        gradient = jax.grad(classification_loss(predict))

        def update(params: Any, batch: Any) -> tuple[Any, None]:
            return jax.tree.map(lambda p, g: p - 1e-3 * g, params, gradient(params, batch)), None

        two = jax.tree.map(lambda array: array.reshape(2, BATCH_SIZE, *array.shape[1:]), (images, labels))
        steps = jax.jit(lambda params: jax.lax.scan(update, params, two)[0])
        batches = batched((images, labels), BATCH_SIZE)
        curvature = classification_curvature("hessian", predict, params, batches)
        found = {"step": lambda: steps(params), "product": lambda: curvature.matvec(curvature.weights)}
        for function in found.values():
            jax.block_until_ready(function())
    finally:
        convolutional.convolve, convolutional.SHARED_CHANNELS = usual
    return found


def main() -> None:
    rows = []
    for name in NETWORKS:
        functions = {f"{n} {kind}": run for n in CHANNELS for kind, run in runs(name, n).items()}
        times = common.in_turns(functions)
        for n in CHANNELS:
            seconds = {"step": times[f"{n} step"] / 2, "product": times[f"{n} product"]}
            rows.append({"network": name, "channels": n, "seconds": seconds})
    plain = {row["network"]: row["seconds"] for row in rows if row["channels"] == 1}
    cells = [
        [
            row["network"],
            {0: "XLA's own", 1: "none shared"}.get(row["channels"], str(row["channels"])),
            *(f"{1e3 * row['seconds'][kind]:.0f} ms" for kind in ("step", "product")),
            *(f"{plain[row['network']][kind] / row['seconds'][kind]:.2f}" for kind in ("step", "product")),
        ]
        for row in rows
    ]
    heads = ["network", "channels of a patch", "step", "product", "faster than none shared: step", "product"]
    document = {"command": f"python benchmarks/{NAME}.py", "rows": rows}
    common.write(NAME, document, common.markdown(heads, cells))


if __name__ == "__main__":
    main()
