"""Products with a curvature, and Lanczos runs, by other libraries: same weights, data, batches and vectors.

    python benchmarks/peers.py --check

prints by how much the products and Ritz values of every peer differ from jaxlimit's, on few examples.

Every peer has its data in memory as a list of batches, so that it pays for no loader, and multiplies with
the same prunable weights as jaxlimit. `to_native` and `to_flat` convert vectors and are not to be timed;
`matvec`, `matmat` and `lanczos` are. On a GPU call `synchronize` before reading a clock. Needs
`pip install -e ".[cli,bench]"`.
"""

import argparse
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib.metadata import version
from typing import Any, ClassVar

import common
import curvlinops  # pyright: ignore[reportMissingImports]
import hessian_eigenthings as eigenthings  # pyright: ignore[reportMissingImports]
import jax
import jax.numpy as jnp
import networks
import numpy as np
import pyhessian  # pyright: ignore[reportMissingImports]
import torch  # pyright: ignore[reportMissingImports]
from curvlinops.papyan2020traces.spectrum import fast_lanczos  # pyright: ignore[reportMissingImports]
from jax.flatten_util import ravel_pytree
from matfree import decomp  # pyright: ignore[reportMissingImports]
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal
from twins import Twin, make_twin

import jaxlimit
from jaxlimit.core.trees import PyTree

OPERATORS = ("hessian", "gauss_newton")
# Nodes and weights of the Gauss rule of a start vector.
Rule = tuple[NDArray[np.float64], NDArray[np.float64]]
# Of the plain loop: the value for ResNet18. Its second derivative is 0, its cost is not.
L1 = 5e-5


def gauss_rule(diagonal: Any, off_diagonal: Any) -> Rule:
    """Of a tridiagonal matrix, on the host in float64."""
    diagonal, off_diagonal = np.asarray(diagonal, np.float64), np.asarray(off_diagonal, np.float64)
    nodes, vectors = eigh_tridiagonal(diagonal, off_diagonal)
    return nodes, vectors[0] ** 2


class Peer:
    """A library's product with the curvature of a problem, on vectors of its own kind.

    Attributes:
        name: of the library.
        package: whose version is recorded.
        operators: it offers.
        has_blocks: whether `matmat` is the library's own, rather than one `matvec` after the other.
        has_lanczos: whether there is a `lanczos`.
        own_start: whether `lanczos` draws its own start vector and ignores the one given.
    """

    name: ClassVar[str]
    package: ClassVar[str]
    operators: ClassVar[tuple[str, ...]] = ("hessian",)
    has_blocks: ClassVar[bool] = False
    has_lanczos: ClassVar[bool] = True
    own_start: ClassVar[bool] = False

    def __init__(self, twin: Twin, operator: str = "hessian"):
        if operator not in self.operators:
            raise ValueError(f"{self.name} offers {', '.join(self.operators)}, not {operator!r}.")
        self.twin, self.operator = twin, operator

    @property
    def version(self) -> str:
        """That is installed."""
        return version(self.package)

    def to_native(self, vector: NDArray) -> Any:
        """What `matvec` takes, from a flat vector in the order of `ravel_pytree(curvature.weights)`."""
        return self.twin.to_torch(vector)

    def to_flat(self, native: Any) -> NDArray:
        """The inverse of `to_native`."""
        return self.twin.to_jax(native)

    def to_native_block(self, vectors: NDArray) -> Any:
        """What `matmat` takes, from several flat vectors, one a row."""
        return [self.to_native(vector) for vector in vectors]

    def to_flat_block(self, block: Any) -> NDArray:
        """The inverse of `to_native_block`."""
        return np.stack([self.to_flat(native) for native in block])

    def matvec(self, vector: Any) -> Any:
        """The curvature times a vector."""
        raise NotImplementedError

    def matmat(self, block: Any) -> Any:
        """The curvature times several vectors."""
        return [self.matvec(vector) for vector in block]

    def lanczos(self, start: Any, num_steps: int) -> Rule:
        """A whole run from a native start vector, with as much reorthogonalisation as the library does."""
        raise NotImplementedError(f"{self.name} has no Lanczos run that works.")

    def product(self, vector: NDArray) -> NDArray:
        """The curvature times a flat vector."""
        return self.to_flat(self.matvec(self.to_native(vector)))

    def synchronize(self) -> None:
        """Waits until a GPU has finished what it was given."""
        if self.twin.parameters[0].is_cuda:
            torch.cuda.synchronize()


class DoubleBackward(Peer):
    """A plain loop in PyTorch, as in the paper's code: the gradient of <gradient, v>, L1 term in the graph.

    Its Lanczos run has one Gram-Schmidt pass over all vectors, as there.
    """

    name = "PyTorch double backward"
    package = "torch"

    def matvec(self, vector: torch.Tensor) -> torch.Tensor:
        twin = self.twin
        total = torch.zeros_like(vector)
        for inputs, labels in twin.batches:
            penalty = sum(x.abs().sum() for x in twin.module.parameters())
            loss = twin.loss(twin.module(inputs), labels) + L1 * penalty
            gradients = torch.autograd.grad(loss, twin.parameters, create_graph=True)
            gradient = torch.cat([x.flatten() for x in gradients])
            products = torch.autograd.grad(gradient @ vector, twin.parameters)
            total += len(labels) / twin.num_examples * torch.cat([x.flatten() for x in products])
        return total

    def lanczos(self, start: torch.Tensor, num_steps: int) -> Rule:
        basis, diagonal, off_diagonal = [start / start.norm()], [], []
        for _ in range(num_steps):
            residual = self.matvec(basis[-1])
            diagonal.append((residual @ basis[-1]).item())
            for vector in basis:
                residual = residual - (residual @ vector) * vector
            off_diagonal.append(residual.norm().item())
            basis.append(residual / off_diagonal[-1])
        return gauss_rule(diagonal, off_diagonal[:-1])


class HessianEigenthings(Peer):
    """Its operators take the mean over batches, so the loss is weighted by what each batch holds.

    Its Gauss-Newton products come with PyTorch's graph, which a Lanczos run would keep for all its steps; it
    is dropped here. Its Lanczos run has one Gram-Schmidt pass over all vectors.
    """

    name = "hessian-eigenthings"
    package = "hessian-eigenthings"
    operators = OPERATORS

    def __init__(self, twin: Twin, operator: str = "hessian"):
        super().__init__(twin, operator)
        scale = len(twin.batches) / twin.num_examples

        def criterion(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return twin.loss(logits, labels) * (scale * len(labels))

        if operator == "hessian":
            loss = eigenthings.supervised_loss(criterion)
            self.matrix = eigenthings.HessianOperator(twin.module, twin.batches, loss)
        else:
            forward, loss = eigenthings.supervised_forward, eigenthings.supervised_loss_of_output(criterion)
            self.matrix = eigenthings.GGNOperator(twin.module, twin.batches, forward, loss)

    def matvec(self, vector: torch.Tensor) -> torch.Tensor:
        return self.matrix.matvec(vector).detach()

    def lanczos(self, start: torch.Tensor, num_steps: int) -> Rule:
        matrix = eigenthings.LambdaOperator(self.matvec, len(start), start.device, start.dtype)
        run = eigenthings.lanczos_tridiagonal(matrix, start, num_steps)
        return gauss_rule(run.alphas.cpu(), run.betas.cpu())


class Curvlinops(Peer):
    """Its Lanczos run reorthogonalises nothing and starts from its own Gaussian vector."""

    name = "curvlinops"
    package = "curvlinops-for-pytorch"
    operators = OPERATORS
    has_blocks = True
    own_start = True

    def __init__(self, twin: Twin, operator: str = "hessian"):
        super().__init__(twin, operator)
        kinds = {
            "hessian": curvlinops.HessianLinearOperator,
            "gauss_newton": curvlinops.GGNLinearOperator,
        }
        self.matrix = kinds[operator](
            twin.module,
            twin.loss,
            twin.parameters,
            twin.batches,
            check_deterministic=False,
            num_data=twin.num_examples,
        )

    def to_native_block(self, vectors: NDArray) -> torch.Tensor:
        return torch.stack(super().to_native_block(vectors), dim=1)

    def to_flat_block(self, block: torch.Tensor) -> NDArray:
        return super().to_flat_block(block.T)

    def matvec(self, vector: torch.Tensor) -> torch.Tensor:
        return self.matrix @ vector

    def matmat(self, block: torch.Tensor) -> torch.Tensor:
        return self.matrix @ block

    def lanczos(self, start: torch.Tensor, num_steps: int) -> Rule:
        nodes, vectors = fast_lanczos(self.matrix, num_steps)
        return nodes.double().cpu().numpy(), vectors[0].double().square().cpu().numpy()


class PyHessian(Peer):
    """Its products only: its Lanczos run ends in `torch.eig`, which PyTorch no longer has."""

    name = "PyHessian"
    package = "pyhessian"
    has_lanczos = False

    def __init__(self, twin: Twin, operator: str = "hessian"):
        super().__init__(twin, operator)
        cuda = twin.parameters[0].is_cuda
        self.matrix = pyhessian.hessian(twin.module, twin.loss, dataloader=twin.batches, cuda=cuda)
        # It empties the gradients after each batch, which ends the cycle that PyTorch warns of.
        warnings.filterwarnings("ignore", message="Using backward\\(\\) with create_graph=True")

    def to_native(self, vector: NDArray) -> list[torch.Tensor]:
        parameters = self.twin.parameters
        parts = super().to_native(vector).split([x.numel() for x in parameters])
        return [part.view_as(x) for part, x in zip(parts, parameters, strict=True)]

    def to_flat(self, native: list[torch.Tensor]) -> NDArray:
        return super().to_flat(torch.cat([x.flatten() for x in native]))

    def matvec(self, vector: list[torch.Tensor]) -> list[torch.Tensor]:
        return self.matrix.dataloader_hv_product(vector)[1]


class Matfree:
    """Its Lanczos run (full reorthogonalisation, compiled as one program) with jaxlimit's product.

    It has no products of its own: it is a peer for whole runs only, and takes a curvature for a twin.
    """

    name = "matfree"
    package = "matfree"

    def __init__(self, curvature: jaxlimit.Curvature):
        self.curvature = curvature
        self.compile = lru_cache(maxsize=None)(self._compile)

    @property
    def version(self) -> str:
        """That is installed."""
        return version(self.package)

    def to_native(self, vector: NDArray) -> jax.Array:
        """On the device; the order stays."""
        return jnp.asarray(vector)

    def lanczos(self, start: jax.Array, num_steps: int) -> Rule:
        """A whole run; `compile` it first, or the first of each number of steps does."""
        return gauss_rule(*self.compile(num_steps)(start, self.curvature.linear))

    def _compile(self, num_steps: int) -> Callable[..., tuple[jax.Array, jax.Array]]:
        curvature = self.curvature
        flat, unravel = ravel_pytree(curvature.weights)
        decompose = decomp.tridiag_sym(num_steps, materialize=False)

        # The linearised batches are arguments: as constants of the program they would be compiled into it.
        def matvec(vector: jax.Array, linear: PyTree) -> jax.Array:
            vectors = jax.tree.map(lambda x: x[None], unravel(vector))
            return ravel_pytree(curvature.product.linear_mean(linear, curvature.num_examples, vectors))[0]

        program = jax.jit(lambda start, linear: decompose(matvec, start, linear).J_small)
        return program.lower(flat, curvature.linear).compile()


PEERS: tuple[type[Peer], ...] = (DoubleBackward, HessianEigenthings, Curvlinops, PyHessian)


def load_peers(
    problem: networks.Problem,
    operator: str,
    batch_size: int = networks.BATCH_SIZE,
    *,
    precision: str = "highest",
    num_threads: int | None = None,
) -> list[Peer]:
    """Every peer that offers the operator ("hessian" or "gauss_newton"), on one twin of the problem.

    Args:
        problem: as `networks.load_problem` returns it.
        operator: which curvature.
        batch_size: examples a batch.
        precision: of matrix products on a GPU: "default" lets PyTorch use TF32.
        num_threads: of PyTorch, for the whole process; default: as it is.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    _allow_tf32(False)  # the twin's outputs are checked to float32 rounding
    twin = make_twin(problem, batch_size, "cpu" if common.on_cpu() else "cuda")
    _allow_tf32(precision == "default")
    return [peer(twin, operator) for peer in PEERS if operator in peer.operators]


def _allow_tf32(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def product_difference(
    peer: Peer, curvature: jaxlimit.Curvature, num_vectors: int = 1, seed: int = 0
) -> float:
    """||peer's product - jaxlimit's|| / ||jaxlimit's||, for one Gaussian vector or a block of them."""
    vectors = _gaussian(curvature, (num_vectors,), seed)
    unravel = ravel_pytree(curvature.weights)[1]
    expected = np.stack([ravel_pytree(curvature.matvec(unravel(jnp.asarray(v))))[0] for v in vectors])
    if num_vectors == 1:
        product = peer.product(vectors[0])[None]
    else:
        product = peer.to_flat_block(peer.matmat(peer.to_native_block(vectors)))
    return float(np.linalg.norm(product - expected) / np.linalg.norm(expected))


def lanczos_difference(
    peer: Peer | Matfree, curvature: jaxlimit.Curvature, num_steps: int = 4, seed: int = 0
) -> float:
    """The largest difference of a Ritz value from jaxlimit's, over the largest Ritz value; same start.

    It exceeds that of the products by the rounding of the peer's own norms and inner products: on a CPU
    PyTorch's float32 norm of a unit vector of 8e5 entries can be .99993.
    """
    vector = _gaussian(curvature, (), seed)
    start = ravel_pytree(curvature.weights)[1](jnp.asarray(vector))
    run = jaxlimit.tridiagonalize(curvature.matvec, start, num_steps)
    expected, _ = gauss_rule(run.diagonal, run.off_diagonal)
    nodes, _ = peer.lanczos(peer.to_native(vector), num_steps)
    return float(np.abs(nodes - expected).max() / np.abs(expected).max())


def _gaussian(curvature: jaxlimit.Curvature, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((*shape, curvature.dim), np.float32)


def check(name: str, num_examples: int, batch_size: int) -> Iterator[list[str]]:
    """Rows of the table: a difference where the peer has such a product, or run from a start of our own."""
    problem = networks.load_problem(name, num_examples)
    for operator in OPERATORS:
        curvature = problem.curvature(operator, batch_size)
        for peer in load_peers(problem, operator, batch_size):
            product = product_difference(peer, curvature)
            block = product_difference(peer, curvature, 2) if peer.has_blocks else None
            compares = peer.has_lanczos and not peer.own_start
            ritz = lanczos_difference(peer, curvature) if compares else None
            cells = ["" if x is None else f"{x:.1e}" for x in (product, block, ritz)]
            yield [name, operator, f"{peer.name} {peer.version}", *cells]
        matfree = Matfree(curvature)
        ritz = lanczos_difference(matfree, curvature)
        yield [name, operator, f"{matfree.name} {matfree.version}", "", "", f"{ritz:.1e}"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Compares the peers' products with jaxlimit's.")
    parser.add_argument("--check", action="store_true", required=True)
    parser.add_argument("--networks", nargs="+", default=list(networks.NETWORKS), choices=networks.NETWORKS)
    parser.add_argument("--num-examples", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=8)
    arguments = parser.parse_args()
    print("| network | operator | peer | product | block | Ritz values |")
    print("| --- | --- | --- | ---: | ---: | ---: |")
    for name in arguments.networks:
        for row in check(name, arguments.num_examples, arguments.batch_size):
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
