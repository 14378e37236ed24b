"""The same limits on one device, on eight of a mesh, and on eight that two processes share.

The oracle is the same code on one device, with arrays that nobody placed. The eight devices are parts of
this machine's processor, in processes of their own: `eight_devices.py`, which also looks at the product.
"""

import itertools
import json
import os
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

import eight_devices
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlimit.core import memory
from jaxlimit.core.sharding import ExampleSharding, example_sharding, place, sharding_like
from jaxlimit.data import load_digits

KERNELS = {"w0": [1, 64, 48], "w1": [1, 48, 24], "w2": [1, 24, 16]}
# Parts of the examples and of the kernels.
MESHES = pytest.mark.parametrize(
    ("data", "model"),
    [pytest.param(4, 2, marks=pytest.mark.slow), pytest.param(1, 8, marks=pytest.mark.nightly)],
)


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    """A trained network of three layers and 1,024 digits; 16 classes, so that 8 divides every kernel."""
    digits = load_digits()
    labels = np.eye(16, dtype=np.float32)[digits.train_labels[:1024]]
    arrays = {"x": digits.train_images[:1024], "y": labels}
    rng, params = np.random.default_rng(0), {}
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise((64, 48, 24, 16))):
        params[f"w{i}"] = rng.standard_normal((fan_in, fan_out)).astype(np.float32) / np.sqrt(fan_in)
        params[f"b{i}"] = np.zeros(fan_out, np.float32)

    def objective(params):
        l1 = sum(jnp.sum(jnp.abs(params[name])) for name in KERNELS)
        return eight_devices.loss(params, arrays) + 1e-3 * l1

    optimizer = optax.adam(0.01)

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(objective)(params), state)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=300)
    path = tmp_path_factory.mktemp("sharding") / "problem.npz"
    np.savez(path, **params, **arrays)
    return path


@cache
def report(problem, *arguments, processes=1):
    """What `eight_devices.py` prints."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={8 // processes}"
    environment = os.environ | {"XLA_FLAGS": flags}
    command = [sys.executable, "-W", "error", eight_devices.__file__, str(problem), *map(str, arguments)]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []
    for number in range(processes):
        process = ["--process", str(number), str(processes), str(port)] if processes > 1 else []
        started.append(
            subprocess.Popen(
                command + process,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    outputs = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0] * processes, outputs[0][1][-3000:]
    return json.loads(outputs[0][0].splitlines()[-1])


def assert_same(many, one, model, kind):
    """To rounding; and a vector lies as the weights do."""
    assert many["mean"] == pytest.approx(one["mean"], rel=1e-5)
    assert many["batch_std"] == pytest.approx(one["batch_std"], rel=1e-4)
    assert many[kind]["apart"] == pytest.approx(one[kind]["product"], rel=1e-5)
    for quantity in ("product", "gradient"):
        assert many[kind][quantity] == pytest.approx(one[kind][quantity], rel=1e-5)
    assert many[kind]["limits"] == pytest.approx(one[kind]["limits"], abs=3e-4)
    parts = {"w0": [1, 64, 48 // model], "w1": [1, 48 // model, 24], "w2": [1, 24, 16 // model]}
    assert many[kind]["parts"] == many[kind]["parts apart"] == many[kind]["offloaded"]["parts"] == parts
    assert many[kind]["offloaded"]["difference"] < 1e-4


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
@MESHES
def test_many_devices_give_the_same_limits(problem, data, model, kind):
    assert_same(report(problem, "--mesh", data, model), report(problem), model, kind)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
def test_a_product_is_one_reduction_where_only_the_examples_are_divided(problem, kind):
    assert_same(report(problem, "--mesh", 8, 1), report(problem), 1, kind)
    found = report(problem, "--mesh", 8, 1)[kind]["collectives"]
    assert found == [["all-reduce", list(KERNELS.values())]]


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
@MESHES
def test_no_vector_is_gathered_where_the_kernels_are_divided(problem, kind, data, model):
    """Activations are summed over devices, as in every network divided so; of the vectors parts at most."""
    found = report(problem, "--mesh", data, model)[kind]["collectives"]
    assert {name for name, _ in found} == {"all-reduce"}
    parts = list(report(problem, "--mesh", data, model)[kind]["parts"].values())
    vectors = [shapes for _, shapes in found if any(shape in parts for shape in shapes)]
    assert vectors == ([parts] if data > 1 else [])
    for _, shapes in found:
        assert not any(shape in KERNELS.values() for shape in shapes)


@pytest.mark.nightly
@pytest.mark.parametrize(("data", "model", "kind"), [(4, 2, "hessian"), (1, 8, "gauss_newton")])
def test_two_processes_give_the_same_limits_and_go_on_from_a_checkpoint(problem, tmp_path, data, model, kind):
    arguments = ("--mesh", data, model, "--kinds", kind, "--checkpoint", tmp_path)
    first = report(problem, *arguments, processes=2)
    assert_same(first, report(problem), model, kind)
    written = {path: path.stat().st_mtime_ns for path in Path(tmp_path).rglob("*.npz")}
    assert written
    report.cache_clear()  # the second time in earnest
    assert report(problem, *arguments, processes=2) == first
    assert {path: path.stat().st_mtime_ns for path in Path(tmp_path).rglob("*.npz")} == written


@pytest.mark.parametrize(("allowed", "expected"), [("1048576\n", 2**20), ("max\n", None)])
def test_a_container_may_use_what_it_is_allowed(allowed, expected, tmp_path, monkeypatch):
    machine = memory.device_memory() * jax.local_device_count()
    file = tmp_path / "memory.max"
    file.write_text(allowed)
    monkeypatch.setattr(memory, "CONTAINER_MEMORY", file)
    assert memory.device_memory() * jax.local_device_count() == pytest.approx(expected or machine, abs=8)


def test_examples_divided_in_different_ways_are_refused():
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    x = place(np.ones((4, 2)), NamedSharding(mesh, PartitionSpec("data")))
    assert example_sharding(x) is None  # one part
    assert ExampleSharding(mesh, ("data",)).num_shards == 1
    assert sharding_like(jnp.ones(3)) is None
    assert sharding_like(x, new_axes=2, without=1).spec == PartitionSpec(None, None)
