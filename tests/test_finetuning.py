"""The fine-tuned sweep against Adam written in NumPy, float64, with the whole data at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlimit
from jaxlimit.measuring import finetuning
from jaxlimit.measuring.finetuning import FinetunedNetwork, finetuned_sweep

RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((17, 6)), RNG.standard_normal((17, 1))
W = RNG.standard_normal((6, 1))
GRID = [0.5, 1.0]


def loss(w, batch):
    return jnp.mean((batch[0] @ w - batch[1]) ** 2)


def numpy_adam(sparsity, num_steps, rate):
    """Lowest loss on the way, the start included."""
    kept = np.argsort(np.argsort(np.abs(W), axis=0), axis=0) >= round(sparsity * W.size)
    w, m, v, losses = W * kept, np.zeros_like(W), np.zeros_like(W), []
    for t in range(1, num_steps + 2):
        error = X @ w - Y
        losses.append(np.mean(error**2))
        g = 2 / len(X) * X.T @ error * kept
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        w = w - rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return min(losses)


def typed(dtype):
    return jnp.asarray(W, dtype), jaxlimit.batched((jnp.asarray(X, dtype), jnp.asarray(Y, dtype)), 5)


def test_losses_are_those_of_adam_in_numpy(dtype):
    sweep = finetuned_sweep(loss, *typed(dtype), GRID, num_steps=30, learning_rate=0.05)
    expected = [numpy_adam(s, 30, 0.05) for s in GRID]
    np.testing.assert_allclose(sweep.metrics["loss"], expected, rtol=1e-12 if dtype == np.float64 else 1e-5)


@pytest.mark.parametrize("other", ["bfloat16", "float16", "float64"])
def test_a_loss_may_have_another_dtype_than_the_weights(other, dtype):
    other = jnp.float32 if other == "float64" and dtype == np.float32 else other  # JAX has no float64 then
    sweep = finetuned_sweep(
        lambda w, b: loss(w, b).astype(other), *typed(dtype), GRID, num_steps=30, learning_rate=0.05
    )
    expected = [numpy_adam(s, 30, 0.05) for s in GRID]
    np.testing.assert_allclose(sweep.metrics["loss"], expected, rtol=2 * float(jnp.finfo(other).eps) + 1e-5)


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_half_precision_is_summed_in_float32(half):
    """Sums of ones end at 256 in bfloat16, and at 2,048 in float16; 3e4 three times is beyond float16."""
    ones, batches = jnp.ones((1, 1), half), jaxlimit.batched(jnp.ones((2400, 1), half), 1)
    sweep = finetuned_sweep(
        lambda w, x: jnp.mean(3e4 * x * jnp.ones_like(w)), ones, batches, [0.0], num_steps=1
    )
    assert sweep.metrics["loss"][0] == pytest.approx(float(jnp.asarray(3e4, half)), rel=1e-5)


def test_removed_weights_of_half_precision_stay_zero_while_others_are_tuned():
    """Adam's 1e-8 is 0 in float16, where a removed weight's step would be 0 / 0."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((64, 8)).astype(np.float32)
    y = x @ rng.standard_normal((8, 1)).astype(np.float32)
    start = rng.standard_normal((8, 1)).astype(np.float32)

    def tuned(dtype):
        batches = jaxlimit.batched((x.astype(dtype), y.astype(dtype)), 32)
        return finetuned_sweep(
            lambda w, b: jnp.mean((b[0] @ w - b[1]) ** 2),
            jnp.asarray(start, dtype),
            batches,
            [0.25, 0.5],
            num_steps=30,
            learning_rate=0.1,
        ).metrics["loss"]

    np.testing.assert_allclose(tuned(np.float16), tuned(np.float32), rtol=0.05)


@pytest.mark.parametrize("seconds", [1e-9, 0.002])
def test_bits_do_not_depend_on_where_the_passes_are_cut(seconds, monkeypatch):
    arguments = *typed(np.float32), GRID
    whole = finetuned_sweep(loss, *arguments, num_steps=9, metrics_fn=lambda w, b: {"l": loss(w, b)})
    monkeypatch.setattr(finetuning, "CALL_SECONDS", seconds)
    told = []
    cut = finetuned_sweep(
        loss,
        *arguments,
        num_steps=9,
        metrics_fn=lambda w, b: {"l": loss(w, b)},
        progress=lambda *at: told.append(at),
    )
    for name in ("loss", "eval_l"):
        assert cut.metrics[name].tobytes() == whole.metrics[name].tobytes()
    assert told[-1] == (20, 20)
    assert told == sorted(told)
    if seconds < 1e-6:  # a call for every batch
        assert len(told) == 2 * 10 * 4


def test_calls_have_the_wanted_length(monkeypatch):
    clock = iter(np.cumsum([0, 1, 0, 1, 0, 0.01, 0, 0.6]))
    monkeypatch.setattr(finetuning.time, "perf_counter", lambda: next(clock))
    pace, found = finetuning._Pace(), []
    for _ in range(4):
        with pace:
            pass
        found.append(pace.num_batches)
    assert found == [1, 1, 2, 1]


def test_memory_does_not_depend_on_the_number_of_batches():
    """Of a network whose activations take more than its weights; also with several sparsities at once."""
    w = {"a": jnp.ones((6, 500)), "b": jnp.ones((500, 1))}

    def deep(w, batch):
        return jnp.mean((jnp.tanh(batch[0] @ w["a"]) @ w["b"] - batch[1]) ** 2)

    def temporaries(times):
        arrays = (jnp.tile(X, (4 * times, 1)), jnp.tile(Y, (4 * times, 1)))
        network = FinetunedNetwork(deep, w, jaxlimit.batched(arrays, 17))
        counts = np.array([10, 100], np.int32)
        state = network.first_state(counts)
        compiled = network.advance.lower(state, *network.arguments(counts), 0, 1).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(8) < temporaries(1) + 2**14


def test_a_weight_function_leaves_padding_out():
    """17 examples in batches of 5, the last one padded with nonsense; the oracle has none."""

    def pad(batch):
        short = 5 - len(batch[0])
        mask = jnp.r_[jnp.ones(len(batch[0])), jnp.zeros(short)]
        return *(jnp.pad(x, ((0, short), (0, 0)), constant_values=7.0) for x in batch), mask

    def masked(w, batch):
        x, y, mask = batch
        return jnp.sum(mask * ((x @ w - y)[:, 0]) ** 2) / jnp.sum(mask)

    w, batches = typed(np.float32)
    padded = [pad(batch) for batch in batches]
    sweep = finetuned_sweep(
        masked,
        w,
        padded,
        GRID,
        num_steps=30,
        learning_rate=0.05,
        weight_fn=lambda batch: batch[2].sum(),
    )
    expected = [numpy_adam(s, 30, 0.05) for s in GRID]
    np.testing.assert_allclose(sweep.metrics["loss"], expected, rtol=1e-5)


def test_a_loss_that_is_no_scalar_is_refused():
    with pytest.raises(ValueError, match=r"loss_fn must return a scalar.*got shape \(5, 1\)"):
        finetuned_sweep(lambda w, b: b[0] @ w, *typed(np.float32), GRID)


def test_a_stream_without_batches_is_refused():
    with pytest.raises(ValueError, match="batches hold no examples"):
        finetuned_sweep(loss, typed(np.float32)[0], lambda: iter(()), GRID)


def test_sparsities_side_by_side_are_those_one_after_the_other(monkeypatch):
    """As on a device that is no CPU: in chunks, the last one filled up."""
    one_by_one = finetuned_sweep(loss, *typed(np.float32), [0.2, 0.5, 0.9], num_steps=9)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    at_once = finetuned_sweep(loss, *typed(np.float32), [0.2, 0.5, 0.9], num_steps=9, chunk_size=2)
    np.testing.assert_allclose(at_once.metrics["loss"], one_by_one.metrics["loss"], rtol=1e-5)


def test_networks_are_kept_and_can_be_certified(monkeypatch):
    """Oracle: their losses in NumPy are those of the sweep. Trained two by two, as on a GPU."""
    monkeypatch.setattr(finetuning.jax, "default_backend", lambda: "gpu")
    params = {"kernel": jnp.asarray(W, jnp.float32), "bias": jnp.full(1, 0.5)}

    def biased(params, batch):
        return batch[0] @ params["kernel"] + params["bias"] - batch[1]

    def squared(params, batch):
        return jnp.mean(biased(params, batch) ** 2)

    arrays = X.astype(np.float32), Y.astype(np.float32)
    options = {"num_steps": 9, "learning_rate": 0.1, "chunk_size": 2}
    arguments = squared, params, jaxlimit.batched(arrays, 5), [0, 0.5, 0.9]
    sweep = finetuned_sweep(*arguments, keep=True, **options)
    plain = finetuned_sweep(*arguments, **options)
    assert plain.networks is None
    assert plain.metrics["loss"].tobytes() == sweep.metrics["loss"].tobytes()
    assert [sparsity for sparsity, _ in sweep.networks] == sweep.sparsities.tolist()
    for (sparsity, network), expected in zip(sweep.networks, sweep.metrics["loss"], strict=True):
        assert np.mean((X @ network["kernel"] + 0.5 - Y) ** 2) == pytest.approx(expected, rel=1e-5)
        assert np.sum(np.asarray(network["kernel"]) == 0) == int(6 * sparsity)
    certificate = jaxlimit.certify(
        lambda params, batch: jnp.abs(biased(params, batch))[:, 0] > 10,
        sweep.networks,
        jaxlimit.batched((np.tile(arrays[0], (20, 1)), np.tile(arrays[1], (20, 1))), 17),
        bound=0.1,
    )
    assert certificate.sparsities == (0.0, 0.5, 0.9)
    assert certificate.sparsity == 0.9


@pytest.mark.parametrize(
    ("asked", "message"),
    [({"learning_rate": x}, "learning_rate must be a positive") for x in (0, -0.1, np.nan, np.inf, None)]
    + [({"chunk_size": x}, "chunk_size must be an integer") for x in (0, -1, 2.5)]
    + [({"eval_batches": [jnp.ones((1, 2))]}, "eval_batches are for metrics_fn")],
)
def test_numbers_that_make_no_sense_are_refused(asked, message):
    def loss(w, x):
        return jnp.mean((x @ w - 2.0) ** 2)

    with pytest.raises(ValueError, match=message):
        finetuned_sweep(loss, jnp.ones((2, 1)), [jnp.ones((1, 2))], [0.5], **asked)


@pytest.mark.parametrize("bound", [np.nan, None, "0.1", np.ones(3)])
def test_a_bound_is_a_number(bound):
    sweep = jaxlimit.Sweep(np.array([0.0, 0.5, 0.9]), {"loss": np.array([0.1, 0.2, 1.0])})
    for read in (sweep.largest_sparsity, sweep.first_crossing):
        with pytest.raises(ValueError, match="bound must be a number"):
            read("loss", bound)
