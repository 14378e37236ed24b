"""A run: its stages one after another, each computed once (see `ledger`)."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from jaxlimit.application import (
    report,
    run_folder,
    stage_answers,
    stage_limits,
    stage_sweeps,
    stage_training,
)
from jaxlimit.application.answering import Answering, with_networks
from jaxlimit.application.job import Job
from jaxlimit.application.ledger import Found, Ledger, Stage
from jaxlimit.application.presets import Arrays, Options, Preset
from jaxlimit.application.spectra import load_spectrum
from jaxlimit.application.stage_limits import Limits
from jaxlimit.application.stage_sweeps import Measured
from jaxlimit.application.stage_training import Trained
from jaxlimit.core.terminal import Monitor
from jaxlimit.core.writing import FORMAT, content_of, read_json


def config_of(preset: Preset, options: Options) -> dict[str, Any]:
    """What config.json holds."""
    return {"format": FORMAT, "preset": preset.to_json(), "options": asdict(options)}


def execute_run(
    folder: Path,
    preset: Preset,
    options: Options,
    arrays: tuple[Arrays, Arrays],
    command: str,
    monitor: Monitor,
) -> run_folder.Record:
    """Runs all stages that limit.json in the folder does not name yet.

    Args:
        folder: made by `run_folder.prepare_folder`.
        preset: the experiment.
        options: what else decides the numbers.
        arrays: training and test examples, from `load_arrays`.
        command: as typed, for limit.json.
        monitor: told about the progress.

    Returns:
        The run, as on disk.

    Raises:
        FloatingPointError: training diverged.
        ValueError: a file of an earlier stage is damaged.
    """
    job = Job(folder, preset, options, *arrays, monitor)
    ledger = Ledger(folder, command, monitor)
    trained = ledger.perform(_training(job))
    limits = [ledger.perform(_limits(job, trained, name)) for name in options.curvatures]
    measured = ledger.perform(_sweep(job, trained, limits))
    with content_of(folder / run_folder.LIMIT):
        predicted = stage_answers.predicted_of(ledger.document)
        cut = stage_answers.cut_of(measured.columns, ledger.document["measured"])
    work = Answering(stage_answers.question_of(job, trained), folder, True, monitor)
    with_networks(work, predicted, cut, ledger)
    if preset.finetune_steps:
        measured = ledger.perform(_finetuned_sweep(job, trained, limits, measured))
    return _finish(job, ledger, measured)


def _training(job: Job) -> Stage[Trained]:
    checkpoint = run_folder.checkpoint_path(job.folder, "training")
    return Stage(
        "training",
        "training",
        job.preset.recipe.epochs,
        partial(stage_training.train_network, job, checkpoint),
        partial(stage_training.load_trained, job),
        lambda found: (
            f"test accuracy {found.network['test_accuracy']:.2%}, loss tolerance {found.loss_tolerance:.4g}"
        ),
        checkpoint,
    )


def _limits(job: Job, trained: Trained, name: str) -> Stage[Limits]:
    checkpoint = run_folder.checkpoint_path(job.folder, name)
    return Stage(
        f"limit_{name}",
        f"limit, {name.replace('_', '-')}",
        stage_limits.max_products(trained),
        partial(stage_limits.find_limits, job, trained, name, checkpoint),
        partial(stage_limits.load_limits, name=name),
        lambda found: ", ".join(f"{which} {value:.3f}" for which, value in found.predicted.items()),
        checkpoint,
    )


def _sweep(job: Job, trained: Trained, limits: list[Limits]) -> Stage[Measured]:
    return Stage(
        "sweep",
        "sparsity sweep",
        stage_sweeps.NUM_SWEPT,
        partial(stage_sweeps.sweep, job, trained, limits),
        partial(stage_sweeps.load_measured, job, names=("loss", "accuracy")),
        lambda found: f"loss threshold {found.thresholds['loss']['value']:.4f}",
    )


def _finetuned_sweep(job: Job, trained: Trained, limits: list[Limits], swept: Measured) -> Stage[Measured]:
    checkpoint = run_folder.checkpoint_path(job.folder, "finetuned")
    return Stage(
        "finetuned",
        "fine-tuned sweep",
        stage_sweeps.num_finetuning_steps(job, trained, limits),
        partial(stage_sweeps.sweep_finetuned, job, trained, limits, swept, checkpoint),
        partial(stage_sweeps.load_measured, job, names=("finetuned", "finetuned_accuracy")),
        lambda found: f"fine-tuned threshold {found.thresholds['finetuned']['value']:.4f}",
        checkpoint,
    )


def _finish(job: Job, ledger: Ledger, measured: Measured) -> run_folder.Record:
    folder, curvatures = job.folder, ledger.document["limits"]
    run = run_folder.Record(
        read_json(folder / run_folder.CONFIG, alone=False),
        ledger.document | {"finished": True},
        measured.columns,
        {name: load_spectrum(run_folder.spectrum_path(folder, name)) for name in curvatures},
    )

    def write(_: Any = None) -> Found[None]:
        report.write_report(folder, run)
        return Found(None, {"finished": True})

    page = str(folder / run_folder.REPORT)
    ledger.perform(Stage("report", "report", 1, write, write, lambda _: page))
    return run
