"""The options of `jaxlimit run`, made of the dataclasses that they fill, and what other commands share."""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

from tyro.conf import Positional, arg

from jaxlimit.application.presets import PRESETS, Options, Preset, find_preset
from jaxlimit.training.recipe import Recipe


def shown(default: str, metavar: str) -> Any:
    """How the help shows an option whose default None stands for something else."""
    return arg(help_behavior_hint=f"(default: {default})", metavar=metavar)


def options_of(made_from: type, default: str | None = None, **defaults: str) -> Any:
    """A dataclass's fields as options of the command line, with its docstring as their help.

    Args:
        made_from: the dataclass. Fields without a default are no options.
        default: words for the default of every option, which is then None.
        defaults: the same for some, by name.

    Returns:
        The type of an argument whose attributes are the options.
    """
    hints, made = get_type_hints(made_from), []
    for field in dataclasses.fields(made_from):
        words, hint = defaults.get(field.name, default), hints[field.name]
        if field.default is dataclasses.MISSING:
            continue
        if words is None:
            made.append((field.name, hint, field.default))
        else:
            made.append((field.name, Annotated[hint | None, shown(words, _metavar(hint))], None))
    # What None stands for is said as the default.
    namespace = {"__doc__": re.sub(r"[;.]\s+None: [^.]*\.", ".", made_from.__doc__ or "")}
    return dataclasses.make_dataclass(made_from.__name__, made, namespace=namespace, frozen=True)


def _metavar(hint: Any) -> str:
    """How the help shows a value of a type."""
    inner = [each for each in get_args(hint) if each is not type(None)]
    if hint is bool:
        return "{True,False}"
    if get_origin(hint) is Literal:
        return f"{{{','.join(inner)}}}"
    if get_origin(hint) is tuple:
        return f"[{_metavar(inner[0])} ...]"
    return _metavar(inner[0]) if inner else hint.__name__.upper()


PresetName = Annotated[Positional[str], arg(metavar="PRESET")]
DataFolder = Annotated[str | None, shown("$JAXLIMIT_DATA", "DIR")]
if TYPE_CHECKING:  # what is not given is None
    from types import SimpleNamespace as GivenPreset

    from jaxlimit.application.presets import Options as GivenOptions
    from jaxlimit.training.recipe import Recipe as GivenRecipe
else:
    GivenRecipe = options_of(Recipe, "the preset's")
    GivenPreset = options_of(Preset, "the preset's")
    GivenOptions = options_of(
        Options,
        loss_tolerance="standard deviation of the training batches' losses",
        num_examples="all",
        groups="single weights",
    )


@dataclass(frozen=True)
class Run:
    """What `jaxlimit run` is to do.

    Attributes:
        preset: the experiment, with what was given in place of its settings.
        options: what else decides the numbers.
        out: folder of the results.
        data: folder of the data.
        overwrite: replace the run in the folder.
    """

    preset: Preset
    options: Options
    out: Path
    data: str | None
    overwrite: bool


def run(
    preset: PresetName = "digits",
    *,
    options: Annotated[GivenOptions, arg(name="prediction")] = GivenOptions(),  # noqa: B008 (frozen)
    recipe: Annotated[GivenRecipe, arg(name="training")] = GivenRecipe(),  # noqa: B008 (frozen)
    others: Annotated[GivenPreset, arg(name="data-and-measurement")] = GivenPreset(),  # noqa: B008 (frozen)
    out: Annotated[Path | None, shown("results/PRESET-seedSEED-...", "DIR")] = None,
    data: DataFolder = None,
    overwrite: bool = False,
) -> Run:
    """The run that the options ask for.

    Args:
        preset: which experiment: see `jaxlimit presets`.
        options: what decides the numbers beside the preset.
        recipe: in place of the preset's. When the epochs are given, its warm-up takes at most half of them.
        others: in place of the preset's.
        out: folder of the results.
        data: folder that holds mnist/ or cifar10/; not needed for digits.
        overwrite: replace the run in the folder.
    """
    settings = find_preset(preset, **vars(recipe), **vars(others))
    chosen = Options(**vars(options))
    return Run(settings, chosen, out or default_folder(settings, chosen), data, overwrite)


def default_folder(preset: Preset, options: Options) -> Path:
    """results/PRESET-seedSEED, with every other option that is not at its default in the name.

    Examples:
        >>> default_folder(find_preset("digits", l1=0.0), Options(seed=1)).name
        'digits-seed1-l1-0'
    """
    usual = PRESETS[preset.name].to_json() | dataclasses.asdict(Options())
    chosen = preset.to_json() | dataclasses.asdict(options)
    changed = [(name, value) for name, value in chosen.items() if name != "seed" and value != usual.get(name)]
    parts = [f"{name}-{_in_a_name(value)}" for name, value in changed]
    return Path("results") / "-".join([preset.name, f"seed{options.seed}", *parts]).replace("_", "-")


def _in_a_name(value: Any) -> str:
    if isinstance(value, tuple):
        return "-".join(map(_in_a_name, value))
    return value if isinstance(value, str) else format(value, "g")
