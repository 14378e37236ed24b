"""The experiments on trained networks: each end to end in seconds, and what they compute against other ways.

The numbers of a network this small mean nothing; that the machinery is right is what is tested.
"""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from scipy.stats import rv_discrete

from jaxlimit import baselines, batched, hessian, pruning_limit
from jaxlimit.application import presets
from jaxlimit.baselines.gems import signed_constants
from jaxlimit.baselines.network import bare, cut
from jaxlimit.cli import main
from jaxlimit.core.trees import flatten, partition, unflatten
from jaxlimit.experiments import EXPERIMENTS, gems, orders, study, subject
from jaxlimit.experiments.distance import EDGES, sampling_distance, shares, total_variation
from jaxlimit.experiments.gradual import survivors
from jaxlimit.experiments.options import EXAMPLES
from jaxlimit.experiments.scaling import scaled
from jaxlimit.experiments.study import Study, Trainings
from jaxlimit.geometry.magnitude import apply_mask, magnitude_mask, magnitude_order
from jaxlimit.measuring.sweeps import SPARSITIES, sparsity_sweep
from jaxlimit.models import ConvolutionalNetwork, FullyConnected, ResNet, from_nnx
from jaxlimit.models.convolutional import Convolution, Pool
from jaxlimit.reference.paper_code import row_norms
from jaxlimit.training import pure_classifier
from jaxlimit.training.losses import classification_loss

TINY = presets.Preset(
    "tiny",
    "digits",
    "64-3-10",
    replace(presets.SGD, epochs=2, learning_rate=0.1, schedule="cosine", l1=5e-4),
    finetune_steps=2,
)
SMALL = ["--seeds", "1", "--probes", "0", "--num-examples", "200"]
OPTIONS = {
    "crossing": [],
    "distance": ["--seeds", "2", "--l1", "0"],
    "gems": ["--epochs", "2", "--sparsities", "0.9"],
    "gradual": ["--rounds", "1", "--learning-rate", "0.05"],
    "lambda": ["--lambdas", "5e-4"],
    "order": [],
    "orders": ["--orders", "magnitude", "obd", "uniform+", "--max-products", "5"],
    "regularizer": ["--weights", "1"],
    "rows": ["--num-rows", "20", "--l1", "0"],
    "scaling": ["--factors", "2"],
    "tolerances": [],
    "training": ["--at", "0"],
}
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
# The others train in other ways, which compile for longer, are several limits, or are run by another test.
BY_DAY = ("distance", "lambda", "rows")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(presets.PRESETS, "tiny", TINY)


def test_every_experiment_is_run_here():
    assert {"compare", *OPTIONS} == EXPERIMENTS.keys() == EXAMPLES.keys()


@pytest.mark.parametrize(("name", "example"), EXAMPLES.items(), ids=EXAMPLES)
def test_the_example_in_a_help_is_what_was_run_and_took_as_long(name, example):
    path = RESULTS / f"{'methods' if name == 'compare' else name}_digits.json"
    documents = [json.loads(path.read_text())]
    if name == "compare":  # its methods were run in two parts
        documents.append(json.loads((RESULTS / "methods_greg_digits.json").read_text()))
    words, minutes = example
    for document in documents:
        methods = f" --methods {' '.join(document['config']['settings'])}" if name == "compare" else ""
        assert document["command"] == f"jaxlimit experiment {name} {words}{methods}"
    taken = [piece["seconds"] for document in documents for piece in document["pieces"].values()]
    seconds = sum(sum(each.values()) if isinstance(each, dict) else each for each in taken)
    assert minutes == pytest.approx(seconds / 60, abs=1)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(name, options, marks=[] if name in BY_DAY else [pytest.mark.nightly], id=name)
        for name, options in OPTIONS.items()
    ],
)
def test_an_experiment_writes_results_table_and_figures(name, options, tmp_path, capsys):
    args = ["experiment", name, "tiny", *SMALL, *options, "--out", str(tmp_path / name)]
    assert main(args) == 0
    document = json.loads((tmp_path / name / "results.json").read_text())
    assert document["command"] == " ".join(["jaxlimit", *args])
    assert all({"variant", "seed"} <= piece.keys() for piece in document["pieces"].values())
    table = (tmp_path / name / "table.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    assert len(rows) >= 3
    assert "nan" not in table
    figures = list((tmp_path / name / "figures").iterdir())
    assert figures
    assert all(figure.read_bytes().startswith(b"\x89PNG") for figure in figures)
    capsys.readouterr()
    assert main(args) == 0  # nothing is left to do
    assert table in capsys.readouterr().out


@pytest.mark.nightly
def test_a_factor_of_one_is_the_trained_network(tmp_path):
    folder = tmp_path / "scaling"
    args = ["experiment", "scaling", "tiny", *SMALL, "--factors", "1", "2", "--out", str(folder)]
    assert main(args) == 0
    found = json.loads((folder / "results.json").read_text())["pieces"]
    assert len(found) == 4
    held = found["trained-1-seed0"]["held"]
    assert f"| held times 2 | - | {held[1]:.3f} |" in (folder / "table.md").read_text()


@pytest.mark.nightly
def test_a_limit_that_was_not_computed_is_not_predicted(tmp_path):
    args = ["experiment", "training", "tiny", *SMALL, "--max-matvecs", "16", "--at", "0"]
    assert main([*args, "--out", str(tmp_path / "training")]) == 0
    assert "one_shot - of 2," in (tmp_path / "training" / "table.md").read_text()


@pytest.mark.nightly
def test_scores_that_are_all_off_have_no_limit(tmp_path, monkeypatch):
    """The accuracy is measured all the same."""
    monkeypatch.setattr(gems, "recipe_l2", lambda density: 1e3)
    folder = tmp_path / "gems"
    assert main(["experiment", "gems", "tiny", *SMALL, *OPTIONS["gems"], "--out", str(folder)]) == 0
    found = json.loads((folder / "results.json").read_text())["pieces"]
    assert {name: piece["off"] == 1 for name, piece in found.items()} == {
        "without-0.9-seed0": False,
        "recipe-0.9-seed0": True,
        "matched-0.9-seed0": True,
    }
    for line in (folder / "table.md").read_text().splitlines()[3:5]:
        accuracy, width, trace = line.split(" | ")[3:6]
        assert 0 < float(accuracy) < 100
        assert (width, trace) == ("-", "-")


def test_scores_are_asked_about_with_the_running_statistics_of_their_search():
    """With scores that stay as they are, and one batch, the loss is the one in training mode."""
    model = ConvolutionalNetwork(
        [Convolution(3, 3)], [], 3, image_shape=(6, 6, 1), normalize=True, rngs=nnx.Rngs(0)
    )
    inputs = np.asarray(3 + 2 * jax.random.normal(jax.random.key(0), (40, 6, 6, 1)))
    arrays = inputs, np.arange(40) % 3
    task = subject.Task(TINY, arrays, arrays, max_matvecs=100)
    settings = baselines.RareGems(epochs=100, batch_size=40, learning_rate=1e-12, l2=0.0)
    found = gems.score_subject(task, model, 0, 0.5, settings)
    network = pure_classifier(bare(model, biases=False))
    gated = jax.tree.map(lambda w, p: w * (p > 0.5), signed_constants(network.params), found.params)
    wanted, _ = network.objective(gated, network.state, arrays, jax.random.key(0))
    assert found.statistics.mean == pytest.approx(float(wanted), rel=1e-4)


def test_too_few_products_are_mentioned_below_the_table(tmp_path):
    """The two orders of weights ask about one network: it is trained once, and kept with the results."""
    out = tmp_path / "order"
    args = ["experiment", "order", "tiny", "--seeds", "1", "--num-examples", "200", "--out", str(out)]
    assert main([*args, "--max-matvecs", "32"]) == 0
    assert "Under-resolved, or without a product left: 2 of 2." in (out / "table.md").read_text()
    assert [path.name for path in (out / "networks").iterdir()] == ["tiny-l1-0.0005-epoch-2-of-2-seed0"]


@pytest.fixture(scope="module")
def network():
    """A network of three layers at its random start, and examples for it."""
    predict, params = from_nnx(FullyConnected([5, 6, 4, 3], rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda x: x + 0.1, params)  # biases that are not 0
    inputs = jax.random.normal(jax.random.key(0), (40, 5))
    labels = jax.random.randint(jax.random.key(1), (40,), 0, 3)
    return predict, params, batched((inputs, labels), 20)


def curvature(predict, params, batches):
    return hessian(classification_loss(predict), params, batches)


def test_row_norms_are_those_of_the_dense_matrix(network):
    H = curvature(*network)
    wanted = np.abs(H.dense()).sum(1)
    rows = [3, 0, H.dim - 1, *range(20)]  # not a whole number of blocks
    assert row_norms(H, rows) == pytest.approx(wanted[rows], rel=1e-4, abs=1e-6)


def test_the_hessian_of_the_survivors_is_a_block_of_the_whole(network):
    """And the network is the same function; H of the whole is taken from pruned weights, too."""
    _, params, batches = network
    mask = magnitude_mask(partition(params)[0], 0.4)
    pruned = cut(FullyConnected([5, 6, 4, 3], rngs=nnx.Rngs(0)), mask)
    whole = curvature(pruned.predict, pruned.params, batches).dense()
    of, kept = survivors(pruned.predict, pruned.params, mask)
    alive = np.flatnonzero(flatten(mask))
    assert np.allclose(curvature(of, kept, batches).dense(), whole[np.ix_(alive, alive)], atol=1e-6)
    inputs = batches.arrays[0]
    assert np.allclose(of(kept, inputs), pruned.predict(pruned.params, inputs), atol=1e-6)


def limits(predict, params, batches, eps=0.01):
    found = pruning_limit(curvature(predict, params, batches), jax.random.key(0), loss_tolerance=eps)
    return {name: estimate.value for name, estimate in found.estimates().items()}


@pytest.fixture(scope="module")
def convolutional():
    """As `network`, with two convolutions and two dense layers."""
    layers = [Convolution(2, 3), Pool(), Convolution(3, 2)]
    model = ConvolutionalNetwork(layers, [4], 3, image_shape=(8, 8, 1), rngs=nnx.Rngs(0))
    predict, params = from_nnx(model)
    params = jax.tree.map(lambda x: x + 0.1, params)
    inputs = jax.random.normal(jax.random.key(0), (40, 8, 8, 1))
    labels = jax.random.randint(jax.random.key(1), (40,), 0, 3)
    return predict, params, batched((inputs, labels), 20)


def multiplied(params, factors):
    """A chain's parameters with those of layer l, counted from the first, times factors[l]."""
    flat = flatten_dict(params)
    names = sorted({path[:-1] for path in flat})  # "convolutions" come before "dense"
    return unflatten_dict({path: x * factors[names.index(path[:-1])][path[-1]] for path, x in flat.items()})


@pytest.mark.parametrize("kind", [pytest.param("network", marks=pytest.mark.nightly), "convolutional"])
def test_scaling_keeps_the_function_and_with_a_temperature_the_limits(kind, request):
    """c^T H c and lambda R^2 stay as they are when all weights grow alike and the function is kept."""
    predict, params, batches = request.getfixturevalue(kind)
    inputs, c = batches.arrays[0], 3.0
    outputs = predict(params, inputs)
    for way in ("temperature", "balance"):
        other, grown = scaled(predict, params, way, c)
        assert np.allclose(other(grown, inputs), outputs, atol=1e-4)
        if way == "temperature":
            found = limits(other, grown, batches)
            assert found == pytest.approx(limits(predict, params, batches), abs=0.02)
    other, plain = scaled(predict, params, "plain", c)
    assert other is predict
    assert not np.allclose(predict(plain, inputs), outputs, atol=0.1)


@pytest.mark.parametrize("kind", ["network", "convolutional"])
def test_a_scaled_chain_is_one_whose_biases_and_logits_make_up_for_it(kind, request):
    """Pruned, too: the same function of its kernels, not only the same outputs."""
    predict, params, batches = request.getfixturevalue(kind)
    inputs, c = batches.arrays[0], 3.0
    depth = len({path[:-1] for path in flatten_dict(params)})
    growing = [{"kernel": c, "bias": c ** (layer + 1)} for layer in range(depth)]
    balanced = [{"kernel": c if layer == 0 else 1, "bias": c} for layer in range(depth - 1)]
    chains = {
        "temperature": (growing, c**depth),
        "balance": ([*balanced, {"kernel": 1 / c, "bias": 1}], 1.0),
    }
    for way, (factors, divisor) in chains.items():
        chain = multiplied(params, factors)
        other, grown = scaled(predict, params, way, c)
        for sparsity in (0.0, 0.5):
            mask = magnitude_mask(partition(grown)[0], sparsity)
            pruned = apply_mask(grown, mask), apply_mask(chain, mask)
            jax.tree.map(np.testing.assert_array_equal, *(partition(tree)[0] for tree in pruned))
            assert np.allclose(other(pruned[0], inputs), predict(pruned[1], inputs) / divisor, atol=1e-4)


def test_a_network_of_one_layer_is_not_scaled(monkeypatch):
    monkeypatch.setitem(presets.PRESETS, "tiny", replace(TINY, network="64-10"))
    with pytest.raises(ValueError, match="network of two layers or more, got 64-10"):
        EXPERIMENTS["scaling"](Study("tiny"))


def test_a_scaled_network_with_batch_norm_is_one_whose_running_statistics_have_grown():
    c, inputs = 3.0, jax.random.normal(jax.random.key(0), (4, 32, 32, 3))
    model = ResNet(18, width=2, rngs=nnx.Rngs(0))
    model.train()
    model(inputs)  # running statistics that are not those of the start
    predict, params = from_nnx(model)
    other, grown = scaled(predict, params, "temperature", c)
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, nnx.Conv | nnx.Linear):
            layer.kernel[...] = c * layer.kernel[...]
        if isinstance(layer, nnx.Linear):
            layer.bias[...] = c * layer.bias[...]
        if isinstance(layer, nnx.BatchNorm):
            layer.mean[...] = c * layer.mean[...]
            layer.var[...] = c**2 * (layer.var[...] + layer.epsilon) - layer.epsilon
    model.eval()
    assert np.allclose(other(grown, inputs), model(inputs) / c, atol=1e-4)
    start, balanced = flatten_dict(params), flatten_dict(scaled(predict, params, "balance", c)[1])
    changed = {path for path, x in start.items() if not np.array_equal(x, balanced[path])}
    assert changed == {("stem", "convolution", "kernel"), ("dense", "kernel")}


def test_weights_go_in_the_order_of_scores(network):
    """Limits and sweep in an order of scores are those of the relabelled weights."""
    predict, params, batches = network
    weights = partition(params)[0]
    ranks = np.random.default_rng(0).permutation(flatten(weights).size)
    scores = unflatten(ranks, weights)
    order = magnitude_order(weights, scores)
    assert order.rank.tolist() == ranks.tolist()
    assert order.squared_norm[7] == pytest.approx(np.sum(flatten(weights)[ranks < 7] ** 2))
    loss = classification_loss(predict)
    sweep = sparsity_sweep(lambda p, b: {"loss": loss(p, b)}, params, batches, [0.5], scores=scores)
    gone = ranks < flatten(weights).size // 2
    by_hand = jax.tree.map(
        lambda p, m: p if m is None else jnp.where(m, 0, p),
        params,
        unflatten(gone, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, bool), weights)),
        is_leaf=lambda x: x is None,
    )
    assert sweep.metrics["loss"][0] == pytest.approx(float(loss(by_hand, batches.arrays)), rel=1e-5)
    # The one-shot limit from the dense matrix: the last n before the quadratic loss exceeds eps.
    H = curvature(predict, params, batches)
    matrix, gradient, flat = H.dense(), flatten(H.gradient), flatten(weights)
    removed = [np.where(ranks < n, flat, 0) for n in range(flat.size + 1)]
    losses = np.array([c @ matrix @ c / 2 - gradient @ c for c in removed])
    found = pruning_limit(H, jax.random.key(0), loss_tolerance=0.01, which=["one_shot"], scores=scores)
    assert found.one_shot is not None
    assert found.one_shot.value == pytest.approx((np.argmax(losses > 0.01) - 1) / flat.size)
    with pytest.raises(ValueError, match="scores must have the shapes of weights"):
        magnitude_order(weights, {"other": np.ones(3)})


def test_total_variation_is_the_largest_difference_of_probabilities():
    """Sup over sets of bins of P(set) - Q(set), by trying every set."""
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(8), 2)
    sets = (np.arange(256)[:, None] >> np.arange(8)) & 1
    assert total_variation(p, q) == pytest.approx(np.max(sets @ (p - q)))


def test_shares_of_weights_by_hand():
    found = shares(np.array([1.5, -1.5, 1.52, 1e-9, 0.0, 3e-3]))
    assert found.sum() == pytest.approx(1)
    counts = {
        int(np.searchsorted(EDGES, x, side="right")) - 1: n for x, n in ((1.5, 2), (-1.5, 1), (3e-3, 1))
    }
    counts[int(np.searchsorted(EDGES, 0.0)) - 1] = 2
    assert {int(i): round(6 * found[i]) for i in np.flatnonzero(found)} == counts


def test_the_distance_of_two_samples_is_that_of_simulated_ones():
    """Monte Carlo, within 3 standard errors and the 2 % of the normal approximation."""
    p = np.array([0.5, 0.2, 0.2, 0.1])
    draw = rv_discrete(values=(np.arange(4), p))
    samples = draw.rvs(size=(400, 2, 500), random_state=0)
    counted = np.array([[np.bincount(s, minlength=4) / 500 for s in pair] for pair in samples])
    distances = np.abs(counted[:, 0] - counted[:, 1]).sum(1) / 2
    error = distances.std() / np.sqrt(len(distances))
    assert sampling_distance(p, 500) == pytest.approx(
        distances.mean(), abs=3 * error + 0.02 * distances.mean()
    )


@pytest.mark.nightly
def test_every_order_has_scores():
    """Of the random start; magnitudes that are looked at anew have no scores."""
    task = Study("tiny", num_examples=200).task()
    model = task.network(0, until=0)
    network, found = task.subject(model, 0), {}
    for name in orders.ORDERS:
        scores = orders.order_scores(name, network, model)
        if name == orders.ANEW:
            assert scores is None
        else:
            assert jax.tree.map(np.shape, scores) == jax.tree.map(np.shape, network.weights)
            assert np.all(flatten(scores) >= 0)
            found[name] = np.argsort(flatten(scores), kind="stable").tolist()
    assert found["magnitude"] == np.argsort(np.abs(flatten(network.weights)), kind="stable").tolist()
    assert len({tuple(order) for order in found.values()}) == len(found)


def test_the_table_of_orders_has_what_is_predicted_measured_and_attained():
    piece = {
        "limit": {"one_shot": {"value": 0.5}},
        "measured": {"loss": 0.6, "accuracy": 0.7},
        "test_accuracy": {"0.8": 0.875, "0.9": 0.75},
        "attained": {"sparsity": 0.9, "code": "out_of_products", "test_accuracy": 0.8},
        "dense_test_accuracy": 0.95,
    }
    text = orders.table({"a": {"variant": "obd", **piece}})
    assert "| obd | 0.500 | 0.600 | 0.700 | 87.5 | 75.0 | 0.900 | 80.0 |" in text
    assert "without pruning: 95.0 %. The budget ended 1 of 1 searches" in text


RECORDED = [path for path in sorted(RESULTS.glob("*.json")) if '"experiment"' in path.read_text()[:200]]


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_the_tables_of_the_docs_are_what_the_results_say(path, monkeypatch):
    document = json.loads(path.read_text())
    nothing = ((np.zeros(1000), np.zeros(1000)),) * 2
    monkeypatch.setattr(study, "load_arrays", lambda *_: nothing)
    name, config = document["experiment"], document["config"]
    preset = config["preset"]["name"]
    if name == "compare":
        experiment = EXPERIMENTS[name](Trainings(preset), sparsities=tuple(config["sparsities"]))
    else:
        experiment = EXPERIMENTS[name](Study(preset))
    assert path.with_suffix(".md").read_text() == experiment.table(document["pieces"])


def test_thresholds_are_those_of_the_whole_sweep(monkeypatch):
    monkeypatch.setattr(subject, "PART", 100)
    network = Study(epochs=20).task().trained(0)
    loss = network.sweep(SPARSITIES, network.batches)
    bound = network.statistics.mean + network.statistics.batch_std
    accuracy = network.sweep(SPARSITIES, network.test).metrics["accuracy"]
    wanted = {
        "loss": loss.first_crossing("loss", bound),
        "accuracy": SPARSITIES[np.flatnonzero(accuracy[0] - accuracy < 0.0101)[-1]],
    }
    assert all(0 < s < 1 for s in wanted.values())
    assert network.thresholds() == wanted


def test_experiments_that_share_networks_train_each_once(tmp_path):

    def run(name, out, *options):
        args = ["experiment", name, "tiny", *SMALL, "--out", str(tmp_path / out), *options]
        assert main(args) == 0
        pieces = json.loads((tmp_path / out / "results.json").read_text())["pieces"]
        return {k: v for piece in pieces.values() for k, v in piece.items() if k != "seconds"}

    shared = ["--networks", str(tmp_path / "networks")]
    run("order", "order", *shared)
    epochs = list((tmp_path / "networks").rglob("epoch.npz"))
    assert [path.parent.name for path in epochs] == ["tiny-l1-0.0005-epoch-2-of-2-seed0"]
    written = epochs[0].stat().st_mtime_ns
    alone, again = run("crossing", "alone"), run("crossing", "again", *shared)
    assert epochs[0].stat().st_mtime_ns == written  # nothing was trained
    assert again == alone


@pytest.mark.nightly
def test_a_limit_that_was_interrupted_goes_on(tmp_path):

    def found(folder, last):
        at = []

        def note(text):
            if "products" in text:
                at.append(int(text.split(", ")[1].split()[0]))
                if at[-1] >= last:
                    raise KeyboardInterrupt

        task = replace(Study("tiny", max_matvecs=200).task(), checkpoint=folder, note=note)
        return task.trained(0).limit(("width",)).to_json(), at[0]

    whole, _ = found(None, 1000)
    with pytest.raises(KeyboardInterrupt):
        found(tmp_path / "piece", 40)
    gone_on, first = found(tmp_path / "piece", 1000)
    assert first > 16
    assert gone_on == whole
