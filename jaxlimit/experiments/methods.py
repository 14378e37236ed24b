"""The pruning methods that experiments compare, and how each trains the network of a preset."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from jaxlimit import baselines
from jaxlimit.application.presets import Preset

# Training examples of CIFAR-10, for which the recipes were made.
CIFAR10 = 50_000


class Method(NamedTuple):
    """A method, as the comparison shows it."""

    title: str
    run: Callable[..., tuple[baselines.SparseNetwork, ...]]
    trainings: str


METHODS = {
    "dense": Method("dense", baselines.dense, "one"),
    "lomp": Method("LOMP", baselines.lomp, "one for all s"),
    "imp": Method("iterative, rewound", baselines.iterative_pruning, "one a round"),
    "rare-gems": Method("Rare Gems", baselines.rare_gems, "two an s"),
    "hybrid": Method("Smart-Ratio, hybrid", baselines.smart_ratio, "one, and one an s"),
    "smart-ratio": Method("Smart-Ratio, random", baselines.smart_ratio, "one an s"),
    "greg-1": Method("GReg-1", baselines.greg, "one, and two an s"),
    "greg-2": Method("GReg-2", baselines.greg, "two, and two an s"),
    "prune": Method("LOMP, readjusted", baselines.readjusted_pruning, "one for all s"),
    "prune-dense": Method("dense, readjusted", baselines.readjusted_pruning, "one for all s"),
    "random": Method("random", baselines.random_pruning, "one an s"),
}


def settings_of(
    name: str,
    preset: Preset,
    num_examples: int,
    epochs: int | None = None,
    learning_rate: float | None = None,
) -> Any:
    """The recipe of a method for the network of a preset.

    LOMP, and dense and random as its controls, are trained as the preset says, the controls without L1 term.
    The others follow their papers, with what these change for VGG. Rewinding goes back to the recipe's share
    of its training on CIFAR-10. When `epochs` is given, Rare Gems drops about as often, 29 times, but with
    one epoch at least between two drops. The regularization of GReg grows for as many epochs as a training
    has; choosing and stabilising take a tenth of them. `prune` starts from the networks of LOMP and dense.
    Smart-Ratio fixes the last dense layer only (see `baselines.SmartRatio`).

    Examples:
        >>> from jaxlimit.application.presets import PRESETS
        >>> settings_of("imp", PRESETS["digits"], 1438).rewind_steps
        31
    """
    vgg = preset.network.startswith("VGG")

    def changed(recipe: baselines.Recipe) -> baselines.Recipe:
        given = {"epochs": epochs, "learning_rate": learning_rate}
        return replace(recipe, **{key: value for key, value in given.items() if value is not None})

    if name in ("dense", "lomp", "random"):
        return replace(preset.recipe, l1=preset.recipe.l1 if name == "lomp" else 0.0)
    if name in ("prune", "prune-dense"):
        return baselines.ReadjustedPruning(
            replace(preset.recipe, l1=preset.recipe.l1 if name == "prune" else 0.0)
        )
    if name in ("greg-1", "greg-2"):
        usual = baselines.GReg(choose_first=name == "greg-1")
        recipe, finetune = changed(usual.recipe), changed(usual.finetune)
        short = max(1, round(recipe.epochs / 10))
        return replace(
            usual,
            recipe=recipe,
            finetune=finetune,
            grow_epochs=recipe.epochs,
            choose_epochs=short,
            stabilise_epochs=short,
        )
    if name == "imp":
        usual = baselines.IterativePruning()
        if vgg:
            longer = replace(usual.recipe, epochs=200, milestones=(80 / 200, 120 / 200))
            usual = replace(usual, rewind_steps=2000, recipe=longer)
        recipe = changed(usual.recipe)
        share = usual.rewind_steps / usual.recipe.updates(CIFAR10)
        return replace(usual, rewind_steps=round(share * recipe.updates(num_examples)), recipe=recipe)
    if name == "rare-gems":
        usual = baselines.RareGems()
        search = epochs or usual.epochs
        every = max(1, round(usual.drop_every * search / usual.epochs))
        return replace(usual, epochs=search, drop_every=every, finetune=changed(usual.finetune))
    usual = baselines.SmartRatio(hybrid=name == "hybrid", vgg=vgg, fixed="last")
    return replace(usual, recipe=changed(usual.recipe))
