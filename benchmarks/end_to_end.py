"""From trained weights to an answer: jaxlimit beside the same work in PyTorch, and what is not a product.

    python benchmarks/end_to_end.py

    limit      the width limit of the 784-100-10 network of tests/data on 10,000 MNIST images, resolved to
               .001 with its interval, for both curvatures; beside it the plain PyTorch loop of the paper's
               code with 128 Lanczos steps, which bounds nothing
    sweep      loss and accuracy at 200 sparsities on the 10,000 test images; PyTorch masks and evaluates one
               network after the other
    the rest   for four million weights, everything in a limit that is no product: sorting, R(s), brackets,
               roots

Results are in results/end_to_end.json and end_to_end.md. Needs `pip install -e ".[cli,bench]"`, and MNIST
under $JAXLIMIT_DATA.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import common
import jax
import jax.numpy as jnp
import networks
import numpy as np
import peers
import torch  # pyright: ignore[reportMissingImports]
from flax import nnx
from twins import Twin, make_twin

import jaxlimit
from jaxlimit import data, models
from jaxlimit.geometry.magnitude import magnitude_order
from jaxlimit.limits.cone import cone_point, cone_root
from jaxlimit.limits.problem import Problem
from jaxlimit.limits.width import width_limit
from jaxlimit.spectrum import lanczos
from jaxlimit.spectrum.bracket import SpectralBracket, bracket_indefinite, bracket_semidefinite
from jaxlimit.spectrum.measure import stack_rules
from jaxlimit.training.losses import classification_loss, classification_metrics

NAME = "end_to_end"
GOLDEN = Path(__file__).parents[1] / "tests" / "data" / "golden_fc2_mnist" / "weights.npz"
EXAMPLES, STEPS, SPARSITIES = 10_000, 128, np.arange(200) / 200
MANY_WEIGHTS = 4_000_000


def trained(split: str) -> networks.Problem:
    """The network that the paper's code trained, with the first training images or all test images."""
    mnist = data.load_mnist()
    images, labels = getattr(mnist, f"{split}_images"), getattr(mnist, f"{split}_labels")
    inputs = jnp.asarray(data.flatten_channel_first(images[:EXAMPLES]))
    model = models.load_torch_state(models.fc2(784, rngs=nnx.Rngs(0)), GOLDEN)
    predict, params = models.from_nnx(model)
    return networks.Problem("fc2", model, predict, params, inputs, jnp.asarray(labels[:EXAMPLES]))


def limits() -> list[dict[str, Any]]:
    """Seconds to the width limit, compilation included and apart, and what it is."""
    problem = trained("train")
    batches = problem.batches()
    loss = classification_loss(problem.predict)
    eps = jaxlimit.loss_statistics(loss, problem.params, batches).batch_std
    rows = []
    for operator in peers.OPERATORS:

        def answer(operator: str = operator) -> jaxlimit.PruningLimit:
            key, curvature = jax.random.key(0), problem.curvature(operator)
            return jaxlimit.pruning_limit(curvature, key, loss_tolerance=eps, which=["width"])

        first = common.seconds(answer)
        start = time.perf_counter()
        limit = answer()
        again = time.perf_counter() - start
        assert limit.width is not None
        width = vars(limit.width)
        row = {"what": f"width limit, {operator}", "seconds": again, "with compilation": first}
        rows.append({**row, "products": limit.num_matvecs, "width": width, "status": limit.status})
    twin = make_twin(problem, networks.BATCH_SIZE, "cpu")
    peer, order = peers.DoubleBackward(twin), magnitude_order(problem.curvature("hessian").weights)
    signs = np.sign(np.random.default_rng(0).standard_normal(order.dim)).astype(np.float32)

    def theirs() -> jaxlimit.Estimate:
        rule = peer.lanczos(peer.to_native(signs), STEPS)
        bracket = SpectralBracket.exact(stack_rules([rule]))
        return width_limit(bracket, Problem(order, eps))

    start = time.perf_counter()
    estimate = theirs()
    taken = time.perf_counter() - start
    row = {"what": f"PyTorch double backward, {STEPS} steps", "seconds": taken, "with compilation": taken}
    rows.append({**row, "products": STEPS, "width": {"value": estimate.value}, "status": "one Gauss rule"})
    return rows


def sweeps() -> dict[str, Any]:
    """Seconds of the sweep, and by how much the losses differ."""
    problem = trained("test")
    twin = make_twin(problem, 1_000, "cpu")
    metrics = classification_metrics(problem.predict)

    def ours() -> jaxlimit.Sweep:
        return jaxlimit.sparsity_sweep(metrics, problem.params, problem.batches(1_000), SPARSITIES)

    found = ours().metrics, torch_sweep(twin)
    functions: dict[str, Callable[[], Any]] = {"jaxlimit": ours, "PyTorch": partial(torch_sweep, twin)}
    return {
        "seconds": common.in_turns(functions),
        "largest difference": {
            name: float(np.max(np.abs(found[0][name] - found[1][name]))) for name in ("loss", "accuracy")
        },
    }


@torch.no_grad()
def torch_sweep(twin: Twin) -> dict[str, np.ndarray]:
    """Global magnitude pruning in PyTorch: the smallest weights by one sort, then network after network."""
    kept = [x.clone() for x in twin.parameters]
    order = torch.cat([x.abs().flatten() for x in kept]).argsort(stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    ranks = [part.view_as(x) for part, x in zip(rank.split([x.numel() for x in kept]), kept, strict=True)]
    losses, accuracies = [], []
    for sparsity in SPARSITIES:
        count = int(sparsity * len(order))
        for x, weights, place in zip(twin.parameters, kept, ranks, strict=True):
            x.copy_(torch.where(place < count, 0, weights))
        loss = accuracy = 0.0
        for inputs, labels in twin.batches:
            logits = twin.module(inputs)
            loss += twin.loss(logits, labels).item() * len(labels)
            accuracy += (logits.argmax(1) == labels).sum().item()
        losses.append(loss / twin.num_examples)
        accuracies.append(accuracy / twin.num_examples)
    for x, weights in zip(twin.parameters, kept, strict=True):
        x.copy_(weights)
    return {"loss": np.array(losses), "accuracy": np.array(accuracies)}


def the_rest(num_weights: int = MANY_WEIGHTS, num_steps: int = 256) -> dict[str, float]:
    """Seconds of each part of a limit but its products, once each, for weights from a Laplace distribution.

    The Lanczos run is that of a spectrum like a trained network's: a few outliers, a bulk near 0.
    """
    rng = np.random.default_rng(0)
    weights = {"kernel": jnp.asarray(rng.laplace(size=(num_weights // 1_000, 1_000)), jnp.float32) / 100}
    values = np.concatenate([np.geomspace(1, 100, 10), rng.laplace(size=4_000) / 100])
    diagonal = jnp.asarray(values, jnp.float32)
    start = jnp.asarray(rng.standard_normal(len(values)), jnp.float32)
    run = lanczos.tridiagonalize(lambda v: diagonal * v, start, num_steps)
    found: dict[str, float] = {}

    def timed(name: str, function: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        value = function()
        found[name] = time.perf_counter() - begin
        return value

    order = timed("sort and R(s)", lambda: magnitude_order(weights))
    eps = 1e-3 * float(order.squared_norm[-1])
    n, problem = num_weights // 2, Problem(order, eps)
    ridge = problem.ridge(n)
    semidefinite = timed("bracket, semidefinite", lambda: bracket_semidefinite([run], order.dim))
    timed("width root, semidefinite", lambda: width_limit(semidefinite, problem))
    indefinite = timed("bracket, indefinite", lambda: bracket_indefinite([run], order.dim, ridge=ridge))
    timed("width root, indefinite", lambda: width_limit(indefinite, problem))
    removed = bracket_indefinite([run], ridge=ridge)
    point = timed("cone's ridge", lambda: cone_point(removed, problem, n))
    timed("cone root", lambda: cone_root(indefinite, problem, [point]))
    timed("mask and removed vector", lambda: jax.block_until_ready((order.mask(n), order.removed_vector(n))))
    return found


def table(document: dict[str, Any]) -> str:
    """All three parts."""
    lines = []
    for row in document["limits"]:
        width = row["width"]
        interval = f"{width['value']:.4f}"
        if "lower" in width:
            interval += f" [{width['lower']:.4f}, {width['upper']:.4f}]"
        lines.append(
            [
                row["what"],
                str(row["products"]),
                interval,
                f"{row['seconds']:.1f} s",
                f"{row['with compilation']:.1f} s",
            ]
        )
    text = common.markdown(["limit", "products", "width", "seconds", "first time"], lines)
    times = document["sweep"]["seconds"]
    text += "\n" + common.markdown(
        ["sweep of 200 sparsities", "seconds"], [[name, f"{value:.2f} s"] for name, value in times.items()]
    )
    rest = {**document["rest"], "all": sum(document["rest"].values())}
    return (
        text
        + "\n"
        + common.markdown(
            ["no product, 4 million weights", "seconds"], [[name, f"{x:.3f} s"] for name, x in rest.items()]
        )
    )


def main() -> None:
    document = {
        "command": f"python benchmarks/{NAME}.py",
        "limits": limits(),
        "sweep": sweeps(),
        "rest": the_rest(),
    }
    common.write(NAME, document, table(document))


if __name__ == "__main__":
    main()
