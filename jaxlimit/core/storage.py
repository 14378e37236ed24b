r"""Intermediate results on disk: plain NumPy arrays in a folder, written whole or not at all.

A file is first written beside its place and then renamed, so a process killed at any moment leaves either
the old file or the new one. Arrays are stored exactly; a resumed run continues to the same bits. Nothing is
pickled. Of several processes the first writes and all read, from a folder that they share.
"""

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from numpy.typing import ArrayLike, NDArray

from jaxlimit.core.sharding import to_host

PyTree = Any


class Checkpoint:
    """A folder of named results of one problem; without a folder nothing is kept.

    Args:
        folder: where to write; made if missing.
        fingerprint: what identifies the problem, as JSON values. A folder with another one is refused.

    Raises:
        ValueError: the folder belongs to another problem, is not a checkpoint, or is not shared.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, fingerprint: dict[str, Any]):
        self.folder = None if folder is None else Path(folder)
        if self.folder is None:
            return
        identity = self.folder / "problem.json"
        try:
            if jax.process_index() == 0:
                self._begin(identity, fingerprint)
        finally:  # without waiting for a process that failed
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("checkpoint")
        if not identity.exists():
            raise ValueError(f"{self.folder} holds no checkpoint here: it must be shared by all processes.")
        try:
            stored = json.loads(identity.read_text())
        except ValueError as error:
            raise ValueError(
                f"{identity} is damaged ({error}): remove {self.folder} to start anew."
            ) from error
        names = {**fingerprint, **stored}
        different = [name for name in names if stored.get(name) != fingerprint.get(name)]
        if different:
            raise ValueError(
                f"the checkpoint in {self.folder} is of another problem: {', '.join(different)} differ. Name "
                "another folder, or remove this one."
            )

    def _begin(self, identity: Path, fingerprint: dict[str, Any]) -> None:
        folder = identity.parent
        folder.mkdir(parents=True, exist_ok=True)
        if not identity.exists():
            if any(path.suffix != ".tmp" for path in folder.iterdir()):
                raise ValueError(f"{folder} is not empty and holds no checkpoint: name another folder.")
            temporary = identity.with_suffix(".tmp")
            temporary.write_text(json.dumps(fingerprint, indent=1))
            temporary.replace(identity)

    def save_tree(self, name: str, tree: PyTree) -> None:
        """Stores the leaves of a pytree."""
        if self.folder is not None:
            leaves = {f"leaf_{i:04d}": to_host(x) for i, x in enumerate(jax.tree.leaves(tree))}
            if jax.process_index() == 0:
                self._write(self.folder / name, leaves)

    def load_tree(self, name: str, like: PyTree) -> PyTree | None:
        """The pytree of that name with the structure of `like`, or None."""
        content = self.load_arrays(name)
        return None if content is None else self.unflatten(name, content, like)

    def unflatten(self, name: str, content: dict[str, NDArray[Any]], like: PyTree) -> PyTree:
        """The pytree of arrays that `load_arrays` returned, with the structure of `like`."""
        leaves, structure = jax.tree.flatten(like)
        if len(content) != len(leaves):
            raise ValueError(
                f"the checkpoint {name} in {self.folder} holds {len(content)} arrays, not {len(leaves)}."
            )
        # NumPy's format keeps the bytes of bfloat16 but not its name.
        stored = (content[key] for key in sorted(content))
        return structure.unflatten(
            [x.view(leaf.dtype) if x.dtype.kind == "V" else x for x, leaf in zip(stored, leaves, strict=True)]
        )

    def _write(self, path: Path, arrays: dict[str, NDArray[Any]]) -> None:
        temporary = path.with_name(f"{path.name}.tmp")
        with temporary.open("wb") as file:
            np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path.with_name(f"{path.name}.npz"))

    def load_arrays(self, name: str) -> dict[str, NDArray[Any]] | None:
        """The stored arrays of that name, or None."""
        if self.folder is None or not (path := self.folder / f"{name}.npz").exists():
            return None
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
                return dict(content)
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"the checkpoint file {path} is damaged ({error}): remove it to go on."
            ) from error


def ordered_sum(values: ArrayLike) -> float:
    """Sum over i, from 1, of sqrt(i) times the i-th value: for a fingerprint, it sees signs and order.

    Examples:
        >>> ordered_sum([2.0, 0.0, 0.0, 1.0]), ordered_sum([1.0, 0.0, 0.0, 2.0])
        (4.0, 5.0)
    """
    values = np.asarray(values, np.float64)
    return float(np.sum(values * np.sqrt(np.arange(1, len(values) + 1))))  # BLAS adds up as threads come
