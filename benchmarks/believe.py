"""Which answer to "how sparse?" to believe: every prediction against what was measured, on trained networks.

    python benchmarks/believe.py --work DIR [--cases digits fc2-mnist mlpnet] [--seeds 0 1]

The networks are those of believe_cases.py, and those of `jaxlimit run` in real_runs.py (`--runs`). The loss
is the mean over training examples, the tolerance eps the standard deviation of its batches. Measured are

    cut         the last sparsity at which the network that is cut stays within eps
    point       the largest sparsity measured at which that network loses at most a point of test accuracy
    attained    the sparsest network within eps that was built, its kept weights readjusted
    finetuned   the largest sparsity at which a network loses at most a point of test accuracy after 400 steps
                of full-batch Adam; of the networks of `--finetune`

Each prediction is compared with the one that it is about (believe_tables.py). DIR keeps the folder of each
network's assessment, and of each run; an interrupted run goes on behind it. MNIST, CIFAR-10 and the published
networks are read from $JAXLIMIT_DATA.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import believe_cases
import common
import jax
import numpy as np
import real_runs
from believe_cases import Subject
from believe_tables import NAME, SHORT, figure, networks_table, predictions_table, summary

import jaxlimit
from jaxlimit import baselines, models
from jaxlimit.application import run_folder
from jaxlimit.application.assessment import Assessment
from jaxlimit.application.presets import build_network, find_preset
from jaxlimit.application.spectra import load_spectrum
from jaxlimit.core import writing
from jaxlimit.core.trees import PyTree, flatten, partition
from jaxlimit.geometry.dimensions import last_within, width_dimension
from jaxlimit.geometry.magnitude import magnitude_order
from jaxlimit.measuring.sweeps import ACCURACY_LOSS
from jaxlimit.reference.paper_code import reference_limit
from jaxlimit.spectrum.measure import SpectralMeasure
from jaxlimit.training.losses import classification_metrics
from jaxlimit.training.model_files import load_model

COMMAND = f"python benchmarks/{NAME}.py --work DIR"
# Runs of real_runs.py whose attained network is known.
RUNS = tuple(name for name in real_runs.RUNS if name.startswith(("mnist-fc2-10", "fashion", "cifar10-fc")))
# Densities of the networks that the scaling law is fitted to, and the sparsities at which its threshold is
# measured.
FITTED = {5: (0.5, 0.2, 0.1, 0.05, 0.02), 8: (0.5, 0.3, 0.2, 0.1, 0.05, 0.03, 0.02, 0.01)}
FINETUNED = np.arange(0.3, 1, 0.01)
FINETUNE_STEPS = 400


def believe(subject: Subject, folder: Path) -> dict[str, Any]:
    """What is predicted of a network, what was measured, and what each prediction cost in products."""
    found = jaxlimit.assess(
        subject.outputs,
        subject.loss_of,
        subject.params,
        subject.batches,
        subject.key,
        loss_tolerance=subject.loss_tolerance,
        test_batches=subject.test_batches,
        error_fn=subject.error_fn,
        curvatures=subject.curvatures,
        prunable=subject.prunable,
        statistics_fn=subject.statistics_fn,
        max_matvecs=subject.max_matvecs,
        max_products=subject.max_products,
        out=folder,
        progress=True,
    )
    weights = partition(subject.params, subject.prunable)[0]
    of_hessian: dict[str, Any] = {}
    if "hessian" in found.predicted:
        of_hessian = _clipped(weights, found, found.predicted["hessian"].measure)
        key = jax.random.fold_in(subject.key, 1)
        curvature = jaxlimit.hessian(subject.loss, subject.params, subject.batches, prunable=subject.prunable)
        reference = reference_limit(curvature, key, loss_tolerance=found.attained.loss_tolerance)
        of_hessian["paper's code"] = {"sparsity": reference.value, "products": reference.num_matvecs}
    return _row(subject.l1, subject.seed, weights, found, of_hessian)


def believe_run(name: str, folder: Path) -> dict[str, Any]:
    """The same of a `jaxlimit run`, from its folder."""
    if not (document := common.read_document(name)).get("finished") or not folder.exists():
        real_runs.perform(name, folder)
        document = common.read_document(name)
    config, found = writing.read_json(folder / run_folder.CONFIG), jaxlimit.load_assessment(folder)
    preset, seed = find_preset(config["preset"]["name"]), config["options"]["seed"]
    model = load_model(folder / run_folder.MODEL, build_network(preset, seed))
    weights = partition(models.from_nnx(model)[1])[0]
    of_hessian: dict[str, Any] = {}
    if "hessian" in found.predicted:
        spectrum = load_spectrum(run_folder.spectrum_path(folder, "hessian"))
        of_hessian = _clipped(weights, found, spectrum.measure)
        reference = document["limits"]["hessian"]["reference"]
        of_hessian["paper's code"] = {"sparsity": reference["value"], "products": reference["num_matvecs"]}
    return _row(config["preset"]["l1"], seed, weights, found, of_hessian)


def _row(
    l1: float, seed: int, weights: PyTree, found: Assessment, of_hessian: Mapping[str, Any]
) -> dict[str, Any]:
    """What is kept of a network; `of_hessian`: predictions that are no limits of the assessment."""
    return {
        "l1": l1,
        "seed": seed,
        "num_weights": flatten(weights).size,
        "num_examples": next(iter(found.predicted.values())).num_examples,
        "loss_tolerance": found.attained.loss_tolerance,
        "dense_error": found.dense_error,
        "attained_error": found.attained_error,
        "attained_code": found.attained.code,
        "unpruned_loss": found.attained.unpruned_loss,
        "dense_loss": found.attained.dense_loss,
        "measured": {
            "cut": found.cut.sparsity,
            "point": _point(found),
            "attained": found.attained.sparsity,
            "certified": None if found.certificate is None else found.certificate.sparsity,
        },
        "predicted": {**dict(_from_limits(found)), **of_hessian, **_from_weights(weights)},
        "status": {name: limit.status for name, limit in found.predicted.items()},
    }


def _point(found: Assessment) -> float | None:
    """The largest sparsity of the sweep at which the cut network loses at most a point of accuracy."""
    if found.cut.errors is None:
        return None
    errors = np.array(found.cut.errors)
    return float(np.array(found.cut.sparsities)[errors <= errors[0] + ACCURACY_LOSS][-1])


def _from_limits(found: Assessment) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, limit in found.predicted.items():
        for which, estimate in limit.estimates().items():
            if not estimate.crossed:
                interval = {"lower": estimate.lower, "upper": estimate.upper, "spread": estimate.spread}
                yield (
                    f"{SHORT[name]} {which}",
                    {"sparsity": estimate.value, "products": limit.num_matvecs, **interval},
                )


def _clipped(weights: PyTree, found: Assessment, measure: SpectralMeasure) -> dict[str, Any]:
    """Widths with the negative eigenvalues taken as flat, and as half as stiff."""
    width, widths = dict(_from_limits(found))["Hessian width"], {}
    for name, factor in {"H+ width": 0.0, "H-/2 width": 0.5}.items():
        nodes = np.where(measure.nodes < 0, factor * measure.nodes, measure.nodes)
        changed = SpectralMeasure(nodes, measure.weights, measure.dim)
        widths[name] = width | {"sparsity": width_of(weights, changed, found.attained.loss_tolerance)}
    return widths


def width_of(weights: PyTree, measure: SpectralMeasure, loss_tolerance: float) -> float:
    """The width limit with another spectrum."""
    order = magnitude_order(weights)
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


def scaling_law(subject: Subject) -> dict[str, Any]:
    """The threshold after fine-tuning, and what the law says of it that is fitted to a few such networks."""

    def errors(sparsities: Sequence[float]) -> np.ndarray:
        sweep = jaxlimit.finetuned_sweep(
            subject.loss,
            subject.params,
            subject.batches,
            sparsities,
            num_steps=FINETUNE_STEPS,
            metrics_fn=classification_metrics(subject.predict),
            eval_batches=subject.test_batches,
            prunable=subject.prunable,
        )
        return 1 - sweep.metrics["eval_accuracy"]

    densities = sorted({density for some in FITTED.values() for density in some}, reverse=True)
    known = dict(zip(densities, errors([1 - density for density in densities]), strict=True))
    dense = float(errors([0.0])[0])
    bound = dense + ACCURACY_LOSS
    measured = common.last_reached(lambda s: bool(errors([s])[0] <= bound), FINETUNED, FINETUNED[0])
    predicted = {}
    for count, some in FITTED.items():
        law = baselines.fit_pruned_error(some, [known[density] for density in some], dense)
        found = {"sparsity": law.sparsity(bound), "products": count * FINETUNE_STEPS}
        predicted[f"scaling law, {count} networks"] = found
    return {"finetuned": measured, "dense_error": dense, "errors": known, "predicted": predicted}


def write(work: Path, computed: Mapping[str, Callable[[], dict[str, Any]]]) -> None:
    """Measures what is not there yet, and writes what is known of all networks."""
    cases = common.read_document(NAME).get("cases", {})
    for name, compute in computed.items():
        case = compute()
        law = work / name / "scaling_law.json"
        if law.exists():
            found = writing.read_json(law)
            case["measured"]["finetuned"] = found["finetuned"]
            case["predicted"] |= found["predicted"]
        cases[name] = case
    document = {"command": COMMAND, "cases": cases, "summary": summary(cases)}
    common.write(NAME, document, predictions_table(cases))
    common.write_table(f"{NAME}_networks", networks_table(cases))
    figure(cases).savefig(common.FIGURES / f"{NAME}.png", dpi=110, metadata={"Software": None})


def _of_subject(make: Callable[[], Subject], folder: Path, finetune: bool) -> dict[str, Any]:
    if finetune:
        common.step(folder / "scaling_law.json", lambda: scaling_law(make()))
    return common.step(folder / "believe.json", lambda: believe(make(), folder / "assessment"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder of the networks")
    names = believe_cases.NAMES
    parser.add_argument("--cases", nargs="*", default=names, choices=names, metavar="NAME", help="networks")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1], choices=[0, 1], help="of the networks"
    )
    parser.add_argument(
        "--runs", nargs="*", default=RUNS, choices=RUNS, metavar="NAME", help="of real_runs.py"
    )
    parser.add_argument(
        "--finetune", nargs="*", default=("digits", "fc2-mnist"), choices=names, metavar="NAME"
    )
    options = parser.parse_args()
    computed: dict[str, Callable[[], dict[str, Any]]] = {
        name: partial(_of_subject, make, options.work / name, name.startswith(tuple(options.finetune)))
        for name, make in believe_cases.subjects(options.cases, options.seeds, options.work).items()
    }
    computed |= {
        name: partial(
            common.step, options.work / name / "believe.json", partial(believe_run, name, options.work / name)
        )
        for name in options.runs
    }
    write(options.work, computed)


if __name__ == "__main__":
    main()
