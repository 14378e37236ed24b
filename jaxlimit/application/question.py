"""What is asked of a network: how sparse it may be, as predicted, attained and certified."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlimit.core.batches import batch_length
from jaxlimit.core.checks import as_real, require_instance, require_positive, require_problem, require_range
from jaxlimit.core.leaves import to_arrays
from jaxlimit.core.passes import in_memory, passes
from jaxlimit.core.trees import Prunable, PyTree, is_kernel, partition
from jaxlimit.limits.arguments import check_arguments
from jaxlimit.limits.estimate import LIMITS
from jaxlimit.limits.pruning_limit import MAX_MATVECS
from jaxlimit.measuring.risks import ExampleRisks, Metric
from jaxlimit.models.torch_state import torch_state_dict
from jaxlimit.pruning.attained import MAX_PRODUCTS
from jaxlimit.pruning.trust_region import DEFAULT, Settings
from jaxlimit.training.losses import are_right

NO_TEST_BATCHES = "no test_batches were given, examples that have had no part in training or pruning."
NO_ERROR = (
    "no error_fn was given, and the batches are no (inputs, integer labels) with one row of outputs for each "
    "example: give error_fn(params, batch) -> (n,)."
)
# A point of error: what "as good as before" means to the presets' accuracy threshold, too.
ERROR_RISE = 0.01


@dataclass(frozen=True)
class Certifying:
    """What is to be certified of the networks that were attained.

    Attributes:
        batches: examples that have had no part in training or pruning.
        error_fn: `error_fn(params, batch) -> (n,)`, the risk of each example, within `bounds`.
        bounds: lowest and highest risk of an example.
        bound: what the mean risk is to stay below; None: that it rises by at most `rise`.
        rise: above the unpruned network's, in units of the risk.
        confidence: with which probability at least no certificate is wrong.

    Raises:
        ValueError: a number out of range.
    """

    batches: Iterable[PyTree]
    error_fn: Metric
    bounds: tuple[float, float] = (0.0, 1.0)
    bound: float | None = None
    rise: float = ERROR_RISE
    confidence: float = 0.95

    def __post_init__(self) -> None:
        ends = [as_real(x) for x in self.bounds] if np.shape(self.bounds) == (2,) else [math.nan] * 2
        pair = -math.inf < ends[0] < ends[1] < math.inf
        require_range("error_bounds", self.bounds, pair, "two numbers, the second of them larger")
        lower, upper = self.bounds
        inside = self.bound is None or lower < as_real(self.bound) < upper
        require_range("error_bound", self.bound, inside, f"between {lower:g} and {upper:g}")
        most = upper - lower
        require_range("error_rise", self.rise, 0 < as_real(self.rise) < most, f"between 0 and {most:g}")
        require_range(
            "confidence", self.confidence, 0 < as_real(self.confidence) < 1, "between 0 and 1, as .95"
        )


@dataclass(frozen=True, eq=False)
class Question:
    """How sparse a network may be while its loss rises by at most `loss_tolerance`.

    Attributes:
        predict_fn: `predict_fn(params, batch) -> outputs`.
        loss_fn: `loss_fn(outputs, batch) -> scalar`, the mean over a batch.
        params: the trained parameters.
        batches: whose loss is to stay low.
        key: of the random probes.
        loss_tolerance: eps, in units of the loss.
        tolerance: wanted accuracy of the predicted limits, in sparsity.
        attained_tolerance: wanted accuracy of the attained one.
        max_matvecs: budget of products for each curvature.
        max_products: budget of products for what is attained.
        prunable, trainable, scores, groups, weight_fn, statistics_fn: as for `attained_limit`.
        settings: how networks are readjusted.
        certifying: what is to be certified, or a sentence why nothing is.
        model: the network of `jaxlimit.models` that the parameters are of, if there is one.

    Raises:
        ValueError: a number out of range; parameters that are not of the model.
    """

    predict_fn: Callable[[PyTree, PyTree], PyTree]
    loss_fn: Callable[[PyTree, PyTree], jax.Array]
    params: PyTree
    batches: Iterable[PyTree]
    key: jax.Array
    loss_tolerance: float
    tolerance: float = 1e-3
    attained_tolerance: float = 0.005
    max_matvecs: int = MAX_MATVECS
    max_products: float = MAX_PRODUCTS
    prunable: Prunable = is_kernel
    trainable: Prunable | None = None
    scores: PyTree | None = None
    groups: Any = None
    statistics_fn: Callable[[PyTree], PyTree] | None = None
    weight_fn: Callable[[PyTree], jax.Array] | None = None
    settings: Settings = DEFAULT
    certifying: Certifying | str = field(default=NO_TEST_BATCHES)
    model: nnx.Module | None = None

    def __post_init__(self) -> None:
        require_positive("loss_tolerance", self.loss_tolerance)
        check_arguments(self.loss_tolerance, self.tolerance, self.max_matvecs, None, LIMITS, None)
        close = self.attained_tolerance
        require_range("attained_tolerance", close, 0 < as_real(close) < 1, "between 0 and 1")
        require_positive("max_products", self.max_products)
        require_instance("settings", self.settings, Settings, "jaxlimit.Settings(...)")
        if self.model is not None:
            torch_state_dict(self.model, self.params)

    @property
    def loss(self) -> "MeanLoss":
        """The loss as a function of the parameters."""
        return MeanLoss(self.predict_fn, self.loss_fn)

    @property
    def weights(self) -> PyTree:
        """Those that may be pruned, None elsewhere."""
        return partition(self.params, self.prunable)[0]

    @property
    def selection(self) -> dict[str, Any]:
        """What may be pruned, and how batches count, as keywords."""
        return {"prunable": self.prunable, "weight_fn": self.weight_fn}


@dataclass(frozen=True)
class MeanLoss:
    """`loss(params, batch) -> scalar`, of a loss of outputs."""

    predict_fn: Callable[[PyTree, PyTree], PyTree]
    loss_fn: Callable[[PyTree, PyTree], jax.Array]

    def __call__(self, params: PyTree, batch: PyTree) -> jax.Array:
        """The loss of a batch."""
        return self.loss_fn(self.predict_fn(params, batch), batch)


@dataclass(frozen=True)
class Misclassified:
    """The error of classification, 1 where the largest output is not that of the label."""

    predict_fn: Callable[[PyTree, PyTree], PyTree]

    def __call__(self, params: PyTree, batch: PyTree) -> jax.Array:
        """A bool for each example."""
        return ~are_right(self.predict_fn(params, batch), batch[1])


def default_error(
    predict_fn: Callable[[PyTree, PyTree], PyTree], params: PyTree, batches: Iterable[PyTree]
) -> Metric | None:
    """The error of classification, where batches are (inputs, integer labels) and outputs (n, classes).

    Raises:
        ValueError: a label that is no class, as padding has. Both networks would be wrong there, so that a
            rise of errors would seem smaller than it is.
    """
    batch = first_batch(batches)
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        return None
    labels = batch[1]
    count = batch_length(batch)
    if np.shape(labels) != (count,) or not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
        return None
    outputs: Any = jax.eval_shape(lambda batch: predict_fn(params, batch), batch)
    is_row = isinstance(outputs, jax.ShapeDtypeStruct) and outputs.shape[:1] == (count,)
    if not is_row or len(outputs.shape) != 2 or outputs.shape[1] < 2:
        return None
    for number, (_, labels) in enumerate(passes(batches)):
        labels = jnp.asarray(to_arrays("labels", labels))
        if not labels.size:
            continue
        lowest, highest = int(jnp.min(labels)), int(jnp.max(labels))
        if lowest < 0 or highest >= outputs.shape[1]:
            raise ValueError(
                f"test_batches have labels from {lowest} to {highest} in batch {number}, but outputs of "
                f"{outputs.shape[1]} classes: leave out examples without a label, or give error_fn."
            )
    return Misclassified(predict_fn)


def certifying_of(
    predict_fn: Callable[[PyTree, PyTree], PyTree],
    params: PyTree,
    batches: Iterable[PyTree],
    test_batches: Iterable[PyTree] | None,
    error_fn: Metric | None,
    **risk: Any,
) -> Certifying | str:
    """What is to be certified with these data, or a sentence why nothing is.

    Raises:
        ValueError: test data that are the data of `batches`, or no batches; a number out of range; an
            `error_fn` that gives the first of them no risks; as `default_error`.
    """
    if test_batches is None:
        return NO_TEST_BATCHES
    require_apart(batches, test_batches)
    if error_fn is None:
        error_fn = default_error(predict_fn, params, test_batches)
        return NO_ERROR if error_fn is None else Certifying(test_batches, error_fn, **risk)
    require_problem("assess(..., error_fn=error_fn)", params, error_fn=error_fn)
    certifying = Certifying(test_batches, error_fn, **risk)
    ExampleRisks(error_fn, [first_batch(test_batches)], certifying.bounds)(params)
    return certifying


def arrays_of(batches: Iterable[PyTree]) -> Iterator[PyTree]:
    """The batches of one pass, as arrays; a ValueError if these are no batches."""
    again = in_memory(batches) if isinstance(batches, list | tuple) else passes(batches)
    return (to_arrays("batch", batch) for batch in again)


def first_batch(batches: Iterable[PyTree]) -> PyTree:
    """The first batch, as arrays; a ValueError if there is none, or if these are no batches."""
    for batch in islice(arrays_of(batches), 1):
        return batch
    raise ValueError("batches hold no examples.")


def require_apart(batches: Iterable[PyTree], test_batches: Iterable[PyTree]) -> None:
    """Raises ValueError where the examples that certify are those that prune.

    Examples:
        >>> require_apart([np.ones((2, 3))], [np.ones((2, 3))])
        Traceback (most recent call last):
        ...
        ValueError: test_batches begin with the examples of batches: ...
    """
    first, tested = (first_batch(some) for some in (batches, test_batches))
    for batch in (first, tested):
        batch_length(batch)
    leaves, others = jax.tree.leaves(first), jax.tree.leaves(tested)
    same = len(leaves) == len(others) and all(
        np.array_equal(np.asarray(a)[:1], np.asarray(b)[:1]) for a, b in zip(leaves, others, strict=True)
    )
    if batches is test_batches or same:
        raise ValueError(
            "test_batches begin with the examples of batches: what prunes a network cannot certify it. Give "
            "examples that have had no part in training or pruning."
        )
