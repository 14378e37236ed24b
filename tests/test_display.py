"""Results show themselves: text that fits a terminal, HTML that a browser's parser reads back."""

from dataclasses import replace
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlimit
from jaxlimit import plots
from jaxlimit.core.display import MOST_ROWS, View, few
from jaxlimit.measuring.sweeps import Sweep


def mean_square(params, x):
    return distance(output(params, x), x)


def output(params, x):
    return x @ params["a"]


def distance(outputs, x):
    return jnp.mean((outputs - 1) ** 2) / 2


PARAMS = {"a": jnp.array([[1.0], [1.0], [0.9]])}
BATCHES = jaxlimit.batched(jnp.eye(3), batch_size=2)


class Cells(HTMLParser):
    """The texts of a page's cells, row by row."""

    def __init__(self, page):
        super().__init__()
        self.rows, self.inside = [], False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data):
        if self.inside:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def shown():
    curvature = jaxlimit.hessian(mean_square, PARAMS, BATCHES)
    limit = jaxlimit.pruning_limit(curvature, jax.random.key(0), loss_tolerance=0.2)

    attained = jaxlimit.attained_limit(output, distance, PARAMS, BATCHES, loss_tolerance=0.2)

    def wrong(params, x):
        return x @ params["a"][:, 0] > 2

    return {
        "curvature": curvature,
        "batches": BATCHES,
        "limit": limit,
        "measure": limit.measure,
        "curve": limit.curve(),
        "sensitivity": limit.sensitivity(),
        "layers": jaxlimit.layer_limits(curvature, jax.random.key(0), loss_tolerance=0.2),
        "attained": attained,
        "pruned": attained.pruned,
        "certificate": jaxlimit.certify(wrong, [(0.0, PARAMS)], BATCHES, bound=0.1),
        "sweep": Sweep(np.arange(401) / 400, {"loss": np.arange(401.0), "error": np.zeros(401)}),
    }


def test_no_result_prints_more_than_a_screen(shown):
    for name, result in shown.items():
        lines = repr(result).splitlines()
        assert len(lines) <= 25, name
        assert max(map(len, lines)) <= 79, name


def test_html_shows_the_cells_of_the_text(shown):
    for name, result in shown.items():
        rows = Cells(result._repr_html_()).rows
        text = " ".join(repr(result).split())
        for row in rows:
            assert " ".join(" ".join(row).split()) in text, name
    assert len(Cells(shown["sweep"]._repr_html_()).rows) == 1 + MOST_ROWS


def test_the_limit_says_that_three_weights_have_no_window(shown):
    assert "3 weights are too few for a sharp transition" in " ".join(repr(shown["limit"]).split())


def test_names_are_escaped():
    view = View("a < b", ("<i>", "x & y"), [("<script>", "1")], ["<b>"])
    assert Cells(view.html()).rows == [["<i>", "x & y"], ["<script>", "1"]]
    assert "<script>" not in view.html()
    assert "<b>" not in view.html()


def test_of_many_rows_the_ends_are_shown():
    rows = [(str(i), "") for i in range(400)]
    found = few(rows)
    assert len(found) == MOST_ROWS
    assert (found[0], found[-1]) == (rows[0], rows[-1])


def test_the_attained_network_is_among_the_rows_however_many_were_built(shown):
    attained, built = shown["attained"], 100
    for i in range(1, built):
        others = [(s / built, np.inf) for s in range(built) if s != i]
        found = replace(attained, sparsity=i / built, tried=(*others, (i / built, attained.dense_loss)))
        assert f"{i / built:.4f} {attained.dense_loss:>9.4g}  within" in repr(found)


def test_an_estimate_prints_as_its_interval(shown):
    assert repr(shown["limit"].cone) == str(shown["limit"].cone)


def test_a_narrow_figure_has_its_legend_in_one_column(shown):
    figure = plots.plot_limit(shown["limit"])
    wide, _ = figure.get_size_inches()
    plots.narrow(figure)
    width, _ = figure.get_size_inches()
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert width < 3.5 < wide
    assert legend.get_window_extent().width <= figure.bbox.width
    lefts = {round(text.get_window_extent().x0) for text in legend.get_texts()}
    assert len(lefts) == 1
