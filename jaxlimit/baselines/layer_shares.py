r"""Shares of the layers by rules: uniform, uniform+, ER and ERK, as one order of all weights.

A rule gives each layer l a raw density r_l, and the layers keep min(1, e r_l) of their m_l weights, with e
such that the total is right: layers that are full stay so, and the others share what is left.

    uniform   r = 1
    ER        r = (inputs + outputs) / (inputs * outputs)          (Mocanu et al., arXiv 1707.04780)
    ERK       r = sum of the axes of the kernel / their product    (Evci et al., arXiv 1911.11134)
    uniform+  r = 1, but the first convolution keeps all its weights and the last dense layer a fifth at least
              (Gale, Elsen and Hooker, arXiv 1902.09574)

The k-th largest weight of a layer is kept from e = (k - 1/2) / (r_l m_l) on. That number orders all weights,
so that one array of scores has the rule's shares at every sparsity, to a weight or so, and networks of rising
sparsity are nested. As counts it is the method of Sainte-Lague for dividing seats: of all counts with their
sum it has the least sum_l (n_l - q_l)^2 / q_l about the quotas q_l = e r_l m_l.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from jaxlimit.baselines.masks import count, size
from jaxlimit.baselines.network import kernels
from jaxlimit.baselines.ratios import forward_order
from jaxlimit.core.checks import as_real, require_range
from jaxlimit.core.trees import PyTree, path_name
from jaxlimit.geometry.magnitude import magnitude_mask, magnitude_order

RULES = ("uniform", "er", "erk")
# What the last dense layer keeps at least in uniform+.
LAST = 0.2
# Puts what is reserved above all other scores, which lie between 1e-15 and 1e15.
RESERVED = 1e30


def share_scores(
    weights: PyTree,
    rule: str,
    *,
    scores: PyTree | None = None,
    reserved: Mapping[str, float] | None = None,
) -> PyTree:
    """Scores whose order removes weights by the shares of a rule, the least of each layer first.

    Args:
        weights: pytree of the prunable weights: kernels with inputs on the last axis but one, outputs on the
            last.
        rule: "uniform", "er" or "erk".
        scores: what is least within a layer; None: the magnitudes.
        reserved: by name of a kernel, as "layers.0.kernel", the share of its weights that goes only when
            nothing else is left: `uniform_plus(model)`. A layer with a reserve takes part in the rule as the
            others do, until it has come down to it.

    Returns:
        Pytree like the weights, positive, float64 on the host, for `scores=`, or for `magnitude_mask`.

    Raises:
        ValueError: another rule, a reserve that is no share or of no kernel; weights or scores that
            `magnitude_order` refuses.

    Examples:
        ERK keeps all of a small layer while a large one has lost five of six.

        >>> weights = {"large": np.arange(1.0, 37.0).reshape(6, 6), "small": np.array([[1.0, 2.0]])}
        >>> share_counts(weights, "erk", 8)
        {'large': 6, 'small': 2}
    """
    require_range("rule", rule, rule in RULES, f"one of {', '.join(RULES)}")
    reserved = dict(reserved or {})
    paths = jax.tree_util.tree_leaves_with_path(weights)
    names = [path_name(path) for path, _ in paths]
    unknown = sorted(reserved.keys() - {*names})
    if unknown:
        raise ValueError(
            f"reserved has {', '.join(unknown)}, which are no kernels: these are {', '.join(names)}."
        )
    for name, share in reserved.items():
        require_range(f"reserved of {name}", share, 0 <= as_real(share) <= 1, "a share from 0 to 1")
    rankings = jax.tree.leaves(weights if scores is None else scores)
    magnitude_order(weights, scores)  # refuses what does not match
    found = [
        _score(leaf, ranking, rule, reserved.get(name, 0.0))
        for (_, leaf), ranking, name in zip(paths, rankings, names, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(weights), found)


def share_counts(
    weights: PyTree, rule: str, num_kept: int, *, reserved: Mapping[str, float] | None = None
) -> dict[str, int]:
    """How many weights each layer keeps by a rule: integers that sum to `num_kept`.

    Args:
        weights: as for `share_scores`.
        rule: as for `share_scores`.
        num_kept: in all layers together.
        reserved: as for `share_scores`, but that they must be kept.

    Raises:
        ValueError: as for `share_scores`; fewer than what is reserved, or more than all weights.

    Examples:
        >>> weights = {"a": np.ones((2, 5)), "b": np.ones((5, 2)), "c": np.ones((2, 2))}
        >>> share_counts(weights, "uniform", 12)
        {'a': 5, 'b': 5, 'c': 2}
        >>> share_counts(weights, "uniform", 12, reserved={"a": 1.0})
        {'a': 10, 'b': 1, 'c': 1}
    """
    reserved, dim = dict(reserved or {}), size(weights)
    scores = share_scores(weights, rule, reserved=reserved)
    sizes = {path_name(path): np.size(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(weights)}
    least = sum(_reserve(sizes[name], share) for name, share in reserved.items())
    if not least <= num_kept <= dim:
        raise ValueError(
            f"num_kept must lie between the {least:,} weights that are reserved and all {dim:,}, "
            f"got {num_kept:,}."
        )
    mask = magnitude_mask(scores, 1 - num_kept / dim)
    return {path_name(path): count(keep) for path, keep in jax.tree_util.tree_leaves_with_path(mask)}


def uniform_plus(model: nnx.Module) -> dict[str, float]:
    """What uniform+ reserves: all of the first layer if it is a convolution, a fifth of the last if dense.

    Its first layer is a convolution in the paper; to keep a first dense layer, which has most weights of a
    small network, would leave nothing to prune.

    Args:
        model: with the layers in the order in which it defines them.

    Examples:
        >>> from jaxlimit.models import FullyConnected
        >>> uniform_plus(FullyConnected([3, 2, 2], rngs=nnx.Rngs(0)))
        {'layers.1.kernel': 0.2}
    """
    paths = jax.tree_util.tree_leaves_with_path(kernels(model))
    axes = {path_name(path): np.ndim(leaf) for path, leaf in paths}
    names = [".".join(name) for name in forward_order(model)]
    found = {names[0]: 1.0} if axes[names[0]] > 2 else {}
    return found | ({names[-1]: LAST} if axes[names[-1]] == 2 else {})


def _reserve(number: int, share: float) -> int:
    return int(np.ceil(share * number - 1e-9 * number))


def _score(weights: Any, ranking: Any, rule: str, share: float) -> NDArray[np.float64]:
    """1 / e from which on each weight of a layer is kept; beyond that of all others for what is reserved."""
    shape, number = np.shape(weights), np.size(weights)
    place = number - np.argsort(np.argsort(np.abs(np.asarray(ranking, np.float64)).ravel(), kind="stable"))
    density = _raw_density(shape, rule)
    score = density * number / (place - 0.5)
    return np.where(place <= _reserve(number, share), RESERVED * score, score).reshape(shape)


def _raw_density(shape: tuple[int, ...], rule: str) -> float:
    """r_l of a kernel."""
    if rule == "uniform":
        return 1.0
    axes = np.array(shape[-2:] if rule == "er" else shape, float)
    return float(axes.sum() / axes.prod())
