"""Experiments with one command each: `jaxlimit experiment NAME`.

An experiment is a function whose arguments are its options on the command line and whose docstring is its
help; it checks them, and returns an `Experiment`. To add one: a module here, and its name in `EXPERIMENTS`.
"""

from collections.abc import Callable

from jaxlimit.experiments.anatomy import crossing, distance, rows
from jaxlimit.experiments.experiment import Experiment, execute
from jaxlimit.experiments.flatness import regularizer
from jaxlimit.experiments.growth import scaling
from jaxlimit.experiments.iterations import gems, gradual
from jaxlimit.experiments.l1_term import penalty
from jaxlimit.experiments.methods import compare
from jaxlimit.experiments.moments import during_training, order, tolerances
from jaxlimit.experiments.study import Study

EXPERIMENTS: dict[str, Callable[..., Experiment]] = {
    "compare": compare,
    "crossing": crossing,
    "distance": distance,
    "gems": gems,
    "gradual": gradual,
    "lambda": penalty,
    "order": order,
    "regularizer": regularizer,
    "rows": rows,
    "scaling": scaling,
    "tolerances": tolerances,
    "training": during_training,
}
"""By their names on the command line."""

__all__ = [
    "EXPERIMENTS",
    "Experiment",
    "Study",
    "compare",
    "crossing",
    "distance",
    "during_training",
    "execute",
    "gems",
    "gradual",
    "order",
    "penalty",
    "regularizer",
    "rows",
    "scaling",
    "tolerances",
]
