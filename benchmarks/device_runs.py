"""The paper's larger networks, as many epochs as a device has time for.

    python benchmarks/device_runs.py --work DIR --seconds 840 [--epochs 30] [--runs cifar10-vgg16 ...]

Each run is `jaxlimit run PRESET` with all of its stages: training, limits of 1,024 examples, the sweep, what
is attained and certified. They are done in this order until the seconds are over; then the stage at hand is
interrupted as by Ctrl-C, and the same command, later or on another machine with the same DIR, goes on behind
its last checkpoint to the same bits. What is finished is kept as results/RUN.json. CIFAR-10 is read from
$JAXLIMIT_DATA.
"""

import argparse
import signal
import time
from pathlib import Path
from typing import Any

import common

from jaxlimit import cli
from jaxlimit.application import run_folder
from jaxlimit.core import writing

RUNS = ("cifar10-vgg16", "cifar10-resnet18-8", "cifar10-alexnet", "cifar10-fc12")
NUM_EXAMPLES = 1_024


def stop_after(seconds: float) -> None:
    """Interrupts this process as Ctrl-C does."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def arguments_of(preset: str, epochs: int | None, work: Path) -> list[str]:
    """What is typed after `jaxlimit`."""
    given = [] if epochs is None else ["--epochs", str(epochs)]
    size = [] if preset == "digits" else ["--num-examples", str(NUM_EXAMPLES)]
    name = preset if epochs is None else f"{preset}-{epochs}"
    return ["run", preset, *given, *size, "--out", str(work / name)]


def perform(preset: str, epochs: int | None, work: Path) -> bool:
    """Does a run, or what is left of it; whether it is finished."""
    arguments = arguments_of(preset, epochs, work)
    folder = Path(arguments[-1])
    if cli.main(arguments):
        return False
    document = writing.read_json(folder / run_folder.LIMIT)
    typed = " ".join(["jaxlimit", *arguments[:-2]])
    common.write_document(folder.name, document | {"command": typed})
    return True


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder of the runs")
    parser.add_argument("--seconds", type=float, required=True, help="until the work is interrupted")
    parser.add_argument("--epochs", type=int, help="of each training; left out: the preset's")
    parser.add_argument(
        "--runs", nargs="+", default=list(RUNS), metavar="PRESET", help="which, in this order"
    )
    options = parser.parse_args()
    start = time.monotonic()
    stop_after(options.seconds)
    try:
        for preset in options.runs:
            if not perform(preset, options.epochs, options.work):
                break
    except KeyboardInterrupt:  # between two runs
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    print(f"{time.monotonic() - start:.0f} of {options.seconds:.0f} seconds")


if __name__ == "__main__":
    main()
