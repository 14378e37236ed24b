"""What masks of every kind cost, predicted and real; and what whole groups cost in sparsity.

    python benchmarks/groups.py --work DIR [--networks digits fc2 lenet] [--stages masks limits report]

Networks and data: groups_networks.py. Losses are means over the first examples, as many as `NUM_EXAMPLES` and
`ASKED` say; the tolerance eps is the standard deviation of the losses of batches. The stages:

    masks    `predicted_loss` of 200 masks: 50 of the smallest weights, 50 at random, 50 of the weakest input
             channels, 50 of N:M patterns; with the Hessian (digits, fc2, lenet) and with Gauss-Newton,
             beside the rise of the loss
    limits   of single weights, blocks of 4x4, channels, heads and units: predicted (digits: from the
             Hessian; the others from Gauss-Newton), attained by `attained_limit`, and certified on examples
             that are new (confidence .95): of the networks that are cut as they are, and of those on the way
             to the attained one. And 2:4 and 4:8. How many examples and products, and which rise of the
             error is certified: `ASKED`, for two cores
    rounding attained on digits, four times more, from weights that differ by a millionth
    lasso    digits and fc2 trained with a group lasso on their hidden units, in place of the L1 term:
             one_shot of the units, and how many the training itself has emptied, for each lambda
    speed    milliseconds of our networks on a batch: dense, zeros stored as numbers, without the units that
             are gone (`shrink`), and, where all layers are dense, with kernels in the format BCOO of
             jax.experimental.sparse, at several sparsities; on whatever device JAX has
    report   what is done so far: groups_tables.py

DIR holds a folder for each network, and there a file for each step that is done. MNIST and CIFAR-10 are read
from $JAXLIMIT_DATA.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import common
import groups_lasso
import groups_networks
import groups_speed
import groups_tables
import jax
import numpy as np
from groups_networks import Network

import jaxlimit
from jaxlimit import models
from jaxlimit.baselines.masks import kept_counts, random_mask
from jaxlimit.core.trees import PyTree, partition
from jaxlimit.geometry.magnitude import MagnitudeOrder, magnitude_order
from jaxlimit.limits.estimate import LIMITS
from jaxlimit.measuring.certificates import certify
from jaxlimit.measuring.risks import paired
from jaxlimit.pruning.trust_region import DEFAULT, Settings

STAGES = ("masks", "limits", "rounding", "lasso", "speed", "report")
# Examples of the masks' losses.
NUM_EXAMPLES = {"digits": 1_438, "fc2": 2_048, "lenet": 256, "resnet18-8": 128, "minilm-attention": 16}


class Asked(NamedTuple):
    """What the stage `limits` asks of a network, as far as the time goes.

    Attributes:
        num_examples: of the loss.
        num_test: examples of the certificate.
        curvature: which predicts.
        which: limits.
        max_matvecs: products of the prediction.
        max_products: of the search.
        error_rise: what is certified. 359 test images cannot certify two points, even of no mistakes; of
            minilm, the share of sentences whose embedding turns.
        settings: of the search.
    """

    num_examples: int
    num_test: int
    curvature: str = "gauss_newton"
    which: tuple[str, ...] = ("one_shot",)
    max_matvecs: int = 60
    max_products: float = 60.0
    error_rise: float = 0.01
    settings: Settings = DEFAULT


# A step of one batch takes the whole of its curvature.
SMALL_STEPS = Settings(step_products=8, stage_share=0.9)

ASKED = {
    "digits": Asked(1_438, 359, "hessian", LIMITS, 10_000, 4_000.0, 0.03),
    "fc2": Asked(2_048, 4_000, which=LIMITS, max_matvecs=4_000, max_products=1_500.0),
    "lenet": Asked(256, 4_000, which=("one_shot", "readjusted")),
    "resnet18-8": Asked(512, 4_000),
    "resnet20": Asked(512, 2_000, max_products=40.0, settings=Settings(stage_share=0.9)),
    "minilm-attention": Asked(64, 1_000, max_products=80.0, error_rise=0.05, settings=SMALL_STEPS),
    "minilm-inner": Asked(64, 1_000, max_products=80.0, error_rise=0.05, settings=SMALL_STEPS),
}
NUM_MASKS = 50
# Searches of the stage `rounding`, and how far the weights that they begin with differ, relative to them.
NUM_STARTS, LITTLE = 4, 1e-6
PATTERNS = ((2, 4), (4, 8))
CUTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


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


def masks_of(name: str, network: Network) -> dict[str, Any]:
    """The stage `masks`."""
    cheap = network.curvature("gauss_newton")
    first = network.curvature("hessian") if name in groups_networks.CASES else cheap
    rows = []
    for kind, mask_name, mask in masks(first.weights):
        found = jaxlimit.predicted_loss(first, mask)
        other = found if first is cheap else jaxlimit.predicted_loss(cheap, mask)
        rows.append({"kind": kind, "mask": mask_name, **vars(found), "gauss_newton": other.increase})
    return {"loss_tolerance": network.tolerance, "masks": rows}


def granularities(name: str, network: Network) -> dict[str, Any]:
    """The kinds of groups that are compared."""
    if network.model is not None:  # attention cannot be traced
        weights, _ = partition(network.params, network.prunable)
        units = "heads" if name == "minilm-attention" else "units"
        return {units: models.unit_labels(network.model, weights), "single weights": None}
    found: dict[str, Any] = {"single weights": None, "blocks of 4x4": ("blocks", (4, 4))}
    if name in ("digits", "fc2"):
        found |= {"output channels": "output_channels", "input channels": "input_channels"}
    one = np.asarray(network.train[0][:1])
    labels = models.traced_labels(network.predict, network.params, one, prunable=network.prunable)
    return found | {"units": labels}


def limit_of(asked: Asked, network: Network, groups: Any) -> dict[str, Any]:
    """The stage `limits`, of one kind of groups: what is predicted."""
    if asked.which == ("one_shot",):
        curvature, order = network.curvature(asked.curvature), _order(network, groups)
        wanted = network.tolerance, groups_tables.WANTED, asked.max_matvecs
        found = common.one_shot(curvature, *wanted, groups=groups)
        return {"one_shot": found, "dim": order.dim, "num_groups": order.num_removals}
    keywords: dict[str, Any] = {"loss_tolerance": network.tolerance, "groups": groups, "which": asked.which}
    keywords |= {"max_matvecs": asked.max_matvecs}
    if asked.curvature != "hessian":
        keywords["tolerance"] = groups_tables.WANTED
    curvature = network.curvature(asked.curvature)
    return jaxlimit.pruning_limit(curvature, jax.random.key(0), **keywords).to_json()


def built_of(asked: Asked, network: Network, groups: Any) -> dict[str, Any]:
    """The stage `limits`, of one kind of groups: what is attained and certified."""
    order = _order(network, groups)
    reached = {order.counts[n] / order.dim: n for n in (order.within(int(s * order.dim)) for s in CUTS) if n}
    cuts = ((s, jaxlimit.apply_mask(network.params, order.mask(n))) for s, n in reached.items())
    found = {"certified_cut": certified(asked, network, cuts)}
    return found | attained_of(asked, network, groups)


def _order(network: Network, groups: Any) -> MagnitudeOrder:
    return magnitude_order(partition(network.params, network.prunable)[0], groups=groups)


def attained_of(asked: Asked, network: Network, groups: Any) -> dict[str, Any]:
    """The search, and what is certified of the networks on its way."""
    kept: dict[float, PyTree] = {}
    attained = searched(asked, network, groups, on_network=kept.__setitem__)
    found = None if not kept else certified(asked, network, sorted(kept.items()))
    return {"attained": attained.to_json(), "certified": found}


def searched(asked: Asked, network: Network, groups: Any, **keywords: Any) -> jaxlimit.Attained:
    """The search alone."""
    return jaxlimit.attained_limit(
        *network.problem,
        loss_tolerance=network.tolerance,
        tolerance=0.005 if asked.curvature == "hessian" else 0.01,
        max_products=asked.max_products,
        prunable=network.prunable,
        groups=groups,
        unpruned=False,
        settings=asked.settings,
        statistics_fn=network.statistics,
        **keywords,
    )


def rounding_of(asked: Asked, network: Network, groups: Any) -> dict[str, Any]:
    """The stage `rounding`, of one kind of groups: what is attained from weights that differ by so little."""
    found = []
    for seed in range(NUM_STARTS):
        rng = np.random.default_rng(seed)
        params = jax.tree.map(
            lambda x, r=rng: x * (1 + LITTLE * r.normal(size=x.shape)).astype(x.dtype), network.params
        )
        found.append(searched(asked, replace(network, params=params), groups).sparsity)
    return {"attained": found}


def certified(asked: Asked, network: Network, networks: Any) -> dict[str, Any]:
    """Up to which sparsity the error rises by no more than it may."""
    metric, rise = paired(network.wrong, network.params), asked.error_rise
    return certify(metric, networks, network.test_batches, bound=rise, bounds=(-1, 1)).to_json()


def pattern_of(asked: Asked, network: Network, n: int, m: int) -> dict[str, Any]:
    """The stage `limits`, of an N:M pattern: cut, and readjusted."""
    curvature = network.curvature(asked.curvature)
    mask = jaxlimit.nm_mask(curvature.weights, n, m)
    predicted = jaxlimit.predicted_loss(curvature, mask)
    of_cut = [(predicted.sparsity, jaxlimit.apply_mask(network.params, mask))]
    found: dict[str, Any] = {"predicted": vars(predicted), "loss_tolerance": network.tolerance}
    found["certified_cut"] = certified(asked, network, of_cut)
    keywords: dict[str, Any] = {"mask": mask, "prunable": network.prunable}
    keywords |= {"max_products": min(asked.max_products, 100.0), "statistics_fn": network.statistics}
    pruned = jaxlimit.prune(*network.problem, **keywords)
    return found | {
        "readjusted_rise": pruned.loss - curvature.loss,
        "certified": certified(asked, network, [(pruned.sparsity, pruned.params)]),
    }


def limits(name: str, asked: Asked, network: Network, folder: Path) -> None:
    """The stage `limits`."""
    kinds = granularities(name, network)
    for kind, groups in kinds.items():
        common.step(folder / f"limit {kind}.json", partial(limit_of, asked, network, groups))
    for kind, groups in kinds.items():
        common.step(folder / f"built {kind}.json", partial(built_of, asked, network, groups))
    for n, m in PATTERNS if network.model is None else ():
        common.step(folder / f"pattern {n}-{m}.json", partial(pattern_of, asked, network, n, m))


def main() -> None:
    """Does the stages that are asked for."""
    names = groups_tables.NETWORKS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--networks", nargs="+", choices=names, default=names)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    options = parser.parse_args()
    for name in options.networks:
        folder, load = options.work / name, partial(groups_networks.load, name, options.work / name)
        if "masks" in options.stages and name in NUM_EXAMPLES:
            count = NUM_EXAMPLES[name]
            common.step(folder / "masks.json", lambda n=name, load=load, m=count: masks_of(n, load(m)))
        if "limits" in options.stages and name in ASKED:
            asked = ASKED[name]
            limits(name, asked, load(asked.num_examples, asked.num_test), folder)
        if "rounding" in options.stages and name == "digits":
            asked = ASKED[name]
            network = load(asked.num_examples)
            for kind, groups in granularities(name, network).items():
                common.step(folder / f"rounding {kind}.json", partial(rounding_of, asked, network, groups))
        if "lasso" in options.stages and name in groups_lasso.LAMBDAS:
            network = load(NUM_EXAMPLES[name])
            for strength in groups_lasso.LAMBDAS[name]:
                common.step(
                    folder / f"lasso {strength:g}.json",
                    partial(groups_lasso.trained, name, network, strength),
                )
    if "speed" in options.stages:
        for name in groups_speed.NETWORKS:
            common.step(options.work / f"speed {name}.json", partial(groups_speed.measured, name))
    if "report" in options.stages:
        groups_tables.report(options.work)


if __name__ == "__main__":
    main()
