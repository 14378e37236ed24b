"""`jaxlimit run`, interrupted by Ctrl-C at random times: how soon it ends, how, and what is resumed.

    python benchmarks/interrupts.py [--interrupts 26] [--seed 0] [--often 8] [--seconds 60] [-- OPTION ...]

A process runs the preset digits, with the options after --. A random time after it has said that it writes to
its folder it gets SIGINT, as Ctrl-C sends it; its exit code and the seconds until it has ended are kept. Then
the same command goes on in the same folder, is interrupted again, and so on, until it ends. What it wrote is
compared, to the bit, with that of a run that was left alone.
"""

import argparse
import json
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

NAME = "interrupts"
CODE = "import sys; from jaxlimit.cli import main; sys.exit(main())"


def start(folder: Path, given: list[str]) -> subprocess.Popen[str]:
    """The command in a process of its own, which has begun to work."""
    words = ["run", "digits", *given, "--out", str(folder)]
    process = subprocess.Popen([sys.executable, "-c", CODE, *words], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while process.poll() is None and not process.stderr.readline().startswith(("writing to", "going on")):
        pass
    return process


def interrupted(process: subprocess.Popen[str], seconds: float) -> dict[str, Any] | None:
    """What became of a process that got Ctrl-C after some seconds; None if it had ended before."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        pass
    else:
        return None
    began = time.perf_counter()
    process.send_signal(signal.SIGINT)
    process.wait()
    assert process.stderr is not None
    told = process.stderr.read().splitlines()
    return {
        "after": round(seconds, 2),
        "seconds": round(time.perf_counter() - began, 3),
        "code": process.returncode,
        "stages": sum(" s  " in line for line in told),
        "told": any(line.startswith("interrupted") for line in told),
        "traceback": any("Traceback" in line for line in told),
    }


def written(folder: Path) -> dict[str, Any]:
    """What two runs of the same configuration must agree on."""
    document = json.loads((folder / "limit.json").read_text())
    kept = {name: value for name, value in document.items() if name not in ("seconds", "command")}
    files = {name: (folder / name).read_bytes() for name in ("curves.csv", "weights.safetensors")}
    return kept | files


def experiment(
    num_interrupts: int, seed: int, often: int, seconds: float, given: list[str]
) -> dict[str, Any]:
    """Interrupts until it has been done often enough, and compares.

    Args:
        num_interrupts: in all.
        seed: of the random times.
        often: how many interrupts of one run before it is left alone, so that it ends.
        seconds: the longest time before an interrupt.
        given: options of the run.

    Raises:
        RuntimeError: a result differs, or a run failed.
    """
    draw, found, runs = random.Random(seed), [], 0
    with tempfile.TemporaryDirectory() as parent:
        alone = Path(parent) / "alone"
        start(alone, given).communicate()
        while len(found) < num_interrupts:
            folder, here = Path(parent) / f"run-{runs}", 0
            while True:
                process = start(folder, given)
                more = here < often and len(found) < num_interrupts
                result = interrupted(process, draw.uniform(0, seconds)) if more else None
                if result is None:
                    process.communicate()
                    break
                found.append({"run": runs} | result)
                here += 1
                print(found[-1], file=sys.stderr, flush=True)
            if process.returncode or written(folder) != written(alone):
                raise RuntimeError(f"run {runs} is another one than that which was left alone: {found}.")
            runs += 1
    slowest = max(x["seconds"] for x in found)
    codes = sorted({x["code"] for x in found})
    return {"runs": runs, "slowest": slowest, "codes": codes, "interrupts": found}


def main() -> None:
    """As typed on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--interrupts", type=int, default=26)
    parser.add_argument("--seed", type=int, default=0, help="of the random times")
    parser.add_argument("--often", type=int, default=8, help="interrupts of a run, before it is left alone")
    parser.add_argument("--seconds", type=float, default=60, help="longest time before an interrupt")
    parser.add_argument("given", nargs="*", metavar="OPTION", help="of the run")
    options = parser.parse_args()
    found = experiment(options.interrupts, options.seed, options.often, options.seconds, options.given)
    common.write(
        NAME, {"command": shlex.join(["python", "benchmarks/interrupts.py", *sys.argv[1:]]), **found}
    )
    print(
        f"{len(found['interrupts'])} interrupts: exit codes {found['codes']}, at most {found['slowest']} s."
    )


if __name__ == "__main__":
    main()
