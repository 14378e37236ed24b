"""Which pruned network is better at the same cost: jaxlimit's, or one that is trained as people do?

    taskset -c 0 python benchmarks/pruning.py --work DIR --stages shares
    python benchmarks/pruning.py --work DIR [--networks digits fc2] [--stages methods choices attained table]

The unit of cost is one gradient over all the data. The stages, for each network:

    shares    seconds of processor time of a Gauss-Newton product, a loss and a gradient, on one core
    methods   loss and test accuracy against cost, for each method at three sparsities
    choices   the same for jaxlimit with other settings: what should be the default
    attained  `attained_limit` beside the threshold of the fine-tuned sweep, at equal cost
    table     all that is there, as results/pruning.json, .md and a figure

DIR holds a folder for each network, and there a file for each part that is done; an interrupted run goes on
behind them. The ways to readjust are in pruning_methods.py and pruning_baselines.py.
MNIST and CIFAR-10 are read from $JAXLIMIT_DATA.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import common
from predicted_vs_measured import FINETUNED_SPARSITIES, Case, Problem, train
from pruning_baselines import Minibatches, full_batch_adam, reconstructed, shares
from pruning_methods import Subject, Variant, count_with, pruned_path
from pruning_report import (
    CHOICES,
    KERNELS_ALONE,
    METHODS,
    NAME,
    RATES,
    TRAINED,
    WITH_FEW,
    figure,
    optimizer_of,
    tables,
)

import jaxlimit
from jaxlimit.application.presets import PRESETS, SGD, Preset
from jaxlimit.core import writing
from jaxlimit.geometry.magnitude import apply_mask
from jaxlimit.measuring import sweeps
from jaxlimit.measuring.finetuning import FinetunedNetwork
from jaxlimit.training.losses import cross_entropy

STAGES = ("shares", "methods", "choices", "attained", "table")
COMMANDS = (
    f"taskset -c 0 python benchmarks/{NAME}.py --work DIR --stages shares",
    f"python benchmarks/{NAME}.py --work DIR",
)
COSTS = (20, 50, 100, 400)


@dataclass(frozen=True)
class Comparison:
    """A network, its data, and what is asked of it.

    Attributes:
        case: the network, how it is trained, and the examples whose loss is to be low.
        sparsities: at, and beyond the limit of the cut alone.
        costs: at which methods are compared.
        num_tuned: of them, from the first; the next one has the learning rate that was best at the last.
        methods: of jaxlimit.
        trained: what they are compared with.
    """

    case: Case
    sparsities: tuple[float, ...]
    costs: tuple[int, ...] = COSTS
    num_tuned: int = 3
    methods: Mapping[str, Variant] = field(default_factory=lambda: METHODS)
    trained: tuple[str, ...] = TRAINED


LENET = Preset("lenet", "cifar10", "LeNet", replace(SGD, epochs=10, l1=5e-5))
COMPARISONS = {
    "digits": Comparison(Case(PRESETS["digits"], 1_438, 359), (0.9, 0.94, 0.97)),
    "fc2": Comparison(Case(PRESETS["mnist-fc2"], 10_000, 10_000), (0.9, 0.94, 0.97)),
    "lenet": Comparison(
        Case(LENET, 512, 2_000),
        (0.9, 0.95),
        (10, 60),
        num_tuned=1,
        methods=WITH_FEW,
        trained=("adam", "sgd", "full_batch_adam"),
    ),
}


class Work:
    """The parts of a network's comparison, each of them done once."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder, self.comparison = name, folder, COMPARISONS[name]
        problem = Problem(self.comparison.case)
        self.subject = Subject(self.comparison.case, problem, train(self.comparison.case, problem, folder))

    def part(self, stage: str, key: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A part, with the seconds of processor time it took, compilation included."""

        def timed() -> dict[str, Any]:
            start = time.process_time()
            found = compute()
            return found | {"cpu_seconds": round(time.process_time() - start, 1)}

        return common.step(self.folder / stage / f"{key}.json", timed)

    def shares(self) -> dict[str, float]:
        """Seconds of processor time."""
        return self.part("shares", "shares", lambda: {"seconds_of": shares(self.subject)})["seconds_of"]

    def path(self, stage: str, method: str, variant: Variant, sparsity: float, max_cost: float) -> None:
        """A way in which jaxlimit prunes."""

        def compute() -> dict[str, Any]:
            product = count_with(self.shares(), self.subject.share_of_products(variant))
            curve = pruned_path(self.subject, sparsity, variant, product, max_cost)
            return {"method": method, "sparsity": sparsity, "curve": curve}

        name = "".join(c if c.isalnum() else "-" for c in method)
        self.part(stage, f"{sparsity}-{name}", compute)

    def methods(self) -> None:
        """The stage `methods`."""
        for sparsity in self.comparison.sparsities:
            mask = self.subject.magnitude_mask(sparsity)
            self.once("cut", sparsity, lambda mask=mask: apply_mask(self.subject.params, mask))
            if {"layers", "dense"} & self.subject.params.keys():
                self.once("reconstruction", sparsity, lambda mask=mask: reconstructed(self.subject, mask))
        for sparsity in self.comparison.sparsities:
            for method, variant in self.comparison.methods.items():
                self.path("methods", method, variant, sparsity, self.comparison.costs[-1])
            for method in (*self.comparison.trained, *(KERNELS_ALONE if self.name == "digits" else ())):
                self.trained(method, sparsity)

    def once(self, method: str, sparsity: float, compute: Callable[[], Any]) -> None:
        """A method without steps; its cost is its processor time, in that of a gradient."""

        def measured() -> dict[str, Any]:
            gradient = self.shares()["gradient"]
            seconds = common.in_turns({method: compute}, clock=time.process_time)[method]
            cost = 0.0 if method == "cut" else seconds / gradient
            return {
                "method": method,
                "sparsity": sparsity,
                "curve": [self.subject.measured(compute(), cost)],
            }

        self.part("methods", f"{sparsity}-{method}", measured)

    def trained(self, method: str, sparsity: float) -> None:
        """Training with each rate; beyond the budget before the last, with the best rate alone."""
        tuned = self.comparison.num_tuned
        costs, more = self.comparison.costs[:tuned], self.comparison.costs[tuned:]
        mask, found = self.subject.magnitude_mask(sparsity), {}
        for rate in RATES[optimizer_of(method)]:
            compute = partial(self.with_rate, method, sparsity, mask, rate, costs)
            found[rate] = self.part("methods", f"{sparsity}-{method}-{rate}", compute)["curve"][-1]["loss"]
        if more and method in RATES:
            best = min(found, key=lambda rate: found[rate])
            compute = partial(self.with_rate, method, sparsity, mask, best, more)
            self.part("methods", f"{sparsity}-{method}-{best}-{more[0]}", compute)

    def with_rate(
        self, method: str, sparsity: float, mask: Any, rate: float, costs: Sequence[int]
    ) -> dict[str, Any]:
        """The networks at these costs; each has a schedule of its own."""
        if method == "full_batch_adam":
            curve = full_batch_adam(self.subject, mask, rate, costs)
        else:
            optimizer = optimizer_of(method)
            minibatches = self.minibatches(optimizer, everything=not method.endswith("_kernels"))
            gradual = sparsity if method.endswith("_gradual") else None
            curve = [
                self.subject.measured(minibatches.trained(mask, rate, cost, gradual=gradual), cost)
                for cost in costs
            ]
        return {"method": method, "sparsity": sparsity, "rate": rate, "curve": curve}

    def minibatches(self, optimizer: str, *, everything: bool) -> Minibatches:
        """Compiled once."""
        known = vars(self).setdefault("_minibatches", {})
        if (optimizer, everything) not in known:
            known[optimizer, everything] = Minibatches(self.subject, optimizer, everything=everything)
        return known[optimizer, everything]

    def choices(self) -> None:
        """The stage `choices`: up to a cost of 100 gradients."""
        for sparsity in self.comparison.sparsities:
            for method, variant in CHOICES.items():
                self.path("choices", method, variant, sparsity, 100)

    def attained(self) -> None:
        """The stage `attained`: both searches for the largest sparsity within the tolerance."""
        problem, subject = self.subject.problem, self.subject
        statistics = jaxlimit.loss_statistics(problem.loss, subject.params, problem.batches)
        bound = statistics.mean + statistics.batch_std

        def ours() -> dict[str, Any]:
            product = count_with(self.shares(), subject.share_of_products(Variant()))
            found = jaxlimit.attained_limit(
                lambda params, batch: problem.predict(params, batch[0]),
                lambda logits, batch: cross_entropy(logits, batch[1]),
                subject.params,
                problem.batches,
                loss_tolerance=statistics.batch_std,
            )
            accuracy = float(subject.test_error(found.pruned.params))
            return found.to_json() | {"cost": product * found.num_products, "test_accuracy": accuracy}

        cost = self.part("attained", "jaxlimit", ours)["cost"]

        def swept(num_steps: int, rate: float) -> dict[str, Any]:
            grid = FINETUNED_SPARSITIES
            cut = sweeps.sparsity_sweep(problem.metrics, subject.params, problem.batches, grid)
            network = FinetunedNetwork(
                problem.loss, subject.params, problem.batches, num_steps=num_steps, learning_rate=rate
            )
            tried = []

            def reached(sparsity: float) -> bool:
                loss = float(network.sweep([sparsity]).metrics["loss"][0])
                tried.append((sparsity, loss))
                return loss <= bound

            low = cut.first_crossing("loss", bound)
            found = common.last_reached(reached, grid, low)
            return {
                "cut": low,
                "sparsity": found,
                "cost": len(tried) * (num_steps + 1),
                "rate": rate,
                "num_steps": num_steps,
                "tried": tried,
            }

        def trained(epochs: int, rate: float) -> dict[str, Any]:
            minibatches = self.minibatches("adam", everything=False)
            tried = []

            def reached(sparsity: float) -> bool:
                mask = subject.magnitude_mask(sparsity)
                loss = float(subject.mean_loss(minibatches.trained(mask, rate, epochs)))
                tried.append((sparsity, loss))
                return loss <= bound

            found = common.last_reached(reached, FINETUNED_SPARSITIES, 0.8)
            cost = len(tried) * epochs
            return {"sparsity": found, "cost": cost, "rate": rate, "epochs": epochs, "tried": tried}

        # Bisection of the grid takes five or six networks.
        equal = max(1, round(cost / 5.5))
        for num_steps in (400, equal):
            for rate in RATES["full_batch_adam"]:
                self.part("attained", f"sweep-{num_steps}-{rate}", partial(swept, num_steps, rate))
        for rate in RATES["adam"]:
            self.part("attained", f"minibatches-{equal}-{rate}", partial(trained, equal, rate))


def collect(work: Path) -> dict[str, Any]:
    """All parts that are there."""
    networks = {}
    for name, comparison in COMPARISONS.items():
        folder = work / name
        found = {
            stage: [writing.read_json(path) for path in sorted((folder / stage).glob("*.json"))]
            for stage in STAGES[:-1]
        }
        if found["methods"]:
            networks[name] = {
                "case": comparison.case.to_json(),
                "sparsities": comparison.sparsities,
                "costs": comparison.costs,
                **found,
            }
    return {"commands": COMMANDS, "networks": networks}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder of the parts")
    parser.add_argument("--networks", nargs="+", default=list(COMPARISONS), choices=list(COMPARISONS))
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    options = parser.parse_args()
    for name in options.networks:
        stages = [stage for stage in STAGES[:-1] if stage in options.stages]
        if stages:
            work = Work(name, options.work / name)
            for stage in stages:
                getattr(work, stage)()
    if "table" in options.stages:
        document = collect(options.work)
        common.write(NAME, document)
        for key, table in tables(document).items():
            common.write_table(key, table)
        figure(document).savefig(common.FIGURES / f"{NAME}.png")


if __name__ == "__main__":
    main()
