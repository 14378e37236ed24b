"""The presets on real data, each by one `jaxlimit run`: what was predicted, and what was measured.

    python benchmarks/real_runs.py --work DIR [--runs mnist-fc2-10 ...]

DIR gets the folder of each run. Of a finished run limit.json goes to results/NAME.json and the figure of its
loss to docs/figures/NAME.png; the tables are made of all runs that are in results: real_runs.md, and
real_runs_time.md with the minutes of each stage. Data are read from $JAXLIMIT_DATA. An interrupted run goes
on where it was.
"""

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import common

from jaxlimit import cli
from jaxlimit.application import run_folder
from jaxlimit.application.options import Run
from jaxlimit.core import writing
from jaxlimit.training.losses import CURVATURES

NAME = "real_runs"
# What is typed after `jaxlimit`.
RUNS = {
    "digits-seed0": "run --seed 0",
    "digits-seed1": "run --seed 1",
    "digits-units": "run --groups units",
    "mnist-fc2-10": "run mnist-fc2 --epochs 10",
    "mnist-fc2-units": "run mnist-fc2 --num-examples 10000 --curvature gauss_newton --groups units",
    "mnist-fc2-60": "run mnist-fc2 --epochs 60 --finetune-steps 400",
    "cifar10-lenet-30": "run cifar10-lenet --epochs 30 --num-examples 1024",
    "cifar10-lenet-200": "run cifar10-lenet --num-examples 1024",
    "cifar10-fc5": "run cifar10-fc5 --num-examples 1024 --curvature gauss_newton",
    "fashion-mnist-fc5": "run fashion-mnist-fc5 --epochs 20 --num-examples 1024 --curvature gauss_newton",
    "cifar10-fc12": "run cifar10-fc12 --num-examples 1024 --curvature gauss_newton",
    "cifar10-fc5-l1-0": "run cifar10-fc5 --l1 0 --num-examples 1024 --curvature gauss_newton",
}
# Columns of the Markdown table, and where their values are in limit.json. Measured thresholds are bold, and
# stand before their predictions.
COLUMNS = {
    "**pruned**": ("measured", "loss", "value"),
    "one_shot": ("limits", "hessian", "one_shot", "value"),
    "**attained**": ("attained", "sparsity"),
    "**fine-tuned**": ("measured", "finetuned", "value"),
    "width": ("limits", "hessian", "width", "value"),
    "cone": ("limits", "hessian", "cone", "value"),
    "readjusted": ("limits", "hessian", "readjusted", "value"),
    "GN one_shot": ("limits", "gauss_newton", "one_shot", "value"),
    "GN width": ("limits", "gauss_newton", "width", "value"),
    "GN cone": ("limits", "gauss_newton", "cone", "value"),
    "GN readjusted": ("limits", "gauss_newton", "readjusted", "value"),
    "paper's code": ("limits", "hessian", "reference", "value"),
}


def perform(name: str, folder: Path) -> None:
    """Does a run, or what is left of it, and keeps its limit.json and its figure.

    Raises:
        SystemExit: the run failed or was interrupted; it has said so.
    """
    limit = folder / run_folder.LIMIT
    if not limit.exists() or not writing.read_json(limit)["finished"]:
        code = cli.main([*RUNS[name].split(), "--out", str(folder)])
        if code:
            raise SystemExit(code)
    document = writing.read_json(limit) | {"command": f"jaxlimit {RUNS[name]}"}
    common.write_document(name, document)
    shutil.copyfile(folder / run_folder.FIGURES / "loss.png", common.FIGURES / f"{name}.png")


def markdown_table(documents: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each run. Limits that are not known well are marked, as by `common.limit`."""
    rows = []
    for name, document in documents.items():
        accuracy = f"{document['network']['test_accuracy']:.2%}"
        point_less = _cell(document, ("measured", "accuracy", "value"))
        rows.append((name, accuracy, point_less, *(_cell(document, path) for path in COLUMNS.values())))
    return common.markdown(("run", "test accuracy", "1 point less", *COLUMNS), rows)


def time_table(documents: Mapping[str, Mapping[str, Any]]) -> str:
    """Minutes of each stage of a run, and of all that follows the training, in trainings."""
    stages = {
        "Hessian": ("limit_hessian",),
        "Gauss-Newton": ("limit_gauss_newton",),
        "sweep": ("sweep",),
        "attained, certified": ("attained", "certified"),
    }
    rows = []
    for name, document in documents.items():
        seconds, run = document["seconds"], cli.parse(RUNS[name].split())
        assert isinstance(run, Run)
        spent = [sum(seconds.get(part, 0) for part in parts) for parts in stages.values()]
        products = [document["limits"].get(kind, {}).get("num_matvecs") for kind in CURVATURES]
        cells = [f"{x / 60:.1f}" if x else "-" for x in spent]
        for column, number in enumerate(products):
            cells[column] += f" ({number:,})" if number else ""
        ratio = f"{sum(spent) / seconds['training']:.1f}"
        rows.append((name, f"{seconds['training'] / 60:.1f} ({run.preset.recipe.epochs})", *cells, ratio))
    return common.markdown(("run", "training (epochs)", *stages, "after / training"), rows)


def _cell(document: Mapping[str, Any], path: tuple[str, ...]) -> str:
    found: Any = document
    for name in path[:-1]:
        found = found.get(name, {})
    if not found:
        return "-"
    first = next(iter(document["limits"].values()))
    return common.limit(found[path[-1]], found, first["tolerance"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder of the runs")
    parser.add_argument("--runs", nargs="*", default=list(RUNS), choices=RUNS, metavar="NAME", help="which")
    options = parser.parse_args()
    for name in options.runs:
        perform(name, options.work / name)
    documents = {name: document for name in RUNS if (document := common.read_document(name))}
    common.write_table(NAME, markdown_table(documents))
    common.write_table(f"{NAME}_time", time_table(documents))


if __name__ == "__main__":
    main()
