"""Training and limits, killed at random times: what is resumed must give the same bits.

    python benchmarks/kills.py [--kills 24] [--seed 0]

A child process trains the digits network and finds its limits by Lanczos, with both curvatures, all of it
with checkpoints. It is killed (SIGKILL) after a random time and started again in the same folder until it
ends; then it starts anew, until there were enough kills. Every result is compared, to the bit, with that of a
run that was left alone.
"""

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import jax
import numpy as np
from flax import nnx

import jaxlimit
from jaxlimit import data, models, training

NAME = "kills"


def child(folder: Path, epochs: int, max_matvecs: int) -> dict[str, Any]:
    """Trains, and finds limits; everything that comes out, as hexadecimal digits."""
    digits = data.load_digits()
    arrays = (digits.train_images, digits.train_labels)
    predict, params = models.from_nnx(models.FullyConnected((64, 48, 24, 10), rngs=nnx.Rngs(0)))
    loss = training.classification_loss(predict)
    params = training.train(
        loss,
        params,
        arrays,
        jax.random.key(0),
        epochs=epochs,
        learning_rate=0.05,
        l1=5e-4,
        checkpoint=folder / "w",
    )
    found: dict[str, Any] = {"weights": _digest(*jax.tree.leaves(params))}
    batches = jaxlimit.batched(arrays, 128)
    for name in ("hessian", "gauss_newton"):
        curvature = training.classification_curvature(name, predict, params, batches)
        limit = jaxlimit.pruning_limit(
            curvature,
            jax.random.key(0),
            loss_tolerance=0.01,
            num_probes=2,
            max_matvecs=max_matvecs,
            checkpoint=str(folder / name),
        )
        values = [value for x in limit.estimates().values() for value in vars(x).values()]
        found[name] = _digest(limit.measure.nodes, limit.measure.weights, values)
        found[f"{name} limits"] = {key: x.value for key, x in limit.estimates().items()}
    return found


def _digest(*arrays: Any) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def start(folder: Path, work: tuple[int, int]) -> subprocess.Popen[str]:
    """A child process in a folder: `work` is the number of epochs, and of products at most."""
    command = [sys.executable, __file__, "--child", str(folder), "--work", *map(str, work)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str], seconds: float | None) -> dict[str, Any] | None:
    """What a child found; None if it was killed first.

    Raises:
        RuntimeError: it failed.
    """
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return None
    if process.returncode:
        raise RuntimeError(f"the child failed:\n{errors}")
    return json.loads(output.splitlines()[-1])


def experiment(num_kills: int, seed: int, work: tuple[int, int]) -> dict[str, Any]:
    """Kills until it has been done often enough, and compares; `work` as for `start`.

    Raises:
        RuntimeError: a result differs, or a child failed.
    """
    draw, killed, runs = random.Random(seed), [], 0
    with tempfile.TemporaryDirectory() as parent:
        began = time.perf_counter()
        alone = finished(start(Path(parent) / "alone", work), None)
        whole = time.perf_counter() - began
        while len(killed) < num_kills:
            folder, result = Path(parent) / f"run-{runs}", None
            while result is None:
                # The time to the first work is a good part of a short run; no run is killed for ever.
                often = len([x for x in killed if x["run"] == runs]) >= 10
                seconds = None if often else draw.uniform(0.2, 1) * whole
                result = finished(start(folder, work), seconds)
                if result is None:
                    stages = sorted(path.name for path in folder.glob("*")) if folder.exists() else []
                    files = len(list(folder.rglob("*.npz"))) if folder.exists() else 0
                    killed.append({"run": runs, "seconds": seconds, "stages": stages, "files": files})
            if result != alone:
                raise RuntimeError(f"a resumed run differs: {result} instead of {alone}, after {killed}.")
            runs += 1
    return {"kills": len(killed), "runs": runs, "seconds": whole, "killed": killed, "result": alone}


def main() -> None:
    """As typed on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0, help="of the random times")
    parser.add_argument("--work", type=int, nargs=2, default=(20, 600), help="epochs, and products at most")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child, *options.work)))
        return
    found = experiment(options.kills, options.seed, tuple(options.work))
    command = f"python benchmarks/kills.py --kills {options.kills} --seed {options.seed}"
    common.write(NAME, {"command": command, **found})
    print(f"{found['kills']} kills in {found['runs']} runs: every result the same, to the bit.")


if __name__ == "__main__":
    main()
