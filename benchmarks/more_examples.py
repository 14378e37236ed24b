"""What do limits from a part of the examples say of all? FC5 by 1,024, 10,000 and all 50,000 of CIFAR-10.

    python benchmarks/more_examples.py --work DIR
    python benchmarks/more_examples.py --work DIR --runs cifar10-fc5-l1-0 cifar10-fc12 --examples 1024 10000

The networks are those of finished runs of real_runs.py in DIR. one_shot and width are predicted at the loss
tolerance of the run and by at most `MAX_MATVECS` products, so that an interval may be wider than .001: by
Gauss-Newton from every number of examples, by the Hessian from the first of them alone, for it needs several
times the products. The cut network is measured on the same examples. A file for each row stays in DIR; an
interrupted run goes on behind them. Runs that are not asked for keep their rows.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import common
import jax
import real_runs

import jaxlimit
from jaxlimit import models, training
from jaxlimit.application import answers, run_folder
from jaxlimit.application.presets import Options, build_network, find_preset, load_arrays
from jaxlimit.application.question import Question
from jaxlimit.core import writing
from jaxlimit.training.losses import cross_entropy
from jaxlimit.training.model_files import load_model

NAME = "more_examples"
MAX_MATVECS = {"gauss_newton": 100, "hessian": 400}
LIMITS = ("one_shot", "width")


def measure(folder: Path, kind: str, num_examples: int) -> dict[str, Any]:
    """Limits and the measured cut of a run's network, on the first so many training examples."""
    config, found = (writing.read_json(folder / name) for name in (run_folder.CONFIG, run_folder.LIMIT))
    preset, seed = find_preset(config["preset"]["name"]), config["options"]["seed"]
    predict, params = models.from_nnx(load_model(folder / run_folder.MODEL, build_network(preset, seed)))
    (images, labels), _ = load_arrays(preset, Options())
    batches = jaxlimit.batched((images[:num_examples], labels[:num_examples]), 128)
    limit = jaxlimit.pruning_limit(
        training.classification_curvature(kind, predict, params, batches),
        jax.random.key(seed),
        loss_tolerance=found["loss_tolerance"],
        which=LIMITS,
        max_matvecs=MAX_MATVECS[kind],
        progress=True,
    )
    question = Question(
        predict_fn=lambda params, batch: predict(params, batch[0]),
        loss_fn=lambda outputs, batch: cross_entropy(outputs, batch[1]),
        params=params,
        batches=batches,
        key=jax.random.key(seed),
        loss_tolerance=found["loss_tolerance"],
    )
    cut = answers.cut(question, lambda done, note: None)
    return {"curvature": kind, "num_examples": num_examples, "cut": cut.to_json(), "limit": limit.to_json()}


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """A row for each network and number of examples."""
    heads = ("run", "curvature", "examples", "**cut**", "one_shot", "interval", "width", "interval")
    heads += ("products", "minutes")
    lines = []
    for name, measured in rows.items():
        for row in measured:
            cells = [name, row["curvature"], f"{row['num_examples']:,}"]
            cells += [common.sparsity(row["cut"]["sparsity"])]
            for which in LIMITS:
                found = row["limit"][which]
                cells += [common.sparsity(found["value"]), f"[{found['lower']:.4f}, {found['upper']:.4f}]"]
            lines.append((*cells, str(row["limit"]["num_matvecs"]), f"{row['seconds'] / 60:.0f}"))
    return common.markdown(heads, lines)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder of the runs")
    names = [name for name in real_runs.RUNS if name.startswith("cifar10-fc")]
    parser.add_argument("--runs", nargs="+", default=["cifar10-fc5"], choices=names, metavar="NAME")
    parser.add_argument("--examples", nargs="+", type=int, default=[1_024, 10_000, 50_000], metavar="N")
    options = parser.parse_args()
    rows = common.read_document(NAME).get("rows", {})
    for name in options.runs:
        folder = options.work / name
        asked = [("hessian", options.examples[0]), *(("gauss_newton", n) for n in options.examples)]
        rows[name] = [
            common.step(folder / f"examples-{kind}-{n}.json", partial(measure, folder, kind, n))
            for kind, n in asked
        ]
    rows = {name: rows[name] for name in names if name in rows}
    document = {"command": f"python benchmarks/{NAME}.py --work DIR", "rows": rows}
    common.write(NAME, document, table(rows))


if __name__ == "__main__":
    main()
