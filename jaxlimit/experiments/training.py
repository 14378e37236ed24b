"""The limit during training: after some of its epochs."""

from typing import Annotated, Any

from tyro.conf import arg

from jaxlimit import plots
from jaxlimit.application.options import shown
from jaxlimit.experiments.experiment import Experiment
from jaxlimit.experiments.study import Study
from jaxlimit.experiments.subject import DEFAULT_LIMITS, Task, values
from jaxlimit.experiments.tables import Results, by_variant, cell, curve, limit, limit_cells, markdown

# Shares of the epochs after which the limit is computed.
SHARES = (0.0, 0.0125, 0.05, 0.125, 0.25, 0.5, 1.0)
# A prediction made early is good if it lies within so much of the last one.
CLOSE = 0.01


def plan(
    study: Annotated[Study, arg(name="")] = Study(),
    *,
    at: Annotated[tuple[int, ...] | None, shown("7, closer at first", "[INT ...]")] = None,
) -> Experiment:
    """The limit during training: can it be predicted early?

    Every piece trains anew up to its epoch, with the schedule of the whole training.

    Args:
        study: see `Study`.
        at: epochs after which the limit is computed, 0 being the random start.
    """
    task = study.task()
    last = task.preset.recipe.epochs
    epochs = sorted({*(at if at is not None else (round(share * last) for share in SHARES)), last})
    if at == () or epochs[0] < 0 or epochs[-1] > last:
        raise ValueError(f"at must hold epochs from 0 to {last}, got {list(at or ())}.")
    variants = {f"epoch-{epoch}": epoch for epoch in epochs}
    return study.experiment("training", task, variants, _run, table, figure)


def _run(task: Task, seed: int, epoch: int) -> dict[str, Any]:
    subject = task.trained(seed, until=epoch)
    found = subject.limit()
    return {
        "epoch": epoch,
        "limit": values(found),
        "train_loss": subject.statistics.mean,
        "test_accuracy": subject.test_accuracy([0.0])[0],
        "measured": {"loss": subject.loss_threshold()},
    }


def table(results: Results) -> str:
    """Markdown: limits and the loss threshold after each epoch."""
    groups = by_variant(results)
    rows = []
    for pieces in groups.values():
        numbers = limit_cells(pieces, DEFAULT_LIMITS)
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
    text = markdown(["epoch", "loss", "eps", *DEFAULT_LIMITS, "measured loss", "test accuracy"], rows)
    last = max(piece["epoch"] for piece in results.values())
    first = [f"{name} {_first_close(results, name)} of {last}" for name in DEFAULT_LIMITS]
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


def figure(results: Results) -> Any:
    """Limits, and the loss with its tolerance, against the epoch."""
    groups = by_variant(results)
    x = range(len(groups))
    limits = {name: curve(groups, x, limit(name)) for name in DEFAULT_LIMITS}
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
