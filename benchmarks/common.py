"""What all benchmarks share: where results go, and the machine they were measured on."""

import platform
from pathlib import Path
from typing import Any

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
