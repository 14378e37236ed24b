"""How much memory does a product of the PyTorch libraries take where the vocabulary is large?

    python benchmarks/language_heads_peers.py

The layers of `language_heads.py`. Every number is by how much the largest memory of a fresh process grows in
one call, after the same call with a vocabulary of 100 has loaded what PyTorch loads. Needs PyTorch,
curvlinops and hessian-eigenthings, not JAX. Results are in results/language_heads_peers.json, in arrays of
logits.
"""

import json
import platform
import resource
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

NAME = "language_heads_peers"
VOCABULARY, TOKENS, UNITS = 50_000, 512, 128
PACKAGES = {
    "PyTorch": "torch",
    "curvlinops": "curvlinops-for-pytorch",
    "hessian-eigenthings": "hessian-eigenthings",
}
# As language_heads.py names them: a PyTorch library linearises in every call.
COLUMNS = {"gradient": "gradient", "hessian": "hessian anew", "gauss_newton": "gauss_newton anew"}


def call_of(peer: str, operator: str, vocabulary: int) -> Callable[[], Any]:
    """A gradient, or a product, of the network with a vocabulary."""
    import torch  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    layers = torch.nn.Linear(UNITS, UNITS, bias=False), torch.nn.Linear(UNITS, vocabulary, bias=False)
    model, loss = torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1]), torch.nn.CrossEntropyLoss()
    batches = [(torch.randn(TOKENS, UNITS), torch.randint(0, vocabulary, (TOKENS,)))]
    wanted = list(model.parameters())
    vector = torch.randn(sum(x.numel() for x in wanted))
    if operator == "gradient":
        return lambda: torch.autograd.grad(loss(model(batches[0][0]), batches[0][1]), wanted)
    if peer == "curvlinops":
        import curvlinops  # pyright: ignore[reportMissingImports]

        kinds = {
            "hessian": curvlinops.HessianLinearOperator,
            "gauss_newton": curvlinops.GGNLinearOperator,
        }
        matrix = kinds[operator](model, loss, wanted, batches, check_deterministic=False)
        return lambda: matrix @ vector
    import hessian_eigenthings as eigenthings  # pyright: ignore[reportMissingImports]

    if operator == "hessian":
        matrix = eigenthings.HessianOperator(model, batches, eigenthings.supervised_loss(loss))
    else:
        forward, of_output = eigenthings.supervised_forward, eigenthings.supervised_loss_of_output(loss)
        matrix = eigenthings.GGNOperator(model, batches, forward, of_output)
    return lambda: matrix.matvec(vector)


def growth(peer: str, operator: str) -> float:
    """Of this process, in arrays of logits."""
    call_of(peer, operator, 100)()
    call = call_of(peer, operator, VOCABULARY)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call()
    unit = 1 if sys.platform == "darwin" else 1024
    grown = unit * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    return grown / (4 * TOKENS * VOCABULARY)


def measured(peer: str, operator: str) -> float:
    """`growth` in a process of its own."""
    command = [sys.executable, __file__, peer, operator]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(found.stdout.splitlines()[-1])


def main() -> None:
    if len(sys.argv) == 3:
        print(growth(sys.argv[1], sys.argv[2]))
        return
    peers: dict[str, dict[str, float]] = {"PyTorch": {"gradient": measured("PyTorch", "gradient")}}
    for peer in list(PACKAGES)[1:]:
        peers[peer] = {COLUMNS[name]: measured(peer, name) for name in ("hessian", "gauss_newton")}
    document = {
        "format": 1,
        "command": f"python benchmarks/{NAME}.py",
        "versions": {name: version(package) for name, package in PACKAGES.items()},
        "machine": platform.machine(),
        "peers": peers,
    }
    path = Path(__file__).parent / "results" / f"{NAME}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(peers, indent=1))


if __name__ == "__main__":
    main()
