"""When does the loss sublevel set stay in reach? Statistical dimensions, and the order of the weights.

Everything here is a scalar equation or a sort, and can be tested on diagonal matrices.
"""

from jaxlimit.geometry.dimensions import (
    cone_dimension,
    cone_ridge,
    effective_dimension,
    fixed_point,
    transition_halfwidth,
    width_dimension,
    width_ridge,
)

__all__ = [
    "cone_dimension",
    "cone_ridge",
    "effective_dimension",
    "fixed_point",
    "transition_halfwidth",
    "width_dimension",
    "width_ridge",
]
