"""What happens to the limits when the weights grow: with the network's function kept, and not kept.

All formulas of the limits see the weights and the curvature only through c^T |H| c and lambda R^2, which stay
as they are when every kernel is multiplied by c and the function is kept: then H falls as c^-2. So it is not
the size of the weights alone that matters, and these ways to grow are told apart:

temperature   every kernel times c, the bias of layer l times c^l, the logits divided by c^L: the same
              function, the same order of the weights. Theory: the same limits, tr H falls as 1 / c^2.
balance       the first layer times c, the kernel of the last times 1 / c: the same function, for ReLU is
              homogeneous, but another global order of the weights.
plain         every kernel times c, nothing else: another function, with another loss, tolerance and Hessian.
held          as plain, with Hessian and tolerance as they were: the paper's argument about its width
              formula, for which it is the same as eps / c^2.
"""

import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from tyro.conf import arg

from jaxlimit import plots
from jaxlimit.experiments.experiment import Experiment
from jaxlimit.experiments.study import Results, Study
from jaxlimit.experiments.subject import Subject, Task, trace, values
from jaxlimit.experiments.tables import by_variant, cell, curve, is_less, limit, markdown, over_seeds, tally
from jaxlimit.models import from_nnx
from jaxlimit.presets import build_network

Params = Mapping[str, Any]
WHICH = ("one_shot", "width")
WAYS = ("temperature", "balance", "plain")


def scaling(
    study: Annotated[Study, arg(name="")] = Study(), *, factors: tuple[float, ...] = (2, 3, 4, 5)
) -> Experiment:
    """The limits and tr H of a network whose weights are multiplied by 2 to 5, in four ways.

    Args:
        study: see `Study`; the network must have two layers or more, and no batch norm.
        factors: by which the weights are multiplied.
    """
    task = study.task()
    params = from_nnx(build_network(task.preset, 0))[1]
    if {path[-1] for path in flatten_dict(params)} != {"kernel", "bias"} or len(_layers(params)) < 2:
        raise ValueError(
            f"preset must have a network of two layers or more without batch norm, got {task.preset.network}."
        )
    factors = tuple(sorted({*factors} - {1.0}))
    if not factors or not all(0 < factor < float("inf") for factor in factors):
        raise ValueError(f"factors must be one or more positive numbers other than 1, got {list(factors)}.")
    variants: dict[str, Any] = {"trained-1": ["trained", 1.0, factors]}
    variants |= {f"{way}-{factor:g}": [way, factor, ()] for way in WAYS for factor in factors}
    return study.experiment("scaling", task, variants, _run, table, {"scaling.png": figure})


def scaled(params: Params, way: str, factor: float) -> tuple[dict[str, Any], float]:
    """The parameters of a network of kernels and biases, and what its logits are to be divided by.

    Args:
        params: {..., "layers": {"0": {"kernel": ..., "bias": ...}, ...}} as of `models.FullyConnected` or
            `models.ConvolutionalNetwork`: a chain of layers with ReLU, and pools, between them.
        way: "temperature", "balance" or "plain" (see the module), or "trained", which leaves them.
        factor: c.

    Examples:
        >>> layer = {"kernel": 1.0, "bias": 1.0}
        >>> scaled({"layers": {"0": layer, "1": layer}}, "temperature", 2.0)
        ({'layers': {'0': {'bias': 2.0, 'kernel': 2.0}, '1': {'bias': 4.0, 'kernel': 2.0}}}, 4.0)
    """
    layers = _layers(params)
    last = len(layers) - 1
    kernels, biases, divisor = {}, {}, 1.0
    if way in ("temperature", "plain"):
        kernels = dict.fromkeys(range(last + 1), factor)
    if way == "temperature":
        biases, divisor = {i: factor ** (i + 1) for i in range(last + 1)}, factor ** (last + 1)
    if way == "balance":
        # What the first layer puts out grows by c, and so must every bias up to the last layer.
        kernels, biases = {0: factor, last: 1 / factor}, dict.fromkeys(range(last), factor)
    factors = {
        (*layer, kind): of.get(i, 1.0)
        for i, layer in enumerate(layers)
        for kind, of in (("kernel", kernels), ("bias", biases))
    }
    return jax.tree.map(operator.mul, dict(params), unflatten_dict(factors)), divisor


def _layers(params: Params) -> list[tuple[str, ...]]:
    """Paths of the layers, the first one first; "convolutions" come before "dense" in the alphabet, too."""
    return sorted({path[:-1] for path in flatten_dict(params)}, key=lambda path: (path[:-1], int(path[-1])))


def _run(task: Task, seed: int, variant: Any) -> dict[str, Any]:
    way, factor, held = variant
    subject = _scaled(task.trained(seed), way, factor)
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


def _scaled(subject: Subject, way: str, factor: float) -> Subject:
    params, divisor = scaled(subject.params, way, factor)
    predict = subject.predict
    return replace(subject, params=params, predict=lambda p, inputs: predict(p, inputs) / divisor)


def table(results: Results) -> str:
    """Markdown: limits, tolerance, tr H and test accuracy (per cent), a row for each way and factor."""
    groups = by_variant(results)
    rows = []
    for name, pieces in groups.items():
        numbers = [cell(pieces, limit(which)) for which in WHICH]
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
