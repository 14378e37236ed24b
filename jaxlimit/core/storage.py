"""Folders that belong to one problem and one process, and intermediate results in them.

A JSON file in the folder says what it is for; a folder that is for something else is refused. While a process
works there, others wait or leave. Arrays are stored exactly; a resumed run continues to the same bits.
Nothing is pickled.
"""

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import jax
import numpy as np
from jax.experimental import multihost_utils
from numpy.typing import ArrayLike, NDArray

from jaxlimit.core.locks import LOCK, Lock, lock
from jaxlimit.core.sharding import to_host
from jaxlimit.core.trees import PyTree
from jaxlimit.core.writing import FORMAT, DamagedFile, is_leftover, read_json, remove, write_file


@dataclass(frozen=True)
class Purpose:
    """What a kind of folder is for.

    Attributes:
        kind: such as "a run".
        file: name of the JSON file that says which.
        foreign: why a folder with other files in it is refused; {folder} and {file} are filled in.
        different: why one of another identity is refused; {folder}, {names} (what differs) and {values} (how)
            are filled in.
    """

    kind: str
    file: str
    foreign: str
    different: str


class Claim(NamedTuple):
    """A folder in use: keep it as long as you write there.

    Attributes:
        lock: keeps other processes out.
        resumed: whether the folder was made before.
    """

    lock: Lock
    resumed: bool


def claim(
    folder: Path,
    purpose: Purpose,
    identity: Mapping[str, Any],
    *,
    wait: bool = True,
    free: Collection[str] = (),
) -> Claim:
    """Makes a folder for a problem, or finds it made for the same one, and keeps other processes out of it.

    What killed writers left in it is removed.

    Args:
        folder: the folder.
        purpose: what for.
        identity: of the problem, as JSON values.
        wait: as for `lock`. A folder of another identity is refused without waiting.
        free: names in the identity that may differ; the new value is stored.

    Raises:
        ValueError: the folder is of another identity, holds something else, or its identity is damaged; or
            another process works there, and `wait` is False.
    """
    wanted = json.loads(json.dumps({"format": FORMAT, **identity}))
    stored_identity(folder, purpose, wanted, free)
    held = lock(folder, wait=wait)
    stored = stored_identity(folder, purpose, wanted, free)
    if held.holds:  # nobody else writes these any more; a folder in it with a lock belongs to somebody
        inside = [item for item in folder.iterdir() if item.is_dir() and not (item / LOCK).exists()]
        for leftover in filter(is_leftover, [x for part in (folder, *inside) for x in part.iterdir()]):
            remove(leftover)
    if stored is None or _different(stored, wanted):
        write_file(folder / purpose.file, json.dumps(wanted, indent=1) + "\n")
    return Claim(held, stored is not None)


def stored_identity(
    folder: Path, purpose: Purpose, wanted: Mapping[str, Any], free: Collection[str] = ()
) -> dict[str, Any] | None:
    """The identity of a folder, None where it is empty or missing; changes nothing.

    Raises:
        ValueError: as for `claim`.
    """
    path = folder / purpose.file
    if path.exists():
        stored = read_json(path, purpose.kind, alone=False)
        different = _different(stored, wanted)
        if not {names[0] for names in different} <= {*free}:
            names = ", ".join(dict.fromkeys(names[0] for names in different))
            values = "; ".join(
                f"{names[-2 if names[-1] == 'name' else -1]} = {old}, not {new}"
                for names, (old, new) in different.items()
            )
            raise ValueError(purpose.different.format(folder=folder, names=names, values=values))
        return stored
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: name another folder.")
    files = sorted(folder.iterdir()) if folder.exists() else []
    foreign = [item.name for item in files if item.name != LOCK and not is_leftover(item)]
    if foreign:
        raise ValueError(purpose.foreign.format(folder=folder, file=foreign[0]))
    return None


def _different(
    stored: Mapping[str, Any], wanted: Mapping[str, Any], at: tuple[str, ...] = ()
) -> dict[tuple[str, ...], tuple[Any, Any]]:
    """The two values wherever two documents differ, by the names that lead there."""
    found = {}
    for name in {**wanted, **stored}:
        old, new = stored.get(name), wanted.get(name)
        if _is_about(old) and _is_about(new):
            if not abs(old["about"] - new["about"]) <= max(old["within"], new["within"]):
                found[*at, name] = (old["about"], new["about"])
        elif isinstance(old, dict) and isinstance(new, dict):
            found |= _different(old, new, (*at, name))
        elif old != new and json.dumps(old) != json.dumps(new):  # 1 is 1.0, and NaN is itself
            found[*at, name] = (old, new)
    return found


def about(value: float, within: float) -> dict[str, float]:
    """A number in an identity that was computed: another one within so much of it is the same."""
    return {"about": value, "within": within}


def _is_about(value: Any) -> TypeGuard[dict[str, float]]:
    return isinstance(value, dict) and value.keys() == {"about", "within"}


CHECKPOINT = Purpose(
    "a checkpoint",
    "problem.json",
    "{folder} is not empty and holds no checkpoint: name another folder.",
    "the checkpoint in {folder} is of another problem: {names} differ. Name another folder, or remove this "
    "one.",
)


class Checkpoint:
    """A folder of named results of one problem; without a folder nothing is kept.

    Where one computation runs in several processes, the first writes and all read, from a folder that they
    share. Another computation with the same folder waits until this one is done, and goes on from there.

    Args:
        folder: where to write; made if missing.
        fingerprint: what identifies the problem, as JSON values. A folder with another one is refused.

    Raises:
        ValueError: the folder belongs to another problem, is not a checkpoint, or is not shared.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, fingerprint: dict[str, Any]):
        self.folder = None if folder is None else Path(folder)
        self._claim: Claim | None = None
        if self.folder is None:
            return
        try:
            if jax.process_index() == 0:
                self._claim = claim(self.folder, CHECKPOINT, fingerprint)
        finally:  # without waiting for a process that failed
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("checkpoint")
        wanted = json.loads(json.dumps({"format": FORMAT, **fingerprint}))
        if jax.process_index() and stored_identity(self.folder, CHECKPOINT, wanted) is None:
            raise ValueError(f"{self.folder} holds no checkpoint here: it must be shared by all processes.")

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        """Lets other processes in, at once: a notebook keeps what an exception has gone through."""
        if self._claim is not None:
            self._claim.lock.release()

    def save_tree(self, name: str, tree: PyTree) -> None:
        """Stores the leaves of a pytree."""
        if self.folder is not None:
            leaves = {f"leaf_{i:04d}": to_host(x) for i, x in enumerate(jax.tree.leaves(tree))}
            if jax.process_index() == 0:
                path = self.folder / f"{name}.npz"
                write_file(path, lambda file: np.savez(file, **leaves))  # pyright: ignore[reportArgumentType]

    def load_tree(self, name: str, like: PyTree, *, same_shapes: bool = True) -> PyTree | None:
        """The pytree of that name with the structure of `like`, or None; as `unflatten`."""
        content = self.load_arrays(name)
        return None if content is None else self.unflatten(name, content, like, same_shapes=same_shapes)

    def unflatten(
        self, name: str, content: dict[str, NDArray[Any]], like: PyTree, *, same_shapes: bool = True
    ) -> PyTree:
        """The pytree of arrays that `load_arrays` returned, with the structure of `like`.

        Args:
            name: of the arrays, for the messages.
            content: the arrays.
            like: a pytree of arrays with the same dtypes; a number stands for any array.
            same_shapes: whether the shapes are those of `like`, too.

        Raises:
            ValueError: they are other arrays.
        """
        leaves, structure = jax.tree.flatten(like)
        path = Path(f"{self.folder}/{name}.npz")
        damaged = f"the checkpoint file {path} holds other arrays than its problem has"
        if len(content) != len(leaves):
            raise DamagedFile(f"{damaged} ({len(content)}, not {len(leaves)}): remove it to go on.", path)
        stored = [_as(content[key], leaf) for key, leaf in zip(sorted(content), leaves, strict=True)]
        for x, leaf in zip(stored, leaves, strict=True):
            if hasattr(leaf, "dtype") and (x.dtype != leaf.dtype or (same_shapes and x.shape != leaf.shape)):
                found, wanted = (f"{a.dtype} of shape {tuple(a.shape)}" for a in (x, leaf))
                raise DamagedFile(f"{damaged} ({found}, not {wanted}): remove it to go on.", path)
        return structure.unflatten(stored)

    def load_arrays(self, name: str) -> dict[str, NDArray[Any]] | None:
        """The stored arrays of that name, or None."""
        if self.folder is None or not (path := self.folder / f"{name}.npz").exists():
            return None
        with path.open("rb") as file:
            try:
                with np.load(file, allow_pickle=False) as content:
                    return dict(content)
            # NumPy raises whatever the damage leads to: BadZipFile, zlib.error, NotImplementedError, ...
            except Exception as error:
                message = f"the checkpoint file {path} is damaged ({error}): remove it to go on."
                raise DamagedFile(message, path) from error


def _as(stored: NDArray[Any], like: Any) -> NDArray[Any]:
    """With its own dtype: NumPy's format keeps the bytes of bfloat16 but not its name."""
    unnamed = stored.dtype.kind == "V" and stored.dtype.itemsize == like.dtype.itemsize
    return stored.view(like.dtype) if unnamed else stored


def ordered_sum(values: ArrayLike) -> float:
    """Sum over i, from 1, of sqrt(i) times the i-th value: for a fingerprint, it sees signs and order.

    Examples:
        >>> ordered_sum([2.0, 0.0, 0.0, 1.0]), ordered_sum([1.0, 0.0, 0.0, 2.0])
        (4.0, 5.0)
    """
    values = np.asarray(values, np.float64)
    return float(np.sum(values * np.sqrt(np.arange(1, len(values) + 1))))  # BLAS adds up as threads come
