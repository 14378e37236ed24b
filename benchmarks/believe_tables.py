"""The tables and the figure of believe.py: each prediction against the measurement that it is about."""

from collections.abc import Callable, Mapping
from typing import Any

import common
import numpy as np

from jaxlimit.limits.estimate import LIMITS
from jaxlimit.plots.assessments import last_sparsity, opened_axis
from jaxlimit.pruning.result import Ending

NAME = "believe"
SHORT = {"hessian": "Hessian", "gauss_newton": "Gauss-Newton"}
# What is measured, in the order of the table.
MEASURED = ("cut", "point", "attained", "certified")
MEDIANS = {about: f"median of the other networks, {about}" for about in ("cut", "point", "attained")}
SAID = {
    **{f"{SHORT[name]} one_shot": "cut" for name in SHORT},
    **{f"{SHORT[name]} {which}": "attained" for name in SHORT for which in LIMITS[1:]},
    "H+ width": "attained",
    "H-/2 width": "attained",
    "paper's code": "attained",
    "near zero, .001": "cut",
    "near zero, .01": "cut",
    "near zero, .001 of the largest": "cut",
    "effective number": "point",
    "PQ index (.5, 1)": "point",
    **{f"scaling law, {count} networks": "finetuned" for count in (5, 8)},
    **{name: about for about, name in MEDIANS.items()},
}
"""What each prediction is about, as far as its authors say. `Hessian` is |H|: negative curvature counts as
stiff; of H+ as flat, of H-/2 as half as stiff. Then come five formulas in the weights alone, and the law of
the error fitted to networks that were fine-tuned: its products are gradients. Whoever knows nothing of a
network says the median of the others."""
# Columns of mean errors, and which networks each is over.
KINDS: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "all": lambda case: True,
    "L1": lambda case: case["l1"] > 0,
    "no L1": lambda case: not case["l1"],
    "> 100,000 weights": lambda case: case["num_weights"] > 100_000,
    "< .1 examples a weight": lambda case: case["num_examples"] < 0.1 * case["num_weights"],
}
# A limit that is less resolved is marked with a ~.
RESOLVED = 2e-3
# Predictions that the table of networks shows.
SHOWN = (
    "Hessian one_shot",
    "PQ index (.5, 1)",
    "Hessian width",
    "Hessian cone",
    "Gauss-Newton width",
    "Gauss-Newton cone",
    "Gauss-Newton readjusted",
    "paper's code",
)
# Predictions that the figure shows.
DRAWN = (*SHOWN[:2], "near zero, .01", "effective number", *SHOWN[2:], "H+ width")


def settled(case: Mapping[str, Any], about: str) -> float | None:
    """What was measured of a network; None where there is nothing, or where the budget ended the search."""
    ended = about == "attained" and case["attained_code"] == Ending.OUT_OF_PRODUCTS
    return None if ended else case["measured"].get(about)


def summary(cases: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each prediction: its cost and its errors against what it is about, over all networks and kinds."""
    cases = {
        name: {**case, "predicted": {**case["predicted"], **_medians(cases, name)}}
        for name, case in cases.items()
    }
    rows = []
    for name, about in SAID.items():
        known = [
            case for case in cases.values() if name in case["predicted"] and settled(case, about) is not None
        ]
        if known:
            said = np.array([case["predicted"][name]["sparsity"] for case in known])
            measured = np.array([settled(case, about) for case in known])
            one_weight = 1 / np.array([case["num_weights"] for case in known])
            kept = np.maximum(1 - said, one_weight) / np.maximum(1 - measured, one_weight)
            kinds = {kind: [is_of(case) for case in known] for kind, is_of in KINDS.items()}
            rows.append(
                {
                    "prediction": name,
                    "about": about,
                    "products": float(np.median([case["predicted"][name]["products"] for case in known])),
                    "mean": {kind: _mean(np.abs(said - measured)[chosen]) for kind, chosen in kinds.items()},
                    "factor": float(np.exp(np.mean(np.abs(np.log(kept))))),
                    "worst": float(max(said - measured, key=abs)),
                    "sign": _mean(said - measured),
                    "num_cases": len(known),
                }
            )
    return rows


def _medians(cases: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, dict[str, Any]]:
    """What a network is expected to be by someone who knows the other networks only."""
    found = {}
    for about, median in MEDIANS.items():
        measured = [settled(case, about) for other, case in cases.items() if other != name]
        others = [value for value in measured if value is not None]
        if others:
            found[median] = {"sparsity": float(np.median(others)), "products": 0}
    return found


def _mean(values: Any) -> float | None:
    return float(np.mean(values)) if len(values) else None


def predictions_table(cases: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each prediction: its cost, and its errors over all networks."""

    def shown(value: float | None, form: str = ".3f") -> str:
        return "-" if value is None else format(value, form)

    rows = [
        (
            row["prediction"],
            row["about"],
            f"{row['products']:,.0f}",
            f"{row['num_cases']}",
            *(shown(row["mean"][kind]) for kind in KINDS),
            shown(row["factor"], ".2f"),
            shown(row["worst"], "+.3f"),
            shown(row["sign"], "+.3f"),
        )
        for row in summary(cases)
    ]
    heads = (
        "prediction",
        "about",
        "products",
        "networks",
        *KINDS,
        "factor",
        "worst",
        "signed",
    )
    return common.markdown(heads, rows)


def networks_table(cases: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each network: what was measured of it, and the predictions that are shown."""

    def measured(case: Mapping[str, Any], about: str) -> str:
        value = case["measured"].get(about)
        if value is None:
            return "-"
        return f"{'' if settled(case, about) is not None else '> '}{common.sparsity(value)}"

    def prediction(case: Mapping[str, Any], which: str) -> str:
        found = case["predicted"].get(which)
        if found is None:
            return "-"
        return common.limit(found["sparsity"], found, RESOLVED)

    rows = [
        (
            name,
            f"{case['num_weights']:,}",
            f"{case['num_examples']:,}",
            *(measured(case, of) for of in MEASURED),
            *(prediction(case, which) for which in SHOWN),
        )
        for name, case in cases.items()
    ]
    heads = ("network", "weights", "examples", *(f"**{name}**" for name in MEASURED), *SHOWN)
    return common.markdown(heads, rows)


def figure(cases: Mapping[str, Mapping[str, Any]]) -> Any:
    """Predicted against measured, a panel for each prediction; beyond .9 logarithmic in the density."""
    from matplotlib.figure import Figure

    rows = [row for row in summary(cases) if row["prediction"] in DRAWN]
    columns = 4
    height = -(-len(rows) // columns)
    drawn = Figure(figsize=(2.3 * columns, 2.3 * height), layout="constrained")
    panels = drawn.subplots(height, columns, sharex=True, sharey=True, squeeze=False)
    end = last_sparsity([x for case in cases.values() for x in case["measured"].values() if x is not None])
    scale = {"functions": opened_axis(end)}
    for panel, row in zip(panels.flat, rows, strict=False):
        for with_l1, marker in ((True, "o"), (False, "x")):
            points = [
                (settled(case, row["about"]), case["predicted"][row["prediction"]]["sparsity"])
                for case in cases.values()
                if row["prediction"] in case["predicted"]
                and settled(case, row["about"]) is not None
                and (case["l1"] > 0) == with_l1
            ]
            label = "trained with L1" if with_l1 else "trained without"
            panel.plot(*np.array(points).reshape(-1, 2).T, marker, color="#0072B2", markersize=4, label=label)
        panel.plot([0, 1], [0, 1], color="#888888", linewidth=0.8)
        panel.set_title(f"{row['prediction']} ({row['about']})", fontsize=8)
        panel.set_xscale("function", **scale)
        panel.set_yscale("function", **scale)
        ticks = [tick for tick in (0.0, 0.5, 0.9, 0.99, 0.999, 0.9999) if tick < end]
        panel.set(xlim=(0, end), ylim=(0, end), xticks=ticks, yticks=ticks)
        panel.set_xticklabels([f"{tick:g}" for tick in ticks], rotation=90, fontsize=7)
        panel.set_yticklabels([f"{tick:g}" for tick in ticks], fontsize=7)
    for panel in panels.flat[len(rows) :]:
        panel.axis("off")
    panels.flat[0].legend(fontsize=7)
    drawn.supxlabel("measured sparsity", fontsize=9)
    drawn.supylabel("predicted sparsity", fontsize=9)
    return drawn
