"""The weight lambda of the L1 term: which lambda buys which sparsity, and what LOMP at the limit keeps."""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from tyro.conf import arg

from jaxlimit import plots
from jaxlimit.experiments.experiment import Experiment
from jaxlimit.experiments.study import ACCURACY_LOSS, Results, Study, Task, values
from jaxlimit.experiments.tables import by_variant, cell, curve, is_less, limit, markdown, tally
from jaxlimit.measure import finetuned_sweep

WHICH = ("one_shot", "width", "cone")
# In units of the preset's lambda.
MULTIPLES = (0.0, 0.2, 1.0, 4.0)


def penalty(
    study: Annotated[Study, arg(name="")] = Study(),
    *,
    lambdas: Annotated[
        tuple[float, ...] | None,
        arg(help_behavior_hint="(default: 0, .2, 1 and 4 times the preset's)", metavar="[FLOAT ...]"),
    ] = None,
) -> Experiment:
    """LOMP at the sparsity that pruning_limit chooses, over lambda: what is kept of the dense accuracy.

    Nothing is tuned: the network is trained with lambda, its limits are computed from the training data, and
    it is cut once at each of them. Cut at the cone limit it is also fine-tuned, as `jaxlimit run` does.

    Args:
        study: see `Study`.
        lambdas: weights of the L1 term.
    """
    task = study.task()
    chosen = [m * task.preset.l1 for m in MULTIPLES] if lambdas is None else sorted({*lambdas})
    if not chosen or not all(0 <= value < float("inf") for value in chosen):
        raise ValueError(f"lambdas must be one or more finite numbers of at least 0, got {list(chosen)}.")
    variants = {f"{value:g}": value for value in chosen}
    return study.experiment("lambda", task, variants, _run, table, {"lambda.png": figure})


def _run(task: Task, seed: int, l1: float) -> dict[str, Any]:
    subject = task.trained(seed, l1=l1)
    found = subject.limit(WHICH)
    estimates = found.estimates()
    dense, *accuracies = subject.test_accuracy([0.0, *(estimate.value for estimate in estimates.values())])
    tuned = None
    if task.preset.finetune_steps and "cone" in estimates:
        sweep = finetuned_sweep(
            subject.loss,
            subject.params,
            subject.batches,
            [estimates["cone"].value],
            metrics_fn=subject.metrics,
            eval_batches=subject.test,
            num_steps=task.preset.finetune_steps,
        )
        tuned = float(sweep.metrics["eval_accuracy"][0])
    return {
        "limit": values(found),
        "dense_accuracy": dense,
        "accuracy": dict(zip(estimates, accuracies, strict=True)),
        "finetuned_accuracy": tuned,
        "measured": subject.thresholds(),
    }


def _accuracy(name: str) -> Callable[[Mapping[str, Any]], float]:
    """Test accuracy of the network cut at this limit; NaN where no product was left for it."""
    return lambda piece: piece["accuracy"].get(name, np.nan)


def _kept(name: str, pieces: Sequence[dict[str, Any]]) -> list[bool | None]:
    """Of each piece, whether the cut at this limit costs at most one point of test accuracy."""
    least = ACCURACY_LOSS + 1e-6
    return [is_less(p["dense_accuracy"] - _accuracy(name)(p), least) for p in pieces]


def table(results: Results) -> str:
    """Markdown: for each lambda the limits, and the test accuracy in per cent of the network cut there."""
    rows = []
    for name, pieces in by_variant(results).items():
        row = [name, cell(pieces, lambda p: p["dense_accuracy"], ".1%")]
        for which in WHICH:
            row += [cell(pieces, limit(which)), cell(pieces, _accuracy(which), ".1%")]
        row += [cell(pieces, lambda p: p["finetuned_accuracy"], ".1%")]
        rows.append([*row, *(cell(pieces, lambda p, w=w: p["measured"][w]) for w in ("loss", "accuracy"))])
    heads = ["lambda", "dense", "one_shot", "kept there", "width", "kept there", "cone", "kept there"]
    text = markdown([*heads, "fine-tuned there", "measured loss", "1 point less"], rows)
    pieces = list(results.values())
    counts = [f"{name} {tally(_kept(name, pieces))}" for name in WHICH]
    verdict = "Runs that lose at most one point of test accuracy when cut at the limit"
    return f"{text}\n{verdict}: {', '.join(counts)}.\n"


def figure(results: Results) -> Any:
    """Limits and the accuracy that LOMP keeps there, against lambda."""
    groups = by_variant(results)
    x = range(len(groups))
    limits = {name: curve(groups, x, limit(name)) for name in WHICH}
    accuracies = {name: curve(groups, x, lambda p, name=name: 100 * _accuracy(name)(p)) for name in limits}
    dense = {"dense": curve(groups, x, lambda p: 100 * p["dense_accuracy"])}
    measured = {"measured, 1 point less": curve(groups, x, lambda p: p["measured"]["accuracy"])}
    panels = {"limit (sparsity)": limits | measured, "test accuracy there (%)": accuracies | dense}
    return plots.plot_series(panels, xlabel="λ of the L1 term", ticks=list(groups))
