"""What jaxlimit's way to readjust a pruned network is compared with, and what each of them costs.

See benchmarks/pruning.py.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
from pruning_methods import Curve, Subject, Variant, window_share

from jaxlimit.core.trees import PyTree, combine, is_kernel, partition
from jaxlimit.curvature.operator import Curvature
from jaxlimit.geometry.magnitude import apply_mask, magnitude_order
from jaxlimit.pruning.windows import window

BATCH_SIZE = 128
# Added to the second moments of a layer's inputs, as a share of their mean: SparseGPT's percdamp.
RIDGE = 0.01


def full_batch_adam(subject: Subject, mask: PyTree, rate: float, costs: Sequence[float]) -> Curve:
    """Adam on the kernels with the mask held, as `finetuned_sweep`: the best network so far, at these costs.

    A step is a gradient, whose loss comes with it.
    """
    optimizer = optax.adam(rate)

    @jax.jit
    def step(state: tuple, best: tuple) -> tuple[tuple, tuple]:
        weights, moments = state
        rest = partition(subject.params)[1]
        loss, gradient = jax.value_and_grad(lambda w: subject.loss_fn(combine(w, rest), subject.arrays))(
            weights
        )
        better = loss < best[0]
        best = jax.tree.map(partial(jnp.where, better), (loss, weights), best)
        updates, moments = optimizer.update(apply_mask(gradient, mask), moments)
        return (optax.apply_updates(weights, updates), moments), best

    weights = apply_mask(subject.kernels, mask)
    state, best, curve = (weights, optimizer.init(weights)), (jnp.array(jnp.inf), weights), []
    for number in range(1, int(max(costs)) + 1):
        state, best = step(state, best)
        if number in costs:
            curve.append(subject.measured(combine(best[1], partition(subject.params)[1]), number))
    return curve


class Minibatches:
    """Training with a cosine schedule, batches of 128 in random order, and the mask held.

    Args:
        subject: the network.
        optimizer: "sgd", with momentum .9, or "adam".
        everything: whether biases and norms move, too.
    """

    def __init__(self, subject: Subject, optimizer: str, *, everything: bool):
        self._subject, self._everything = subject, everything
        self._optimizer = {"sgd": optax.sgd(1.0, momentum=0.9), "adam": optax.adam(1.0)}[optimizer]
        self._epoch = jax.jit(self._one_epoch)
        self._batches = max(1, subject.num_examples // BATCH_SIZE)

    def trained(self, mask: PyTree, rate: float, epochs: int, *, gradual: float | None = None) -> PyTree:
        """The whole tree, after so many epochs; the rest of the last batch is left out of each.

        Args:
            mask: is held.
            rate: the first learning rate.
            epochs: 1 or more.
            gradual: a sparsity that is reached after half of the epochs, in steps as Zhu and Gupta's (2017)
                s (1 - (1 - t)^3), each with the smallest of the weights as they are then; instead of `mask`.
        """
        params = apply_mask(self._subject.params, mask) if gradual is None else self._subject.params
        moments, key = self._optimizer.init(params), jax.random.key(0)
        for epoch in range(epochs):
            if gradual is not None and epoch <= (epochs + 1) // 2:
                left = max(0.0, 1 - (epoch + 1) / ((epochs + 1) // 2)) ** 3
                order = magnitude_order(partition(params)[0])
                mask = order.mask(self._subject.removed(gradual * (1 - left)))
                params = apply_mask(params, mask)
            params, moments = self._epoch(params, moments, mask, rate, epoch, epochs, key)
        return params

    def _one_epoch(
        self,
        params: PyTree,
        moments: Any,
        mask: PyTree,
        rate: jax.Array,
        epoch: jax.Array,
        epochs: jax.Array,
        key: jax.Array,
    ) -> tuple[PyTree, Any]:
        subject, count = self._subject, self._batches
        size = min(BATCH_SIZE, subject.num_examples)
        order = jax.random.permutation(jax.random.fold_in(key, epoch), subject.num_examples)
        rows = order[: count * size].reshape(count, size)

        def update(carry: tuple, item: tuple) -> tuple[tuple, None]:
            params, moments = carry
            chosen, number = item
            batch = tuple(x[chosen] for x in subject.arrays)
            gradient = apply_mask(jax.grad(subject.loss_fn)(params, batch), mask)
            if not self._everything:
                gradient = jax.tree_util.tree_map_with_path(
                    lambda path, x: x if is_kernel(path, x) else jnp.zeros_like(x), gradient
                )
            updates, moments = self._optimizer.update(gradient, moments)
            now = rate * 0.5 * (1 + jnp.cos(jnp.pi * (epoch * count + number) / (epochs * count)))
            return (jax.tree.map(lambda w, u: w + now * u, params, updates), moments), None

        return jax.lax.scan(update, (params, moments), (rows, jnp.arange(count)))[0]


def reconstructed(subject: Subject, mask: PyTree) -> PyTree:
    """Layer by layer, the kept weights whose outputs are closest to the layer's on the data: least squares.

        min over W' on the mask of ||X W - X W'||^2 / N + ridge ||W - W'||^2

    X are the inputs of the layer in the network that is pruned so far, as SparseGPT takes them (Frantar and
    Alistarh 2023), W its trained kernel. Each column is solved exactly on its kept weights, without their
    blocks of columns. For dense layers with ReLU between them; convolutions before them are cut alone.
    """
    convolutional = "dense" in subject.params
    layers, masks = ((tree["dense"] if convolutional else tree)["layers"] for tree in (subject.params, mask))
    cut, found = apply_mask(subject.params, mask), {}
    hidden = np.asarray(_features(subject, cut) if convolutional else subject.arrays[0], np.float64)
    for number in sorted(layers, key=int):
        kernel = np.asarray(layers[number]["kernel"], np.float64)
        keep = np.asarray(masks[number]["kernel"])
        moments = hidden.T @ hidden / len(hidden)
        moments += RIDGE * np.mean(np.diag(moments)) * np.eye(len(moments))
        wanted, solved = moments @ kernel, np.zeros_like(kernel)
        for column in range(kernel.shape[1]):
            rows = np.flatnonzero(keep[:, column])
            solved[rows, column] = np.linalg.solve(moments[np.ix_(rows, rows)], wanted[rows, column])
        found[number] = layers[number] | {"kernel": jnp.asarray(solved, jnp.float32)}
        hidden = np.maximum(hidden @ solved + np.asarray(layers[number]["bias"], np.float64), 0)
    return cut | ({"dense": {"layers": found}} if convolutional else {"layers": found})


def _features(subject: Subject, params: PyTree) -> jax.Array:
    """What convolutions hand to the dense layers: the outputs if these were identities: it is positive."""
    layers = params["dense"]["layers"]
    size = len(layers["0"]["kernel"])
    identity = {"kernel": jnp.eye(size), "bias": jnp.zeros(size)}
    dense = {"layers": dict.fromkeys(layers, identity)}
    return subject.problem.predict(params | {"dense": dense}, subject.arrays[0])


def shares(subject: Subject) -> dict[str, float]:
    """Seconds of processor time of what methods are made of, over all the data.

    A step of 20 products linearises once; "product" is a twentieth of that, "product_linearised" what a
    further one costs, "product_alone" one that is not linearised before.
    """
    curvature = subject.readjustable(Variant()).curvature
    weights, vector = curvature.weights, jax.tree.map(jnp.ones_like, curvature.weights)

    def products(of: Curvature, count: int) -> PyTree:
        here = replace(of, weights=weights)
        return [here.matvec(vector) for _ in range(count)][-1]

    tenth, epoch = window(curvature, 0.1, 0), Minibatches(subject, "sgd", everything=True)
    mask = subject.magnitude_mask(0.5)
    functions = {
        "gradient": lambda: replace(curvature, weights=weights).gradient,
        "loss": lambda: curvature.mean_loss(weights),
        "linearisation_and_product": lambda: products(curvature, 1),
        "step_of_20_products": lambda: products(curvature, 20),
        "step_of_20_products_with_a_tenth": lambda: products(tenth, 20),
        "product_alone": lambda: products(replace(curvature, linear_bytes=0), 1),
        "minibatch_epoch": lambda: epoch.trained(mask, 1e-3, 1),
    }
    seconds = common.in_turns(functions, budget=4.0, clock=time.process_time)
    share = window_share(tenth, curvature)
    return {
        **seconds,
        "product": seconds["step_of_20_products"] / 20,
        "product_with_a_tenth": seconds["step_of_20_products_with_a_tenth"] / 20 / share,
        "product_linearised": (seconds["step_of_20_products"] - seconds["linearisation_and_product"]) / 19,
        "tenth": share,
    }
