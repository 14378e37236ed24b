"""What the experiments on trained networks share: their options, and a piece for each variant and seed."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from jaxlimit.application.presets import Options, find_preset, load_arrays
from jaxlimit.experiments.experiment import Compute, Experiment, Note
from jaxlimit.experiments.subject import Task
from jaxlimit.experiments.tables import Results, unresolved
from jaxlimit.limits.pruning_limit import LEAST_MATVECS, MAX_MATVECS


def _by(default: str, metavar: str) -> Any:
    return arg(help_behavior_hint=f"(default: {default})", metavar=metavar)


@dataclass(frozen=True)
class Study:
    """Options of every experiment on trained networks.

    Args:
        preset: network, data and training: see `jaxlimit presets`.
        seeds: how many independent trainings, from other weights in another order; 3 or more give a spread. A
            folder of fewer goes on with the others.
        epochs: of the training; the schedule of the learning rate is stretched, and a warm-up takes at most
            half of them.
        l1: lambda, the weight of the L1 term in training.
        num_examples: how many of the training examples give the loss that is predicted and measured.
        probes: random probes of every limit, the same for all variants of a seed; 0: as `pruning_limit`
            chooses, which is exact up to 5,000 weights with as many products.
        max_matvecs: budget of every limit, in products; a table says when that did not resolve them.
        networks: folder of trained networks: each is trained once for all experiments that share it.
        out: folder of the results.
        data: folder that holds mnist/ or cifar10/; not needed for digits.

    Raises:
        ValueError: fewer than one seed or too few products, or a negative number of probes.
    """

    preset: Annotated[Positional[str], arg(metavar="PRESET")] = "digits"
    seeds: int = 3
    epochs: Annotated[int | None, _by("the preset's", "INT")] = None
    l1: Annotated[float | None, _by("the preset's", "FLOAT")] = None
    num_examples: Annotated[int | None, _by("all", "INT")] = None
    # At digits' size the error of one probe, about .004, is below the spread over seeds.
    probes: int = 1
    max_matvecs: int = MAX_MATVECS
    networks: Annotated[Path | None, _by("OUT/networks", "DIR")] = None
    out: Annotated[Path | None, _by("results/NAME-PRESET", "DIR")] = None
    data: Annotated[str | None, _by("$JAXLIMIT_DATA", "DIR")] = None

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}.")
        if self.probes < 0:
            raise ValueError(f"probes must be at least 0, got {self.probes}.")
        least = max(LEAST_MATVECS, self.probes)
        if self.max_matvecs < least:
            raise ValueError(f"max_matvecs must be at least {least}, got {self.max_matvecs}.")

    def refuse(self, *names: str) -> None:
        """Raises ValueError if one of these options is given, which have no effect on an experiment."""
        for name in names:
            if getattr(self, name) is not None:
                raise ValueError(f"{name} has no effect on this experiment: leave it out.")

    def task(self) -> Task:
        """The preset with these options, and its data.

        Raises:
            ValueError: as `find_preset` and `load_arrays`; examples for one batch only.
            FileNotFoundError: as `load_arrays`.
        """
        preset = find_preset(self.preset, l1=self.l1, epochs=self.epochs)
        options = Options(num_examples=self.num_examples)
        arrays = load_arrays(preset, options, self.data)
        available = self.num_examples or len(arrays[0][1])
        if available <= preset.batch_size:
            raise ValueError(
                f"num_examples must be above the batch size, {preset.batch_size}, got {available}: "
                "the tolerance is the spread of the batches' losses."
            )
        return Task(preset, self.num_examples, self.probes or None, self.max_matvecs, *arrays)

    def experiment(
        self,
        name: str,
        task: Task,
        variants: Mapping[str, Any],
        run: Callable[..., dict[str, Any]],
        table: Callable[[Results], str],
        figures: Mapping[str, Callable[[Results], Any]],
    ) -> Experiment:
        """An experiment with a piece for each variant and seed.

        Args:
            name: of the experiment.
            task: from `task`.
            variants: by name, what `run` is to vary, as JSON values.
            run: `run(task, seed, value of the variant)`, what a piece found.
            table: as for `Experiment`; every piece has its variant and its seed.
            figures: as for `Experiment`.
        """
        out = self.out or Path("results") / f"{name}-{self.preset}"
        networks = self.networks or out / "networks"

        def piece(variant: str, value: Any, seed: int, checkpoint: Path, note: Note) -> dict[str, Any]:
            at_work = replace(task, networks=networks, checkpoint=checkpoint, note=note)
            return {"variant": variant, "seed": seed, **run(at_work, seed, value)}

        pieces: dict[str, Compute] = {
            f"{variant}-seed{seed}": partial(piece, variant, value, seed)
            for variant, value in variants.items()
            for seed in range(self.seeds)
        }
        config = {
            "preset": asdict(task.preset),
            "num_examples": self.num_examples,
            "seeds": self.seeds,
            "probes": self.probes,
            "max_matvecs": self.max_matvecs,
            "variants": dict(variants),
        }
        return Experiment(name, out, config, pieces, lambda found: table(found) + unresolved(found), figures)
