"""What the numbers of a run were computed with: versions of the packages, and the device."""

import os
import platform
from importlib.metadata import version
from typing import Any

import jax

from jaxlimit.core.version import __version__


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that decide the numbers."""
    # Not that of an installed package: a source tree need not be installed.
    own = {"python": platform.python_version(), "jaxlimit": __version__}
    return own | {name: version(name) for name in ("jax", "jaxlib", "numpy", "scipy", "flax", "optax")}


def device() -> dict[str, Any]:
    """The devices, the cores and the operating system that the numbers are computed on."""
    devices = jax.devices()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "platform": devices[0].platform,
        "kind": devices[0].device_kind,
        "count": len(devices),
        "cpu_cores": cores,
        "system": f"{platform.system()} {platform.machine()}",
    }
