"""The stages that answer a question, for any network: predicted, cut, attained, certified."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlimit.application import answers, pruned_files, run_folder
from jaxlimit.application.answers import CertifiedNetwork, Cut, Networks
from jaxlimit.application.assessment import Assessment
from jaxlimit.application.ledger import Found, Performer, Stage
from jaxlimit.application.question import Certifying, Question
from jaxlimit.application.spectra import load_spectrum, save_spectrum
from jaxlimit.core.terminal import Monitor
from jaxlimit.core.trees import PyTree, flatten
from jaxlimit.limits.dense_source import dense_fits
from jaxlimit.limits.result import PruningLimit
from jaxlimit.measuring.certificates import Certificate
from jaxlimit.measuring.sweeps import SPARSITIES
from jaxlimit.models.torch_state import save_torch_state
from jaxlimit.pruning.result import Attained

NO_NETWORK = "no network within the tolerance was built."
Certified = tuple[Certificate | None, CertifiedNetwork | None]
"""A certificate, and the network that it is about."""


@dataclass(frozen=True)
class Answering:
    """A question, and where its answers go.

    Attributes:
        question: what is asked.
        folder: of the results; of networks on the way, where nothing is kept.
        kept: whether results, and work that is interrupted, are kept there.
        monitor: told about the progress.
    """

    question: Question
    folder: Path
    kept: bool
    monitor: Monitor

    @property
    def networks(self) -> Networks:
        """Those on the way to the attained limit."""
        return Networks(run_folder.checkpoint_path(self.folder, "networks"), self.question)

    def checkpoint(self, stage: str) -> Path | None:
        """Where a stage keeps what is half done."""
        return run_folder.checkpoint_path(self.folder, stage) if self.kept else None


@dataclass(frozen=True)
class NetworkFiles:
    """A pruned network in the folder of the answers; of a model of ours under PyTorch's names, too.

    Attributes:
        work: whose folder, and whose unpruned network.
        name: of the file.
        torch_name: of the other one.
    """

    work: Answering
    name: str
    torch_name: str

    def save(self, params: PyTree, mask: PyTree) -> dict[str, str]:
        """Writes them; the name of PyTorch's file, if there is one."""
        pruned_files.save_pruned(self.work.folder / self.name, params, mask)
        if self.work.question.model is None:
            return {}
        save_torch_state(self.work.question.model, self.work.folder / self.torch_name, params)
        return {"torch": self.torch_name}

    def load(self, num_kept: int | None) -> tuple[PyTree, PyTree]:
        """Parameters and mask. PyTorch's file is written where the model was not given before.

        Args:
            num_kept: as for `load_pruned`.
        """
        folder, question = self.work.folder, self.work.question
        path, like = folder / self.name, question.weights
        params, mask = pruned_files.load_pruned(path, question.params, like, num_kept)
        if question.model is not None and not (folder / self.torch_name).exists():
            save_torch_state(question.model, folder / self.torch_name, params)
        return params, mask


def answer(work: Answering, curvatures: Sequence[str], performer: Performer) -> Assessment:
    """All answers, from one stage after the other."""
    predicted = {name: performer.perform(limit_stage(work, name)).value for name in curvatures}
    cut = performer.perform(cut_stage(work)).value
    return with_networks(work, predicted, cut, performer)


def with_networks(
    work: Answering, predicted: Mapping[str, PruningLimit], cut: Cut, performer: Performer
) -> Assessment:
    """What is attained and certified, beside what is predicted and cut."""
    attained, error = performer.perform(attained_stage(work)).value
    certificate, network = performer.perform(certified_stage(work)).value
    reason = work.question.certifying if isinstance(work.question.certifying, str) else NO_NETWORK
    return Assessment(predicted, cut, attained, certificate, "" if certificate else reason, error, network)


def limit_stage(work: Answering, name: str) -> Stage[Found[PruningLimit]]:
    """The limits that a curvature predicts."""
    question, checkpoint = work.question, work.checkpoint(name)

    def compute() -> Found[PruningLimit]:
        limit = answers.predicted(question, name, checkpoint, work.monitor.update)
        if work.kept:
            save_spectrum(run_folder.spectrum_path(work.folder, name), limit, SPARSITIES)
        return Found(limit, {"limits": {name: limit.to_json()}})

    def load(document: Mapping[str, Any]) -> Found[PruningLimit]:
        spectrum = load_spectrum(run_folder.spectrum_path(work.folder, name))
        return Found(PruningLimit.from_json(document["limits"][name], spectrum.measure), {})

    dim = flatten(question.weights).size
    return Stage(
        f"limit_{name}",
        f"limit, {name.replace('_', '-')}",
        dim if dense_fits(dim) else question.max_matvecs,
        compute,
        load,
        lambda found: ", ".join(f"{which} {x.value:.3f}" for which, x in found.value.estimates().items()),
        checkpoint,
    )


def cut_stage(work: Answering) -> Stage[Found[Cut]]:
    """Where the loss of the network that is cut leaves the tolerance."""

    def compute() -> Found[Cut]:
        cut = answers.cut(work.question, work.monitor.update)
        return Found(cut, {"cut": cut.to_json()})

    return Stage(
        "cut",
        "sparsity sweep",
        answers.num_cuts(work.question),
        compute,
        lambda document: Found(Cut.from_json(document["cut"]), {}),
        lambda found: f"loss threshold {found.value.sparsity:.4f}",
    )


def attained_stage(work: Answering) -> Stage[Found[tuple[Attained, float | None]]]:
    """The sparsest network within the tolerance that is built, kept with its mask; and its test error."""
    question, checkpoint = work.question, work.checkpoint("attained")
    files = NetworkFiles(work, run_folder.PRUNED, run_folder.PRUNED_TORCH)

    def compute() -> Found[tuple[Attained, float | None]]:
        attained = answers.attained(question, work.networks, checkpoint, work.monitor.update)
        error = answers.error_of(question, attained.pruned.params)
        part: dict[str, Any] = {"attained": attained.to_json(), "attained_error": error}
        if work.kept:
            torch = files.save(attained.pruned.params, attained.pruned.mask)
            sizes = pruned_files.sizes(question.params, attained.pruned, question.model)
            part["pruned"] = sizes | torch
        return Found((attained, error), part)

    def load(document: Mapping[str, Any]) -> Found[tuple[Attained, float | None]]:
        stored = document["attained"]
        num_kept = pruned_files.expected_kept(stored["sparsity"], question.weights)
        attained = Attained.from_json(stored, *files.load(num_kept))
        return Found((attained, document["attained_error"]), {})

    return Stage(
        "attained",
        "attained limit",
        round(question.max_products),
        compute,
        load,
        lambda found: f"sparsity {found.value[0].sparsity:.4f}",
        checkpoint,
    )


def certified_stage(work: Answering) -> Stage[Found[Certified]]:
    """How far the networks on the way to it are certified, and the sparsest one that is."""
    question = work.question
    files = NetworkFiles(work, run_folder.CERTIFIED, run_folder.CERTIFIED_TORCH)

    def compute() -> Found[Certified]:
        certificate = answers.certified(question, work.networks, work.monitor.update)
        network = answers.certified_network(question, work.networks, certificate)
        part: dict[str, Any] = {"certificate": None if certificate is None else certificate.to_json()}
        if work.kept and network is not None:
            files.save(network.params, network.mask)
            part["certified_file"] = files.name
            part["certified_kept"] = pruned_files.count_kept(network.mask)
        return Found((certificate, network), part)

    def load(document: Mapping[str, Any]) -> Found[Certified]:
        stored = document["certificate"]
        certificate = None if stored is None else Certificate.from_json(stored)
        network = None
        if certificate is not None and certificate.sparsity is not None:
            network = CertifiedNetwork(certificate.sparsity, *files.load(document.get("certified_kept")))
        return Found((certificate, network), {})

    def told(found: Found[Certified]) -> str:
        certificate, _ = found.value
        sparsity = None if certificate is None else certificate.sparsity
        return "nothing" if sparsity is None else f"sparsity {sparsity:.4f}"

    return Stage(
        "certified",
        "certificate",
        1 if isinstance(work.question.certifying, Certifying) else 0,
        compute,
        load,
        told,
        run_folder.checkpoint_path(work.folder, "networks"),
    )
