"""Which folder of the package imports which? The picture of the page "How the code is laid out".

    python benchmarks/layout.py

Imports are read from the source text, those within functions and for type checkers too. A folder may import
itself and every folder that stands before it in `FOLDERS`; `upward_imports` lists the imports that break this
rule, and tests/test_layout.py wants none. The figure is docs/figures/layout.png.
"""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import common
import matplotlib.pyplot as plt

from jaxlimit.plots import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PACKAGE = Path(__file__).parents[1] / "jaxlimit"
FIGURE = common.FIGURES / "layout.png"
# From the foundation up: a folder imports none that stands after it.
FOLDERS = (
    "core",
    "data",
    "models",
    "curvature",
    "spectrum",
    "geometry",
    "measuring",
    "training",
    "reference",
    "limits",
    "pruning",
    "baselines",
    "plots",
    "application",
    "experiments",
    "cli",
)
# Cells of the figure that a row of module names may take before it breaks.
CHARACTERS = 84


class Import(NamedTuple):
    """One import statement between two modules of the package."""

    module: str
    imported: str

    @property
    def folders(self) -> tuple[str, str]:
        """The importing and the imported folder."""
        return folder_of(self.module), folder_of(self.imported)


def folder_of(module: str) -> str:
    """The folder of a module, or the module itself where it stands alone.

    Examples:
        >>> folder_of("jaxlimit.spectrum.lanczos"), folder_of("jaxlimit")
        ('spectrum', 'jaxlimit')
    """
    return module.split(".")[1] if "." in module else module


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports() -> Iterator[Import]:
    """Every import of one module of the package by another."""
    known = modules()
    for module, path in known.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "jaxlimit":
                for alias in node.names:  # a module of the folder, or a name in it
                    name = f"{node.module}.{alias.name}"
                    yield Import(module, name if name in known else str(node.module))
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.split(".")[0] == "jaxlimit":
                        yield Import(module, alias.name)


def upward_imports() -> list[Import]:
    """Imports of a folder that stands above the importing one.

    The top of the package re-exports names of the folders up to `limits`: to import from it counts as an
    import of `limits`.
    """

    def level(folder: str) -> int:
        return FOLDERS.index("limits" if folder == "jaxlimit" else folder)

    return [
        each
        for each in imports()
        if each.module != "jaxlimit" and level(each.folders[1]) > level(each.folders[0])
    ]


def draw(axes: "Axes") -> None:
    """One row a folder: its modules, and a dot for every folder that it imports, larger for more imports."""
    counts = Counter(each.folders for each in imports())
    names = {folder: [m for m in modules() if folder_of(m) == folder] for folder in FOLDERS}
    lines = {
        folder: sum(len(modules()[m].read_text().splitlines()) for m in names[folder]) for folder in FOLDERS
    }
    height = len(FOLDERS)
    for row, folder in enumerate(FOLDERS):
        axes.axhspan(row - 0.5, row + 0.5, color="#f4f4f4" if row % 2 else "white", zorder=0)
        axes.text(-0.8, row, folder, ha="right", va="center", fontweight="bold")
        axes.text(height - 0.2, row, f"{lines[folder]:,}", ha="right", va="center", color=style.GREY)
        axes.text(height + 0.1, row, _shown(names[folder]), va="center", fontsize=7, color="#333333")
        for column, other in enumerate(FOLDERS):
            if (number := counts[folder, other]) and folder != other:
                colour = style.BLUE if column < row else style.ORANGE
                axes.scatter(column, row, s=12 + 6 * number, color=colour, zorder=2)
    axes.plot([-0.5, height - 1.5], [-0.5, height - 1.5], color=style.GREY, linewidth=0.8, zorder=1)
    axes.set(xlim=(-0.6, height + 12.5), ylim=(-0.6, height - 0.4), yticks=[])
    axes.set_xticks(range(height - 1), FOLDERS[:-1], rotation=60, ha="right", rotation_mode="anchor")
    axes.text(height - 0.2, height - 0.2, "lines", ha="right", color=style.GREY)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _shown(modules: list[str]) -> str:
    """The names of modules without their folder, in lines of `CHARACTERS`."""
    rows = [""]
    for name in sorted(module.split(".")[-1] for module in modules if module.count(".") > 1):
        if len(rows[-1]) + len(name) > CHARACTERS:
            rows.append("")
        rows[-1] += f"{name}  "
    return "\n".join(row.strip() for row in rows)


def main() -> None:
    """Draws the figure."""
    with plt.rc_context({**style.STYLES, "axes.grid": False}):
        figure, axes = plt.subplots(figsize=(12, 7.4), layout="constrained")
        draw(axes)
        figure.savefig(FIGURE, dpi=150, metadata={"Software": None})


if __name__ == "__main__":
    main()
