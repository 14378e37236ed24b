"""Batches and sums over them, against Python loops over NumPy slices, which know no grouping and no scan."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlimit.core.batches import batch_length, batched, grouped
from jaxlimit.core.sums import ExampleSum
from jaxlimit.measuring.loss_statistics import loss_statistics


def squared_error(params, batch):
    return jnp.mean((batch["x"] @ params - batch["y"]) ** 2)


def squared_error_by_hand(params, x, y):
    return np.mean((np.asarray(x, np.float64) @ np.asarray(params, np.float64) - y) ** 2)


@pytest.fixture
def data():
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((17, 3)), rng.standard_normal(17)
    return {"x": x.astype(np.float32), "y": y.astype(np.float32)}


@pytest.fixture
def params():
    return jnp.array([0.5, -1.0, 2.0])


class Stream:
    """Yields the batches again in every pass, from its own generator."""

    def __init__(self, batches):
        self.batches, self.passes = list(batches), 0

    def __iter__(self):
        self.passes += 1
        yield from self.batches


def cut(data, sizes):
    edges = np.cumsum([0, *sizes])
    return [{k: v[i:j] for k, v in data.items()} for i, j in pairwise(edges)]


# How the 17 examples may be held. The sizes of the batches are the second entry.
FORMS = {
    "batches": lambda d: (batched(d, 5), [5, 5, 5, 2]),
    "even batches": lambda d: (batched(d, 17), [17]),
    "larger than the data": lambda d: (batched(d, 100), [17]),
    "one by one": lambda d: (batched(d, 1), [1] * 17),
    "list": lambda d: (cut(d, [5, 5, 5, 2]), [5, 5, 5, 2]),
    "tuple": lambda d: (tuple(cut(d, [5, 5, 5, 2])), [5, 5, 5, 2]),
    "differing shapes": lambda d: (cut(d, [3, 7, 1, 6]), [3, 7, 1, 6]),
    "shapes that come back": lambda d: (cut(d, [4, 4, 1, 4, 4]), [4, 4, 1, 4, 4]),
    "stream": lambda d: (Stream(cut(d, [5, 5, 5, 2])), [5, 5, 5, 2]),
}


def test_batches_keep_the_order_and_the_remainder(data):
    batches = batched(data, 5)
    parts = list(batches)
    assert [batch_length(part) for part in parts] == [5, 5, 5, 2]
    assert len(batches) == 4
    assert batches.num_examples == 17
    for again in (parts, list(batches)):
        np.testing.assert_array_equal(np.concatenate([part["x"] for part in again]), data["x"])
        np.testing.assert_array_equal(np.concatenate([part["y"] for part in again]), data["y"])


@pytest.mark.parametrize(
    ("examples", "batch_size", "expected"), [(10, 5, 2), (11, 5, 3), (1, 5, 1), (5, 1, 5)]
)
def test_number_of_batches(examples, batch_size, expected):
    batches = batched(np.zeros((examples, 2)), batch_size)
    assert len(batches) == len(list(batches)) == expected


def test_integer_types_of_numpy_are_batch_sizes():
    assert [len(x) for x in batched(np.zeros(4), np.int64(3))] == [3, 1]


@pytest.mark.parametrize("form", FORMS)
def test_example_sum_is_the_loop(form, data, params):
    batches, sizes = FORMS[form](data)
    total, num_examples = ExampleSum(squared_error)(grouped(batches), params)
    expected = sum(
        size * squared_error_by_hand(params, part["x"], part["y"])
        for size, part in zip(sizes, cut(data, sizes), strict=True)
    )
    assert num_examples == 17
    assert float(total) == pytest.approx(expected, rel=1e-5)
    # The sum over examples does not depend on the cut. (The sum of the batch means would.)
    assert float(total) == pytest.approx(17 * squared_error_by_hand(params, data["x"], data["y"]), rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_loss_statistics_are_those_of_numpy(form, data, params):
    batches, sizes = FORMS[form](data)
    means = [squared_error_by_hand(params, part["x"], part["y"]) for part in cut(data, sizes)]
    statistics = loss_statistics(squared_error, params, batches)
    assert statistics.mean == pytest.approx(squared_error_by_hand(params, data["x"], data["y"]), rel=1e-5)
    assert statistics.batch_std == pytest.approx(
        np.sqrt(np.mean((means - np.mean(means)) ** 2)), rel=1e-5, abs=1e-7
    )
    assert statistics.num_examples == 17


def test_several_arguments_and_a_pytree_of_results(data, params):
    def moments(scale, shift, batch):
        return {"x": jnp.mean(scale * batch["x"], axis=0), "y": (jnp.mean(batch["y"] + shift),)}

    total, num_examples = ExampleSum(moments)(grouped(batched(data, 4)), 2.0, jnp.array(3.0))
    assert num_examples == 17
    np.testing.assert_allclose(total["x"], 2 * np.sum(data["x"], axis=0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(total["y"][0], np.sum(data["y"]) + 17 * 3, rtol=1e-5)


def test_accumulates_in_the_precision_of_the_device(data, params, x64):
    double = {name: array.astype(np.float64) for name, array in data.items()}
    total, _ = ExampleSum(squared_error)(grouped(batched(double, 5)), jnp.asarray(params, jnp.float64))
    assert total.dtype == jnp.float64
    assert float(total) == pytest.approx(17 * squared_error_by_hand(params, data["x"], data["y"]), rel=1e-14)


def test_arrays_in_memory_are_grouped_by_shape(data):
    shapes = [group["x"].shape for group in grouped(batched(data, 5))]
    assert shapes == [(3, 5, 3), (1, 2, 3)]
    assert [group["x"].shape for group in grouped(cut(data, [4, 4, 1, 4, 4]))] == [
        (2, 4, 3),
        (1, 1, 3),
        (2, 4, 3),
    ]
    assert [group["x"].shape for group in grouped(Stream(cut(data, [5, 5, 7])))] == [(1, 5, 3)] * 2 + [
        (1, 7, 3)
    ]


def test_a_list_of_different_dtypes_is_not_promoted(data):
    half = {name: array.astype(np.float16) for name, array in data.items()}
    groups = list(grouped([data, half, data]))
    assert [group["x"].dtype for group in groups] == [jnp.float32, jnp.float16, jnp.float32]


def test_a_stream_is_read_once_a_pass_and_not_kept(data, params):
    stream = Stream(cut(data, [5, 5, 5, 2]))
    groups = grouped(stream)
    assert stream.passes == 0
    first, second = (ExampleSum(squared_error)(groups, params)[0] for _ in range(2))
    assert stream.passes == 2
    assert float(first) == float(second)
    stream.batches = stream.batches[:1]
    with pytest.raises(ValueError, match="data changed between two passes: 17 examples in the first, 5 in"):
        ExampleSum(squared_error)(groups, params)


def test_a_second_pass_does_not_trace_again(data, params):
    traces = []

    def counted(params, batch):
        traces.append(batch["x"].shape)
        return squared_error(params, batch)

    total = ExampleSum(counted)
    total(grouped(batched(data, 5)), params)
    assert sorted(traces) == [(2, 3), (5, 3)]
    total(grouped(batched(data, 5)), 2 * params)
    total(grouped(batched(jax.tree.map(lambda x: x + 1, data), 5)), params)
    assert len(traces) == 2


@pytest.mark.parametrize(
    "make", [lambda d: (b for b in [d]), lambda d: iter([d]), lambda d: zip([d], strict=True)]
)
def test_iterators_that_run_out_are_refused(make, data, params):
    with pytest.raises(ValueError, match=r"iterable more than once.*batched\(arrays"):
        grouped(make(data))
    with pytest.raises(ValueError, match="iterable more than once"):
        loss_statistics(squared_error, params, make(data))


def test_not_iterable_at_all_is_refused():
    with pytest.raises(ValueError, match="iterable more than once, got int"):
        grouped(3)


@pytest.mark.parametrize("empty", [[], (), Stream([])])
def test_no_batches_are_refused(empty, params):
    with pytest.raises(ValueError, match=r"batches (is empty|hold no examples)"):
        loss_statistics(squared_error, params, empty)
    with pytest.raises(ValueError, match=r"batches (is empty|hold no examples)"):
        ExampleSum(squared_error)(grouped(empty), params)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (np.zeros((0, 3)), "no examples"),
        ({"x": np.zeros((4, 2)), "y": np.zeros(3)}, r"same number of examples.*\(4, 2\).*\(3,\)"),
        ({"x": np.zeros((4, 2)), "scale": 1.0}, r"leading example axis.*\(\)"),
        (3.0, "leading example axis"),
        ({}, "leading example axis"),
        (None, "leading example axis"),
    ],
)
def test_unusable_arrays_are_refused(arrays, message):
    with pytest.raises(ValueError, match=message):
        batched(arrays, 2)


@pytest.mark.parametrize("batch_size", [0, -1, 2.0, "2", None, True, np.float32(2)])
def test_unusable_batch_sizes_are_refused(batch_size):
    with pytest.raises(ValueError, match=r"batch_size must be an integer of at least 1, got"):
        batched(np.zeros(4), batch_size)


@pytest.mark.parametrize(
    "batch",
    [{"x": np.zeros((4, 3)), "y": np.zeros(3)}, {"x": np.zeros((4, 3)), "y": 1.0}, {"x": 2.0, "y": 1.0}],
)
def test_unusable_batches_in_a_list_are_refused(batch, data):
    with pytest.raises(ValueError, match=r"same number of examples|leading example axis"):
        grouped([data, batch])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_is_refused_and_its_batch_named(value, data, params):
    data["y"][12] = value
    with pytest.raises(ValueError, match="not finite in batch 2"):
        loss_statistics(squared_error, params, batched(data, 5))


@pytest.mark.parametrize("batch_size", [17, 5])
def test_a_loss_that_is_not_a_scalar_is_refused(batch_size, data, params):
    with pytest.raises(ValueError, match="must return a scalar"):
        loss_statistics(lambda p, b: (b["x"] @ p - b["y"]) ** 2, params, batched(data, batch_size))
