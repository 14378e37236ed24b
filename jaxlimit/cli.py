"""The command line: `jaxlimit run`, `jaxlimit presets`, `jaxlimit report`, `jaxlimit experiment`.

A command is imported when it is asked for, so that help and errors come at once.
"""

import contextlib
import errno
import importlib.util
import inspect
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from jaxlimit import __version__
from jaxlimit.core.interrupt import INTERRUPTED, Interrupt

if TYPE_CHECKING:
    from jaxlimit.application.options import Run
    from jaxlimit.experiments import Experiment

EXTRA = ("tyro", "rich", "matplotlib", "safetensors", "jinja2")
INSTALL = 'pip install "jaxlimit[cli]"'
DESCRIPTION = """How sparse can a trained network be pruned, how sure is that, and is it true?

Start with `jaxlimit run`, which takes one to four minutes; `jaxlimit COMMAND --help` has examples.

(--version prints the version.)"""
COMMANDS = {
    "run": """Train a network, predict how sparse it can be pruned, measure the truth, write a report.

After Ctrl-C the same command goes on with what is missing. What is not given of the training is the preset's;
of other epochs its warm-up takes at most half.

Examples (times on two cores):
  jaxlimit run                                digits, one to four minutes
  jaxlimit run --curvature gauss_newton       the faster of the two predictions
  jaxlimit run --l1 0 --seed 1                other training, other seed
  jaxlimit run mnist-fc2 --epochs 10          MNIST, about an hour""",
    "presets": """Print the presets as a table, at once.

Example:
  jaxlimit presets""",
    "report": """Make the figures and report.html of a finished run again, from its files: seconds.

Example:
  jaxlimit report results/digits-seed0""",
    "experiment": """Run an experiment; `jaxlimit experiment --help` names them.

Each has options of its own: `jaxlimit experiment NAME --help`. After Ctrl-C the same command goes on.""",
}
# Customary exit codes for wrong use and for failure.
WRONG_USE, FAILED = 2, 1
# What the system answers where another folder would do: no permission, a read-only disk, a full one, a file
# in the place of a folder.
ELSEWHERE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST)


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
        args: the arguments after the program's name; default: those of this process, which Ctrl-C then ends
            at once.
    """
    interrupt = Interrupt(leave=args is None)
    args = list(sys.argv[1:] if args is None else args)
    if args in (["--version"], ["-V"]):
        print(f"jaxlimit {__version__}")
        return 0
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        return _error(f"the command line needs {', '.join(missing)}: {INSTALL}", FAILED)
    with interrupt:
        try:
            command = parse(args or ["--help"])
            return _PERFORM[args[0]](command, args, interrupt)
        except (ValueError, OSError) as error:
            _error(error, WRONG_USE)
            return _next(_after(error, args), WRONG_USE)
        except (FloatingPointError, ImportError, MemoryError) as error:
            return _error(error, FAILED)
        except KeyboardInterrupt:
            print(interrupt.message(), file=sys.stderr)
            return INTERRUPTED


def parse(args: Sequence[str]) -> "Run | Presets | Report | Experiment":
    """The command that the arguments ask for.

    Raises:
        ValueError: an option out of range.
        SystemExit: arguments that cannot be read (2), or a request for help (0).
    """
    name, *rest = args
    if name == "run":
        from jaxlimit.application.options import run

        return _read(run, _preset_first(rest), name, COMMANDS[name])
    if name == "presets":
        return _read(Presets, rest, name, COMMANDS[name])
    if name == "report":
        return Report(Path(_read(_word("DIR", "folder of the run."), rest, name, COMMANDS[name])))
    if name == "experiment":
        return _parse_experiment(rest)
    from tyro.extras import subcommand_cli_from_dict

    # Prints the commands, or says that there is no such one.
    names = {name: _named(text.split("\n\n")[0]) for name, text in COMMANDS.items()}
    subcommand_cli_from_dict(names, prog="jaxlimit", description=DESCRIPTION, args=list(args))
    raise ValueError(f"the first word must be one of {', '.join(COMMANDS)}, got {name!r}.")


def _parse_experiment(args: Sequence[str]) -> "Experiment":
    from jaxlimit.experiments import EXPERIMENTS, Trainings, options

    if args and args[0] in EXPERIMENTS:
        plan, given = EXPERIMENTS[args[0]], [word.split("=")[0].strip("-") for word in args]
        for parameter in inspect.signature(plan).parameters.values():
            if isinstance(parameter.default, Trainings):
                parameter.default.refuse(given)
        name, about = f"experiment {args[0]}", options.description(args[0], plan)
        return _read(options.grouped(plan), _preset_first(args[1:]), name, about)
    description = f"{COMMANDS['experiment']}\n\n{options.overview(EXPERIMENTS)}"
    name = _read(_word("NAME", "name of the experiment."), args, "experiment", description)
    raise ValueError(f"there is no experiment {name!r}; the experiments are {', '.join(EXPERIMENTS)}.")


def _preset_first(args: Sequence[str]) -> list[str]:
    """The arguments with PRESET before the options: one of several values would take it for one of them."""
    from jaxlimit.application.presets import PRESETS

    option = 0
    for position, word in enumerate(args):
        option = position if word.startswith("--") else option
        if word in PRESETS and position - option > 1:  # one word after an option is its value
            return [word, *args[:position], *args[position + 1 :]]
    return list(args)


def _read(command: Any, args: Sequence[str], name: str, description: str | None = None) -> Any:
    """What a function makes of the arguments, each of its parameters being an option."""
    import tyro

    config = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)  # groups have titles, options none
    prog = f"jaxlimit {name}"
    return tyro.cli(command, prog=prog, description=description, args=list(args), config=config)


def _word(metavar: str, explained: str) -> Any:
    """A single word on the command line, as a type."""
    from tyro.conf import Positional, arg

    return Annotated[Positional[str], arg(name="word", metavar=metavar, help=explained)]


def _named(text: str) -> Any:
    def command() -> None: ...

    command.__doc__ = text
    return command


def _presets(command: Presets, args: Sequence[str], interrupt: Interrupt) -> int:
    from jaxlimit.application.presets import presets_table

    print(presets_table())
    return _next("jaxlimit run PRESET")


def _run(command: "Run", args: Sequence[str], interrupt: Interrupt) -> int:
    from jaxlimit.application import pipeline, run_folder, stage_answers
    from jaxlimit.application.presets import load_arrays
    from jaxlimit.core.terminal import make_monitor

    folder = command.out
    config = pipeline.config_of(command.preset, command.options)
    begun = [word for word in args if word != "--overwrite"]  # with which it goes on
    interrupt.message = partial(_interrupted, folder, args, "Nothing was written; the same command starts")
    with _writing_to(folder), make_monitor(interrupt) as monitor:
        # Before anything is written: data that are missing leave no folder behind.
        arrays = load_arrays(command.preset, command.options, command.data)
        claim = run_folder.prepare_folder(folder, config, overwrite=command.overwrite)

        def message() -> str:
            if run_folder.is_finished(folder):
                return f"interrupted when all was done. report: {folder / run_folder.REPORT}"
            return _interrupted(folder, begun)

        interrupt.message = message
        with claim.lock:
            print(f"{'going on with' if claim.resumed else 'writing to'} {folder}", file=sys.stderr)
            run = pipeline.execute_run(
                folder, command.preset, command.options, arrays, shlex.join(["jaxlimit", *begun]), monitor
            )
        interrupt.finish()
    assessment = stage_answers.assessment_of(run.document, run.columns)
    told = assessment.text(stage_answers.notes(run.document))
    print(f"\n{told}\n\nreport: {folder / run_folder.REPORT}")
    return _next(
        f"open the report; in Python, jaxlimit.load_assessment({str(folder)!r}) has the pruned network"
    )


def _report(command: Report, args: Sequence[str], interrupt: Interrupt) -> int:
    from jaxlimit.application import report, run_folder

    with _writing_to(command.folder):
        run = run_folder.read_record(command.folder)
        print(f"report: {report.write_report(command.folder, run)}")
    return _next("open the report in a browser")


def _experiment(command: "Experiment", args: Sequence[str], interrupt: Interrupt) -> int:
    from jaxlimit.core.terminal import make_monitor
    from jaxlimit.experiments import execute_experiment

    interrupt.message = partial(_interrupted, command.out, args)
    with _writing_to(command.out), make_monitor(interrupt) as monitor:
        table = execute_experiment(command, shlex.join(["jaxlimit", *args]), monitor)
        interrupt.finish()
    print(f"\n{table}\nresults: {command.out}")
    return _next(f"look at the figure in {command.out}; more seeds: the same command with --seeds 5")


def _interrupted(folder: Path, args: Sequence[str], what: str | None = None) -> str:
    what = what or f"What is finished is in {folder}; the same command goes on with the rest"
    return f"interrupted. {what}:\n  {_typed(folder, args)}"


def _typed(folder: Path, args: Sequence[str]) -> str:
    """The command with the name of its folder."""
    named = any(word == "--out" or word.startswith("--out=") for word in args)
    return shlex.join(["jaxlimit", *args, *([] if named else ["--out", str(folder)])])


@contextlib.contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    """A block that writes to a folder: says where it cannot that another one may do."""
    try:
        yield
    except OSError as error:
        named = [Path(name).absolute() for name in (error.filename, error.filename2) if name]
        there = folder.absolute()
        above = any(there.is_relative_to(path) for path in named)  # which cannot be made, as in /proc
        inside = above or any(path.is_relative_to(there) for path in named)
        elsewhere = error.errno in ELSEWHERE or (error.errno == errno.ENOENT and above)
        if not elsewhere or (named and not inside):
            raise
        raise OSError(f"{folder} cannot be written to ({error.strerror}): name another --out.") from error


def _next(what: str, code: int = 0) -> int:
    """Says on standard error, which pipes leave out, what to do now; the exit code."""
    print(f"next: {what}", file=sys.stderr)
    return code


def _after(error: Exception, args: Sequence[str]) -> str:
    """What to do after an error: with the file that is damaged, or the options that can be given."""
    from jaxlimit.core.writing import DamagedFile
    from jaxlimit.experiments import EXPERIMENTS

    if isinstance(error, DamagedFile):
        again = "name another --out, then type the same command"
        if args[0] == "report":
            again = f"report another folder; the same `jaxlimit run` with --out {args[1]} makes it anew"
        return f"remove {error.remove} or {again}"
    if isinstance(error, FileNotFoundError) and args[0] == "report":
        return "give the folder of a finished run; `jaxlimit run` makes one, and says where"
    words = [word for word in args[:2] if word in {*COMMANDS, *EXPERIMENTS}]
    return " ".join(["jaxlimit", *words, "--help lists what can be given"])


def _error(message: object, code: int) -> int:
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    return code


_PERFORM: dict[str, Callable[[Any, Sequence[str], Interrupt], int]] = {
    "run": _run,
    "presets": _presets,
    "report": _report,
    "experiment": _experiment,
}

if __name__ == "__main__":
    sys.exit(main())
