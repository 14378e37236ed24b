"""Tables and figure of benchmarks/groups.py, from the files of its steps."""

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import common
import groups_speed
import numpy as np

from jaxlimit.limits.estimate import LIMITS
from jaxlimit.plots import style

COMMAND = "python benchmarks/groups.py --work DIR"
NETWORKS = ("digits", "fc2", "lenet", "resnet18-8", "resnet20", "minilm-attention", "minilm-inner")
# Accuracy of the limits that Gauss-Newton predicts.
WANTED = 0.01
KINDS = ("magnitude", "random", "channels", "N:M")
BECOMES = {
    "single weights": "no smaller and no faster, but for storage",
    "blocks of 4x4": "faster with kernels for blocks; none are used here",
    "input channels": "smaller where a channel is gone from every reader",
    "output channels": "smaller where a channel is gone from every maker",
    "heads": "smaller and faster, by `shrink`",
    "units": "smaller and faster, by `shrink`",
}
# The real rise in units of eps: bins in which predictions are judged.
EDGES = (0.1, 1.0, 10.0, 100.0, np.inf)


def report(work: Path) -> None:
    """The stage `report`."""
    masks = {name: found for name in NETWORKS for found in _read([work / name / "masks.json"])}
    limits = {name: found for name in NETWORKS if (found := _limits(work / name))}
    lasso = {name: found for name in NETWORKS if (found := _read((work / name).glob("lasso *.json")))}
    timed = [(x, work / f"speed {x}.json") for x in groups_speed.NETWORKS]
    quick = {name: found for name, path in timed for found in _read([path])}
    common.write(
        "groups", {"command": COMMAND, "masks": masks, "limits": limits, "lasso": lasso, "speed": quick}
    )
    common.write_table("groups_masks", masks_table(masks))
    common.write_table("groups_answer", answer_table(limits))
    common.write_table("groups_limits", limits_table(limits))
    common.write_table("groups_patterns", patterns_table(limits))
    common.write_table("groups_lasso", lasso_table(lasso))
    common.write_table("groups_speed", groups_speed.table(quick))
    draw(masks)


def _read(paths: Iterable[Path]) -> list[dict[str, Any]]:
    return [common.writing.read_json(path) for path in paths if path.exists()]


def _limits(folder: Path) -> dict[str, Any]:
    """Predicted and built by kind of groups, then the patterns; in the order in which they were done."""
    found = {}
    for path in sorted(folder.glob("limit *.json"), key=lambda path: path.stat().st_mtime):
        kind = path.stem.removeprefix("limit ")
        built = _read([path.with_name(f"built {kind}.json")])
        found[kind] = {"predicted": common.writing.read_json(path), **(built[0] if built else {})}
        for starts in _read([path.with_name(f"rounding {kind}.json")]):
            found[kind]["attained_by_rounding"] = starts["attained"]
    for path in sorted(folder.glob("pattern *.json")):
        found[path.stem.removeprefix("pattern ").replace("-", ":")] = common.writing.read_json(path)
    return found


def masks_table(found: dict[str, Any]) -> str:
    """Predicted over real rise, by the real rise: median, and the middle half."""
    heads = ["network", *[f"{a:g} to {b:g} eps" for a, b in pairwise(EDGES)], "right about eps"]
    rows = []
    for network, result in found.items():
        rises, increases = (
            np.array([x[name] for x in result["masks"]]) / result["loss_tolerance"]
            for name in ("rise", "increase")
        )
        cells = []
        for low, high in pairwise(EDGES):
            inside = (rises > low) & (rises <= high)
            quartiles = np.percentile(increases[inside] / rises[inside], [50, 25, 75]) if inside.any() else []
            cells.append("{:.2f} [{:.2f}, {:.2f}]".format(*quartiles) if inside.any() else "-")
            cells[-1] += f" ({inside.sum()})" if inside.any() else ""
        right = int(np.sum((rises <= 1) == (increases <= 1)))
        rows.append([network, *cells, f"{right} of {len(rises)}"])
    return common.markdown(heads, rows)


def answer_table(found: dict[str, Any]) -> str:
    """Of each kind of groups the lowest and the highest sparsity of the networks that were asked."""
    rows = []
    for kind, what in BECOMES.items():
        results = [kinds[kind] for kinds in found.values() if kind in kinds]
        one_shot = [x["predicted"]["one_shot"]["value"] for x in results]
        attained = [x["attained"]["sparsity"] for x in results if "attained" in x]
        proven = [_proven(x) for x in results if "attained" in x]
        if results:
            cells = [_range(values) for values in (one_shot, attained, proven)]
            rows.append([kind, str(len(results)), *cells, what])
    heads = ["what goes together", "networks", "one_shot", "attained", "certified", "the network becomes"]
    return common.markdown(heads, rows)


def _proven(result: dict[str, Any]) -> float:
    """The sparsest network that was certified, cut or on the way."""
    found = [result[name] or {} for name in ("certified_cut", "certified")]
    return max(x.get("sparsity") or 0.0 for x in found)


def _range(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}" if values else "-"


def limits_table(found: dict[str, Any]) -> str:
    """The limits of each kind of groups."""
    rows = [
        [f"{network}, {kind}", *_limit_row(result)]
        for network, kinds in found.items()
        for kind, result in kinds.items()
        if not _of_pattern(result)
    ]
    heads = ["network, groups", "number", *LIMITS, "attained", "certified as cut", "certified on the way"]
    return common.markdown(heads, rows)


def patterns_table(found: dict[str, Any]) -> str:
    """What a pattern costs, in units of eps."""
    rows = []
    for network, kinds in found.items():
        for kind, result in kinds.items():
            if _of_pattern(result):
                eps, predicted = result["loss_tolerance"], result["predicted"]
                rises = predicted["increase"], predicted["rise"], result.get("readjusted_rise")
                cells = ["-" if x is None else f"{x / eps:.2g}" for x in rises]
                verdicts = [_certified(result, name) for name in ("certified_cut", "certified")]
                rows.append([f"{network}, {kind}", f"{predicted['sparsity']:.3f}", *cells, *verdicts])
    heads = ["network, pattern", "sparsity", "predicted / eps", "rise / eps", "readjusted / eps"]
    return common.markdown([*heads, "certified as cut", "certified readjusted"], rows)


def _of_pattern(result: dict[str, Any]) -> bool:
    return "rise" in result["predicted"]


def _limit_row(result: dict[str, Any]) -> list[str]:
    predicted = result["predicted"]
    values = [predicted.get(name) for name in LIMITS]
    cells = [_estimate(x) for x in values]
    number = predicted.get("num_groups", predicted["dim"])
    cells.append(_attained(result))
    return [f"{number:,}", *cells, _certified(result, "certified_cut"), _certified(result, "certified")]


def _attained(result: dict[str, Any]) -> str:
    """With the lowest and the highest that rounding makes of it, where it is known."""
    attained = result.get("attained")
    if attained is None:
        return "-"
    all_of_them = [attained["sparsity"], *result.get("attained_by_rounding", [])]
    spread = f" [{min(all_of_them):.2f}, {max(all_of_them):.2f}]" if len(all_of_them) > 1 else ""
    ended = "" if attained["code"] == "bracketed" else " (out of products)"
    return f"{attained['sparsity']:.3f}{spread}{ended}"


def _estimate(found: dict[str, Any] | None) -> str:
    """A limit; with its interval where products ran out before it was resolved."""
    if found is None:
        return "-"
    wide = found["upper"] - found["lower"] > 5 * WANTED
    return f"{found['value']:.3f}" + (f" [{found['lower']:.2f}, {found['upper']:.2f}]" if wide else "")


def _certified(result: dict[str, Any], name: str) -> str:
    found = result.get(name)
    if found is None:
        return "-"
    return "nothing" if found["sparsity"] is None else f"{found['sparsity']:.3f}"


def lasso_table(found: dict[str, Any]) -> str:
    """Which lambda buys which sparsity of units."""
    rows = []
    for network, results in found.items():
        for x in sorted(results, key=lambda x: x["lambda"]):
            numbers = f"{x['loss']:.4f}", f"{x['loss_tolerance']:.4f}", f"{100 * x['test_error']:.2f}"
            empty = f"{x['empty_units']} of {x['units']}"
            one_shot = x["one_shot"]["one_shot"]["value"]
            rows.append([f"{network}, {x['lambda']:g}", *numbers, empty, f"{one_shot:.3f}"])
    heads = ["network, lambda", "loss", "eps", "test error, %", "emptied units", "one_shot of the units"]
    return common.markdown(heads, rows)


def draw(found: dict[str, Any]) -> None:
    """Predicted against real rises, both in units of eps."""
    figure, panels = style.new_figure(6.5, 3.4 * len(found), *[1.0] * len(found))
    colours = dict(zip(KINDS, (style.BLUE, style.ORANGE, style.GREEN, style.PURPLE), strict=True))
    for axes, (network, result) in zip(panels, found.items(), strict=True):
        eps = result["loss_tolerance"]
        for kind in KINDS:
            points = [x for x in result["masks"] if x["kind"] == kind and x["rise"] > 0 < x["increase"]]
            rises, increases = ([x[name] / eps for x in points] for name in ("rise", "increase"))
            axes.plot(rises, increases, ".", color=colours[kind], label=kind)
        axes.set(xscale="log", yscale="log", xlabel="real rise of the loss / eps", ylabel="predicted / eps")
        ends = np.array(axes.get_xlim())
        axes.plot(ends, ends, color=style.GREY, linewidth=0.8)
        axes.set_title(network)
        axes.legend(frameon=False)
    figure.savefig(common.FIGURES / "groups.png", dpi=150)
