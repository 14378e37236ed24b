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

from jaxlimit.core.constraints import places_itself
from jaxlimit.core.sharding import ExampleSharding


@pytest.mark.slow
def test_where_data_and_kernels_lie_does_not_matter():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    script = Path(__file__).with_name("meshes.py")
    command = [sys.executable, "-W", "error", str(script)]
    done = subprocess.run(
        command, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    cases = json.loads(done.stdout)
    assert len(cases) == 19
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
