"""An experiment in pieces, its folder, and going on after an interruption.

config.json      what decides the numbers; a folder with another one is refused, but for more or fewer seeds
pieces/*.json    one finished piece each, with the device and the versions that computed it
results.json     all pieces and the command
table.md, figures/*.png
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlimit.application import run_folder
from jaxlimit.application.terminal import Monitor

RESULTS, TABLE = "results.json", "table.md"
# note(what a piece is at)
Note = Callable[[str], None]
# compute(checkpoint folder, note) -> what a piece found, as JSON values
Compute = Callable[[Path, Note], dict[str, Any]]


@dataclass(frozen=True)
class Experiment:
    """What `execute` needs of an experiment.

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


def execute(experiment: Experiment, command: str, monitor: Monitor) -> str:
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
    folder, found = experiment.out, {}
    prepare(folder, experiment.name, experiment.config)
    monitor.start(experiment.name, len(experiment.pieces))
    for number, (name, compute) in enumerate(experiment.pieces.items()):
        path, checkpoint = folder / "pieces" / f"{name}.json", run_folder.checkpoint_path(folder, name)
        if not path.exists():
            _compute(path, compute, checkpoint, monitor, number, name)
        shutil.rmtree(checkpoint, ignore_errors=True)
        found[name] = {key: value for key, value in run_folder.read_json(path).items() if key != "format"}
        monitor.update(number + 1, name)
    results = {
        "format": run_folder.FORMAT,
        "experiment": experiment.name,
        "command": command,
        "config": experiment.config,
        "pieces": found,
    }
    run_folder.write_json(folder / RESULTS, results)
    table = experiment.table(found)
    run_folder.write_atomic(folder / TABLE, table)
    for name, draw in experiment.figures.items():
        path = folder / run_folder.FIGURES / name
        path.parent.mkdir(exist_ok=True)
        draw(found).savefig(path)
    monitor.finish(str(folder))
    return table


def _compute(
    path: Path, compute: Compute, checkpoint: Path, monitor: Monitor, number: int, name: str
) -> None:
    start = time.perf_counter()
    found = compute(checkpoint, lambda text: monitor.update(number, f"{name}: {text}"))
    seconds = round(time.perf_counter() - start, 1)
    found |= {"seconds": seconds, "device": run_folder.device(), "versions": run_folder.versions()}
    run_folder.write_json(path, {"format": run_folder.FORMAT, **found})


def on_epoch(note: Note) -> Callable[[int, float], None]:
    """Notes of the epochs of a training."""
    return lambda epoch, mean_loss: note(f"epoch {epoch + 1}, loss {mean_loss:.4f}")


def prepare(folder: Path, name: str, config: Mapping[str, Any]) -> None:
    """Makes the folder, or finds it made by the same experiment with the same options but for its seeds.

    Raises:
        ValueError: it is not, or holds files of something else.
    """
    wanted = json.loads(json.dumps({"format": run_folder.FORMAT, "experiment": name, **config}))
    path = folder / run_folder.CONFIG
    if path.exists():
        stored = run_folder.read_json(path)
        keys = {key for key in {*stored, *wanted} if stored.get(key) != wanted.get(key)}
        if keys == {"seeds"}:  # every piece has one of its own
            run_folder.write_json(path, wanted)
        elif keys:
            raise ValueError(
                f"{folder} holds an experiment with other options ({', '.join(sorted(keys))}): give the same "
                "ones to go on with it, or name another --out."
            )
        return
    if folder.exists() and (not folder.is_dir() or any(item.suffix != ".tmp" for item in folder.iterdir())):
        raise ValueError(f"{folder} holds something that is not of an experiment: name another --out.")
    run_folder.write_json(path, wanted)
