"""When and how the limit is asked for: during training, for another loss, in another order of the weights."""

from typing import Annotated, Any

import jax
import numpy as np
from tyro.conf import arg

from jaxlimit import plots
from jaxlimit.core.batches import batched
from jaxlimit.core.trees import flatten, unflatten
from jaxlimit.experiments.experiment import Experiment
from jaxlimit.experiments.study import Results, Study
from jaxlimit.experiments.subject import Task, values
from jaxlimit.experiments.tables import by_variant, cell, curve, is_less, limit, markdown, over_seeds, tally
from jaxlimit.measuring.loss_statistics import loss_statistics
from jaxlimit.measuring.sweeps import SPARSITIES

WHICH = ("one_shot", "width", "cone")
# Shares of the epochs after which the limit is computed.
SHARES = (0.0, 0.0125, 0.05, 0.125, 0.25, 0.5, 1.0)
# A prediction made early is good if it lies within so much of the last one.
CLOSE = 0.01


def during_training(
    study: Annotated[Study, arg(name="")] = Study(),
    *,
    at: Annotated[
        tuple[int, ...] | None, arg(help_behavior_hint="(default: 7, closer at first)", metavar="[INT ...]")
    ] = None,
) -> Experiment:
    """The limit during training: can it be predicted early?

    Every piece trains anew up to its epoch, with the schedule of the whole training.

    Args:
        study: see `Study`.
        at: epochs after which the limit is computed, 0 being the random start.
    """
    task = study.task()
    last = task.preset.epochs
    epochs = sorted({*(at if at is not None else (round(share * last) for share in SHARES)), last})
    if epochs[0] < 0 or epochs[-1] > last:
        raise ValueError(f"at must hold epochs from 0 to {last}, got {list(at or ())}.")
    variants = {f"epoch-{epoch}": epoch for epoch in epochs}
    return study.experiment(
        "training", task, variants, _during, table_during, {"training.png": figure_during}
    )


def _during(task: Task, seed: int, epoch: int) -> dict[str, Any]:
    subject = task.trained(seed, until=epoch)
    found = subject.limit(WHICH)
    return {
        "epoch": epoch,
        "limit": values(found),
        "train_loss": subject.statistics.mean,
        "test_accuracy": subject.test_accuracy([0.0])[0],
        "measured": {"loss": subject.loss_threshold()},
    }


def table_during(results: Results) -> str:
    """Markdown: limits and the loss threshold after each epoch."""
    groups = by_variant(results)
    rows = []
    for pieces in groups.values():
        numbers = [cell(pieces, limit(which)) for which in WHICH]
        rows.append(
            [
                str(pieces[0]["epoch"]),
                cell(pieces, lambda p: p["train_loss"]),
                cell(pieces, lambda p: p["limit"]["loss_tolerance"], ".2g"),
                *numbers,
                cell(pieces, lambda p: p["measured"]["loss"]),
                cell(pieces, lambda p: p["test_accuracy"], ".1%"),
            ]
        )
    text = markdown(["epoch", "loss", "eps", *WHICH, "measured loss", "test accuracy"], rows)
    last = max(piece["epoch"] for piece in results.values())
    first = [f"{name} {_first_close(results, name)} of {last}" for name in WHICH]
    verdict = f"First epoch from which on every run stays within {CLOSE:g} of its last limit"
    return f"{text}\n{verdict}: {', '.join(first)}.\n"


def _first_close(results: Results, name: str) -> int | str:
    """The first epoch from which on all limits of all seeds are close to the seed's last one; - for none."""
    last = {p["seed"]: limit(name)(p) for p in sorted(results.values(), key=lambda p: p["epoch"])}
    first = "-"
    for epoch in sorted({p["epoch"] for p in results.values()}, reverse=True):
        first_of = [p for p in results.values() if p["epoch"] == epoch]
        if not all(abs(limit(name)(p) - last[p["seed"]]) <= CLOSE for p in first_of):
            return first
        first = epoch
    return first


def figure_during(results: Results) -> Any:
    """Limits, and the loss with its tolerance, against the epoch."""
    groups = by_variant(results)
    x = range(len(groups))
    limits = {name: curve(groups, x, limit(name)) for name in WHICH}
    measured = {"measured, loss": curve(groups, x, lambda p: p["measured"]["loss"])}
    losses = {
        "training loss": curve(groups, x, lambda p: p["train_loss"]),
        "ε": curve(groups, x, lambda p: p["limit"]["loss_tolerance"]),
    }
    return plots.plot_series(
        {"limit (sparsity)": limits | measured, "nats": losses},
        xlabel="epoch",
        logarithmic=["nats"],
        ticks=[str(pieces[0]["epoch"]) for pieces in groups.values()],
    )


def order(study: Annotated[Study, arg(name="")] = Study()) -> Experiment:
    """Random against magnitude order: limits and measured thresholds of the same network.

    Args:
        study: see `Study`.
    """
    task = study.task()
    variants = {"magnitude": False, "random": True}
    return study.experiment("order", task, variants, _order, table_order, {"order.png": figure_order})


def _order(task: Task, seed: int, random: bool) -> dict[str, Any]:
    subject = task.trained(seed)
    scores = None
    if random:
        key = jax.random.fold_in(jax.random.key(seed), 2)
        flat = jax.random.permutation(key, flatten(subject.weights).size)
        scores = unflatten(np.asarray(flat), subject.weights)
    found = subject.limit(WHICH, scores=scores)
    sweep = subject.sweep(SPARSITIES, subject.batches, scores=scores)
    return {
        "limit": values(found),
        "measured": {
            "loss": sweep.first_crossing("loss", subject.statistics.mean + subject.statistics.batch_std),
            "accuracy": subject.accuracy_threshold(scores),
        },
        "sparsity": SPARSITIES[::4].tolist(),
        "removed_norm": found.curve(SPARSITIES[::4]).removed_norm.tolist(),
        "train_loss": sweep.metrics["loss"][::4].tolist(),
    }


def table_order(results: Results) -> str:
    """Markdown: limits and measured thresholds in both orders."""
    rows = []
    for name, pieces in by_variant(results).items():
        measured = [cell(pieces, lambda p, w=which: p["measured"][w]) for which in ("loss", "accuracy")]
        rows.append([name, *(cell(pieces, limit(which)) for which in WHICH), *measured])
    text = markdown(["order", *WHICH, "measured loss", "1 point less"], rows)
    groups = by_variant(results)
    pairs = list(zip(groups["magnitude"], groups["random"], strict=True))
    below = {name: tally([is_less(limit(name)(b), limit(name)(a)) for a, b in pairs]) for name in WHICH}
    lower = ", ".join(f"{name} {count}" for name, count in below.items())
    return f"{text}\nRuns whose limit is lower in random order: {lower}.\n"


def figure_order(results: Results) -> Any:
    """R(s) and the training loss against sparsity, in both orders."""
    panels: dict[str, dict[str, Any]] = {"R(s)": {}, "training loss (nats)": {}}
    for name, pieces in by_variant(results).items():
        for panel, of in zip(panels.values(), ("removed_norm", "train_loss"), strict=True):
            panel[name] = over_seeds(pieces[0]["sparsity"], [piece[of] for piece in pieces])
    return plots.plot_series(panels, xlabel="sparsity s", logarithmic=["training loss (nats)"])


def tolerances(study: Annotated[Study, arg(name="")] = Study()) -> Experiment:
    """Test loss against training loss: is the limit for one that for the other?

    The same network, with the loss over the training examples, its spread eps being the tolerance; with the
    loss over as many test examples, or all where there are fewer, and the same eps; and with the spread of
    the test batches as eps.

    Args:
        study: see `Study`.
    """
    task = study.task()
    # Which examples give the loss, and which the tolerance.
    variants = {"train": ["train", "train"], "test": ["test", "train"], "test, its eps": ["test", "test"]}
    names = {name.replace(", ", "-").replace(" ", "-"): value for name, value in variants.items()}
    return study.experiment(
        "tolerances", task, names, _tolerances, table_tolerances, {"tolerances.png": figure_tolerances}
    )


def _tolerances(task: Task, seed: int, variant: Any) -> dict[str, Any]:
    subject = task.trained(seed)
    test = batched(tuple(array[: task.num_examples] for array in task.test), task.preset.batch_size)
    data = {"train": subject.batches, "test": test}
    statistics = {name: loss_statistics(subject.loss, subject.params, found) for name, found in data.items()}
    loss, tolerance = statistics[variant[0]].mean, statistics[variant[1]].batch_std
    found = subject.limit(WHICH, batches=data[variant[0]], loss_tolerance=tolerance)
    sweep = subject.sweep(SPARSITIES, data[variant[0]])
    rise = (sweep.metrics["loss"] - loss) / tolerance
    return {
        "limit": values(found),
        "loss": loss,
        "measured": {
            "loss": sweep.first_crossing("loss", loss + tolerance),
            "accuracy": subject.accuracy_threshold(),
        },
        "rise": rise[::4].tolist(),
    }


def table_tolerances(results: Results) -> str:
    """Markdown: loss, tolerance, limits and thresholds, a row for each loss."""
    rows = []
    for name, pieces in by_variant(results).items():
        rows.append(
            [
                _title(name),
                cell(pieces, lambda p: p["loss"], ".4f"),
                cell(pieces, lambda p: p["limit"]["loss_tolerance"], ".4f"),
                *(cell(pieces, limit(which)) for which in WHICH),
                *(cell(pieces, lambda p, w=which: p["measured"][w]) for which in ("loss", "accuracy")),
            ]
        )
    text = markdown(["loss", "L", "eps", *WHICH, "measured loss", "1 point less"], rows)
    groups = by_variant(results)
    near = {
        name: tally([is_less(abs(limit("one_shot")(p) - p["measured"]["loss"]), 0.02) for p in pieces])
        for name, pieces in groups.items()
    }
    counts = "; ".join(f"{_title(name)} {count}" for name, count in near.items())
    return f"{text}\nRuns in which one_shot lies within .02 of the measured threshold: {counts}.\n"


def _title(name: str) -> str:
    return name.replace("-", ", ", 1).replace("-", " ")


def figure_tolerances(results: Results) -> Any:
    """Rise of the loss in units of eps, against sparsity, around the thresholds."""
    thresholds = [piece["measured"]["loss"] for piece in results.values()]
    start, end = max(0.0, min(thresholds) - 0.1), min(1.0, max(thresholds) + 0.01)
    grid = SPARSITIES[::4]
    chosen = (grid >= start) & (grid <= end)
    curves = {
        _title(name): over_seeds(grid[chosen], [np.array(piece["rise"])[chosen] for piece in pieces])
        for name, pieces in by_variant(results).items()
    }
    figure = plots.plot_series({"rise of the loss / ε": curves}, xlabel="sparsity s")
    (axes,) = figure.axes
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set_ylim(top=min(4, axes.get_ylim()[1]))
    return figure
