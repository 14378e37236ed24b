"""Limits layer by layer. Oracle: NumPy on the blocks of the dense Hessian of one flat vector."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import jaxlimit

KEY = jax.random.key(0)
EPS = 0.3


@pytest.fixture(scope="module")
def problem():
    """The curvature of a network of three kernels, its dense Hessian, and which rows are whose; float64."""
    with jax.enable_x64():
        rng = np.random.default_rng(0)
        shapes = {"in": (4, 6), "mid": (6, 5), "out": (5, 2)}
        params = {
            name: {"kernel": jnp.asarray(rng.normal(0, 1, shape)), "bias": jnp.zeros(shape[1])}
            for name, shape in shapes.items()
        }
        data = jnp.asarray(rng.normal(0, 1, (40, 4))), jnp.asarray(rng.normal(0, 1, (40, 2)))

        def loss(p, batch):
            hidden = batch[0]
            for name in ("in", "mid"):
                hidden = jnp.tanh(hidden @ p[name]["kernel"] + p[name]["bias"])
            return jnp.mean((hidden @ p["out"]["kernel"] + p["out"]["bias"] - batch[1]) ** 2)

        kernels = {name: p["kernel"] for name, p in params.items()}
        flat, back = ravel_pytree(kernels)
        whole = {**params}

        def of_flat(w):
            return loss({n: {**whole[n], "kernel": x} for n, x in back(w).items()}, data)

        dense, gradient = np.asarray(jax.hessian(of_flat)(flat)), np.asarray(jax.grad(of_flat)(flat))
        ends = np.cumsum([0, *(x.size for x in kernels.values())])
        rows = {name: np.arange(*ends[i : i + 2]) for i, name in enumerate(kernels)}
        curvature = jaxlimit.hessian(loss, params, jaxlimit.batched(data, 40))
        yield curvature, dense, gradient, np.asarray(flat), rows


def width_by_numpy(block, w, order):
    """The last n / D with n <= sum of |lambda| / (|lambda| + 2 eps / R^2), complemented: see theory.md."""
    values, dim = np.abs(np.linalg.eigvalsh(block)), len(w)
    radii = np.sqrt(np.cumsum(w[order] ** 2))
    within = [n for n in range(1, dim + 1) if n <= np.sum(1 / (1 + values * radii[n - 1] ** 2 / (2 * EPS)))]
    return max(within, default=0) / dim


def one_shot_by_numpy(block, gradient, w, order):
    """The last n before the quadratic model of the loss first exceeds eps."""
    for n in range(1, len(w) + 1):
        removed = np.zeros_like(w)
        removed[order[:n]] = w[order[:n]]
        if -gradient @ removed + removed @ block @ removed / 2 > EPS:
            return (n - 1) / len(w)
    return 1.0


@pytest.mark.parametrize("scored", [False, True])
def test_limits_are_those_of_the_blocks(problem, scored):
    curvature, dense, gradient, w, rows = problem
    scores = None
    ranking = np.abs(w)
    if scored:
        ranking = np.random.default_rng(1).random(w.size)
        scores = {
            name: {"kernel": ranking[rows[name]].reshape(x["kernel"].shape), "bias": None}
            for name, x in curvature.weights.items()
        }
    with jax.enable_x64():
        found = jaxlimit.layer_limits(
            curvature, KEY, loss_tolerance=EPS, which=["one_shot", "width"], scores=scores
        )
    assert list(found) == ["in.kernel", "mid.kernel", "out.kernel"]
    for name, i in rows.items():
        limit, block = found[f"{name}.kernel"], dense[np.ix_(i, i)]
        order = np.argsort(ranking[i])
        assert limit.width.value == pytest.approx(width_by_numpy(block, w[i], order), abs=1e-9)
        assert limit.one_shot.value == pytest.approx(
            one_shot_by_numpy(block, gradient[i], w[i], order), abs=1e-9
        )
        assert limit.dim == len(i)


def test_arrays_are_put_together_and_left_out(problem):
    curvature, dense, gradient, w, rows = problem
    told = []

    def layer_of(path, leaf):
        return {"in": "outer", "out": "outer", "mid": None}[path[0].key]

    with jax.enable_x64():
        found = jaxlimit.layer_limits(
            curvature,
            KEY,
            loss_tolerance=EPS,
            layer_of=layer_of,
            which=["one_shot"],
            progress=lambda name, state: told.append((name, state.num_matvecs)),
        )
    i = np.concatenate([rows["in"], rows["out"]])
    expected = one_shot_by_numpy(dense[np.ix_(i, i)], gradient[i], w[i], np.argsort(np.abs(w[i])))
    assert list(found) == ["outer"]
    assert found["outer"].one_shot.value == pytest.approx(expected, abs=1e-9)
    assert {name for name, _ in told} == {"outer"}
    assert told[-1][1] == found["outer"].num_matvecs


def test_groups_of_each_layer(problem):
    """Oracle: the limit of the layer asked for alone."""
    options = {"loss_tolerance": EPS, "which": ["one_shot"], "groups": "output_channels"}
    with jax.enable_x64():
        found = jaxlimit.layer_limits(problem[0], KEY, **options)
        alone = problem[0].of(lambda path, leaf: path[0].key == "mid" and path[1].key == "kernel")
        expected = jaxlimit.pruning_limit(alone, KEY, **options)
    assert found["mid.kernel"].one_shot == expected.one_shot
    assert expected.one_shot.value in np.arange(6) / 5


def test_one_table_and_back_from_json(problem):
    with jax.enable_x64():
        found = jaxlimit.layer_limits(problem[0], KEY, loss_tolerance=EPS, which=["width"])
    lines = repr(found).splitlines()
    assert lines[1].split() == ["layer", "weights", "width", "ended"]
    assert lines[-1].startswith(f"for a loss increase of {EPS:.4g}; Hessian; ")
    for line, (name, limit) in zip(lines[2:-1], found.items(), strict=True):
        assert line.split() == [name, str(limit.dim), f"{limit.width.value:.4f}", limit.code]
    again = jaxlimit.LayerLimits.from_json(found.to_json())
    assert repr(again) == repr(found)
    with pytest.raises(ValueError, match="not the values of a PruningLimit"):
        jaxlimit.LayerLimits.from_json({"in": {}})


def test_each_layer_has_a_folder_of_its_own(problem, tmp_path):
    """Lanczos, in which the probes are random: the folders give the same bits."""
    options = {"loss_tolerance": EPS, "which": ["width"], "num_probes": 2, "checkpoint": tmp_path}
    with jax.enable_x64():
        found = jaxlimit.layer_limits(
            problem[0], KEY, layer_of=lambda path, _: f"{path[0].key}/all", **options
        )
        again = jaxlimit.layer_limits(
            problem[0], KEY, layer_of=lambda path, _: f"{path[0].key}/all", **options
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0-in_all", "1-mid_all", "2-out_all"]
    assert repr(found) == repr(again)
    assert found["in/all"].measure.nodes.tobytes() == again["in/all"].measure.nodes.tobytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_of": lambda path, leaf: None}, "layer_of names no layer"),
        ({"layer_of": lambda path, leaf: path[0]}, "must return the name of a layer, or None, got DictKey"),
        ({"which": ["all"]}, "which must name limits"),
        ({"loss_tolerance": 0}, "loss_tolerance must be"),
        ({"scores": {"in": 1.0}}, "scores must have the shapes"),
    ],
)
def test_refusals_come_before_work(problem, monkeypatch, options, message):
    monkeypatch.setattr("jaxlimit.limits.layers.pruning_limit", None)
    with pytest.raises(ValueError, match=message):
        jaxlimit.layer_limits(problem[0], KEY, **{"loss_tolerance": EPS, **options})


def test_a_layer_without_weights_is_refused_by_name(monkeypatch):
    monkeypatch.setattr("jaxlimit.limits.layers.pruning_limit", None)
    params = {"a": jnp.ones((2, 1)), "dead": jnp.zeros((2, 1))}
    curvature = jaxlimit.hessian(
        lambda p, x: jnp.mean((x @ (p["a"] + p["dead"])) ** 2), params, [jnp.ones((3, 2))]
    )
    with pytest.raises(ValueError, match=r"all weights of dead are zero.*Let layer_of return None"):
        jaxlimit.layer_limits(curvature, KEY, loss_tolerance=1.0)
