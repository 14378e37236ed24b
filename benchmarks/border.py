"""Random strangers against float64: a right number, a refusal in our words, or a fault.

    python benchmarks/border.py [--draws 300] [--seed 0]
    python benchmarks/border.py --seed 0 --only 17

Each draw is a combination of loss, batches, precision, library, devices, weights, labels and question from
the grammar of `strangers.py`. A fault is a value that is not true, an error that is not ours, and a refusal
of what docs/trust.md says is supported. With a fault the exit code is 1. Draws of other seeds are kept.
"""

import argparse
import contextlib
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# The devices of a mesh are parts of this machine's processor; compiling takes longer than computing here.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    ]
)
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import border_cases
import common
import jax
import numpy as np
import strangers
from border_cases import Case, Truth
from numpy.typing import ArrayLike
from strangers import Stranger
from test_limit import truth_of_matrix  # pyright: ignore[reportMissingImports]

import jaxlimit
from jaxlimit.core.trees import flatten

NAME = "border"
SPARSITIES = [0.0, 0.25, 0.5, 0.9]
STEPS, RATE = 3, 0.01
# Codes under which an interval need not hold the truth: they say that it does not.
NOT_MEANT = ("semidefinite", "imprecise", "crossed", "changed")


class Verdict(NamedTuple):
    """What became of a draw: "right", "refused" or "fault", or "void" where JAX alone cannot do it."""

    outcome: str
    detail: str


class Wrong(Exception):
    """A value that is not true."""


def close(name: str, found: ArrayLike, true: ArrayLike, tolerance: float, scale: float | None = None) -> None:
    """Raises `Wrong` where numbers differ by more than a part of their scale."""
    found, true = np.asarray(found, np.float64), np.asarray(true, np.float64)
    if np.all(np.isnan(true)) and not np.any(np.isfinite(found)):
        return  # nothing is true, and nothing is said
    scale = max(float(np.linalg.norm(true)), 1e-2) if scale is None else scale
    error = float(np.linalg.norm(found - true)) / scale
    if not error <= tolerance:
        raise Wrong(f"{name} off by {error:.2g}: {short(found)} for {short(true)}")


def short(values: np.ndarray) -> str:
    return np.array2string(values.ravel()[:4], precision=4)


def tolerance_of(stranger: Stranger, what: str = "product") -> float:
    """What rounding may cost, in units of the whole."""
    if stranger.dtype in strangers.HALF:
        return 0.05
    if stranger.dtype in ("f16_loss", "bf16_kernels") and what == "loss":
        return 2e-3
    return 1e-8 if stranger.dtype == "float64" else 2e-4


def curvature_of(stranger: Stranger, case: Case) -> jaxlimit.Curvature:
    if stranger.curvature == "hessian":
        return jaxlimit.hessian(case.loss_fn, case.params, case.batches, **case.keywords)
    functions = case.predict_fn, case.output_loss
    return jaxlimit.gauss_newton(*functions, case.params, case.batches, **case.keywords)


def metrics_fn(case: Case) -> Callable:
    return lambda params, batch: {"loss": case.loss_fn(params, batch)}


def ask(stranger: Stranger, case: Case, truth: Truth, rng: np.random.Generator) -> str:
    """Asks the package and compares; returns a word on the answer, raises `Wrong` or what was raised."""
    question, loss_tolerance = stranger.question, tolerance_of(stranger, "loss")
    if question == "loss_statistics":
        found = jaxlimit.loss_statistics(case.loss_fn, case.params, case.batches, **case.keywords)
        close("mean", found.mean, truth.loss(truth.weights), loss_tolerance)
        if stranger.loss not in strangers.WEIGHTED:
            losses = [truth.loss(truth.weights, part) for part in truth.parts]
            scale = float(max(np.std(losses), abs(np.mean(losses)), 1e-2))
            close("batch_std", found.batch_std, np.std(losses), loss_tolerance, scale)
        return f"mean {found.mean:.6g}"
    if question == "sparsity_sweep":
        found = jaxlimit.sparsity_sweep(
            metrics_fn(case), case.params, case.batches, SPARSITIES, **case.keywords
        )
        true = [truth.loss(truth.weights * truth.kept(s)) for s in SPARSITIES]
        close("sweep", found.metrics["loss"], true, loss_tolerance)
        return short(found.metrics["loss"])
    if question == "finetuned_sweep":
        found = jaxlimit.finetuned_sweep(
            case.loss_fn,
            case.params,
            case.batches,
            SPARSITIES,
            num_steps=STEPS,
            learning_rate=RATE,
            **case.keywords,
        )
        true = [truth.tuned(s, STEPS, RATE) for s in SPARSITIES]
        close("fine-tuned", found.metrics["loss"], true, max(loss_tolerance, 1e-3))
        return short(found.metrics["loss"])
    curvature = curvature_of(stranger, case)
    gradient, matrix = truth.quadratic
    norm = max(float(np.linalg.norm(matrix, 2)), 1e-12)
    if question == "loss":
        close("loss", curvature.loss, truth.loss(truth.weights), loss_tolerance)
        return f"{curvature.loss:.6g}"
    if question == "mean_loss":
        found = curvature.mean_loss(jax.tree.map(lambda w: 0.8 * w, curvature.weights))
        close("mean_loss", found, truth.loss(0.8 * truth.weights), loss_tolerance)
        return f"{found:.6g}"
    if question == "gradient":
        scale = max(float(np.linalg.norm(gradient)), 1e-2 * norm)
        close("gradient", flatten(curvature.gradient), gradient, tolerance_of(stranger), scale)
        return "gradient"
    tolerance = tolerance_of(stranger)
    if stranger.dtype in strangers.HALF:  # as precise as it says itself
        tolerance = min(tolerance, max(2e-4, 5 * curvature.rounding))
    if question == "product":
        vector = rng.standard_normal(len(matrix))
        found = flatten(curvature.matvec(unflatten_like(vector, curvature.weights)))
        close("product", found, matrix @ vector, tolerance, norm * float(np.linalg.norm(vector)))
        return "product"
    if question == "dense":
        close("dense", curvature.dense(), matrix, tolerance, float(np.linalg.norm(matrix)))
        return "matrix"
    return limits(stranger, curvature, truth, rng)


def unflatten_like(vector: np.ndarray, like: Any) -> Any:
    leaves, structure = jax.tree.flatten(like)
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
    parts = zip(np.split(vector, ends), leaves, strict=True)
    return structure.unflatten([part.reshape(leaf.shape) for part, leaf in parts])


def limits(stranger: Stranger, curvature: jaxlimit.Curvature, truth: Truth, rng: np.random.Generator) -> str:
    """Every limit asked for holds the truth of all n in its interval, or its code says that it does not."""
    gradient, matrix = truth.quadratic

    def rise(n: int) -> float:
        removed = truth.weights * ~truth.kept(n / len(truth.weights))
        return float(removed @ matrix @ removed / 2 - gradient @ removed)

    scale = max(abs(rise(len(matrix) // 2)), abs(rise(len(matrix))) / 4)
    eps = float(rng.choice([0.05, 0.3, 1.0])) * max(scale, 1e-4)
    arguments: dict[str, Any] = {
        "limit_dense": {},
        "limit_lanczos": {"num_probes": 2, "max_matvecs": 400},
        "limit_one_shot": {"which": ["one_shot"]},
    }[stranger.question]
    found = jaxlimit.pruning_limit(curvature, jax.random.key(1), loss_tolerance=eps, **arguments)
    if any(word in found.code.value for word in NOT_MEANT):
        return f"code {found.code.value}"
    true = truth_of_matrix(matrix, truth.weights, gradient, eps)
    for name, estimate in found.estimates().items():
        if not estimate.lower - 1e-9 <= true[name] <= estimate.upper + 1e-9:
            raise Wrong(f"{name} {estimate} without the truth {true[name]:.4f}, {found.code.value}")
    one_shot = found.one_shot
    if one_shot is not None:
        slack = eps * tolerance_of(stranger) * 10 + 1e-6 * float(np.linalg.norm(matrix, 2))
        last = rise(int(one_shot.value * len(matrix) + 1e-6))
        if last > eps + slack:
            raise Wrong(f"one_shot {one_shot.value:.4f} itself has a rise of {last:.4g} for {eps:.4g}")
    return f"{found.code.value} {', '.join(f'{k} {v}' for k, v in found.estimates().items())}"


def judged(seed: int, index: int) -> tuple[Stranger, Verdict, str]:
    """Builds a draw, asks, and judges; with the traceback of what was raised."""
    stranger = strangers.draw(seed, index)
    rng = np.random.default_rng((seed, index, 1))
    with jax.enable_x64(stranger.dtype == "float64"):
        case = border_cases.case(stranger, rng)
        truth = Truth(stranger, case)
        reason = strangers.refusal(stranger)
        try:
            answer = ask(stranger, case, truth, rng)
            if stranger.labels in strangers.BAD_LABELS and "nan" not in answer and "inf" not in answer:
                raise Wrong(f"labels that are no classes are taken: {answer}")
            return stranger, Verdict("right", answer), ""
        except Wrong as error:
            return stranger, Verdict("fault", str(error)), ""
        except Exception as error:
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if not ours(error) and not border_cases.works(case):
                return stranger, Verdict("void", f"jax.grad of the loss itself: {text}"), ""
            if not ours(error):
                return stranger, Verdict("fault", f"foreign {text}"), traceback.format_exc()
            outcome = "refused" if reason else "fault"
            return (
                stranger,
                Verdict(outcome, text if reason else f"needless refusal: {text}"),
                traceback.format_exc(),
            )


def ours(error: Exception) -> bool:
    """Whether it was raised by a line of the package, of a kind that we document."""
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    known = isinstance(error, (ValueError, FloatingPointError, MemoryError))
    return known and Path(last).is_relative_to(Path(jaxlimit.__file__).parent)


def main() -> int:
    """As typed on the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--draws", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one draw, in full")
    parser.add_argument(
        "--keep", action=argparse.BooleanOptionalAction, default=True, help="write the results"
    )
    options = parser.parse_args()
    jax.config.update("jax_traceback_filtering", "off")
    if options.only is not None:
        stranger, verdict, trace = judged(options.seed, options.only)
        print(*(f"{name:10} {value}" for name, value in vars(stranger).items()), sep="\n")
        print(trace, f"{verdict.outcome}: {verdict.detail}", sep="\n")
        return int(verdict.outcome == "fault")
    draws = []
    for index in range(options.draws):
        stranger, verdict, _ = judged(options.seed, index)
        draws.append({"index": index, "stranger": str(stranger), **verdict._asdict()})
        if verdict.outcome == "fault":
            print(f"{index} {stranger}\n    {verdict.detail}", flush=True)
        if index % 20 == 19:
            jax.clear_caches()
    counts = Counter(draw["outcome"] for draw in draws)
    print(dict(counts))
    if options.keep:
        command = f"python benchmarks/border.py --draws {options.draws} --seed {options.seed}"
        known = common.read_document(NAME).get("seeds", {})
        found = {"command": command, **counts, "environment": common.environment(), "draws": draws}
        common.write_document(NAME, {"seeds": known | {str(options.seed): found}})
    return int(counts["fault"] > 0)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
