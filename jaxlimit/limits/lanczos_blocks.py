"""How deep do Lanczos runs go? Until what they serve is resolved, or the budget is spent.

A block is several runs side by side. Its state can be kept in a checkpoint, from which an interrupted block
goes on to the same bits.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax

from jaxlimit.core.memory import device_bytes
from jaxlimit.core.trees import PyTree
from jaxlimit.limits.budget import Budget, BudgetSpent
from jaxlimit.spectrum import lanczos
from jaxlimit.spectrum.bracket import negative_share
from jaxlimit.spectrum.lanczos import LanczosState
from jaxlimit.spectrum.lanczos_files import LanczosFiles
from jaxlimit.spectrum.tridiagonal import Tridiagonal

# Steps before a run with an indefinite matrix may call itself resolved. While it still finds the outliers, no
# estimate knows of the eigenvalues around the ridge: on a network of 1.6 million weights they say .994 to
# .996 after 8 to 16 steps, where the limit is .89.
INDEFINITE_STEPS = 64
# Steps after which a block is looked at for the first time, and the unit of all further ones: a quarter more
# each time.
STRIDE = 16


@dataclass
class LanczosBlocks:
    """Extends blocks of Lanczos runs, within a budget of products.

    Attributes:
        budget: of the products.
        files: where the states are kept.
        basis_bytes: memory on each device for the vectors that a block keeps.
        host_bytes: host memory of each device for further ones.
        reorthogonalized: whether the vectors of all runs have fitted so far.
        negative_share: how far a matrix that was declared semidefinite reaches below 0, as the runs so far
            see it; see `jaxlimit.spectrum.bracket.negative_share`.
    """

    budget: Budget
    files: LanczosFiles
    basis_bytes: int
    host_bytes: int
    reorthogonalized: bool = True
    negative_share: float = 0.0

    @property
    def semidefinite(self) -> bool:
        """Whether the matrix was declared so, and nothing speaks against it."""
        return self.budget.curvature.positive_semidefinite and self.negative_share == 0

    def extend(
        self,
        name: str,
        starts: PyTree,
        resolved: Callable[[list[Tridiagonal]], bool],
        *,
        max_steps: int | None = None,
        reserve: int = 0,
    ) -> tuple[list[Tridiagonal], LanczosState]:
        """Runs of a block that are resolved, have `max_steps` steps, or have spent the budget.

        Their state is returned, too.

        Args:
            name: of the block, in the checkpoint.
            starts: its start vectors, along a leading axis.
            resolved: whether runs do.
            max_steps: steps at most.
            reserve: products of the budget that are left for later.

        Raises:
            BudgetSpent: too few products are left for a first step.
        """
        num_runs = jax.tree.leaves(starts)[0].shape[0]
        vector_bytes = num_runs * device_bytes(self.budget.curvature.weights)
        max_basis, max_offloaded = self.basis_bytes // vector_bytes, self.host_bytes // vector_bytes
        resident = lanczos.resident_panels(max_basis, max_offloaded)
        state = self.files.load(name, lanczos.init(starts), resident)
        self.budget.count += state.diagonal.size
        if self.budget.left - reserve < num_runs and state.diagonal.size == 0:
            raise BudgetSpent
        while True:
            runs, steps = state.tridiagonals(self.budget.curvature.rounding), state.diagonal.shape[1]
            self.reorthogonalized &= all(run.reorthogonalized for run in runs)
            if self.budget.curvature.positive_semidefinite:
                self.negative_share = max(self.negative_share, negative_share(runs))
            least = 0 if self.semidefinite else INDEFINITE_STEPS
            if runs and (all(run.breakdown for run in runs) or (steps >= least and resolved(runs))):
                return runs, state
            wanted = max(STRIDE, steps // (4 * STRIDE) * STRIDE) if max_steps is None else max_steps - steps
            extra = min(wanted, (self.budget.left - reserve) // num_runs)
            if extra < 1:
                return runs, state
            state = lanczos.run(self.budget.matmat, state, extra, max_basis, max_offloaded)
            self.files.save(name, state)
