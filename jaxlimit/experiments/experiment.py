"""An experiment in pieces, its folder, and going on after an interruption.

config.json      what decides the numbers; a folder with another one is refused, but for more or fewer seeds
pieces/*.json    one finished piece each, with the device and the versions that computed it
results.json     all pieces and the command
table.md, figures/*.png
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jaxlimit.application import machine, run_folder
from jaxlimit.core import writing
from jaxlimit.core.storage import Purpose, claim
from jaxlimit.core.terminal import Monitor

RESULTS, TABLE, PIECES = "results.json", "table.md", "pieces"
EXPERIMENT = Purpose(
    "an experiment",
    run_folder.CONFIG,
    "{folder} holds something that is not of an experiment: name another --out.",
    "{folder} holds an experiment with other options ({names}): give the same ones to go on with it, or name "
    "another --out.",
)
# note(what a piece is at)
Note = Callable[[str], None]
# compute(checkpoint folder, note) -> what a piece found, as JSON values
Compute = Callable[[Path, Note], dict[str, Any]]


@dataclass(frozen=True)
class Experiment:
    """What `execute_experiment` needs of an experiment.

    Attributes:
        name: as on the command line.
        out: folder of the results.
        config: what decides the numbers, as JSON values.
        pieces: by name; each is computed on its own, in this order, and kept.
        table: `table(results) -> Markdown`, from what the pieces found, by name.
        figures: by file name, `figure(results)`, of matplotlib.
    """

    name: str
    out: Path
    config: dict[str, Any]
    pieces: Mapping[str, Compute]
    table: Callable[[Mapping[str, dict[str, Any]]], str]
    figures: Mapping[str, Callable[[Mapping[str, dict[str, Any]]], Any]]


def execute_experiment(experiment: Experiment, command: str, monitor: Monitor) -> str:
    """Computes the pieces that are not in the folder yet; then writes results, table and figures.

    Args:
        experiment: what to do.
        command: as typed, for the results.
        monitor: told about the progress.

    Returns:
        The table.

    Raises:
        ValueError: the folder is of another experiment or of other options, or a file is damaged.
    """
    identity = {"experiment": experiment.name, **experiment.config}
    # Every piece has a seed of its own, so that a folder may get more of them.
    with claim(experiment.out, EXPERIMENT, identity, wait=False, free=["seeds"]).lock:
        monitor.start(experiment.name, len(experiment.pieces))
        found = {
            name: _piece(experiment.out, name, compute, monitor, number)
            for number, (name, compute) in enumerate(experiment.pieces.items())
        }
        table = _write(experiment, found, command)
        monitor.finish(str(experiment.out))
    return table


def _piece(folder: Path, name: str, compute: Compute, monitor: Monitor, number: int) -> dict[str, Any]:
    """What a piece found: read from its file, or computed and written there."""
    path, checkpoint = folder / PIECES / f"{name}.json", run_folder.checkpoint_path(folder, name)
    if not path.exists():
        start = time.perf_counter()
        found = compute(checkpoint, lambda text: monitor.update(number, f"{name}: {text}"))
        seconds = round(time.perf_counter() - start, 1)
        found |= {"seconds": seconds, "device": machine.device(), "versions": machine.versions()}
        writing.write_json(path, {"format": writing.FORMAT, **found})
    writing.remove(checkpoint)
    monitor.update(number + 1, name)
    return {key: value for key, value in writing.read_json(path).items() if key != "format"}


def _write(experiment: Experiment, found: Mapping[str, dict[str, Any]], command: str) -> str:
    """Writes results, table and figures; returns the table."""
    results = {
        "format": writing.FORMAT,
        "experiment": experiment.name,
        "command": command,
        "config": experiment.config,
        "pieces": found,
    }
    writing.write_json(experiment.out / RESULTS, results)
    with writing.content_of(experiment.out / PIECES):
        table = experiment.table(found)
        drawn = {name: draw(found) for name, draw in experiment.figures.items()}
    writing.write_file(experiment.out / TABLE, table)
    for name, figure in drawn.items():
        save = partial(figure.savefig, format=Path(name).suffix[1:])
        writing.write_file(experiment.out / run_folder.FIGURES / name, save)
    return table


def on_epoch(note: Note) -> Callable[[int, float], None]:
    """Notes of the epochs of a training."""
    return lambda epoch, mean_loss: note(f"epoch {epoch + 1}, loss {mean_loss:.4f}")
