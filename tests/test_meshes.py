"""Data on a mesh with explicit axes, as `jax.make_mesh` makes them, or automatic ones: as on one device.

The oracle is the same code on one device. The devices are parts of this machine's processor, in a process of
their own: `meshes.py`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np


def test_the_kind_of_axes_does_not_matter():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    script = Path(__file__).with_name("meshes.py")
    command = [sys.executable, "-W", "error", str(script)]
    done = subprocess.run(
        command, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    expected = found.pop("one device")
    assert len(found) == 8
    for case, values in found.items():
        for name, value in values.items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-5, err_msg=f"{case}: {name}")
