"""Experiments with one command each: `jaxlimit experiment NAME`.

An experiment is a function whose arguments are its options on the command line and whose docstring is its
help; it checks them, and returns an `Experiment`. To add one: a module here, and its name in `EXPERIMENTS`.
"""

from collections.abc import Callable

from jaxlimit.experiments.experiment import Experiment, execute
from jaxlimit.experiments.methods import compare

EXPERIMENTS: dict[str, Callable[..., Experiment]] = {"compare": compare}
"""By their names on the command line."""

__all__ = ["EXPERIMENTS", "Experiment", "compare", "execute"]
