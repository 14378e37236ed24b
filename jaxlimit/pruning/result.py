"""What `prune` and `attained_limit` return: networks, what they cost, and how the work ended."""

import contextlib
import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlimit.core.display import Displayed, View, few
from jaxlimit.core.terminal import Shown
from jaxlimit.core.trees import PyTree
from jaxlimit.limits.status import counted


def kept_share(mask: PyTree) -> dict[str, float]:
    """Share of the weights that is kept in each array of a mask, by its name; all of an empty one."""
    leaves = jax.tree_util.tree_leaves_with_path(mask)
    return {jax.tree_util.keystr(path): float(np.mean(x)) if np.size(x) else 1.0 for path, x in leaves}


class Ending(enum.StrEnum):
    """How a pruned network, or the search for one, ended.

    Attributes:
        SETTLED: a further step lowers the loss by little.
        BRACKETED: the sparsest network within the tolerance and the next one beyond it are close together.
        OUT_OF_PRODUCTS: the budget was spent before.
        NOT_FINITE: the loss of the pruned network is infinite or NaN, and no step mends that.
    """

    SETTLED = "settled"
    BRACKETED = "bracketed"
    OUT_OF_PRODUCTS = "out_of_products"
    NOT_FINITE = "not_finite"


class Readjusting(NamedTuple):
    """What `prune` and `attained_limit` tell about their work, after every step.

    Attributes:
        stage: "path", "search", or "unpruned".
        sparsity: of the network that is being readjusted.
        loss: its loss.
        goal: what the loss has to come down to; infinite where there is no goal.
        num_products: so far.
        max_products: at most.
    """

    stage: str
    sparsity: float
    loss: float
    goal: float
    num_products: float
    max_products: float

    def __str__(self) -> str:
        """In words, for a progress line."""
        goal = f" of {self.goal:.4g}" if np.isfinite(self.goal) else ""
        return f"{self.stage}: sparsity {self.sparsity:.4f}, loss {self.loss:.4g}{goal}"


def shown(state: Readjusting) -> Shown:
    """As a bar shows it."""
    titles = {"path": "pruned network", "search": "attained limit", "unpruned": "without pruning"}
    return Shown(titles[state.stage], round(state.num_products), round(state.max_products), str(state))


@dataclass(frozen=True, eq=False, repr=False)
class Pruned(Displayed):
    """A pruned network whose kept weights were readjusted.

    Attributes:
        params: the whole tree, zero where pruned.
        mask: pytree of bools like the prunable weights, None for all other parameters; False where pruned.
        sparsity: share of the prunable weights that is pruned.
        loss: mean loss on all data, measured.
        dense_loss: that of the network before it was pruned, on the same data.
        num_products: what it cost, in Gauss-Newton products with all the data: a gradient counts as one, a
            loss as a third, a product with a share of the data as that share.
        num_steps: steps of the trust region.
        code: how it ended, for programs.
        status: the same in a sentence.
        kept_share: share of the weights that is kept in each array of the mask, by its name.
    """

    params: PyTree
    mask: PyTree
    sparsity: float
    loss: float
    dense_loss: float
    num_products: float
    num_steps: int
    code: Ending
    status: str
    kept_share: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """Everything but the network, as JSON values."""
        numbers = {name: _json(value) for name, value in vars(self).items() if name not in ("params", "mask")}
        return {**numbers, "kept_share": dict(self.kept_share)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], params: PyTree = None, mask: PyTree = None) -> "Pruned":
        """The inverse of `to_json`; the network, which JSON does not carry, is None unless it is given.

        A loss that was not finite is NaN.

        Raises:
            ValueError: the values are not those of a pruned network.
        """
        with _values_of(cls):
            losses = {name: _number(values[name]) for name in ("loss", "dense_loss")}
            return cls(params=params, mask=mask, **{**values, **losses, "code": Ending(values["code"])})

    def _view(self) -> View:
        title = (
            f"Pruned network of sparsity {self.sparsity:.4f}: loss {self.loss:.4g}, "
            f"{self.dense_loss:.4g} before"
        )
        work = f"{self.num_steps} steps, {self.num_products:.1f} products with all the data"
        return View(title, notes=[work, f"status: {self.status}"])


@dataclass(frozen=True, eq=False, repr=False)
class Attained(Displayed):
    """The sparsest network that was built here whose loss is within the tolerance.

    Attributes:
        sparsity: of that network: a lower bound of what is possible, whatever a theory says.
        pruned: the network itself.
        tried: (sparsity, loss) of every network that was built, in the order in which they were.
        loss_tolerance: eps, in units of the loss.
        tolerance: how close the sparsity of a network that failed was to come, in units of sparsity.
        dense_loss: of the network before it was pruned, on the same data.
        unpruned_loss: what the same number of products does to the network without pruning it; None if that
            was not asked for. Where it is far below `dense_loss`, a part of what was attained is training.
        num_products: of the search, counted as in `Pruned`.
        code: how the search ended, for programs.
        status: the same in sentences.
    """

    sparsity: float
    pruned: Pruned
    tried: tuple[tuple[float, float], ...]
    loss_tolerance: float
    tolerance: float
    dense_loss: float
    unpruned_loss: float | None
    num_products: float
    code: Ending
    status: str

    def to_json(self) -> dict[str, Any]:
        """Everything but the network, as JSON values."""
        numbers = {name: _json(value) for name, value in vars(self).items() if name != "pruned"}
        return {**numbers, "pruned": self.pruned.to_json()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], params: PyTree = None, mask: PyTree = None) -> "Attained":
        """The inverse of `to_json`, as that of `Pruned`.

        Raises:
            ValueError: the values are not those of an attained limit.
        """
        with _values_of(cls):
            found = {**values, "code": Ending(values["code"])}
            found["tried"] = tuple((sparsity, _number(loss)) for sparsity, loss in values["tried"])
            found["pruned"] = Pruned.from_json(values["pruned"], params, mask)
            return cls(**found)

    def _view(self) -> View:
        title = (
            f"Attained sparsity {self.sparsity:.4f} for a loss increase of {self.loss_tolerance:.4g}: "
            f"loss {self.pruned.loss:.4g}, {self.dense_loss:.4g} before"
        )
        most, built = self.dense_loss + self.loss_tolerance, sorted(self.tried)
        rows = [(f"{s:.4f}", f"{loss:.4g}", "within" if loss <= most else "beyond") for s, loss in built]
        attained = [i for i, (s, loss) in enumerate(built) if s == self.sparsity and loss <= most]
        notes = [f"{counted(len(self.tried), 'network')}, {self.num_products:.1f} products with all the data"]
        if self.unpruned_loss is not None:
            notes.append(f"loss without pruning and the same number of products: {self.unpruned_loss:.4g}")
        shown = few(rows, chosen=attained)
        return View(title, ("built", "loss", ""), shown, [*notes, f"status: {self.status}"])


def _json(value: Any) -> Any:
    """With None for numbers that JSON does not have."""
    if isinstance(value, tuple):
        return [_json(x) for x in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


@contextlib.contextmanager
def _values_of(cls: type) -> Iterator[None]:
    """A block that reads values: says so where they are of something else."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"these are not the values of {cls.__name__}: {type(error).__name__}: {error}."
        ) from error


def _number(value: float | None) -> float:
    """What `_json` made None is NaN."""
    return np.nan if value is None else value
