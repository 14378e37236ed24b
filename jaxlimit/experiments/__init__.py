"""Experiments with one command each: `jaxlimit experiment NAME`.

An experiment is a module of this folder, named as its command (with _ at the end where the name is a word of
Python), that has a function `plan`. The arguments of `plan` are the options on the command line, and its
docstring is the help; it checks the options, and returns an `Experiment`. To add an experiment, write such a
module, which `EXPERIMENTS` finds, and its example into `EXAMPLES` of options.py.
"""

import importlib
import pkgutil
from collections.abc import Callable

from jaxlimit.experiments.experiment import Experiment, execute_experiment
from jaxlimit.experiments.study import Study, Trainings


def _plans() -> dict[str, Callable[..., Experiment]]:
    names = [found.name for found in pkgutil.iter_modules(__path__)]
    modules = {name.rstrip("_"): importlib.import_module(f"{__name__}.{name}") for name in names}
    return {name: module.plan for name, module in modules.items() if hasattr(module, "plan")}


EXPERIMENTS: dict[str, Callable[..., Experiment]] = _plans()
"""What plans each experiment, by the experiment's name on the command line."""

__all__ = ["EXPERIMENTS", "Experiment", "Study", "Trainings", "execute_experiment"]
