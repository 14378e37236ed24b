"""A report as one HTML page without external resources: sentences, tables, pictures, how it was made."""

import base64
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

from jaxlimit.limits.estimate import LIMITS

MEANINGS = {
    "one_shot": "How far the smallest weights can be set to zero, all others staying as they are, by the "
    "quadratic model of the loss.",
    "width": "The paper's limit: how sparse some network within the tolerance may be, if the kept weights "
    "lie in no special direction, by the length alone of what is removed.",
    "cone": "The same, by the length and the direction of what is removed.",
    "readjusted": "How far the smallest weights can be set to zero when all others may take new values, by "
    "the quadratic model of the loss.",
    "Hessian |H|": "The second derivative of the loss, every negative eigenvalue taken as positive.",
    "Gauss-Newton": "The second derivative without the network's own curvature: its limits are higher.",
    "predicted": "A limit computed at the trained weights, before any network was pruned.",
    "attained": "The sparsity of a pruned network that was really built here, and is within the tolerance.",
    "certified": "The sparsity up to which networks pass a statistical test on data they have not seen.",
}
"""What the words of a report mean, in a sentence each."""


class Picture(NamedTuple):
    """A figure as PNG: as it is, and in its narrow form for a phone."""

    wide: bytes
    narrow: bytes


class Table(NamedTuple):
    """A table of the page.

    Attributes:
        heading: above it.
        columns: their names.
        groups: rows of cells, by the title of their group.
        notes: paragraphs below it.
    """

    heading: str
    columns: Sequence[str]
    groups: Sequence[tuple[str, Sequence[Sequence[str]]]]
    notes: Sequence[str]


def render(
    *,
    title: str,
    sentences: Sequence[str],
    tables: Sequence[Table],
    captions: Mapping[str, str],
    pictures: Mapping[str, Picture],
    details: Mapping[str, Mapping[str, Any]],
    command: str,
) -> str:
    """The page.

    Args:
        title: of the page.
        sentences: that open it.
        tables: in their order.
        captions: of the pictures, by name.
        pictures: by name, in the order shown.
        details: names and values, by heading.
        command: that made it.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    environment.filters["shown"] = _shown
    template = resources.files("jaxlimit.application").joinpath("report.html.jinja").read_text()
    return environment.from_string(template).render(
        title=title,
        sentences=sentences,
        tables=tables,
        captions=captions,
        pictures={
            name: {"wide": _encoded(both.wide), "narrow": _encoded(both.narrow)}
            for name, both in pictures.items()
        },
        details=details,
        command=command,
        meanings=MEANINGS,
    )


def _encoded(png: bytes) -> str:
    return base64.b64encode(png).decode()


def details(document: Mapping[str, Any]) -> dict[str, Any]:
    """What limit.json knows beside the answers, by heading."""
    return {
        "Hessian": _curvature(document, "hessian"),
        "Gauss-Newton": _curvature(document, "gauss_newton"),
        **{name: document[name] for name in ("seconds", "versions", "device")},
    }


def _curvature(document: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What it knows of a curvature beside its limits."""
    found = document["limits"].get(name, {})
    return {key: value for key, value in found.items() if key not in (*LIMITS, "reference")}


def _shown(value: Any) -> str:
    if value is None:
        return "default"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return (
        f"{value:.5g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
    )
