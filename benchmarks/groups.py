"""What masks of every kind cost, predicted and real; and what whole groups cost in sparsity.

    python benchmarks/groups.py --work DIR [--networks digits fc2 lenet] [--stages masks limits report]

Networks of `predicted_vs_measured`, trained as there with an L1 term, one seed. Losses are means over the
examples of the case, the tolerance eps is the standard deviation of its batches' losses. The stages:

    masks    `predicted_loss` of 200 masks: 50 of the smallest weights, 50 at random, 50 of the weakest input
             channels, 50 of N:M patterns; with the Hessian and with Gauss-Newton, beside the rise of the loss
    limits   of single weights, blocks of 4x4, output channels, input channels and whole hidden units of
             digits: the predicted limits of the Hessian, and the sparsity that `attained_limit` reaches
    speed    milliseconds of 784-1000-600-300-100-10 on 128 images: dense, zeros stored as numbers, without
             the hidden units that are gone (`shrink`), and with kernels in the format BCOO of
             jax.experimental.sparse, at several sparsities; on whatever device JAX has
    report   what is done so far, as results/groups.json, groups_masks.md, _limits.md, _speed.md and a figure

DIR holds a folder for each network, and there a file for each step that is done. MNIST and CIFAR-10 are read
from $JAXLIMIT_DATA.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
import predicted_vs_measured
from flax import nnx
from jax.experimental import sparse

import jaxlimit
from jaxlimit import models
from jaxlimit.baselines.masks import kept_counts, random_mask
from jaxlimit.core.jaxprs import multiplications
from jaxlimit.core.trees import PyTree, partition
from jaxlimit.geometry.magnitude import magnitude_order
from jaxlimit.plots import style

COMMAND = "python benchmarks/groups.py --work DIR"
STAGES = ("masks", "limits", "speed", "report")
CASES = {"digits": ("digits", 5e-4), "fc2": ("fc2-mnist", 5e-5), "lenet": ("lenet-cifar10", 5e-5)}
NUM_MASKS = 50
KINDS = ("magnitude", "random", "channels", "N:M")
# The real rise in units of eps: bins in which predictions are judged.
EDGES = (0.1, 1.0, 10.0, 100.0, np.inf)
SPARSITIES, BATCH = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99), 128


class Trained:
    """A trained network with its curvatures and its tolerance."""

    def __init__(self, name: str, folder: Path):
        preset, l1 = CASES[name]
        cases = (x for x in predicted_vs_measured.CASES if x.preset.name == preset and x.seed == 0)
        case = next(x for x in cases if x.preset.recipe.l1 == l1)
        self.problem = predicted_vs_measured.Problem(case)
        self.params = predicted_vs_measured.train(case, self.problem, folder)
        self.batches, loss = self.problem.batches, self.problem.loss
        self.eps = jaxlimit.loss_statistics(loss, self.params, self.batches).batch_std
        self.curvatures = {
            "hessian": jaxlimit.hessian(loss, self.params, self.batches),
            "gauss_newton": jaxlimit.gauss_newton(self.predict, output_loss, self.params, self.batches),
        }

    @property
    def weights(self) -> PyTree:
        """The prunable ones."""
        return self.curvatures["hessian"].weights

    def predict(self, params: PyTree, batch: PyTree) -> jax.Array:
        """The outputs of a batch."""
        return self.problem.predict(params, batch[0])


def output_loss(outputs: jax.Array, batch: PyTree) -> jax.Array:
    """Cross-entropy, from the outputs."""
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(outputs), batch[1][:, None], 1))


def masks(weights: PyTree) -> Iterator[tuple[str, str, PyTree]]:
    """Kind, name and mask of 200 masks; sparsities from .02 to .98, of random ones from .002."""
    for s in np.linspace(0.02, 0.98, NUM_MASKS):
        yield "magnitude", f"{s:.2f}", jaxlimit.magnitude_mask(weights, s)
    few = np.geomspace(0.002, 0.9, NUM_MASKS).tolist()
    keys = jax.random.split(jax.random.key(0), NUM_MASKS)
    for key, s, count in zip(keys, few, kept_counts(weights, few), strict=True):
        yield "random", f"{s:.3f}", random_mask(key, weights, count)
    order = magnitude_order(weights, groups="input_channels")
    for n in np.linspace(1, order.num_removals - 1, NUM_MASKS).round().astype(int).tolist():
        yield "channels", f"{n} of {order.num_removals}", order.mask(n)
    shapes = [leaf.shape for leaf in jax.tree.leaves(weights)]
    sizes = [(m, axis) for axis in (-2, -1) for m in (4, 8, 16, 5, 10, 20)]
    fitting = [(m, axis) for m, axis in sizes if any(shape[axis] % m == 0 for shape in shapes)]
    patterns = [(n, m, axis) for m, axis in fitting for n in range(1, m)]
    patterns = [patterns[i] for i in np.linspace(0, len(patterns) - 1, NUM_MASKS).round().astype(int)]
    for n, m, axis in patterns:
        yield "N:M", f"{n}:{m} along axis {axis}", jaxlimit.nm_mask(weights, n, m, axis)


def masks_of(network: Trained) -> dict[str, Any]:
    """The stage `masks`."""
    rows = []
    for kind, name, mask in masks(network.weights):
        found = jaxlimit.predicted_loss(network.curvatures["hessian"], mask)
        other = jaxlimit.predicted_loss(network.curvatures["gauss_newton"], mask)
        rows.append({"kind": kind, "mask": name, **vars(found), "gauss_newton": other.increase})
    return {"loss_tolerance": network.eps, "masks": rows}


def hidden_units(weights: PyTree) -> PyTree:
    """Labels of a fully connected network: a unit is its column of a kernel; in the last layer its row."""
    first, labels = 0, {}
    kernels = {name: layer["kernel"].shape for name, layer in weights["layers"].items()}
    for name, (inputs, outputs) in kernels.items():
        last = name == str(len(kernels) - 1)
        at = first - inputs + np.arange(inputs)[:, None] if last else first + np.arange(outputs)
        labels[name] = {"kernel": np.broadcast_to(at, (inputs, outputs)), "bias": None}
        first += outputs
    return {"layers": labels}


def limit_of(network: Trained, groups: Any) -> dict[str, Any]:
    """The stage `limits`, of one kind of groups: what is predicted."""
    curvature, key = network.curvatures["hessian"], jax.random.key(0)
    return jaxlimit.pruning_limit(curvature, key, loss_tolerance=network.eps, groups=groups).to_json()


def attained_of(network: Trained, groups: Any) -> dict[str, Any]:
    """The stage `limits`, of one kind of groups: what is attained."""
    args = network.predict, output_loss, network.params, network.batches
    keywords = {"unpruned": False, "groups": groups}
    return jaxlimit.attained_limit(*args, loss_tolerance=network.eps, **keywords).to_json()


def granularities(weights: PyTree) -> dict[str, Any]:
    """The kinds of groups that are compared."""
    return {
        "single weights": None,
        "blocks of 4x4": ("blocks", (4, 4)),
        "output channels": "output_channels",
        "input channels": "input_channels",
        "hidden units": hidden_units(weights),
    }


def speed() -> dict[str, Any]:
    """The stage `speed`: random weights, for products with them take as long as with trained ones."""
    model = models.fc5(784, rngs=nnx.Rngs(0))
    predict, params = models.from_nnx(model)
    weights, _ = partition(params)
    labels, images = models.unit_labels(model, weights), jax.random.normal(jax.random.key(0), (BATCH, 784))
    chosen = np.random.default_rng(0).random(sum(model.widths[1:-1]))  # in every layer about the same share
    scores, rows = jax.tree.map(lambda x: chosen[x], labels), []
    for s in SPARSITIES:
        mask = jaxlimit.magnitude_mask(weights, s, scores=scores, groups=labels)
        small = jaxlimit.shrink(model, params, mask)
        zeros = jaxlimit.apply_mask(params, jaxlimit.magnitude_mask(weights, s))
        layers = [zeros["layers"][str(i)] for i in range(len(zeros["layers"]))]
        stored = [(sparse.BCOO.fromdense(x["kernel"].T), x["bias"]) for x in layers]
        calls = {
            "dense": partial(jax.jit(predict), params, images),
            "zeros": partial(jax.jit(predict), zeros, images),
            "shrunk": partial(jax.jit(small.predict), small.params, images),
            "BCOO": partial(jax.jit(sparse_predict), stored, images),
        }
        np.testing.assert_allclose(calls["BCOO"](), calls["zeros"](), rtol=1e-3, atol=1e-3)
        counts = {"dense": (predict, params), "shrunk": (small.predict, small.params)}
        rows.append(
            {
                "sparsity": s,
                "milliseconds": {name: 1e3 * x for name, x in common.in_turns(calls).items()},
                "parameters": {"dense": small.dense_num_params, "shrunk": small.num_params},
                "multiplications": {name: multiplications(*x, images) for name, x in counts.items()},
            }
        )
    return {"batch": BATCH, "rows": rows, "environment": common.environment()}


def sparse_predict(layers: list[tuple[sparse.BCOO, jax.Array]], images: jax.Array) -> jax.Array:
    """A fully connected network whose kernels (outputs, inputs) are stored as BCOO."""
    hidden = images.T
    for number, (kernel, bias) in enumerate(layers):
        hidden = kernel @ hidden + bias[:, None]
        hidden = hidden if number == len(layers) - 1 else jax.nn.relu(hidden)
    return hidden.T


def speed_table(found: dict[str, Any]) -> str:
    """Milliseconds, and what is left of the network without its units."""
    names = ("dense", "zeros", "shrunk", "BCOO")
    rows = []
    for row in found["rows"]:
        left, before = row["multiplications"]["shrunk"], row["multiplications"]["dense"]
        cells = [f"{row['milliseconds'][name]:.2f}" for name in names]
        rows.append([f"{row['sparsity']:.2f}", *cells, f"{left / before:.3f}"])
    heads = ["sparsity", *(f"{name}, ms" for name in names), "multiplications left by shrink"]
    return common.markdown(heads, rows)


def masks_table(found: dict[str, Any]) -> str:
    """Predicted over real rise, by the real rise: median, and the middle half."""
    heads = ["network, masks", *[f"{a:g} to {b:g} eps" for a, b in pairwise(EDGES)], "right about eps"]
    rows = []
    for network, result in found.items():
        for kind in KINDS:
            of_kind = [x for x in result["masks"] if x["kind"] == kind]
            rises, increases = (
                np.array([x[name] for x in of_kind]) / result["loss_tolerance"]
                for name in ("rise", "increase")
            )
            ratios = np.divide(increases, rises, out=np.zeros(len(rises)), where=rises > 0)
            cells = []
            for low, high in pairwise(EDGES):
                inside = ratios[(rises > low) & (rises <= high)]
                quartiles = np.percentile(inside, [50, 25, 75]) if inside.size else []
                text = "{:.2f} [{:.2f}, {:.2f}]".format(*quartiles) if inside.size else "-"
                cells.append(f"{text} ({inside.size})" if inside.size else text)
            right = int(np.sum((rises <= 1) == (increases <= 1)))
            rows.append([f"{network}, {kind}", *cells, f"{right} of {len(of_kind)}"])
    return common.markdown(heads, rows)


def limits_table(found: dict[str, Any]) -> str:
    """The limits of each kind of groups."""
    names = ("one_shot", "width", "cone", "readjusted")
    rows = []
    for kind, result in found.items():
        limit, attained = result["predicted"], result["attained"]
        values = [f"{limit[name]['value']:.3f}" for name in names]
        number = limit.get("num_groups", limit["dim"])
        rows.append([kind, f"{number:,}", *values, f"{attained['sparsity']:.3f}", limit["code"]])
    return common.markdown(["digits", "groups", *names, "attained", "ended"], rows)


def draw(found: dict[str, Any]) -> None:
    """Predicted against real rises, both in units of eps."""
    figure, panels = style.new_figure(6.5, 3.4 * len(found), *[1.0] * len(found))
    colours = dict(zip(KINDS, (style.BLUE, style.ORANGE, style.GREEN, style.PURPLE), strict=True))
    for axes, (network, result) in zip(panels, found.items(), strict=True):
        eps = result["loss_tolerance"]
        for kind in KINDS:
            points = [x for x in result["masks"] if x["kind"] == kind and x["rise"] > 0 < x["increase"]]
            rises, increases = ([x[name] / eps for x in points] for name in ("rise", "increase"))
            axes.plot(rises, increases, ".", color=colours[kind], label=kind)
        axes.set(xscale="log", yscale="log", xlabel="real rise of the loss / eps", ylabel="predicted / eps")
        ends = np.array(axes.get_xlim())
        axes.plot(ends, ends, color=style.GREY, linewidth=0.8)
        axes.set_title(network)
        axes.legend(frameon=False)
    figure.savefig(common.FIGURES / "groups.png", dpi=150)


def main() -> None:
    """Does the stages that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--networks", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    options = parser.parse_args()
    for name in options.networks:
        folder = options.work / name
        if "masks" in options.stages:
            common.step(folder / "masks.json", lambda f=folder, n=name: masks_of(Trained(n, f)))
        if "limits" in options.stages and name == "digits":
            network = Trained(name, folder)
            for kind, groups in granularities(network.weights).items():
                common.step(folder / f"limit {kind}.json", partial(limit_of, network, groups))
                common.step(folder / f"attained {kind}.json", partial(attained_of, network, groups))
    if "speed" in options.stages:
        common.step(options.work / "speed.json", speed)
    if "report" in options.stages:
        report(options.work)


def report(work: Path) -> None:
    """The stage `report`."""
    found = {name: work / name / "masks.json" for name in CASES}
    measured = {name: common.writing.read_json(path) for name, path in found.items() if path.exists()}
    limits = {}
    for path in sorted((work / "digits").glob("limit *.json"), key=lambda path: path.stat().st_mtime):
        kind = path.stem.removeprefix("limit ")
        attained = common.writing.read_json(path.with_name(f"attained {kind}.json"))
        limits[kind] = {"predicted": common.writing.read_json(path), "attained": attained}
    quick = common.writing.read_json(work / "speed.json")
    document = {"command": COMMAND, "masks": measured, "limits": limits, "speed": quick}
    common.write("groups", document)
    common.write_table("groups_speed", speed_table(quick))
    common.write_table("groups_masks", masks_table(measured))
    common.write_table("groups_limits", limits_table(limits))
    draw(measured)


if __name__ == "__main__":
    main()
