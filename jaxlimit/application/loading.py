"""An assessment, read back from the folder that `assess` or `jaxlimit run` left."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxlimit.application import pruned_files, run_folder
from jaxlimit.application.answering import NO_NETWORK
from jaxlimit.application.answers import CertifiedNetwork
from jaxlimit.application.assessment import Assessment
from jaxlimit.application.spectra import load_spectrum
from jaxlimit.application.stage_answers import assessment_of
from jaxlimit.core.trees import Prunable, PyTree, is_kernel, partition
from jaxlimit.core.writing import content_of, read_json


def load_assessment(
    folder: str | os.PathLike[str], params: PyTree | None = None, *, prunable: Prunable = is_kernel
) -> Assessment:
    """The assessment in a folder that `assess(..., out=folder)` or `jaxlimit run --out folder` has finished.

    Nothing is computed. The limits have their `measure`, but neither `curve` nor `sensitivity`.

    Args:
        folder: of the results.
        params: of the network before it was pruned, or any tree like it. None: the pruned networks are left
            out, `.attained.pruned.params`, `.mask` and `.certified` are None.
        prunable: as it was for `assess`.

    Raises:
        FileNotFoundError: no folder, or a file is missing.
        ValueError: the work is not finished, a file is damaged, or params are of another network.
    """
    folder = Path(folder)
    config = read_json(folder / run_folder.CONFIG, alone=False)
    if "preset" in config:  # of a run
        record = run_folder.read_record(folder)
        with content_of(folder / run_folder.LIMIT, ValueError):
            found = assessment_of(record.document, record.columns)
    else:
        found = _assessed(folder, config)
    with content_of(folder / run_folder.LIMIT):
        spectra = {name: load_spectrum(run_folder.spectrum_path(folder, name)) for name in found.predicted}
        limits = {name: replace(x, measure=spectra[name].measure) for name, x in found.predicted.items()}
    found = replace(found, predicted=limits)
    if params is None:
        return found
    like = partition(params, prunable)[0]
    num_kept = pruned_files.expected_kept(found.attained.sparsity, like)
    network, mask = pruned_files.load_pruned(folder / run_folder.PRUNED, params, like, num_kept)
    pruned = replace(found.attained.pruned, params=network, mask=mask)
    found = replace(found, attained=replace(found.attained, pruned=pruned))
    sparsity = None if found.certificate is None else found.certificate.sparsity
    if sparsity is None:
        return found
    num_kept = read_json(folder / run_folder.LIMIT).get("certified_kept")
    certified = pruned_files.load_pruned(folder / run_folder.CERTIFIED, params, like, num_kept)
    return replace(found, certified=CertifiedNetwork(sparsity, *certified))


def _assessed(folder: Path, config: Mapping[str, Any]) -> Assessment:
    """What `assess` has found there."""
    document = read_json(folder / run_folder.LIMIT)
    if not document.get("finished"):
        raise ValueError(f"the work in {folder} is not finished: the same call, or command, goes on with it.")
    with content_of(folder / run_folder.CONFIG):
        certifying = config["certifying"]
    with content_of(folder / run_folder.LIMIT, ValueError):
        reason = certifying if isinstance(certifying, str) else NO_NETWORK
        told = "" if document["certificate"] else reason
        return Assessment.from_json({**document, "predicted": document["limits"], "not_certified": told})
