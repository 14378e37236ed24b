"""The command line: `jaxlimit run`, `jaxlimit presets`, `jaxlimit report`, `jaxlimit experiment`."""

import importlib.util
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from jaxlimit import __version__

if TYPE_CHECKING:
    from jaxlimit.application.presets import Options, Preset
    from jaxlimit.experiments import Experiment

EXTRA = ("tyro", "rich", "matplotlib", "safetensors")
INSTALL = 'pip install "jaxlimit[cli]"'
# Exit codes: of the shell for Ctrl-C, and customary ones for wrong use and for failure.
INTERRUPTED, WRONG_USE, FAILED = 130, 2, 1


@dataclass(frozen=True)
class Run:
    """`jaxlimit run`."""

    preset: "Preset"
    options: "Options"
    out: Path
    data: str | None
    overwrite: bool


@dataclass(frozen=True)
class Presets:
    """`jaxlimit presets`."""


@dataclass(frozen=True)
class Report:
    """`jaxlimit report DIR`."""

    folder: Path


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, 1 (failed), 2 (wrong use) or 130 (interrupted).

    Args:
        args: the arguments after the program's name; default: those of this process.
    """
    args = list(sys.argv[1:] if args is None else args)
    if args in (["--version"], ["-V"]):
        print(f"jaxlimit {__version__}")
        return 0
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        return _error(f"the command line needs {', '.join(missing)}: {INSTALL}", FAILED)
    try:
        command = parse(args or ["--help"])
        if isinstance(command, Run):
            return _run(command, args)
        if isinstance(command, Report):
            return _report(command)
        if not isinstance(command, Presets):
            return _experiment(command, args)
        from jaxlimit.application.presets import presets_table

        print(presets_table())
        return 0
    except (ValueError, OSError) as error:
        return _error(error, WRONG_USE)
    except (FloatingPointError, ImportError, MemoryError) as error:
        return _error(error, FAILED)
    except KeyboardInterrupt:
        return _error("interrupted.", INTERRUPTED)


def parse(args: Sequence[str]) -> "Run | Presets | Report | Experiment":
    """The command that the arguments ask for.

    Raises:
        ValueError: an option out of range.
        SystemExit: arguments that cannot be read (2), or a request for help (0).
    """
    import tyro
    from tyro.conf import FlagCreatePairsOff, Positional, arg

    from jaxlimit.application.presets import Options, find_preset
    from jaxlimit.experiments import EXPERIMENTS, Experiment

    config = (FlagCreatePairsOff,)
    if args[0] == "experiment" and len(args) > 1 and args[1] in EXPERIMENTS:
        prog = f"jaxlimit experiment {args[1]}"
        return tyro.cli(EXPERIMENTS[args[1]], prog=prog, args=list(args[2:]), config=config)

    def by(default: str, metavar: str) -> Any:
        return arg(help_behavior_hint=f"(default: {default})", metavar=metavar)

    def run(
        preset: Annotated[Positional[str], arg(metavar="PRESET")] = "digits",
        *,
        seed: int = 0,
        l1: Annotated[float | None, by("the preset's", "FLOAT")] = None,
        epochs: Annotated[int | None, by("the preset's", "INT")] = None,
        batch_size: Annotated[int | None, by("the preset's", "INT")] = None,
        learning_rate: Annotated[float | None, by("the preset's", "FLOAT")] = None,
        schedule: Annotated[
            Literal["constant", "cosine", "steps"] | None, by("the preset's", "{constant,cosine,steps}")
        ] = None,
        warmup_epochs: Annotated[int | None, by("the preset's", "INT")] = None,
        momentum: Annotated[float | None, by("the preset's", "FLOAT")] = None,
        augment: Annotated[bool | None, by("the preset's", "{True,False}")] = None,
        curvature: Literal["both", "hessian", "gauss_newton"] = "both",
        tolerance: float = 1e-3,
        loss_tolerance: Annotated[float | None, by("spread of the training batches' losses", "FLOAT")] = None,
        num_examples: Annotated[int | None, by("all", "INT")] = None,
        finetune_steps: Annotated[int | None, by("the preset's", "INT")] = None,
        out: Annotated[Path | None, by("results/PRESET-seedSEED-...", "DIR")] = None,
        data: Annotated[str | None, by("$JAXLIMIT_DATA", "DIR")] = None,
        overwrite: bool = False,
    ) -> Run:
        """Train a network, predict how sparse it can be pruned, measure the truth, write a report.

        After Ctrl-C the same command goes on with what is missing.

        Args:
            preset: which experiment: see `jaxlimit presets`.
            seed: of the initial weights, the order of the examples and the probes.
            l1: lambda, the weight of the L1 term in training.
            epochs: passes over the training data; the preset's warm-up takes at most half of them.
            batch_size: of training; the loss tolerance, too, is taken over batches of so many.
            learning_rate: of SGD, after the warm-up.
            schedule: of the learning rate: cosine falls to 0, steps is halved three times.
            warmup_epochs: in which the learning rate grows from 0.
            momentum: of SGD.
            augment: random crops and flips in training.
            curvature: of the loss: the Hessian predicts, Gauss-Newton is fast, certified and optimistic.
            tolerance: wanted accuracy of the limits, in sparsity.
            loss_tolerance: by how much the training loss may rise, in nats.
            num_examples: how many of the training examples give the curvature.
            finetune_steps: steps of Adam at each sparsity of the fine-tuned sweep; 0 leaves it out.
            out: folder of the results.
            data: folder that holds mnist/ or cifar10/; not needed for digits.
            overwrite: replace the run in the folder.
        """
        settings = find_preset(
            preset,
            l1=l1,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            schedule=schedule,
            warmup_epochs=warmup_epochs,
            momentum=momentum,
            augment=augment,
            finetune_steps=finetune_steps,
        )
        options = Options(seed, curvature, tolerance, loss_tolerance, num_examples)
        return Run(settings, options, out or default_folder(settings, options), data, overwrite)

    def presets() -> Presets:
        """Print the presets as a table."""
        return Presets()

    def report(folder: Annotated[Positional[Path], arg(metavar="DIR")]) -> Report:
        """Make the figures and report.html of a finished run again, from its files.

        Args:
            folder: of the run.
        """
        return Report(folder)

    def experiment(name: Annotated[Positional[str], arg(metavar="NAME")]) -> Experiment:
        # Those that exist were parsed above, each with options of its own.
        raise ValueError(f"there is no experiment {name!r}; the experiments are {', '.join(EXPERIMENTS)}.")

    experiment.__doc__ = f"""Run an experiment: {", ".join(EXPERIMENTS)}.

        Each has options of its own, which `jaxlimit experiment NAME --help` lists.

        Args:
            name: of the experiment.
        """

    return tyro.extras.subcommand_cli_from_dict(
        {"run": run, "presets": presets, "report": report, "experiment": experiment},
        prog="jaxlimit",
        description="How sparse can a trained network be pruned, how sure is that, and is it true? "
        "(--version prints the version.)",
        args=list(args),
        config=config,
    )


def default_folder(preset: "Preset", options: "Options") -> Path:
    """results/PRESET-seedSEED, with every other option that is not at its default in the name.

    Examples:
        >>> from jaxlimit.application.presets import Options, find_preset
        >>> default_folder(find_preset("digits", l1=0.0), Options(seed=1)).name
        'digits-seed1-l1-0'
    """
    from dataclasses import asdict

    from jaxlimit.application.presets import PRESETS, Options

    usual = asdict(PRESETS[preset.name]) | asdict(Options())
    chosen = asdict(preset) | asdict(options)
    changed = [(name, value) for name, value in chosen.items() if name != "seed" and value != usual[name]]
    parts = [f"{name}-{value if isinstance(value, str) else format(value, 'g')}" for name, value in changed]
    return Path("results") / "-".join([preset.name, f"seed{options.seed}", *parts]).replace("_", "-")


def _run(command: Run, args: Sequence[str]) -> int:
    from jaxlimit.application import comparison, pipeline, run_folder
    from jaxlimit.application.presets import load_arrays
    from jaxlimit.application.terminal import Interrupt, make_monitor

    folder = command.out
    config = pipeline.config_of(command.preset, command.options)
    interrupt = Interrupt()
    typed = ["jaxlimit", *(word for word in args if word != "--overwrite")]
    try:
        with interrupt, make_monitor(interrupt) as monitor:
            # Before anything is written: data that are missing leave no folder behind.
            arrays = load_arrays(command.preset, command.options, command.data)
            resumed = run_folder.prepare_folder(folder, config, overwrite=command.overwrite)
            print(f"{'going on with' if resumed else 'writing to'} {folder}", file=sys.stderr)
            run = pipeline.execute(
                folder, command.preset, command.options, arrays, shlex.join(typed), monitor
            )
    except KeyboardInterrupt:
        return _interrupted(folder, typed)
    print(f"\n{comparison.comparison_table(run.document)}\n\nreport: {folder / run_folder.REPORT}")
    return 0


def _report(command: Report) -> int:
    from jaxlimit.application import report, run_folder

    run = run_folder.read_record(command.folder)
    print(f"report: {report.write_report(command.folder, run)}")
    return 0


def _experiment(command: "Experiment", args: Sequence[str]) -> int:
    from jaxlimit.application.terminal import Interrupt, make_monitor
    from jaxlimit.experiments import execute

    typed = ["jaxlimit", *args]
    interrupt = Interrupt()
    try:
        with interrupt, make_monitor(interrupt) as monitor:
            table = execute(command, shlex.join(typed), monitor)
    except KeyboardInterrupt:
        return _interrupted(command.out, typed)
    print(f"\n{table}\nresults: {command.out}")
    return 0


def _interrupted(folder: Path, typed: Sequence[str]) -> int:
    again = typed if "--out" in typed else [*typed, "--out", str(folder)]
    print(
        f"interrupted. What is finished is in {folder}; the same command goes on with the rest:\n"
        f"  {shlex.join(again)}",
        file=sys.stderr,
    )
    return INTERRUPTED


def _error(message: object, code: int) -> int:
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
