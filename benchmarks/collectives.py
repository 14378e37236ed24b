"""What passes between devices in a compiled program, read from its text."""

import math
import re
from collections import Counter

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
ITEM_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}
COMPUTATION = re.compile(r"^(ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
COLLECTIVE = re.compile(rf"= (?P<results>.*?) (?P<kind>{'|'.join(KINDS)})\(")
ARRAY = re.compile(r"(?P<kind>\w+)\[(?P<shape>[\d,]*)\]")
CALLED = re.compile(
    r"(?:body|calls|to_apply|true_computation|false_computation)=%?(?P<name>[\w.\-]+)"
    r"|branch_computations=\{(?P<names>[^}]*)\}"
)
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def collective_bytes(text: str, most_trips: int | None = None) -> Counter[str]:
    """Bytes that collectives of each kind leave on one device in one run of the program.

    One in a loop counts as often as the loop runs. Of branches all count, as if each were taken.

    Args:
        text: `compiled.as_text()`, of XLA's compiler for CPUs.
        most_trips: how often a loop runs at most of which the text does not tell it.

    Raises:
        ValueError: a loop with collectives of which the text does not tell how often it runs, or a collective
            in two halves, whose results hold more than what passes.
    """
    bodies, entry = computations(text)
    return _bytes_of(entry, bodies, most_trips)


def _bytes_of(name: str, bodies: dict[str, list[str]], most_trips: int | None) -> Counter[str]:
    found: Counter[str] = Counter()
    for line in bodies[name]:
        if re.search(rf" ({'|'.join(KINDS)})-start\(", line):
            raise ValueError(f"a collective is in two halves: {line.strip()[:100]}")
        match = COLLECTIVE.search(line)
        if match:
            found[match["kind"]] += sum(_array_bytes(x) for x in ARRAY.finditer(match["results"]))
            continue  # what it applies is a sum
        inner: Counter[str] = Counter()
        for called in CALLED.finditer(line):
            for part in (called["name"] or called["names"]).split(","):
                inner += _bytes_of(part.strip().lstrip("%"), bodies, most_trips)
        if inner:
            found += Counter({kind: size * _trips(line, most_trips) for kind, size in inner.items()})
    return found


def _trips(line: str, most: int | None) -> int:
    if " while(" not in line:
        return 1
    known = TRIPS.search(line)
    if known is None and most is not None:
        return most
    if known is None:
        raise ValueError(f"the text does not tell how often a loop runs: {line.strip()[:100]}")
    return int(known[1])


def _array_bytes(array: re.Match[str]) -> int:
    return ITEM_BYTES[array["kind"]] * math.prod(int(n) for n in array["shape"].split(",") if n)


def computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation of a module, and the name of the one that is run."""
    bodies: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        head = COMPUTATION.match(line)
        if head:
            name = head["name"]
            bodies[name] = []
            entry = name if head[1] else entry
        elif name:
            bodies[name].append(line)
    return bodies, entry
