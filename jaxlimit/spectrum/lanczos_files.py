"""Where a block of Lanczos runs stands, on disk: a run that was interrupted goes on to the same bits.

The vectors of a basis fill panels. A full panel does not change any more and is written once, to a file of
its own; the rest of the state is written after every block of steps.
"""

import jax
import numpy as np

from jaxlimit.core.memory import in_host_memory
from jaxlimit.core.sharding import place, sharding_like
from jaxlimit.core.storage import Checkpoint
from jaxlimit.core.trees import PyTree
from jaxlimit.spectrum.lanczos import LanczosState


class LanczosFiles:
    """Lanczos states by name, in the folder of a checkpoint.

    Args:
        store: the checkpoint; one without a folder keeps nothing.
    """

    def __init__(self, store: Checkpoint) -> None:
        self._store = store
        self._panels: set[str] = set()  # known to be on disk

    def save(self, name: str, state: LanczosState) -> None:
        """Stores a state after its first step."""
        if self._store.folder is None:
            return
        for i, panel in enumerate(state.basis[:-1]):
            if _panel(name, i) not in self._panels:
                self._store.save_tree(_panel(name, i), panel)
                self._panels.add(_panel(name, i))
        self._store.save_tree(name, (np.array(len(state.basis)), state._replace(basis=state.basis[-1:])))

    def load(self, name: str, initial: LanczosState, resident: float = np.inf) -> LanczosState:
        """The stored state of that name, or the initial one.

        Args:
            name: of the state.
            initial: before the first step.
            resident: panels beyond these, but for the last one, are put into host memory.

        Raises:
            ValueError: a file is damaged, or one of the panels is missing.
        """
        content = self._store.load_arrays(name)
        if content is None:
            return initial
        like = np.array(0), initial._replace(basis=(initial.current,))
        if len(content) < len(jax.tree.leaves(like)):
            like = np.array(0), initial
        num_panels, stored = self._store.unflatten(name, content, like, same_shapes=False)
        panels = []
        for i in range(int(num_panels) - 1):
            panel = self._store.load_tree(_panel(name, i), initial.current, same_shapes=False)
            if panel is None:
                raise ValueError(
                    f"{_panel(name, i)}.npz is missing in the checkpoint {self._store.folder}: remove "
                    f"{name}.npz there to start this run anew."
                )
            panel = _placed(panel, initial.current, 2, 1)
            panels.append(in_host_memory(panel) if i >= resident else panel)
            self._panels.add(_panel(name, i))
        return stored._replace(
            basis=(*panels, *[_placed(x, initial.current, 2, 1) for x in stored.basis]),
            previous=_placed(stored.previous, initial.previous),
            current=_placed(stored.current, initial.current),
            norm=_placed(stored.norm, initial.norm),
        )


def _placed(stored: PyTree, like: PyTree, new_axes: int = 0, without: int = 0) -> PyTree:
    """On the devices, as `sharding_like` says."""
    return jax.tree.map(lambda x, y: place(x, sharding_like(y, new_axes, without)), stored, like)


def _panel(name: str, index: int) -> str:
    """Name of the file of one panel."""
    return f"{name}-panel-{index:04d}"
