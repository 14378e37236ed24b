"""Arguments in foreign places, labels, metrics, complex weights, coarse sparsities: right, or refused.

Oracle: numbers that are counted by hand.
"""

import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jaxlimit
from jaxlimit.application.columns import read_columns
from jaxlimit.core.batches import batched
from jaxlimit.core.checks import require_key
from jaxlimit.core.trees import flatten, unflatten
from jaxlimit.geometry.magnitude import num_removed
from jaxlimit.training import (
    classification_curvature,
    classification_loss,
    classification_metrics,
    train,
    train_model,
)

RNG = np.random.default_rng(5)
X, Y, W = (RNG.standard_normal(shape).astype(np.float32) for shape in ((11, 3), (11, 2), (3, 2)))
PARAMS, BATCHES = {"w": W}, batched((X, Y), 4)
KEY, MODULE = jax.random.key(0), nnx.Linear(3, 2, rngs=nnx.Rngs(0))


def loss(params, batch):
    x, y = batch
    return jnp.mean(jnp.sum((x @ params["w"] - y) ** 2, -1))


def predict(params, batch):
    return batch[0] @ params["w"]


def output_loss(outputs, batch):
    return jnp.mean(jnp.sum((outputs - batch[1]) ** 2, -1))


def metrics(params, batch):
    return {"loss": loss(params, batch)}


@pytest.fixture(scope="module")
def curvature():
    return jaxlimit.hessian(loss, PARAMS, BATCHES)


CALLS = {
    "params first": (
        lambda _: jaxlimit.hessian(PARAMS, loss, BATCHES),
        "loss_fn must be a function, got a dict",
    ),
    "batches before params": (
        lambda _: jaxlimit.hessian(loss, BATCHES, PARAMS),
        r"params must be a pytree of arrays, got a Batches: call hessian\(loss_fn, params, batches\)",
    ),
    "a list before params": (lambda _: jaxlimit.hessian(loss, [(X, Y)], PARAMS), "it is one dict"),
    "statistics": (
        lambda _: jaxlimit.loss_statistics(PARAMS, loss, BATCHES),
        r"loss_fn must be a function, got a dict: call loss_statistics\(loss_fn",
    ),
    "sweep": (
        lambda _: jaxlimit.sparsity_sweep(PARAMS, metrics, BATCHES, [0.5]),
        "metrics_fn must be a function, got a dict: call sparsity_sweep",
    ),
    "fine-tuned sweep": (
        lambda _: jaxlimit.finetuned_sweep(PARAMS, loss, BATCHES, [0.5]),
        "loss_fn must be a function, got a dict: call finetuned_sweep",
    ),
    "a curvature as parameters": (lambda c: jaxlimit.hessian(loss, c, BATCHES), "got a Curvature"),
    "a function as parameters": (lambda _: jaxlimit.hessian(loss, loss, BATCHES), "got the function loss"),
    "an NNX module": (lambda _: jaxlimit.hessian(loss, MODULE, BATCHES), r"models\.from_nnx\(model\)"),
    "an NNX module as loss": (lambda _: jaxlimit.hessian(MODULE, PARAMS, BATCHES), r"from_nnx\(model\)"),
    "a Linen module": (
        lambda _: jaxlimit.gauss_newton(linen.Dense(2), loss, PARAMS, BATCHES),
        r"predict_fn is a module of Flax Linen.*from_linen\(module, variables\)",
    ),
    "a loss of three": (
        lambda _: jaxlimit.hessian(lambda params, x, y: 0.0, PARAMS, BATCHES),
        r"its signature is \(params, x, y\): wrap it",
    ),
    "functions exchanged": (
        lambda _: jaxlimit.gauss_newton(output_loss, predict, PARAMS, BATCHES),
        r"predict_fn and loss_fn look exchanged: .*Call gauss_newton\(predict_fn, loss_fn, params, batches\)",
    ),
    "functions of a stream exchanged": (
        lambda _: jaxlimit.gauss_newton(output_loss, lambda w, b: b[0] @ w, W, lambda: iter(BATCHES)),
        "predict_fn and loss_fn look exchanged",
    ),
    "outputs as a loss": (
        lambda _: jaxlimit.hessian(predict, PARAMS, BATCHES),
        r"scalar.*got shape \(4, 2\)",
    ),
    "outputs as a loss to tune": (
        lambda _: jaxlimit.finetuned_sweep(predict, PARAMS, BATCHES, [0.5]),
        r"scalar.*got shape \(4, 2\)",
    ),
    "a key as curvature": (
        lambda c: jaxlimit.pruning_limit(KEY, c, loss_tolerance=0.1),
        "curvature must be a Curvature, which hessian or gauss_newton makes; got an array",
    ),
    "spectral measure": (
        lambda _: jaxlimit.spectral_measure(PARAMS, KEY, num_probes=1, num_matvecs=1),
        r"curvature must be a Curvature, .*got a dict",
    ),
    "key": (lambda c: jaxlimit.pruning_limit(c, 0, loss_tolerance=0.1), r"one random key.*the int 0"),
    "no key": (
        lambda c: jaxlimit.spectral_measure(c, None, num_probes=1, num_matvecs=1),
        r"one random key.*NoneType",
    ),
    "many keys": (
        lambda c: jaxlimit.pruning_limit(c, jax.random.split(KEY, 3), loss_tolerance=0.1),
        r"one random key.*an array of shape \(3,\)",
    ),
    "statistics as tolerance": (
        lambda c: jaxlimit.pruning_limit(c, KEY, loss_tolerance=jaxlimit.LossStatistics(1.0, 0.1, 3)),
        "loss_tolerance must be a positive finite number, got LossStatistics",
    ),
    "words as sparsities": (
        lambda _: jaxlimit.sparsity_sweep(metrics, PARAMS, BATCHES, ["half"]),
        "sparsity must be numbers",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_arguments_in_foreign_places_are_refused(name, curvature):
    call, message = CALLS[name]
    with pytest.raises(ValueError, match=message):
        call(curvature)


def test_an_error_in_functions_in_their_places_stays_theirs():
    def broken(params, batch):
        raise RuntimeError("of its author")

    with pytest.raises(RuntimeError, match="of its author"):
        jaxlimit.gauss_newton(broken, output_loss, PARAMS, BATCHES)


def test_a_limit_is_no_curvature(curvature):
    limit = jaxlimit.pruning_limit(curvature, KEY, loss_tolerance=0.1)
    for call in (jaxlimit.pruning_limit, jaxlimit.reference_limit):
        with pytest.raises(ValueError, match=r"curvature must be a Curvature, .*got a PruningLimit"):
            call(limit, KEY, loss_tolerance=0.1)


@pytest.mark.parametrize("convert", [jnp.asarray, np.asarray])
def test_keys_of_the_older_kind_are_the_same_keys(convert, curvature):
    key = convert(jax.random.PRNGKey(0))
    assert jax.random.bits(require_key("key", key)) == jax.random.bits(KEY)
    expected = jaxlimit.spectral_measure(curvature, KEY, num_probes=1, num_matvecs=2)
    found = jaxlimit.spectral_measure(curvature, key, num_probes=1, num_matvecs=2)
    np.testing.assert_array_equal(found.nodes, expected.nodes)


# ---- labels and metrics ----------------------------------------------------------------------------------


def classify(params, x):
    return x @ params["w"]


@pytest.mark.parametrize(
    "label", [-1, -100, 2, *(pytest.param(x, marks=pytest.mark.nightly) for x in (-2, 100))]
)
def test_labels_that_are_no_class_are_refused(label):
    labels = (np.arange(11) % 2).astype(np.int8)
    labels[9] = label
    batches = batched((X, labels), 4)
    message = r"labels outside the classes, as -1 or -100 .* weight_fn"
    for name in ("hessian", "gauss_newton"):
        with pytest.raises(ValueError, match=message):
            classification_curvature(name, classify, PARAMS, batches)
    with pytest.raises(ValueError, match=f"not finite in batch 2.*{message}"):
        jaxlimit.loss_statistics(classification_loss(classify), PARAMS, batches)
    with pytest.raises(ValueError, match=f"finite at no sparsity.*{message}"):
        jaxlimit.sparsity_sweep(classification_metrics(classify), PARAMS, batches, [0, 0.5])


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (loss, r'dictionary of scalars by name, \{"loss": value\}; got a scalar'),
        (lambda w, b: (loss(w, b), 1), "dictionary of scalars"),
        (lambda w, b: {}, "dictionary of scalars"),
        (lambda w, b: {"loss": b[1] @ w["w"].T}, r"'loss' must be a real scalar.*got \(4, 3\)"),
        (lambda w, b: {"loss": {"a": 1.0}}, r"'loss' must be a real scalar.*got dict"),
        (lambda w, b: {"loss": loss(w, b) * 1j}, r"real scalar.*got complex64"),
        (lambda w, b: {"loss": loss(w, b) * jnp.nan}, "'loss' is finite at no sparsity"),
    ],
)
def test_metrics_that_are_no_scalars_by_name_are_refused(found, message):
    with pytest.raises(ValueError, match=message):
        jaxlimit.sparsity_sweep(found, PARAMS, BATCHES, [0.0, 0.5])


def test_metrics_of_bools_integers_and_numbers():
    def mixed(params, batch):
        return {"all": jnp.all(batch[0] < 9), "one": jnp.int32(1), "number": 0.25, "half": jnp.bfloat16(0.5)}

    batches = [(X[i:j], Y[i:j]) for i, j in ((0, 4), (4, 4), (4, 11))]
    sweep = jaxlimit.sparsity_sweep(mixed, PARAMS, batches, [0.0, 0.5])
    found = {name: values.tolist() for name, values in sweep.metrics.items()}
    assert found == {"all": [1, 1], "one": [1, 1], "number": [0.25, 0.25], "half": [0.5, 0.5]}


def test_a_threshold_of_what_is_not_a_number_is_refused():
    sweep = jaxlimit.Sweep(np.array([0.0, 0.5, 0.9]), {"loss": np.array([0.1, np.nan, 1.0])})
    for read in (sweep.largest_sparsity, sweep.first_crossing):
        with pytest.raises(ValueError, match=r"not a number at 1 of 3 sparsities, the first 0\.5"):
            read("loss", 0.3)
        with pytest.raises(ValueError, match="metric must be one of loss, got 'accuracy'"):
            read("accuracy", 0.3)


# ---- weights and sparsities ------------------------------------------------------------------------------


def test_complex_weights_have_magnitudes():
    weights = np.array([3 + 4j, -1j, 2, 0.5 + 0.5j])
    squares = jaxlimit.removed_norm(weights, [0.25, 0.5, 0.75, 1]) ** 2
    np.testing.assert_allclose(squares, [0.5, 1.5, 5.5, 30.5])
    mask = jaxlimit.magnitude_mask(weights, 0.5)
    assert mask.tolist() == [True, False, True, False]
    np.testing.assert_array_equal(jaxlimit.apply_mask(weights, mask), [3 + 4j, 0, 2, 0])
    with pytest.raises(ValueError, match="must be real, got complex"):
        flatten(weights)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, jnp.bfloat16])
def test_sparsities_of_fewer_bits_remove_what_they_say(dtype):
    for number in range(11):
        assert num_removed(10, np.asarray(number / 10, dtype)) == number
    assert num_removed(10, np.asarray(0.85, dtype)) == 8


def test_sparsities_of_grids_in_float32():
    assert num_removed(1000, np.asarray(jnp.linspace(0, 1, 1001))).tolist() == list(range(1001))
    assert num_removed(1000, np.float64(0.8999)) == 899
    kept = jaxlimit.sparsity_sweep(
        lambda w, b: {"kept": jnp.sum(w != 0) + 0.0}, jnp.ones((10, 1)), BATCHES, [np.float32(0.9)]
    )
    assert kept.metrics["kept"].tolist() == [1]


def test_a_vector_of_another_length_is_refused():
    like = {"a": jnp.ones((2, 2)), "b": jnp.ones(3)}
    for vector in (np.ones(6), np.ones(8), np.ones((7, 1)), 1.0):
        with pytest.raises(ValueError, match=r"vector must have shape \(7,\)"):
            unflatten(vector, like)


TRAININGS = [
    (lambda **k: train(PARAMS, loss, (X, Y), KEY, **k), "loss_fn must be a function, got a dict: call"),
    (lambda **k: train(loss, PARAMS, (X, Y), 0, **k), r"one random key.*the int 0"),
    (lambda **k: train(loss, PARAMS, (X, ["a"] * 11), KEY, **k), r"arrays\[1\]\[0\] must be an array"),
    (lambda **k: train_model(MODULE, (X, -np.ones(11, int)), KEY, **k), "labels must be classes"),
    (lambda **k: train_model(PARAMS, (X, np.ones(11, int)), KEY, **k), "an NNX module, got a dict"),
]


@pytest.mark.parametrize(("call", "message"), TRAININGS)
def test_trainings_of_what_is_none_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(epochs=1, learning_rate=0.1)


def test_training_with_labels_beyond_the_classes_says_so():
    with pytest.raises(FloatingPointError, match="labels outside the classes"):
        train_model(MODULE, (X, np.full(11, 2)), KEY, epochs=1, learning_rate=0.1)


@pytest.mark.parametrize(
    "convert", [lambda loss: (loss, 1), lambda loss: jnp.int32(loss), lambda loss: loss * 1j]
)
def test_losses_that_are_no_real_scalar_are_refused(convert):
    message = r"return the loss alone|real floating scalar"
    for call in (jaxlimit.hessian, jaxlimit.loss_statistics):
        with pytest.raises(ValueError, match=message):
            call(lambda params, batch: convert(loss(params, batch)), PARAMS, BATCHES)


def test_a_table_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "curves.csv").write_bytes(b"sparsity,\xff\n0,1\n")
    with pytest.raises(ValueError, match=r"curves\.csv is damaged, no table of text"):
        read_columns(tmp_path / "curves.csv")


NUMBERS = {
    jaxlimit.batched: {"arrays": (X, Y), "batch_size": 4},
    jaxlimit.hessian: {"loss_fn": loss, "params": PARAMS, "batches": BATCHES},
    jaxlimit.gauss_newton: {
        "predict_fn": predict,
        "loss_fn": output_loss,
        "params": PARAMS,
        "batches": BATCHES,
    },
    jaxlimit.pruning_limit: {"curvature": None, "key": KEY, "loss_tolerance": 0.1},
    jaxlimit.layer_limits: {"curvature": None, "key": KEY, "loss_tolerance": 0.1},
    jaxlimit.spectral_measure: {"curvature": None, "key": KEY, "num_probes": 1, "num_matvecs": 3},
    jaxlimit.tridiagonalize: {"matvec": lambda v: v, "start": PARAMS, "num_matvecs": 3},
    jaxlimit.reference_limit: {"curvature": None, "key": KEY, "loss_tolerance": 0.1, "num_matvecs": 3},
    jaxlimit.sparsity_sweep: {
        "metrics_fn": metrics,
        "params": PARAMS,
        "batches": BATCHES,
        "sparsities": [0.5],
    },
    jaxlimit.finetuned_sweep: {
        "loss_fn": loss,
        "params": PARAMS,
        "batches": BATCHES,
        "sparsities": [0.5],
        "num_steps": 2,
        "learning_rate": 0.1,
    },
    jaxlimit.prune: {
        "predict_fn": predict,
        "loss_fn": output_loss,
        "params": PARAMS,
        "batches": BATCHES,
        "sparsity": 0.5,
    },
    jaxlimit.attained_limit: {
        "predict_fn": predict,
        "loss_fn": output_loss,
        "params": PARAMS,
        "batches": BATCHES,
        "loss_tolerance": 0.1,
    },
    jaxlimit.certify: {"metric_fn": metrics, "networks": [(0.5, PARAMS)], "batches": BATCHES, "bound": 0.9},
    jaxlimit.magnitude_mask: {"weights": PARAMS, "sparsity": 0.5},
    jaxlimit.nm_mask: {"weights": PARAMS, "n": 1, "m": 3},
    jaxlimit.Settings: {},
    jaxlimit.assess: {
        "predict_fn": predict,
        "loss_fn": output_loss,
        "params": PARAMS,
        "batches": BATCHES,
        "key": KEY,
        "test_batches": batched((X + 1, Y), 4),
        "error_fn": lambda outputs, batch: jnp.ones(len(batch[0])),
        "loss_tolerance": 0.1,
    },
}
# Booleans are looked at as Python does.
REAL = {"int", "float", "int | None", "float | None"}
ARE_NUMBERS = [
    (call, name)
    for call in NUMBERS
    for name, parameter in inspect.signature(call).parameters.items()
    if getattr(parameter.annotation, "__name__", str(parameter.annotation)) in REAL
]


@pytest.mark.parametrize(("call", "name"), ARE_NUMBERS, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_what_is_no_number_is_refused_by_name(call, name, curvature):
    """Every argument that is annotated as a number, also of functions that are added to `NUMBERS` later."""
    given = NUMBERS[call]
    given = {**given, "curvature": curvature} if "curvature" in given else given
    nothing = [] if "None" in str(inspect.signature(call).parameters[name].annotation) else [None]
    for value in ["x", "3", math.nan, -1.5, 1j, np.ones(2), [1], object(), *nothing]:
        with pytest.raises(ValueError, match=name):
            call(**{**given, name: value})


def test_functions_whose_numbers_are_looked_at_are_all_there():
    """Those of the top level that take numbers."""
    public = [getattr(jaxlimit, name) for name in jaxlimit.__all__]
    functions = [x for x in public if inspect.isfunction(x)]
    numbers = {
        x.__name__
        for x in functions
        for parameter in inspect.signature(x).parameters.values()
        if getattr(parameter.annotation, "__name__", str(parameter.annotation)) in REAL
    }
    assert numbers <= {call.__name__ for call in NUMBERS}


EVERY_CALL = {
    "hessian": lambda predict, loss, *given: jaxlimit.hessian(lambda p, x: loss(predict(p, x), x), *given),
    "gauss_newton": jaxlimit.gauss_newton,
    "loss_statistics": lambda predict, loss, *given: jaxlimit.loss_statistics(
        lambda p, x: loss(predict(p, x), x), *given
    ),
    "sparsity_sweep": lambda predict, loss, *given: jaxlimit.sparsity_sweep(
        lambda p, x: {"loss": loss(predict(p, x), x)}, *given, [0.5]
    ),
    "finetuned_sweep": lambda predict, loss, *given: jaxlimit.finetuned_sweep(
        lambda p, x: loss(predict(p, x), x), *given, [0.5], num_steps=1, learning_rate=0.1
    ),
    "prune": lambda *given: jaxlimit.prune(*given, 0.5),
    "attained_limit": lambda *given: jaxlimit.attained_limit(*given, loss_tolerance=0.1),
    "certify": lambda predict, loss, params, batches: jaxlimit.certify(
        lambda p, x: jnp.clip(predict(p, x)[:, 0], 0, 1), [(0.5, params)], batches, bound=0.9
    ),
    "assess": lambda *given: jaxlimit.assess(*given, jax.random.key(0), loss_tolerance=0.1),
}
ONES = np.ones((4, 2), np.float32)


@pytest.mark.parametrize("name", EVERY_CALL)
@pytest.mark.parametrize(
    "predict",
    [
        pytest.param(lambda w, x: np.asarray(x) @ np.asarray(w), id="numpy"),
        pytest.param(lambda w, x: x @ w if w[0, 0] > 0 else -x @ w, id="if"),
        pytest.param(lambda w, x: x @ w * float(w[0, 0]), id="float"),
        pytest.param(lambda w, x: (x @ w)[w[:, 0] > 0], id="boolean index"),
    ],
)
def test_a_function_that_asks_for_values_is_refused(name, predict):
    with pytest.raises(ValueError, match=r"asks for the values of its arrays.*jnp\.where in place of if"):
        EVERY_CALL[name](predict, lambda z, x: jnp.mean(z**2), ONES[:2], [ONES])


@pytest.mark.parametrize("name", sorted(EVERY_CALL.keys() - {"assess"}))
def test_a_module_is_no_parameters(name):
    with pytest.raises(ValueError, match=r"params is a module of Flax Linen"):
        EVERY_CALL[name](lambda p, x: x, lambda z, x: jnp.mean(z**2), linen.Dense(3), [ONES])


def test_a_loss_may_be_a_number():
    sweep = EVERY_CALL["finetuned_sweep"](lambda w, x: x, lambda z, x: 1.5, ONES[:2], [ONES])
    assert sweep.metrics["loss"].tolist() == [1.5]


@pytest.mark.parametrize("name", EVERY_CALL)
def test_a_batch_of_python_lists_is_refused(name):
    batches = [{"x": ONES.tolist()}]
    tested = {"test_batches": batches} if name == "assess" else {}
    call = functools.partial(jaxlimit.assess, key=jax.random.key(0), **tested) if tested else EVERY_CALL[name]
    with pytest.raises(ValueError, match=r"A Python list counts as a tree: pass np\.asarray"):
        call(lambda w, b: b["x"] @ w, lambda z, b: jnp.mean(z**2), ONES[:2], batches)


@pytest.mark.parametrize("trace", [jax.jit, jax.grad, lambda f: lambda x: jax.vmap(f)(x[None])])
@pytest.mark.parametrize(
    "call",
    [
        lambda w, batches: jaxlimit.hessian(mean_square, w, batches).loss,
        lambda w, batches: jaxlimit.loss_statistics(mean_square, w, batches).mean,
        lambda w, batches: jaxlimit.sparsity_sweep(lambda w, x: {"l": mean_square(w, x)}, w, batches, [0.5]),
        lambda w, batches: jnp.sum(jaxlimit.magnitude_mask(w, 0.5) * w),
    ],
    ids=["hessian", "statistics", "sweep", "mask"],
)
def test_what_is_traced_has_no_numbers(trace, call):
    batches = jaxlimit.batched(np.ones((4, 3), np.float32), 2)
    with pytest.raises(ValueError, match="no numbers yet: call jaxlimit outside of what"):
        trace(lambda w: call(w, batches))(jnp.ones((3, 2)))


def mean_square(w, x):
    return jnp.mean((x @ w) ** 2)
