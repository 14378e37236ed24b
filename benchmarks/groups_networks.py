"""The networks of benchmarks/groups.py, trained, with their data.

digits, fc2 and lenet are cases of predicted_vs_measured, trained as there with an L1 term. resnet18-8 is the
preset cifar10-resnet18-8, trained on the first 10,000 images for 5 epochs, so that it is far from what it can
reach; resnet20 comes trained, from published_networks, and all-MiniLM-L6-v2 from minilm: the kernels of its
attention, or those between (`up` and `down`), while the others stay. There the loss is the drift of the
embeddings, and the error that of a sentence whose embedding has a cosine below `NEAR` with the unpruned one.
One seed each.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import common
import jax
import jax.numpy as jnp
import minilm
import numpy as np
import predicted_vs_measured
import published_networks

import jaxlimit
from jaxlimit import models
from jaxlimit.application import presets, run_folder
from jaxlimit.application.presets import Options
from jaxlimit.core.trees import PyTree, is_kernel
from jaxlimit.training import model_files

# Networks of predicted_vs_measured: preset, and weight of the L1 term.
CASES = {"digits": ("digits", 5e-4), "fc2": ("fc2-mnist", 5e-5), "lenet": ("lenet-cifar10", 5e-5)}
BATCH = 128
SMALL_RESNET, NUM_TRAINED = presets.find_preset("cifar10-resnet18-8", epochs=5), 10_000
# Of the embedding of a sentence with that of the unpruned network.
NEAR = 0.95
# Images of resnet20 from which the statistics of its batch norm are taken anew after every cut.
NUM_NORMED = 512
# Examples of the loss tolerance, where the others are fewer.
LEAST_SPREAD = {"resnet18-8": 1_024, "resnet20": 1_024}


def cross_entropy_of(outputs: jax.Array, batch: PyTree) -> jax.Array:
    """Cross-entropy, from the outputs of a batch."""
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(outputs), batch[1][:, None], 1))


def misclassified(outputs: jax.Array, batch: PyTree) -> jax.Array:
    """Of each example whether its class is wrong."""
    return outputs.argmax(-1) != batch[1]


def turned(outputs: jax.Array, batch: PyTree) -> jax.Array:
    """Of each sentence whether its embedding is no longer near."""
    return jnp.sum(outputs * batch[1], axis=-1) < NEAR


@dataclass(frozen=True, eq=False)
class Network:
    """A trained network, and the data whose loss is to stay low.

    Attributes:
        predict: `predict(params, inputs) -> outputs`.
        params: the trained parameters.
        train: (inputs, targets), of which the first so many are taken.
        test: examples that have had no part in training; None where nothing is certified.
        eps: the loss tolerance; None: the standard deviation of the batches' losses.
        output_loss: of outputs and a batch.
        error: of outputs and a batch, for each example.
        prunable: as for `hessian`.
        statistics: takes those of batch norm anew, as for `prune`; None: they are held.
        model: the network of jaxlimit.models whose units are known by its architecture alone.
    """

    predict: Callable[[PyTree, Any], jax.Array]
    params: PyTree
    train: tuple[Any, Any]
    test: tuple[Any, Any] | None
    eps: float | None = None
    output_loss: Callable[[jax.Array, Any], jax.Array] = cross_entropy_of
    error: Callable[[jax.Array, Any], jax.Array] = misclassified
    prunable: Callable[[Any, Any], bool] = is_kernel
    statistics: Callable[[PyTree], PyTree] | None = None
    model: Any = None

    def outputs(self, params: PyTree, batch: PyTree) -> jax.Array:
        """The outputs of a batch."""
        return self.predict(params, batch[0])

    def loss(self, params: PyTree, batch: PyTree) -> jax.Array:
        """The mean loss of a batch."""
        return self.output_loss(self.outputs(params, batch), batch)

    def wrong(self, params: PyTree, batch: PyTree) -> jax.Array:
        """The error of each example."""
        return self.error(self.outputs(params, batch), batch)

    @property
    def problem(self) -> tuple[Any, ...]:
        """As `prune` and `attained_limit` want it."""
        return self.outputs, self.output_loss, self.params, self.batches

    @cached_property
    def batches(self) -> jaxlimit.Batches:
        """The data."""
        return jaxlimit.batched(self.train, min(BATCH, len(self.train[1])))

    @property
    def test_batches(self) -> jaxlimit.Batches:
        """The test examples."""
        assert self.test is not None
        return jaxlimit.batched(self.test, min(500, len(self.test[1])))

    @cached_property
    def tolerance(self) -> float:
        """The loss tolerance eps."""
        if self.eps is not None:
            return self.eps
        return jaxlimit.loss_statistics(self.loss, self.params, self.batches).batch_std

    def curvature(self, name: str) -> jaxlimit.Curvature:
        """By name: hessian or gauss_newton."""
        if name == "hessian":
            return jaxlimit.hessian(self.loss, self.params, self.batches, prunable=self.prunable)
        keywords: dict[str, Any] = {"prunable": self.prunable}
        return jaxlimit.gauss_newton(self.outputs, self.output_loss, self.params, self.batches, **keywords)


def load(name: str, folder: Path, num_examples: int, num_test: int = 0) -> Network:
    """A network of the table with its first examples, trained in the folder if it is not there yet."""
    makers = {
        "resnet18-8": _resnet18_8,
        "resnet20": _resnet20,
        "minilm-attention": partial(_minilm, ("attention",)),
        "minilm-inner": partial(_minilm, ("up", "down")),
    }
    found = makers[name](folder) if name in makers else _of_a_case(name, folder)
    # The tolerance is that of several batches, also where the curvature is that of fewer examples.
    eps = replace(found, train=_first(found.train, max(num_examples, LEAST_SPREAD.get(name, 0)))).tolerance
    test = _first(found.test, num_test) if found.test is not None and num_test else None
    return replace(found, train=_first(found.train, num_examples), test=test, eps=eps)


def _first(arrays: tuple[Any, Any], count: int) -> tuple[Any, Any]:
    inputs, targets = arrays
    return np.asarray(inputs[:count]), np.asarray(targets[:count])


def preset_of(name: str) -> presets.Preset:
    """How a network of `CASES` is trained."""
    return _case(name).preset


def _case(name: str) -> predicted_vs_measured.Case:
    preset, l1 = CASES[name]
    cases = (x for x in predicted_vs_measured.CASES if x.preset.name == preset and x.seed == 0)
    return next(x for x in cases if x.preset.recipe.l1 == l1)


def _of_a_case(name: str, folder: Path) -> Network:
    case = _case(name)
    problem = predicted_vs_measured.Problem(case)
    params = predicted_vs_measured.train(case, problem, folder)
    _, test = presets.load_arrays(case.preset, Options())
    return Network(problem.predict, params, problem.train, test)


def _resnet18_8(folder: Path) -> Network:
    train, test = presets.load_arrays(SMALL_RESNET, Options())
    train = _first(train, NUM_TRAINED)
    model, path = presets.build_network(SMALL_RESNET, 0), folder / run_folder.MODEL

    def compute() -> dict[str, Any]:
        report = predicted_vs_measured.reporter("resnet18-8")
        key = jax.random.fold_in(jax.random.key(0), 0)
        trained = SMALL_RESNET.recipe.train(
            model,
            train,
            key,
            augment=SMALL_RESNET.augmentation(),
            on_epoch=lambda epoch, loss: report(f"epoch {epoch + 1}, loss + L1 {loss:.4f}"),
        )
        model_files.save_model(path, trained)
        return {"preset": SMALL_RESNET.to_json(), "num_examples": NUM_TRAINED}

    common.step(folder / "trained.json", compute)
    model = model_files.load_model(path, model)
    return Network(*models.from_nnx(model), train, test)


def _resnet20(folder: Path) -> Network:
    found = published_networks.resnet20()
    images = jnp.asarray(found.train[0][:NUM_NORMED])
    anew = published_networks.corrected_statistics(found.params, images)
    params, prunable = found.params, found.prunable
    return Network(found.predict, params, found.train, found.test, prunable=prunable, statistics=anew)


def _minilm(parts: tuple[str, ...], _: Path) -> Network:
    problem = minilm.Problem()

    def with_embeddings(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with jax.default_matmul_precision("highest"):
            return tokens, np.asarray(jax.jit(problem.predict)(problem.params, tokens))

    return Network(
        problem.predict,
        problem.params,
        with_embeddings(problem.tokens),
        with_embeddings(problem.other_tokens),
        eps=minilm.TOLERANCES["0.99"],
        output_loss=minilm.drift,
        error=turned,
        prunable=lambda path, leaf: common.kernel_in(path, *parts),
        model=problem.model,
    )
