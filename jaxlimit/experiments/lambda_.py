"""The weight lambda of the L1 term: which lambda buys which sparsity, and what LOMP at the limit keeps."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import numpy as np
from tyro.conf import arg

from jaxlimit import plots
from jaxlimit.application.options import shown
from jaxlimit.experiments.experiment import Experiment
from jaxlimit.experiments.study import Study
from jaxlimit.experiments.subject import DEFAULT_LIMITS, Task, values
from jaxlimit.experiments.tables import (
    Results,
    by_variant,
    cell,
    curve,
    is_less,
    limit,
    markdown,
    tally,
    threshold_cells,
)
from jaxlimit.measuring.finetuning import finetuned_sweep
from jaxlimit.measuring.sweeps import ACCURACY_LOSS

# In units of the preset's lambda.
MULTIPLES = (0.0, 0.2, 1.0, 4.0)
# Steps of Adam, with all examples, on the network that is cut at the cone limit.
FINETUNE_STEPS = 400


def plan(
    study: Annotated[Study, arg(name="")] = Study(),
    *,
    lambdas: Annotated[
        tuple[float, ...] | None, shown("0, .2, 1 and 4 times the preset's", "[FLOAT ...]")
    ] = None,
) -> Experiment:
    """LOMP at the sparsity that pruning_limit chooses, over lambda: what is kept of the test accuracy.

    Nothing is tuned: the network is trained with lambda, its limits are computed from the training data, and
    it is cut once at each of them. It is compared with itself before the cut and, where lambda = 0 is among
    the lambdas, with the network of the same seed that was trained without L1 term. Cut at the cone limit it
    is also fine-tuned, by 400 steps of Adam.

    Args:
        study: see `Study`.
        lambdas: weights of the L1 term.
    """
    if lambdas is not None and study.l1 is not None:
        raise ValueError("l1 has no effect on this experiment where lambdas are given: leave it out.")
    task = study.task()
    chosen = [m * task.preset.recipe.l1 for m in MULTIPLES] if lambdas is None else sorted({*lambdas})
    if not chosen or not all(0 <= value < float("inf") for value in chosen):
        raise ValueError(f"lambdas must be one or more finite numbers of at least 0, got {list(chosen)}.")
    variants = {f"{value:.9g}": value for value in chosen}
    return study.experiment("lambda", task, variants, _run, table, figure)


def _run(task: Task, seed: int, l1: float) -> dict[str, Any]:
    subject = task.trained(seed, l1=l1)
    found = subject.limit()
    estimates = found.estimates()
    dense, *accuracies = subject.test_accuracy([0.0, *(estimate.value for estimate in estimates.values())])
    tuned = None
    if "cone" in estimates:
        sweep = finetuned_sweep(
            subject.loss,
            subject.params,
            subject.batches,
            [estimates["cone"].value],
            metrics_fn=subject.metrics,
            eval_batches=subject.test,
            num_steps=FINETUNE_STEPS,
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


def _kept(results: Results, before: Callable[[Mapping[str, Any]], float]) -> str:
    """For each limit, how many runs are cut there at most one point of test accuracy below `before`."""
    found = {
        name: [is_less(before(piece) - _accuracy(name)(piece), ACCURACY_LOSS) for piece in results.values()]
        for name in DEFAULT_LIMITS
    }
    return ", ".join(f"{name} {tally(kept)}" for name, kept in found.items())


def table(results: Results) -> str:
    """Markdown: for each lambda the limits, and the test accuracy in per cent of the network cut there."""
    rows = []
    for name, pieces in by_variant(results).items():
        row = [name, cell(pieces, lambda p: p["dense_accuracy"], ".1%")]
        for which in DEFAULT_LIMITS:
            row += [cell(pieces, limit(which)), cell(pieces, _accuracy(which), ".1%")]
        row += [cell(pieces, lambda p: p["finetuned_accuracy"], ".1%")]
        rows.append([*row, *threshold_cells(pieces)])
    heads = ["lambda", "uncut", "one_shot", "kept there", "width", "kept there", "cone", "kept there"]
    text = markdown([*heads, "fine-tuned there", "measured loss", "1 point less"], rows)
    kept = _kept(results, lambda p: p["dense_accuracy"])
    text += f"\nRuns that lose at most one point of test accuracy when cut at the limit: {kept}."
    dense = {p["seed"]: p["dense_accuracy"] for p in results.values() if p["variant"] == "0"}
    if dense:
        text += f" Against the network without L1 term: {_kept(results, lambda p: dense[p['seed']])}."
    return f"{text}\n"


def figure(results: Results) -> Any:
    """Limits and the accuracy that LOMP keeps there, against lambda."""
    groups = by_variant(results)
    x = range(len(groups))
    limits = {name: curve(groups, x, limit(name)) for name in DEFAULT_LIMITS}
    accuracies = {name: curve(groups, x, lambda p, name=name: 100 * _accuracy(name)(p)) for name in limits}
    uncut = {"uncut": curve(groups, x, lambda p: 100 * p["dense_accuracy"])}
    measured = {"measured, 1 point less": curve(groups, x, lambda p: p["measured"]["accuracy"])}
    panels = {"limit (sparsity)": limits | measured, "test accuracy there (%)": accuracies | uncut}
    return plots.plot_series(panels, xlabel="λ of the L1 term", ticks=list(groups))
