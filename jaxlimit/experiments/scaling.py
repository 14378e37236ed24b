"""What happens to the limits when the weights grow: with the network's function kept, and not kept.

All formulas of the limits see the weights and the curvature only through c^T |H| c and lambda R^2, which stay
as they are when every kernel is multiplied by c and the function is kept: then H falls as c^-2. So it is not
the size of the weights alone that matters, and these ways to grow are told apart:

temperature   every kernel times c, the function kept: the same order of the weights. Theory: the same limits,
              tr H falls as 1 / c^2.
balance       the first kernel times c, the last times 1 / c, the function kept: another global order.
plain         every kernel times c, nothing else, no running statistics of batch norm either: another
              function, with another loss, tolerance and Hessian.
held          as plain, with Hessian and tolerance as they were: the paper's argument about its width
              formula, for which it is the same as eps / c^2.

The function is kept by what comes after the kernels. In a chain with ReLU, which is homogeneous, these are
the biases and the logits: *temperature* is the network whose bias of layer l has grown by c^l and whose
logits are divided by c^L. In batch norm it is the running statistics, which grow with the kernel before
them. As a function of its kernels such a network is predict(kernels / c) with all else as it was, and so
it is computed, whatever the architecture.
"""

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

from flax.traverse_util import flatten_dict, unflatten_dict
from tyro.conf import arg

from jaxlimit import plots
from jaxlimit.application.presets import build_network
from jaxlimit.core.trees import PyTree, is_kernel
from jaxlimit.experiments.experiment import Experiment
from jaxlimit.experiments.study import Study
from jaxlimit.experiments.subject import Task, trace, values
from jaxlimit.experiments.tables import (
    Results,
    by_variant,
    cell,
    curve,
    is_less,
    limit,
    limit_cells,
    markdown,
    over_seeds,
    tally,
)
from jaxlimit.models import from_nnx

Path = tuple[str, ...]
WHICH = ("one_shot", "width")
WAYS = ("temperature", "balance", "plain")


def plan(
    study: Annotated[Study, arg(name="")] = Study(), *, factors: tuple[float, ...] = (2, 3, 4, 5)
) -> Experiment:
    """The limits and tr H of a network whose weights are multiplied by 2 to 5, in four ways.

    Args:
        study: see `Study`; the network must have two layers or more.
        factors: by which the weights are multiplied.
    """
    task = study.task()
    if len(_kernels(from_nnx(build_network(task.preset, 0))[1])) < 2:
        raise ValueError(f"preset must have a network of two layers or more, got {task.preset.network}.")
    factors = tuple(sorted({*factors} - {1.0}))
    if not factors or not all(0 < factor < float("inf") for factor in factors):
        raise ValueError(f"factors must be one or more positive numbers other than 1, got {list(factors)}.")
    variants: dict[str, Any] = {"trained-1": ["trained", 1.0, factors]}
    variants |= {f"{way}-{factor:g}": [way, factor, ()] for way in WAYS for factor in factors}
    return study.experiment("scaling", task, variants, _run, table, figure)


def scaled(
    predict: Callable[..., Any], params: PyTree, way: str, factor: float
) -> tuple[Callable[..., Any], PyTree]:
    """The network whose kernels are multiplied by c.

    Args:
        predict: `predict(params, inputs)`.
        params: nested dictionaries with kernels, named as by the networks of `jaxlimit.models`.
        way: "temperature", "balance" or "plain" (see the module), or "trained", which leaves them.
        factor: c.

    Returns:
        `predict` and `params` of the other network.

    Examples:
        >>> import numpy as np
        >>> params = {"layers": {"0": {"kernel": np.full((1, 1), 3.0)}, "1": {"kernel": np.ones((1, 1))}}}
        >>> predict = lambda params, x: x @ params["layers"]["0"]["kernel"] @ params["layers"]["1"]["kernel"]
        >>> other, grown = scaled(predict, params, "temperature", 2.0)
        >>> grown["layers"]["0"]["kernel"], other(grown, np.ones((1, 1)))
        (array([[6.]]), array([[3.]]))
    """
    first, *_, last = paths = _kernels(params)
    factors = {"trained": {}, "balance": {first: factor, last: 1 / factor}}.get(
        way, dict.fromkeys(paths, factor)
    )

    def by_factors(operation: Callable[[Any, float], Any], params: PyTree) -> PyTree:
        flat = flatten_dict(params)
        return unflatten_dict(flat | {path: operation(flat[path], c) for path, c in factors.items()})

    def kept(params: PyTree, inputs: Any) -> Any:
        return predict(by_factors(operator.truediv, params), inputs)

    return predict if way == "plain" else kept, by_factors(operator.mul, params)


def _kernels(params: PyTree) -> list[Path]:
    """Paths of the kernels, the first one first.

    That is the order of their names (blocks, convolutions, dense, layers) and numbers, but for the stem.
    """
    paths = [path for path, leaf in flatten_dict(params).items() if is_kernel(path, leaf)]
    return sorted(paths, key=lambda path: (path[0] != "stem", [int(x) if x.isdigit() else x for x in path]))


def _run(task: Task, seed: int, variant: Any) -> dict[str, Any]:
    way, factor, held = variant
    subject = task.trained(seed)
    predict, params = scaled(subject.predict, subject.params, way, factor)
    subject = replace(subject, predict=predict, params=params)
    found = subject.limit(WHICH)
    # lambda R^2 grows by c^2, which is as if eps fell by it.
    tolerances = [found.loss_tolerance / c**2 for c in (1.0, *held)]
    return {
        "way": way,
        "factor": factor,
        "limit": values(found),
        "held": found.sensitivity(tolerances).width.tolist(),
        "trace": trace(found),
        "train_loss": subject.statistics.mean,
        "test_accuracy": subject.test_accuracy([0.0])[0],
    }


def table(results: Results) -> str:
    """Markdown: limits, tolerance, tr H and test accuracy (per cent), a row for each way and factor."""
    groups = by_variant(results)
    rows = []
    for name, pieces in groups.items():
        numbers = limit_cells(pieces, WHICH)
        eps, trace = (
            cell(pieces, of, ".3g") for of in (lambda p: p["limit"]["loss_tolerance"], lambda p: p["trace"])
        )
        accuracy = cell(pieces, lambda p: p["test_accuracy"], ".1%")
        rows.append([name.replace("-", " times "), *numbers, eps, trace, accuracy])
    trained = groups["trained-1"]
    for i, factor in enumerate(_factors(results), start=1):
        width = cell(trained, lambda p, i=i: p["held"][i])
        rows.append([f"held times {factor:g}", "-", width, *"---"])
    text = markdown(["weights", *WHICH, "eps", "tr H", "test accuracy"], rows)
    start = {piece["seed"]: limit("width")(piece) for piece in trained}
    moved: dict[str, list[bool | None]] = {}
    for piece in results.values():
        if piece["way"] != "trained":
            moved.setdefault(piece["way"], []).append(
                is_less(limit("width")(piece), start[piece["seed"]] - 1e-3)
            )
    falls = ", ".join(f"{way} {tally(found)}" for way, found in moved.items())
    return f"{text}\nRuns whose width limit falls by more than .001: {falls}.\n"


def _factors(results: Results) -> list[float]:
    return sorted({piece["factor"] for piece in results.values()} - {1.0})


def figure(results: Results) -> Any:
    """Limits and tr H against the factor, a line for each way."""
    groups = by_variant(results)
    panels: dict[str, dict[str, Any]] = {
        "one_shot limit (sparsity)": {},
        "width limit (sparsity)": {},
        "tr H": {},
    }
    for way in WAYS:
        chosen = {n: found for n, found in groups.items() if found[0]["way"] in ("trained", way)}
        x = [found[0]["factor"] for found in chosen.values()]
        for panel, of in zip(
            panels.values(), (limit("one_shot"), limit("width"), lambda p: p["trace"]), strict=True
        ):
            panel[way] = curve(chosen, x, of)
    held = [piece["held"] for piece in groups["trained-1"]]
    panels["width limit (sparsity)"]["held"] = over_seeds([1.0, *_factors(results)], held)
    return plots.plot_series(panels, xlabel="factor of the weights", logarithmic=["tr H"])
