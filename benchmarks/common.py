"""What all benchmarks share: where results go, and the machine they were measured on."""

import platform
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlimit import record

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """The machine and the versions, for the results of this process."""
    return {"device": record.device() | {"processor": processor()}, "versions": record.versions()}


def processor() -> str:
    """The name of the CPU, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def fast_on_cpu(network: nnx.Module) -> nnx.Module:
    """The network, with `convolve` for its convolutions where it has any; changed in place."""
    for convolution in getattr(network, "convolutions", ()):
        convolution.conv_general_dilated = convolve
    return network


def convolve(images: jax.Array, kernel: jax.Array, *_: Any, **__: Any) -> jax.Array:
    """Convolution without padding, as one matrix product for each row of the kernel.

    On a CPU, the gradient of XLA's own is ten times slower in a loop than outside (jax-ml/jax#12868).
    """
    rows, columns, channels = kernel.shape[0], kernel.shape[1], kernel.shape[3]
    height, width = images.shape[1] - rows + 1, images.shape[2] - columns + 1
    patches = jnp.concatenate([images[:, :, j : j + width] for j in range(columns)], axis=-1)
    products = [patches[:, i : i + height] @ kernel[i].reshape(-1, channels) for i in range(rows)]
    return sum(products[1:], start=products[0])
