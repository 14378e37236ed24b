"""How far can a small language model of characters be pruned, whole and by groups of its layers?

    pip install -e ".[cli]"
    python benchmarks/char_lm.py --work DIR

The decoder-only transformer of networks.py, of width 64 and 4 layers (202,752 kernel weights), reads 64
characters at a time of Python's language reference, which comes with it (`pydoc_data.topics`), and predicts
the next ones. It is trained with Adam on the first nine tenths of the text, without an L1 term and with the
weight that most presets have; the rest of the text is test data.

The loss that is predicted and measured is the mean cross entropy, in nats a character, over 64 training
sequences, evenly spread: the same for limits, sweeps and fine-tuning. It may rise by .05 nats (.07 bits).
All kernels are pruned, or those of a group while everything else stays. Network, L1 term and tolerance were
fixed before any limit was computed; the budget of products was then raised from 160 to 400.

DIR holds a folder for each network, with its weights, a file for each step that is done, and the checkpoints
of the limits. An interrupted run goes on there.
"""

import argparse
import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import common
import jax
import networks
import numpy as np
import optax
from flax import nnx
from networks import Arrays

import jaxlimit
from jaxlimit import models
from jaxlimit.application import run_folder
from jaxlimit.core import trees
from jaxlimit.training import model_files
from jaxlimit.training.losses import CURVATURES, cross_entropy, l1_norm

NAME = "char_lm"
COMMAND = f"python benchmarks/{NAME}.py --work DIR"
L1 = (0.0, 5e-5)
SEEDS = (0,)
SPARSITIES = np.arange(51) / 50
SPECTRUM_STEPS = 64


@dataclass(frozen=True)
class Settings:
    """All that decides the numbers of a network.

    Attributes:
        width, num_heads, num_layers, context: of the transformer.
        num_read: sequences of the text that are read; None: all.
        epochs, batch_size, learning_rate, warmup_steps: of Adam, its rate falling to 0 as a cosine.
        num_sequences: training sequences of the loss that is predicted and measured.
        loss_tolerance: eps, in nats a character.
        tolerance: wanted accuracy of the limits, in sparsity.
        max_matvecs: products at most for the limits of a group with one curvature.
        finetune_steps: of full-batch Adam, for the measured existence threshold.
    """

    width: int = 64
    num_heads: int = 4
    num_layers: int = 4
    context: int = 64
    num_read: int | None = None
    epochs: int = 4
    batch_size: int = 32
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    num_sequences: int = 64
    loss_tolerance: float = 0.05
    tolerance: float = 0.005
    max_matvecs: int = 400
    finetune_steps: int = 200

    @property
    def groups(self) -> dict[str, Callable[..., bool]]:
        """Every group of weights that is pruned while the others stay."""
        parts: dict[str, tuple[str, ...]] = {
            "all kernels": (),
            "attention": ("attention",),
            "feed-forward": ("up", "down"),
            "head": ("head",),
            **{f"layer {number + 1}": (str(number),) for number in range(self.num_layers)},
        }
        return {
            name: lambda path, leaf, found=found: common.kernel_in(path, *found)
            for name, found in parts.items()
        }


# Groups whose existence limits are computed and measured, too.
EXISTENCE = ("all kernels", "attention", "feed-forward", "head")


class Problem:
    """The text, the network at its random start, and the loss."""

    def __init__(self, settings: Settings, seed: int):
        self.settings, self.seed = settings, seed
        inputs, labels = (x[: settings.num_read] for x in networks.text_sequences(settings.context))
        end = len(inputs) * 9 // 10
        chosen = np.linspace(0, end - 1, settings.num_sequences).round().astype(int)
        self.train: Arrays = (inputs[:end], labels[:end])
        self.batches = jaxlimit.batched((inputs[chosen], labels[chosen]), settings.num_sequences)
        self.test_batches = jaxlimit.batched((inputs[end:], labels[end:]), settings.num_sequences)
        model = networks.Transformer(
            settings.width, settings.num_heads, settings.num_layers, settings.context, rngs=nnx.Rngs(seed)
        )
        self.predict, self.initial = models.from_nnx(model)

    def outputs(self, params: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Logits of a batch."""
        return self.predict(params, batch[0])

    def loss(self, params: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Mean cross entropy of a batch in nats a character, at full precision."""
        with jax.default_matmul_precision("highest"):
            return output_loss(self.outputs(params, batch), batch)

    def metrics(self, params: Any, batch: tuple[jax.Array, jax.Array]) -> dict[str, jax.Array]:
        """The loss of a batch, for the sweeps."""
        return {"loss": self.loss(params, batch)}


def output_loss(logits: jax.Array, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Mean cross entropy of logits (batch, positions, characters)."""
    return cross_entropy(logits, batch[1])


def minimise(problem: Problem, l1: float) -> tuple[Any, list[float]]:
    """The trained parameters, and the mean objective of every epoch.

    Adam on the loss of a batch plus `l1` times the magnitudes of all parameters. Each epoch has another
    order of the sequences; those that do not fill a batch are left out of it.
    """
    settings, key = problem.settings, jax.random.key(problem.seed)
    steps = len(problem.train[0]) // settings.batch_size
    optimizer = optax.adam(
        optax.warmup_cosine_decay_schedule(
            0, settings.learning_rate, settings.warmup_steps, settings.epochs * steps
        )
    )

    def objective(params: Any, batch: Any) -> jax.Array:
        return problem.loss(params, batch) + l1 * l1_norm(params)

    @partial(jax.jit, donate_argnums=0)
    def epoch(carry: Any, arrays: Any, order: jax.Array) -> tuple[Any, jax.Array]:
        def update(carry: Any, rows: jax.Array) -> tuple[Any, jax.Array]:
            params, state = carry
            batch = jax.tree.map(lambda x: x[rows], arrays)
            value, gradient = jax.value_and_grad(objective)(params, batch)
            changes, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, changes), state), value

        carry, values = jax.lax.scan(update, carry, order)
        return carry, values.mean()

    carry = jax.tree.map(jax.numpy.array, (problem.initial, optimizer.init(problem.initial)))
    arrays = jax.tree.map(jax.numpy.asarray, problem.train)
    objectives: list[float] = []
    for number in range(settings.epochs):
        order = jax.random.permutation(jax.random.fold_in(key, number), len(problem.train[0]))
        carry, mean = epoch(carry, arrays, order[: steps * settings.batch_size].reshape(steps, -1))
        objectives.append(float(mean))
    return carry[0], objectives


class Network:
    """A network trained in a folder, and what is asked of it."""

    def __init__(self, problem: Problem, l1: float, folder: Path):
        self.problem, self.settings, self.l1, self.folder = problem, problem.settings, l1, folder
        self.groups = self.settings.groups

    def step(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What the file of a step holds, computed first if it is not there."""
        return common.step(self.folder / f"{name.replace(' ', '-')}.json", compute)

    def train(self) -> dict[str, Any]:
        """Trains the network and writes its weights."""
        params, objectives = minimise(self.problem, self.l1)
        model_files.save_params(self.folder / run_folder.MODEL, params)
        loss, test = (
            jaxlimit.loss_statistics(self.problem.loss, params, batches).mean
            for batches in (self.problem.batches, self.problem.test_batches)
        )
        kernels = jax.tree.leaves(trees.partition(params, self.groups["all kernels"])[0])
        return {
            "settings": asdict(self.settings),
            "objectives": objectives,
            "loss": loss,
            "test_bits": test / np.log(2),
            "mean_magnitude": float(np.mean(np.abs(np.concatenate([np.ravel(x) for x in kernels])))),
        }

    @cached_property
    def params(self) -> Any:
        """The trained parameters."""
        return model_files.load_params(self.folder / run_folder.MODEL, self.problem.initial)

    @cached_property
    def curvatures(self) -> dict[str, jaxlimit.Curvature]:
        """Hessian and Gauss-Newton matrix on all kernels; `of` chooses a group."""
        problem, kernels = self.problem, self.groups["all kernels"]
        return {
            "hessian": jaxlimit.hessian(problem.loss, self.params, problem.batches, prunable=kernels),
            "gauss_newton": jaxlimit.gauss_newton(
                problem.outputs, output_loss, self.params, problem.batches, prunable=kernels
            ),
        }

    def measured(self, group: str) -> dict[str, Any]:
        """The loss under one-shot pruning of a group, and where it has risen by eps."""
        pruned = self.groups[group]
        sweep = jaxlimit.sparsity_sweep(
            self.problem.metrics, self.params, self.problem.batches, SPARSITIES, prunable=pruned, chunk_size=1
        )
        losses = sweep.metrics["loss"].tolist()
        return {
            "num_weights": sum(x.size for x in jax.tree.leaves(trees.partition(self.params, pruned)[0])),
            "threshold": common.crossing(SPARSITIES, losses, losses[0] + self.settings.loss_tolerance),
            "loss": losses,
        }

    def one_shot(self, group: str) -> dict[str, Any]:
        """The one_shot limit, from the Hessian."""
        curvature = self.curvatures["hessian"].of(self.groups[group])
        return common.one_shot(
            curvature, self.settings.loss_tolerance, self.settings.tolerance, self.settings.max_matvecs
        )

    def existence(self, group: str, kind: str) -> dict[str, Any]:
        """The limits width and cone, with one curvature."""
        checkpoint = run_folder.checkpoint_path(self.folder, f"{group}-{kind}".replace(" ", "-"))
        limit = jaxlimit.pruning_limit(
            self.curvatures[kind].of(self.groups[group]),
            jax.random.key(self.problem.seed),
            loss_tolerance=self.settings.loss_tolerance,
            tolerance=self.settings.tolerance,
            max_matvecs=self.settings.max_matvecs,
            which=("width", "cone"),
            checkpoint=checkpoint,
        )
        shutil.rmtree(checkpoint, ignore_errors=True)
        return limit.to_json()

    def spectra(self) -> dict[str, Any]:
        """Mean of the eigenvalues and of their magnitudes, of both curvatures on all kernels."""
        key, steps = jax.random.key(self.problem.seed), min(SPECTRUM_STEPS, self.settings.max_matvecs)
        moments = {"mean": lambda x: x, "mean_magnitude": np.abs}
        found: dict[str, Any] = {}
        for kind, curvature in self.curvatures.items():
            spectrum = jaxlimit.spectral_measure(curvature, key, num_probes=1, num_matvecs=steps)
            found[kind] = {name: float(spectrum.integrate(f)[0]) for name, f in moments.items()}
        return found

    def finetuned(self, group: str, low: float, bound: float) -> dict[str, Any]:
        """The last sparsity, from `low` on, at which training the kept weights gets the loss to a bound."""
        evaluated: dict[float, float] = {}

        def reached(sparsity: float) -> bool:
            sweep = jaxlimit.finetuned_sweep(
                self.problem.loss,
                self.params,
                self.problem.batches,
                [sparsity],
                num_steps=self.settings.finetune_steps,
                prunable=self.groups[group],
            )
            evaluated[sparsity] = float(sweep.metrics["loss"][0])
            return evaluated[sparsity] <= bound

        threshold = common.last_reached(reached, SPARSITIES, low)
        return {"threshold": threshold, "evaluated": sorted(evaluated.items())}

    def run(self) -> dict[str, Any]:
        """All steps, or what is left of them.

        Raises:
            ValueError: the folder holds a network of other settings.
        """
        trained = self.step("trained", self.train)
        if trained["settings"] != asdict(self.settings):
            raise ValueError(f"{self.folder} holds a network of other settings: name another folder.")
        found = {"l1": self.l1, "seed": self.problem.seed} | trained
        groups: dict[str, Any] = {}
        for group in self.groups:
            measured = self.step(f"{group}-measured", partial(self.measured, group))
            groups[group] = measured | {
                "one_shot": self.step(f"{group}-one_shot", partial(self.one_shot, group))
            }
        for kind in CURVATURES:
            for group in EXISTENCE:
                limits = self.step(f"{group}-{kind}", partial(self.existence, group, kind))
                groups[group][kind] = limits
        found["spectra"] = self.step("spectra", self.spectra)
        for group in EXISTENCE:
            low, bound = groups[group]["threshold"], found["loss"] + self.settings.loss_tolerance
            tuned = self.step(f"{group}-finetuned", partial(self.finetuned, group, low, bound))
            groups[group]["finetuned"] = tuned
        return found | {"groups": groups}


def table(document: Mapping[str, Any]) -> str:
    """Thresholds (bold) and limits of every group. A limit that is not resolved has a ~ and its interval."""
    tolerance = document["settings"]["tolerance"]

    def cell(found: Mapping[str, Any] | None) -> str:
        if found is None:
            return "-"
        if found["spread"] <= tolerance:
            return f"{found['value']:.3f}"
        return f"~{found['value']:.3f} [{found['lower']:.2f}, {found['upper']:.2f}]"

    rows = [
        [
            f"{network['l1']:g}",
            group,
            f"{found['num_weights']:,}",
            f"{found['threshold']:.3f}",
            cell(found["one_shot"]),
            f"{found['finetuned']['threshold']:.2f}" if "finetuned" in found else "-",
            *(cell(found.get(kind, {}).get(name)) for kind in CURVATURES for name in ("width", "cone")),
        ]
        for network in document["networks"]
        for group, found in network["groups"].items()
    ]
    heads = ("L1", "pruned", "weights", "**measured**", "one_shot", "**fine-tuned**")
    return common.markdown([*heads, "width", "cone", "GN width", "GN cone"], rows)


def plot(document: Mapping[str, Any], path: Path) -> None:
    """Above: loss against sparsity by group, with one_shot limits. Below: existence limits."""
    import matplotlib.pyplot as plt

    shown, eps = document["networks"], document["settings"]["loss_tolerance"]
    size = (5.5 * len(shown), 7)
    figure, axes = plt.subplots(2, len(shown), figsize=size, layout="constrained", squeeze=False)
    for network, above, below in zip(shown, *axes, strict=True):
        for number, (group, found) in enumerate(network["groups"].items()):
            rise = np.array(found["loss"]) - found["loss"][0]
            above.plot(SPARSITIES, rise, color=f"C{number}", label=group)
            above.plot(found["one_shot"]["value"], eps, "x", color=f"C{number}")
        above.axhline(eps, color="0.7", linewidth=0.8)
        above.set(xlabel="sparsity of the group", ylabel="rise of the loss (nats)", ylim=(-0.02, 4 * eps))
        above.set_title(f"L1 {network['l1']:g}: pruned (lines), one_shot (crosses)")
        for row, group in enumerate(reversed(EXISTENCE)):
            found = network["groups"][group]
            below.plot([found["finetuned"]["threshold"]] * 2, [row - 0.3, row + 0.3], "k", label="fine-tuned")
            for number, (kind, name) in enumerate((k, n) for k in CURVATURES for n in ("width", "cone")):
                limit = found[kind].get(name)
                if limit is None:
                    continue
                sides = [[limit["value"] - limit["lower"]], [limit["upper"] - limit["value"]]]
                label = f"{name}, {'|H|' if kind == 'hessian' else 'Gauss-Newton'}"
                height = row + 0.15 * (1.5 - number)
                below.errorbar(
                    limit["value"], height, xerr=sides, fmt="o", color=f"C{number}", capsize=3, label=label
                )
        below.set(xlabel="sparsity of the group", xlim=(0, 1))
        below.set_yticks(range(len(EXISTENCE)), EXISTENCE[::-1])
        below.set_title("fine-tuned (bars), existence limits with their intervals")
    axes[0, 0].legend(fontsize=7)
    handles, labels = axes[1, 0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes[1, 0].legend(unique.values(), unique.keys(), fontsize=7, loc="lower left")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder of the networks")
    work, found = parser.parse_args().work, []
    problems = {seed: Problem(Settings(), seed) for seed in SEEDS}
    for seed, problem in problems.items():
        found += [Network(problem, l1, work / f"l1-{l1:g}-seed{seed}").run() for l1 in L1]
    problem = problems[SEEDS[0]]
    document = {
        "command": COMMAND,
        "settings": asdict(problem.settings),
        "num_train": len(problem.train[0]),
        "train_crc32": zlib.crc32(problem.train[0].tobytes()),
        "networks": found,
    }
    common.write(NAME, document, table(document))
    plot(document, common.FIGURES / f"{NAME}.png")


if __name__ == "__main__":
    main()
