"""What the experiments on trained networks share: their options, and a piece for each variant and seed."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

from tyro.conf import Suppress

from jaxlimit.application.options import DataFolder, PresetName, shown
from jaxlimit.application.presets import Options, find_preset, load_arrays
from jaxlimit.experiments.experiment import Compute, Experiment, Note
from jaxlimit.experiments.subject import Task
from jaxlimit.experiments.tables import Results, unresolved
from jaxlimit.limits.arguments import LEAST_MATVECS
from jaxlimit.limits.pruning_limit import MAX_MATVECS

# run(task, seed, variant, value of the variant) -> what a piece found, as JSON values
Run = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Trainings:
    """Options of every experiment.

    Args:
        preset: network, data and training: see `jaxlimit presets`.
        seeds: how many independent trainings, from other weights in another order; 3 or more give a spread. A
            folder of fewer goes on with the others.
        epochs: of the training; the schedule of the learning rate is stretched, and a warm-up takes at most
            half of them.
        l1: lambda, the weight of the L1 term in training.
        out: folder of the results.
        data: folder that holds mnist/ or cifar10/; not needed for digits.

    Raises:
        ValueError: fewer than one seed.
    """

    # Options of other experiments that this one has not.
    without_effect: ClassVar[tuple[str, ...]] = ()
    preset: PresetName = "digits"
    seeds: int = 3
    epochs: Annotated[int | None, shown("the preset's or the recipe's", "INT")] = None
    l1: Annotated[float | None, shown("the preset's", "FLOAT")] = None
    out: Annotated[Path | None, shown("results/NAME-PRESET", "DIR")] = None
    data: DataFolder = None

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}.")

    @classmethod
    def refuse(cls, given: Collection[str]) -> None:
        """Raises ValueError if one of these options has no effect on the experiment."""
        for name in cls.without_effect:
            if name in given:
                raise ValueError(f"{name} has no effect on this experiment: leave it out.")

    def folder(self, name: str) -> Path:
        """Where the results of an experiment go."""
        return self.out or Path("results") / f"{name}-{self.preset}"

    def load(self, *, num_examples: int | None = None, learning_rate: float | None = None) -> Task:
        """The preset with these options, and its data.

        Args:
            num_examples: the first so many training examples are predicted and measured; None: all.
            learning_rate: in place of the preset's.

        Raises:
            ValueError: as `find_preset` and `load_arrays`.
            FileNotFoundError: as `load_arrays`.
        """
        preset = find_preset(self.preset, l1=self.l1, epochs=self.epochs, learning_rate=learning_rate)
        arrays = load_arrays(preset, Options(num_examples=num_examples), self.data)
        return Task(preset, *arrays, num_examples=num_examples)

    def pieces(self, task: Task, variants: Mapping[str, Any], run: Run, label: str) -> dict[str, Compute]:
        """A piece for each variant and seed, by name.

        Args:
            task: what every piece works on.
            variants: values by name.
            run: `run(task, seed, name, value)`, what a piece found.
            label: under which a piece keeps the name of its variant.
        """

        def piece(name: str, value: Any, seed: int, checkpoint: Path, note: Note) -> dict[str, Any]:
            at_work = replace(task, checkpoint=checkpoint, note=note)
            return {label: name, "seed": seed, **run(at_work, seed, name, value)}

        return {
            f"{name}-seed{seed}": partial(piece, name, value, seed)
            for name, value in variants.items()
            for seed in range(self.seeds)
        }


@dataclass(frozen=True)
class Study(Trainings):
    """Options of every experiment that asks for limits.

    Args:
        num_examples: how many of the training examples give the loss that is predicted and measured.
        probes: random probes of every limit, the same for all variants of a seed; 0: as `pruning_limit`
            chooses, which is exact up to 5,000 weights with as many products.
        max_matvecs: budget of every limit, in products; a table says when that did not resolve them.
        networks: folder of trained networks: each is trained once for all experiments that share it.

    Raises:
        ValueError: as `Trainings`; too few products, or a negative number of probes.
    """

    num_examples: Annotated[int | None, shown("all", "INT")] = None
    # At digits' size the error of one probe, about .004, is below the spread over seeds.
    probes: int = 1
    max_matvecs: int = MAX_MATVECS
    networks: Annotated[Path | None, shown("OUT/networks", "DIR")] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.probes < 0:
            raise ValueError(f"probes must be at least 0, got {self.probes}.")
        least = max(LEAST_MATVECS, self.probes)
        if self.max_matvecs < least:
            raise ValueError(f"max_matvecs must be at least {least}, got {self.max_matvecs}.")

    def task(self) -> Task:
        """The preset with these options, and its data.

        Raises:
            ValueError: as `load`; examples for one batch only.
            FileNotFoundError: as `load`.
        """
        task = self.load(num_examples=self.num_examples)
        available, batch_size = self.num_examples or len(task.train[1]), task.preset.recipe.batch_size
        if available <= batch_size:
            raise ValueError(
                f"num_examples must be above the batch size, {batch_size}, got {available}: "
                "the tolerance is the standard deviation of the batches' losses."
            )
        return replace(task, num_probes=self.probes or None, max_matvecs=self.max_matvecs)

    def experiment(
        self,
        name: str,
        task: Task,
        variants: Mapping[str, Any],
        run: Callable[[Task, int, Any], dict[str, Any]],
        table: Callable[[Results], str],
        figure: Callable[[Results], Any],
    ) -> Experiment:
        """An experiment with a piece for each variant and seed.

        Args:
            name: of the experiment, and of its figure.
            task: from `task`.
            variants: by name, what `run` is to vary, as JSON values.
            run: `run(task, seed, value of the variant)`, what a piece found.
            table: `table(results) -> Markdown`; every piece has its variant and its seed.
            figure: `figure(results)`, of matplotlib.
        """
        out = self.folder(name)
        task = replace(task, networks=self.networks or out / "networks")
        config = {
            "preset": task.preset.to_json(),
            "num_examples": self.num_examples,
            "seeds": self.seeds,
            "probes": self.probes,
            "max_matvecs": self.max_matvecs,
            "variants": dict(variants),
        }
        pieces = self.pieces(
            task, variants, lambda task, seed, _, value: run(task, seed, value), label="variant"
        )
        figures = {f"{name}.png": figure}
        return Experiment(name, out, config, pieces, lambda found: table(found) + unresolved(found), figures)


@dataclass(frozen=True)
class OwnNetworks(Study):
    """Options of an experiment that trains networks of its own, which no other shares."""

    without_effect: ClassVar[tuple[str, ...]] = ("networks",)
    networks: Annotated[Path | None, Suppress] = None


@dataclass(frozen=True)
class OwnTrainings(OwnNetworks):
    """Options of one whose trainings have no L1 term, either."""

    without_effect = ("networks", "l1")
    l1: Annotated[float | None, Suppress] = None
