"""An experiment's plan as the command line reads it: with its options in groups, an example and its time."""

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from typing import Annotated, Any, get_type_hints

from tyro.conf import Suppress, arg

from jaxlimit.experiments.experiment import Experiment

GROUPS = {
    "training": ("The networks that are trained.", ("seeds", "epochs", "l1")),
    "prediction": ("How the limits are computed.", ("num_examples", "probes", "max_matvecs")),
    "output": ("Where results, data and trained networks are.", ("out", "data", "networks")),
}
"""The options that experiments share: by the title of a group, what it is about and what is in it."""
EXAMPLES = {
    "compare": ("digits", 14),
    "crossing": ("digits", 1),
    "distance": ("digits", 2),
    "gems": ("digits", 3),
    "gradual": ("digits", 6),
    "lambda": ("digits", 8),
    "order": ("digits", 9),
    "orders": ("digits", 10),
    "regularizer": ("digits --epochs 40", 7),
    "rows": ("digits", 1),
    "scaling": ("digits", 2),
    "tolerances": ("digits", 6),
    "training": ("digits --at 5 20 50 100 200", 3),
}
"""Of each experiment a command, and the minutes it took for three seeds on one core (benchmarks/results)."""
_KEYWORD = inspect.Parameter.KEYWORD_ONLY


def description(name: str, plan: Callable[..., Experiment]) -> str:
    """What the help says of an experiment before its options."""
    about = inspect.getdoc(plan) or ""
    options, minutes = EXAMPLES[name]
    took = f"{minutes} minute{'s' if minutes > 1 else ''}"
    example = f"Example (time on one core):\n  jaxlimit experiment {name} {options}    {took}"
    return f"{about.partition('Args:')[0].strip()}\n\n{example}"


def overview(plans: Mapping[str, Callable[..., Experiment]]) -> str:
    """A line on each experiment: its name, what it asks, and how long its example takes."""
    lines = ["Experiments (minutes on digits, three seeds, one core):"]
    for name, plan in plans.items():
        about = f"  {name:<12}{EXAMPLES[name][1]:>3}  {(inspect.getdoc(plan) or '').splitlines()[0]}"
        lines += textwrap.wrap(about, 79, subsequent_indent=19 * " ")
    return "\n".join(lines)


def grouped(plan: Callable[..., Experiment]) -> Callable[..., Experiment]:
    """A plan whose first parameter, the options that experiments share, is taken apart into `GROUPS`.

    The options of the experiment itself stay as they are, in no group.
    """
    shared, *own = inspect.signature(plan).parameters.values()
    made_from, default = type(shared.default), shared.default
    hints = get_type_hints(made_from, include_extras=True)
    hidden = [name for name, hint in hints.items() if Suppress in getattr(hint, "__metadata__", ())]
    preset = inspect.Parameter("preset", _KEYWORD, default=default.preset, annotation=hints["preset"])
    parameters = [preset, *own]
    for title, (about, names) in GROUPS.items():
        fields = [(name, hints[name], getattr(default, name)) for name in names if hasattr(default, name)]
        fields = [field for field in fields if field[0] not in hidden]
        if fields:
            doc = {"__doc__": f"{about}\n\nArgs:\n{_documented(made_from)}"}
            group = dataclasses.make_dataclass(title, fields, namespace=doc, frozen=True)
            annotation = Annotated[group, arg(name=title)]
            parameters.append(inspect.Parameter(title, _KEYWORD, default=group(), annotation=annotation))

    def call(preset: str, **given: Any) -> Experiment:
        groups = [given.pop(title) for title in GROUPS if title in given]
        values = {name: value for group in groups for name, value in vars(group).items()}
        return plan(made_from(preset=preset, **values), **given)

    call.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    call.__annotations__ = {each.name: each.annotation for each in parameters}
    call.__doc__ = f"{inspect.getdoc(plan)}\n    preset: network, data and training: see `jaxlimit presets`."
    return call


def _documented(made_from: type) -> str:
    """The arguments in the docstrings of a dataclass and of those it extends."""
    docs = [inspect.getdoc(each) or "" for each in made_from.__mro__ if "__doc__" in vars(each)]
    found = [re.search(r"Args:\n(.*?)(?:\n\n|$)", doc, re.DOTALL) for doc in docs]
    return "\n".join(each[1].rstrip() for each in found if each)
