"""Figures, table and page of a report, from a run written by hand."""

import base64
import html
import itertools
import re
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlimit
from jaxlimit import plots
from jaxlimit.application import report, run_folder, spectra, stage_answers, stage_sweeps
from jaxlimit.application.columns import read_columns, write_columns
from jaxlimit.core import writing

GRID = np.arange(401) / 400
# Loss exp(20 s) / exp(18) - small: crosses .5 at s = .9 + log(.5) / 20 = .8653.
LOSS = np.exp(20 * (GRID - 0.9))

REFERENCE = {"value": 0.9, "direct": 0.875, "zero_share": 0.25, "num_matvecs": 96}


@pytest.fixture(scope="module")
def limit():
    """A diagonal problem with 64 weights, solved densely."""
    weights = jnp.linspace(0.01, 1.0, 64).reshape(64, 1)
    scales = jnp.geomspace(1e-2, 10, 64)

    def loss(w, rows):
        return jnp.mean((rows @ (w - weights)) ** 2) / 2

    curvature = jaxlimit.hessian(loss, weights, jaxlimit.batched(8 * jnp.diag(scales), 64))
    return jaxlimit.pruning_limit(curvature, jax.random.key(0), loss_tolerance=0.5)


@pytest.fixture(scope="module")
def run(limit, tmp_path_factory):
    """A record whose numbers are known."""
    path = tmp_path_factory.mktemp("spectra") / "spectrum.npz"
    spectra.save_spectrum(path, limit, GRID)
    finetuned = np.full(401, np.nan)
    finetuned[::20] = 0.1 * LOSS[::20]
    columns = {"sparsity": GRID, "train_loss": LOSS, "finetuned_train_loss": finetuned}
    columns |= {f"{name}_accuracy": 1 - GRID**8 for name in ("train", "test")}
    document = {
        "command": "jaxlimit run <digits> & more",
        "loss_tolerance": 0.5,
        "network": {"train_loss": float(LOSS[0]), "test_accuracy": 0.98},
        "limits": {"hessian": limit.to_json() | {"reference": REFERENCE}},
        "measured": {
            "loss": {"value": 0.865, "next": 0.8675},
            "finetuned": {"value": 0.95, "next": 0.955},
            "accuracy": {"value": 0.6, "next": 0.6025},
        },
        "seconds": {"training": 1.25},
        "versions": {"jax": "1.2.3"},
        "device": {"platform": "cpu"},
    }
    kept = {"kept_share": {"kernel": 0.25, "head": 0.0}}
    numbers = {"sparsity": 0.97, "loss": 0.4, "dense_loss": float(LOSS[0]), "num_products": 9.0}
    status = {"code": "bracketed", "status": "bracketed: by hand."}
    document["attained"] = {
        "sparsity": 0.97,
        "tried": [(0.5, 0.1), (0.97, 0.4), (0.99, None)],
        **{"loss_tolerance": 0.5, "tolerance": 0.005, "dense_loss": float(LOSS[0]), "unpruned_loss": None},
        **{"pruned": {**numbers, **status, **kept, "num_steps": 3}, "num_products": 9.0},
        **status,
    }
    document["certificate"] = None
    document["pruned"] = {
        **{"bytes": 1000, "dense_compressed_bytes": 900, "compressed_bytes": 300, "vanished": ["head"]},
        **kept,
    }
    document["attained_error"] = 0.03
    config = {"preset": {"name": "hand-made", "epochs": 3}, "options": {"seed": 0, "loss_tolerance": None}}
    return run_folder.Record(config, document, columns, {"hessian": spectra.load_spectrum(path)})


def told(run):
    """What the terminal shows of a run."""
    assessment = stage_answers.assessment_of(run.document, run.columns)
    return assessment.text(stage_answers.notes(run.document))


def test_limits_stand_beside_the_sparsity_of_their_question(run):
    """Of one_shot where the network may be cut to, of the others what was attained."""
    ((_, rows),) = stage_answers.assessment_of(run.document, run.columns).rows()
    assert {row[0]: row[4] for row in rows} == {
        "one_shot": "0.8650",
        "width": "0.9700",
        "cone": "0.9700",
        "readjusted": "0.9700",
    }
    text = " ".join(told(run).split())
    assert f"Error on the test data: 0 unpruned, {0.865**8:.4g} cut to 0.8650, 0.03 attained." in text
    assert "within one point cut to 0.6000." in text
    assert "the network stays within the tolerance up to 0.9500 (the next one is 0.9550)" in text


def test_the_table_shows_the_numbers_and_fits_a_terminal(run, limit):
    text = told(run)
    for name, estimate in limit.estimates().items():
        (line,) = [line for line in text.splitlines() if re.match(rf"  {name} +\d", line)]
        assert f"{estimate.value:.4f}" in line
        interval = re.escape(f"[{estimate.lower:.4f}, {estimate.upper:.4f}]")
        assert re.search(rf"{interval} +{limit.rises[name]:.3g} ", line)
    assert max(map(len, text.splitlines())) < 80
    assert "leaves out the second derivative" not in text  # there is no Gauss-Newton in it


class _Page(HTMLParser):
    """Collects tags, addresses and text, and checks that tags are closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.addresses, self.text, self.cells = [], [], "", []

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "img", "link", "br", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)


def test_the_page_opens_with_the_answer_and_warns_of_what_vanished(run, limit):
    page = html.unescape(report.render(run, {}))
    sentences = re.findall(r'<p class="lead">(.*?)</p>', page)
    assert sentences[0].startswith("Asked: how many of 64 weights can go")
    assert sentences[1].startswith(f"Answer: predicted {limit.readjusted.value:.4f}, attained 0.9700 (0.8650")
    assert ("refuted" in sentences[2]) == (limit.readjusted.upper < 0.97)
    assert sentences[3] == "Recommended: cut to .865 as it is; .970 with readjustment; nothing is certified."
    assert "compressed by zlib 300, before pruning 900" in page
    assert "Warning: nothing is left of head." in page


def test_the_reference_stands_beside_our_limit(run, limit):
    width = limit.width.value
    sentence = (
        f"The paper's code would predict 0.900 ({0.9 - width:+.4f} against width): +0.0250 by its binning, "
        f"integer R and 25% of zero rows, {0.875 - width:+.4f} by its 96 Lanczos steps"
    )
    assert sentence in " ".join(told(run).split())
    assert sentence in html.unescape(report.render(run, {}))


def test_the_page_stands_alone_and_shows_every_figure_and_number(run, limit, tmp_path):
    path = report.write_report(tmp_path, run)
    source = path.read_text()
    page = _Page()
    page.feed(source)
    assert page.open == []
    assert not re.search(
        r"(https?:)?//\w|url\(|@import|<script|<link", re.sub(r"base64,[\w+/=]+", "", source)
    )
    narrow, wide = page.addresses[::2], page.addresses[1::2]
    assert len(wide) == len(report.CAPTIONS) == 6
    for address in narrow:
        head, content = address.split(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(content).startswith(b"\x89PNG")
        assert address not in wide
    for name, address in zip(report.CAPTIONS, wide, strict=True):
        assert (tmp_path / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        head, content = address.split(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(content) == (tmp_path / "figures" / f"{name}.png").read_bytes()
        assert base64.b64decode(content).startswith(b"\x89PNG")
    for estimate in limit.estimates().values():
        assert f"{estimate.value:.4f}" in page.cells
        assert f"[{estimate.lower:.4f}, {estimate.upper:.4f}]" in page.cells
    assert "jaxlimit run <digits> & more" in page.text  # escaped in the source
    assert "1.2.3" in page.cells


def test_figures_are_the_same_bytes_each_time(run, tmp_path):
    """Nothing of the time or the machine is in them."""
    for name in ("one", "two"):
        report.write_report(tmp_path / name, run)
    assert (tmp_path / "one" / "report.html").read_bytes() == (tmp_path / "two" / "report.html").read_bytes()


def drawn(axes, label):
    (line,) = [line for line in axes.get_lines() if line.get_label() == label]
    return np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)


def test_transition_plot_draws_the_curve_and_its_crossing(limit):
    (axes,) = plots.plot_limit(limit).axes
    sparsity, dimension = drawn(axes, "width, Hessian |H|")
    crossing = sparsity[np.argmax(dimension < sparsity)]
    assert crossing == pytest.approx(limit.width.value, abs=2 / 64)
    ends, _ = drawn(axes, "transition window, Hessian |H|")
    expected = limit.width.value + limit.transition_halfwidth * np.array([-1, 1])
    assert ends == pytest.approx(np.clip(expected, 0, 1))


def test_spectrum_plot_is_the_cumulative_measure(limit):
    (axes,) = plots.plot_spectrum({"hessian": limit.measure}, {"hessian": limit.ridge}).axes
    positions, shares = drawn(axes, "Hessian |H|")
    eigenvalues = np.sort(np.geomspace(1e-2, 10, 64) ** 2)
    assert positions[:-1] == pytest.approx(eigenvalues, rel=1e-4)
    assert shares[:-1] == pytest.approx(np.arange(1, 65) / 64)


def test_sweep_plot_draws_limits_and_thresholds_where_they_are(limit):
    limits = {"hessian": limit.estimates()}
    figure = plots.plot_sweep({"train": (GRID, LOSS)}, ylabel="loss", limits=limits, measured={"loss": 0.865})
    strip, axes = figure.axes
    assert np.array_equal(drawn(axes, "train")[1], LOSS)
    assert drawn(strip, "width")[0] == [limit.width.value]
    assert drawn(strip, "measured loss")[0] == [0.865]
    assert strip.get_xlim() == axes.get_xlim()
    assert axes.get_ylabel() == "loss"


def test_sweep_plot_without_limits_is_a_plain_curve():
    (axes,) = plots.plot_sweep({"train": (GRID, LOSS)}, ylabel="loss", logarithmic=True).axes
    assert axes.get_yscale() == "log"
    assert axes.get_xlim() == (0, 1)


@pytest.mark.parametrize("sparsity", [0.6, 0.98, 0.9997, 1 - 2e-6, 1.0])
def test_the_figure_of_an_assessment_shows_the_sparsest_network(sparsity):
    tried = (np.array([0.5, 0.99, sparsity]), np.ones(3))
    panels = {"loss": {"cut": (GRID, LOSS), "attained": tried}}
    measured = {"cut within the tolerance": 0.4, "sparsest attained": sparsity}
    figure = plots.plot_assessment(panels, limits={}, measured=measured, bounds={})
    figure.draw_without_rendering()
    for axes in figure.axes:
        left, right = axes.transData.transform([(axes.get_xlim()[0], 1), (sparsity, 1)])[:, 0]
        assert axes.bbox.x0 == pytest.approx(left)
        assert left < right <= axes.bbox.x1 + 1e-6
    texts = {text.get_text(): text.get_window_extent() for text in figure.axes[-1].get_xticklabels()}
    boxes = sorted(texts.values(), key=lambda box: box.x0)
    assert all(before.x1 < after.x0 for before, after in itertools.pairwise(boxes))
    assert (sparsity >= 0.999) <= ("1" in texts)


def test_sensitivity_plot_has_the_measured_thresholds(run):
    (axes,) = report.make_figures(run)["sensitivity"].axes
    tolerances, thresholds = drawn(axes, "measured, loss")
    # exp(20 (s - .9)) = loss(0) + eps, inverted by hand, and the last sparsity of the grid before it.
    crossings = np.minimum(0.9 + np.log(LOSS[0] + tolerances) / 20, 1)
    assert thresholds.tolist() == GRID[np.searchsorted(GRID, crossings, side="right") - 1].tolist()


def test_a_logarithmic_panel_leaves_out_what_is_not_positive():
    x, spreads = np.arange(3.0), np.zeros(3)
    panels = {"tr H": {"a": (x, np.array([1.0, 100.0, -5.0]), spreads)}, "limit": {"a": (x, -x, spreads)}}
    logarithmic, linear = plots.plot_series(panels, xlabel="x", logarithmic=["tr H"]).axes
    assert logarithmic.get_yscale() == "log"
    np.testing.assert_array_equal(logarithmic.lines[0].get_ydata(), [1, 100, np.nan])
    np.testing.assert_array_equal(linear.lines[0].get_ydata(), [0, -1, -2])


def test_a_line_goes_from_left_to_right():
    panels = {"limit": {"a": (np.array([1.0, 0.5, 2.0]), np.array([3.0, 4.0, 5.0]), np.zeros(3))}}
    (line,) = plots.plot_series(panels, xlabel="factor").axes[0].lines
    np.testing.assert_array_equal(line.get_xydata(), [[0.5, 4], [1, 3], [2, 5]])


def test_no_figure_touches_pyplot(limit):
    import matplotlib.pyplot as plt

    plots.plot_limit(limit)
    assert plt.get_fignums() == []


def test_columns_are_read_back_to_the_bit(tmp_path):
    table = {"sparsity": np.array([0.1, 1 / 3]), "loss": np.array([np.nan, np.pi])}
    write_columns(tmp_path / "curves.csv", table)
    found = read_columns(tmp_path / "curves.csv")
    for name, values in table.items():
        assert np.array_equal(found[name], values, equal_nan=True)


def test_spectra_are_read_back_to_the_bit(limit, tmp_path):
    spectra.save_spectrum(tmp_path / "spectrum.npz", limit, GRID)
    found = spectra.load_spectrum(tmp_path / "spectrum.npz")
    assert np.array_equal(found.measure.nodes, limit.measure.nodes)
    assert np.array_equal(found.curve.width_dimension, limit.curve(GRID).width_dimension)
    assert np.array_equal(found.sensitivity.cone, limit.sensitivity().cone)


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "limit.json"
    writing.write_json(path, {"format": 1, "value": "old"})

    def interrupted(file):
        file.write(b"half of it")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        writing.write_file(path, interrupted)
    assert writing.read_json(path)["value"] == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["limit.json"]


def test_a_network_that_nothing_is_lost_of_is_swept_to_its_end(tmp_path):
    """Both thresholds are 1: between no two sparsities is there anything to look closer at."""
    arrays = np.ones((4, 2), np.float32), np.zeros(4, np.int32)

    def metrics(params, batch):
        return {"loss": jnp.mean(0.0 * batch[0] @ params + 0.5), "accuracy": jnp.mean(batch[1] == 0)}

    trained: Any = SimpleNamespace(
        params=jnp.ones((2, 1)),
        metrics=metrics,
        network={"train_loss": 0.5, "test_accuracy": 1.0},
        loss_tolerance=0.1,
        groups=None,
        sparsities=GRID,
    )
    splits, monitor = {"train": arrays, "test": arrays}, SimpleNamespace(update=lambda *_: None)
    job: Any = SimpleNamespace(folder=tmp_path, splits=splits, monitor=monitor)
    found = stage_sweeps.sweep(job, trained, [])
    assert found.thresholds == {key: {"value": 1.0, "next": 1.0} for key in ("loss", "accuracy")}


def test_a_threshold_of_measured_numbers_alone():
    """What was not measured is left out; what was measured and is no number is refused."""
    trained: Any = SimpleNamespace(network={"train_loss": 0.1, "test_accuracy": 0.9}, loss_tolerance=0.1)
    loss = np.full(len(GRID), np.nan)
    loss[[0, 100, 200, 300]] = [0.1, 0.15, 0.3, np.nan]
    columns = {"sparsity": GRID, "train_loss": loss}
    found = stage_sweeps.threshold(trained, columns, "train_loss", [0, 100, 200])
    assert found == {"value": 0.25, "next": 0.5}
    with pytest.raises(
        ValueError, match=r"'train_loss' is not a number at 1 of 4 sparsities, the first 0\.75"
    ):
        stage_sweeps.threshold(trained, columns, "train_loss", [0, 100, 200, 300])
    with pytest.raises(ValueError, match="is not a number at 398 of 401 sparsities"):
        stage_sweeps.threshold(trained, columns, "train_loss")
