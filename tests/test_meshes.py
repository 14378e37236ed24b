"""Data on a mesh with explicit axes, as `jax.make_mesh` makes them, or automatic ones: right numbers on each.

The oracle is a dense Hessian of all examples in float64, on one device. The devices are parts of this
machine's processor, in a process of their own: `meshes.py`. A slow test; `test_border.py` draws among such
meshes, too.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxlimit
from jaxlimit.core.constraints import places_itself
from jaxlimit.core.placement import placed
from jaxlimit.core.sharding import ExampleSharding


@pytest.mark.parametrize(
    ("wanted", "count"),
    [
        pytest.param("kernels divided|over", 6, marks=pytest.mark.nightly),
        pytest.param("", 27, marks=pytest.mark.nightly),
    ],
)
def test_where_data_and_kernels_lie_does_not_matter(wanted, count):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    script = Path(__file__).with_name("meshes.py")
    command = [sys.executable, "-W", "error", str(script), wanted]
    done = subprocess.run(
        command, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    cases = json.loads(done.stdout)
    assert len(cases) == count
    for case, values in cases.items():
        for name, value in values["found"].items():
            np.testing.assert_allclose(
                value, values["true"][name], rtol=2e-5, atol=1e-6, err_msg=f"{case}: {name}"
            )


def test_shard_map_in_a_loss_on_explicit_axes_is_refused():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,))
    spec = PartitionSpec("data")
    fn = jax.shard_map(lambda x: 2 * x, mesh=mesh, in_specs=spec, out_specs=spec)
    x = jax.device_put(jnp.ones(4), NamedSharding(mesh, spec))
    with pytest.raises(ValueError, match=r"shard_map on a mesh with explicit axes.* axis_types=.*Auto"):
        places_itself(fn, ExampleSharding(mesh, ("data",)), x)


@pytest.fixture(scope="module")
def explicit():
    """A mesh of one device, whose axes are part of the types of arrays all the same."""
    return jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)


def test_a_mesh_that_is_set_changes_no_number(explicit):
    rng = np.random.default_rng(0)
    data, weights = rng.standard_normal((10, 3), np.float32), rng.standard_normal((3, 2), np.float32)

    def loss(w, x):
        return jnp.mean(jnp.tanh(x @ w) ** 2)

    with jax.set_mesh(explicit):
        placed = jax.device_put(data, PartitionSpec("data"))
        kernel = jax.device_put(weights, PartitionSpec(None, "model"))
        curvature = jaxlimit.hessian(loss, kernel, jaxlimit.batched(placed, 5))
        matrix = curvature.dense()
        first = jaxlimit.tridiagonalize(curvature.matvec, curvature.weights, 1).diagonal[0]
    true = np.asarray(jax.hessian(loss)(weights, data)).reshape(6, 6)
    w = weights.ravel()
    np.testing.assert_allclose(matrix, true, atol=1e-5)
    np.testing.assert_allclose(
        [curvature.loss, first], [loss(weights, data), w @ true @ w / (w @ w)], rtol=1e-5
    )


def test_a_function_that_JAX_does_not_trace_on_parts_gets_all_examples(explicit):
    with jax.set_mesh(explicit):
        x = jax.device_put(jnp.ones((4, 2)), PartitionSpec("data"))
        sharding = ExampleSharding(explicit, ("data",))

        def stated(w, x):
            return jnp.sum(jnp.einsum("nd,d->n", x, w, out_sharding=PartitionSpec("data")))

        assert places_itself(stated, sharding, jnp.ones(2), x)
        assert not places_itself(lambda w, x: jnp.sum(x @ w), sharding, jnp.ones(2), x)


@pytest.mark.parametrize("form", ["cut", "list", "stream"])
def test_whatever_holds_the_batches_a_loss_that_places_its_arrays_gets_all_examples(explicit, form):
    x = jax.device_put(jnp.ones((4, 2)), NamedSharding(explicit, PartitionSpec("data")))
    batches = {"cut": jaxlimit.batched(x, 4), "list": [x], "stream": lambda: iter([x])}[form]

    def stated(w, x):
        return jnp.sum(jax.sharding.reshard(x, NamedSharding(explicit, PartitionSpec("data"))) @ w)

    def plain(w, x):
        return jnp.sum(x @ w)

    for loss, axis in ((stated, None), (plain, "data")):
        (group,) = placed(loss, batches, jnp.ones(2))
        assert group.sharding.spec[1] == axis


def test_arrays_that_lie_elsewhere_than_on_the_mesh_that_is_set_are_refused(explicit):
    other = jax.make_mesh((1,), ("batch",), axis_types=(AxisType.Explicit,))
    x = jax.device_put(jnp.ones((4, 2)), NamedSharding(other, PartitionSpec("batch")))
    with jax.set_mesh(explicit):
        for params, data in ((jnp.ones((2, 1)), x), (x, np.ones((2, 4), np.float32))):
            with pytest.raises(ValueError, match=r"lies on the mesh batch=1 \(Explicit\), but jax.set_mesh"):
                jaxlimit.loss_statistics(lambda w, x: jnp.mean(x @ w), params, [data])
