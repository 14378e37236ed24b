"""One table of ratios out of products.json and spectrum.json: what the page on performance begins with.

    python benchmarks/ratios.py

Nothing is measured here. A product is given in units of a gradient, and by how many times as long the fastest
other library takes for it; a whole Lanczos run by the latter alone. Results are in results/ratios.md.
"""

from collections.abc import Mapping
from typing import Any

import common

OPERATORS = {"hessian": "Hessian", "gauss_newton": "Gauss-Newton"}


def product_cells(row: Mapping[str, Any]) -> tuple[str, str]:
    """In gradients, and the fastest library in units of jaxlimit's time."""
    times = row["seconds"]
    fastest = min(times[name] for name in row["versions"])
    return f"{times['jaxlimit'] / times['gradient']:.1f}", f"{fastest / times['jaxlimit']:.1f}"


def run_cell(row: Mapping[str, Any]) -> str:
    """The fastest library in units of jaxlimit's time."""
    times = row["seconds"]
    return f"{min(value for name, value in times.items() if name != 'jaxlimit') / times['jaxlimit']:.1f}"


def table(products: list[dict[str, Any]], runs: list[dict[str, Any]]) -> str:
    """Ratios of each network, without huge pages."""
    steps = sorted({row["steps"] for row in runs})
    heads = ["network"]
    for name in OPERATORS.values():
        heads += [f"{name} product in gradients", "fastest other"]
    heads += [f"fastest other, {count} steps" for count in steps]
    usual = [row for row in products if not row["huge_pages"] and row["precision"] == "highest"]
    lines = []
    for network in dict.fromkeys(row["network"] for row in usual):
        cells = [network]
        for operator in OPERATORS:
            cells += next(
                product_cells(r) for r in usual if (r["network"], r["operator"]) == (network, operator)
            )
        for count in steps:
            found = [run_cell(row) for row in runs if (row["network"], row["steps"]) == (network, count)]
            cells += found or [""]
        lines.append(cells)
    return common.markdown(heads, lines)


def main() -> None:
    products, spectrum = common.read_document("products"), common.read_document("spectrum")
    common.write_table("ratios", table(products["rows"], spectrum["peers"]))


if __name__ == "__main__":
    main()
