"""Which answer to "how sparse?" to believe: every prediction against what was measured, on trained networks.

    python benchmarks/believe.py --work DIR [--cases digits fc2-mnist mlpnet] [--seeds 0 1]

The networks are those of predicted_vs_measured.py, with three weights of the L1 term each, and the published
MLPNet, which others trained without one. The loss is the mean over the first training examples, the tolerance
eps the standard deviation of its batches. Measured are

    cut         the last sparsity at which the network that is cut stays within eps
    point       the largest sparsity measured at which that network loses at most a point of test accuracy
    attained    the sparsest network within eps that was built, its kept weights readjusted

Each prediction is compared with the one that it is about. `SAID` says of each prediction what that is, and
where it comes from. DIR keeps the folder of each network's assessment; an interrupted run goes on behind it.
MNIST and CIFAR-10 are read from $JAXLIMIT_DATA.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import common
import jax
import numpy as np
import predicted_vs_measured
import published_networks
from predicted_vs_measured import CASES, Case, Problem

import jaxlimit
from jaxlimit import baselines
from jaxlimit.application.assessment import Assessment
from jaxlimit.core.trees import Prunable, PyTree, flatten, is_kernel, partition
from jaxlimit.geometry.dimensions import last_within, width_dimension
from jaxlimit.geometry.magnitude import magnitude_order
from jaxlimit.limits.estimate import LIMITS
from jaxlimit.measuring.sweeps import ACCURACY_LOSS
from jaxlimit.reference.paper_code import reference_limit
from jaxlimit.spectrum.measure import SpectralMeasure
from jaxlimit.training.losses import CURVATURES, cross_entropy

NAME = "believe"
COMMAND = f"python benchmarks/{NAME}.py --work DIR"
BATCH_SIZE = 128
# Products a curvature of the networks beyond 100,000 weights, as in predicted_vs_measured.json.
MAX_MATVECS = {"fc5-mnist": 1_000, "lenet-cifar10": 1_000}
# Training examples behind the loss of MLPNet, and test examples, as many as CHITA's gradients at most.
PUBLISHED_EXAMPLES = 10_000
# What is measured, in the order of the table.
MEASURED = ("cut", "point", "attained", "certified")
_TITLES = {"hessian": "Hessian", "gauss_newton": "Gauss-Newton"}
SAID = {
    **{f"{_TITLES[name]} one_shot": "cut" for name in CURVATURES},
    **{f"{_TITLES[name]} {which}": "attained" for name in CURVATURES for which in LIMITS[1:]},
    "H+ width": "attained",
    "H-/2 width": "attained",
    "paper's code": "attained",
    "near zero, .001": "cut",
    "near zero, .01": "cut",
    "near zero, .001 of the largest": "cut",
    "effective number": "point",
    "PQ index (.5, 1)": "point",
}
"""What each prediction is about, as far as its authors say. `Hessian` is |H|: negative curvature counts as
stiff; of H+ as flat, of H-/2 as half as stiff. The last five are formulas in the weights alone."""
# Predictions that the table of networks shows.
SHOWN = (
    "Hessian one_shot",
    "PQ index (.5, 1)",
    "Hessian width",
    "Hessian cone",
    "Gauss-Newton width",
    "Gauss-Newton cone",
    "paper's code",
)


@dataclass(frozen=True)
class Subject:
    """A trained network, and the data that speak of it.

    Attributes:
        name: of the case.
        l1: weight of the L1 term that it was trained with.
        predict: `predict(params, inputs) -> logits`.
        params: as trained.
        batches: whose mean loss is predicted and measured.
        test_batches: whose error is measured.
        prunable: as for `hessian`.
        seed: of the probes.
        max_matvecs: products a curvature.
    """

    name: str
    l1: float
    predict: Callable[[PyTree, Any], jax.Array]
    params: PyTree
    batches: Any
    test_batches: Any
    prunable: Prunable = is_kernel
    seed: int = 0
    max_matvecs: int = 10_000

    @property
    def key(self) -> jax.Array:
        """Of the probes."""
        return jax.random.key(self.seed)

    def outputs(self, params: PyTree, batch: Any) -> jax.Array:
        """The logits of a batch."""
        return self.predict(params, batch[0])


def subject_of(case: Case, work: Path) -> Subject:
    """A network of predicted_vs_measured.py, trained if it is not there."""
    problem, folder = Problem(case), work / case.name
    params = predicted_vs_measured.train(case, problem, folder)
    network = case.preset.name
    return Subject(
        case.name,
        case.preset.recipe.l1,
        problem.predict,
        params,
        problem.batches,
        problem.test_batches,
        seed=case.seed,
        max_matvecs=MAX_MATVECS.get(network, 10_000),
    )


def published() -> Subject:
    """MLPNet as it was published."""
    network = published_networks.mlpnet()
    first, test = (
        jaxlimit.batched(tuple(x[:PUBLISHED_EXAMPLES] for x in arrays), BATCH_SIZE)
        for arrays in (network.train, network.test)
    )
    return Subject("mlpnet", 0.0, network.predict, network.params, first, test, network.prunable)


def loss_of(outputs: jax.Array, batch: Any) -> jax.Array:
    """The mean cross entropy of a batch."""
    return cross_entropy(outputs, batch[1])


def believe(subject: Subject, folder: Path) -> dict[str, Any]:
    """What is predicted of a network, what was measured, and what each prediction cost in products."""
    found = jaxlimit.assess(
        subject.outputs,
        loss_of,
        subject.params,
        subject.batches,
        subject.key,
        test_batches=subject.test_batches,
        prunable=subject.prunable,
        max_matvecs=subject.max_matvecs,
        out=folder,
        progress=True,
    )
    weights = partition(subject.params, subject.prunable)[0]
    certificate = found.certificate
    return {
        "l1": subject.l1,
        "seed": subject.seed,
        "num_weights": flatten(weights).size,
        "num_examples": next(iter(found.predicted.values())).num_examples,
        "loss_tolerance": found.attained.loss_tolerance,
        "dense_error": found.dense_error,
        "attained_error": found.attained_error,
        "unpruned_loss": found.attained.unpruned_loss,
        "dense_loss": found.attained.dense_loss,
        "measured": {
            "cut": found.cut.sparsity,
            "point": _point(found),
            "attained": found.attained.sparsity,
            "certified": None if certificate is None else certificate.sparsity,
        },
        "predicted": dict(_from_curvature(subject, found)) | _from_weights(weights),
        "status": {name: limit.status for name, limit in found.predicted.items()},
    }


def _point(found: Assessment) -> float:
    """The largest sparsity of the sweep at which the cut network loses at most a point of accuracy."""
    errors = np.array(found.cut.errors)
    return float(np.array(found.cut.sparsities)[errors <= errors[0] + ACCURACY_LOSS][-1])


def _from_curvature(subject: Subject, found: Assessment) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, limit in found.predicted.items():
        for which, estimate in limit.estimates().items():
            if not estimate.crossed:
                interval = {"lower": estimate.lower, "upper": estimate.upper, "spread": estimate.spread}
                yield (
                    f"{_TITLES[name]} {which}",
                    {"sparsity": estimate.value, "products": limit.num_matvecs, **interval},
                )
    hessian = found.predicted["hessian"]
    nodes, shares = hessian.measure.nodes, hessian.measure.weights
    for name, factor in {"H+ width": 0.0, "H-/2 width": 0.5}.items():
        measure = SpectralMeasure(np.where(nodes < 0, factor * nodes, nodes), shares, hessian.measure.dim)
        width = width_of(subject, measure, found.attained.loss_tolerance)
        yield name, {"sparsity": width, "products": hessian.num_matvecs}
    curvature = jaxlimit.hessian(
        lambda params, batch: loss_of(subject.outputs(params, batch), batch),
        subject.params,
        subject.batches,
        prunable=subject.prunable,
    )
    key = jax.random.fold_in(subject.key, 1)
    reference = reference_limit(curvature, key, loss_tolerance=found.attained.loss_tolerance)
    yield "paper's code", {"sparsity": reference.value, "products": reference.num_matvecs}


def width_of(subject: Subject, measure: SpectralMeasure, loss_tolerance: float) -> float:
    """The width limit with another spectrum."""
    order = magnitude_order(partition(subject.params, subject.prunable)[0])
    last = last_within(lambda n: width_dimension(measure, order.radius(n), loss_tolerance), order.counts)
    return last / order.dim


def _from_weights(weights: PyTree) -> dict[str, dict[str, Any]]:
    shares = {
        "near zero, .001": baselines.near_zero_share(weights, 0.001),
        "near zero, .01": baselines.near_zero_share(weights, 0.01),
        "near zero, .001 of the largest": baselines.near_zero_share(weights, 0.001, relative=True),
        "effective number": 1 - baselines.effective_number(weights) / flatten(weights).size,
        "PQ index (.5, 1)": baselines.pq_sparsity(weights),
    }
    return {name: {"sparsity": share, "products": 0} for name, share in shares.items()}


def summary(cases: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each prediction: its cost and its errors against what it is about, with and without an L1 term."""
    rows = []
    for name, about in SAID.items():
        known = [case for case in cases.values() if name in case["predicted"]]
        if not known:
            continue
        errors = {with_l1: [] for with_l1 in (True, False)}
        for case in known:
            error = case["predicted"][name]["sparsity"] - case["measured"][about]
            errors[case["l1"] > 0].append(error)
        both = errors[True] + errors[False]
        rows.append(
            {
                "prediction": name,
                "about": about,
                "products": float(np.median([case["predicted"][name]["products"] for case in known])),
                "mean_with_l1": _mean(np.abs(errors[True])),
                "mean_without_l1": _mean(np.abs(errors[False])),
                "worst": max(both, key=abs),
                "sign": _mean(both),
                "num_cases": len(known),
            }
        )
    return rows


def _mean(values: Any) -> float | None:
    return float(np.mean(values)) if len(values) else None


def tables(cases: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of predictions, and that of the networks."""

    def shown(value: float | None, form: str = ".3f") -> str:
        return "-" if value is None else format(value, form)

    predictions = [
        (
            row["prediction"],
            row["about"],
            f"{row['products']:,.0f}",
            shown(row["mean_with_l1"]),
            shown(row["mean_without_l1"]),
            shown(row["worst"], "+.3f"),
            shown(row["sign"], "+.3f"),
        )
        for row in summary(cases)
    ]
    heads = ("prediction", "about", "products", "mean error, L1", "no L1", "worst", "mean, signed")
    text = common.markdown(heads, predictions)
    networks = [
        (
            name,
            f"{case['num_weights']:,}",
            f"{case['num_examples']:,}",
            *(shown(case["measured"][of]) for of in MEASURED),
            *(shown(case["predicted"].get(which, {}).get("sparsity")) for which in SHOWN),
        )
        for name, case in cases.items()
    ]
    heads = ("network", "weights", "examples", *(f"**{name}**" for name in MEASURED), *SHOWN)
    return f"{text}\n{common.markdown(heads, networks)}"


def figure(cases: Mapping[str, Mapping[str, Any]]) -> Any:
    """Predicted against measured, a panel for each prediction."""
    from matplotlib.figure import Figure

    rows = summary(cases)
    columns = 4
    height = -(-len(rows) // columns)
    drawn = Figure(figsize=(2.3 * columns, 2.3 * height), layout="constrained")
    panels = drawn.subplots(height, columns, sharex=True, sharey=True, squeeze=False)
    for panel, row in zip(panels.flat, rows, strict=False):
        for with_l1, marker in ((True, "o"), (False, "x")):
            points = [
                (case["measured"][row["about"]], case["predicted"][row["prediction"]]["sparsity"])
                for case in cases.values()
                if row["prediction"] in case["predicted"] and (case["l1"] > 0) == with_l1
            ]
            label = "trained with L1" if with_l1 else "without"
            panel.plot(*np.array(points).reshape(-1, 2).T, marker, color="#0072B2", markersize=4, label=label)
        panel.plot([0, 1], [0, 1], color="#888888", linewidth=0.8)
        panel.set_title(f"{row['prediction']} ({row['about']})", fontsize=8)
        panel.set(xlim=(0, 1), ylim=(0, 1))
    for panel in panels.flat[len(rows) :]:
        panel.axis("off")
    panels.flat[0].legend(fontsize=7)
    drawn.supxlabel("measured sparsity", fontsize=9)
    drawn.supylabel("predicted sparsity", fontsize=9)
    return drawn


def write(work: Path, subjects: Mapping[str, Callable[[], Subject]]) -> None:
    """Measures what is not there yet, and writes what is known of all networks."""
    cases = common.read_document(NAME).get("cases", {})
    for name, make in subjects.items():
        compute = partial(_compute, make, work / name / "assessment")
        cases[name] = common.step(work / name / "believe.json", compute)
    common.write(NAME, {"command": COMMAND, "cases": cases, "summary": summary(cases)}, tables(cases))
    figure(cases).savefig(common.FIGURES / f"{NAME}.png", dpi=110, metadata={"Software": None})


def _compute(make: Callable[[], Subject], folder: Path) -> dict[str, Any]:
    return believe(make(), folder)


def subjects(names: Sequence[str], seeds: Sequence[int], work: Path) -> dict[str, Callable[[], Subject]]:
    """The networks asked for, made when they are needed."""
    found: dict[str, Callable[[], Subject]] = {
        case.name: partial(subject_of, case, work)
        for case in sorted(CASES, key=Case.order)
        if case.preset.name in names and case.seed in seeds
    }
    return found | ({"mlpnet": published} if "mlpnet" in names else {})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [*predicted_vs_measured.NAMES, "mlpnet"]
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder of the networks")
    parser.add_argument("--cases", nargs="+", default=known, choices=known, metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], choices=[0, 1])
    options = parser.parse_args()
    write(options.work, subjects(options.cases, options.seeds, options.work))


if __name__ == "__main__":
    main()
