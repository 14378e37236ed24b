"""Functions that are traced anew for every use, and compiled programs that are shared where traces agree.

A network that is like one before it, of another seed or with other running statistics, needs no new program.
A function that is not what it was, though it is the same object, must never be served the old one: a bound
method whose object has changed, a loss that reads a module variable. Python's equality of functions cannot
tell the two apart. So every `Program` traces its function itself, and compiled programs are found by what
was traced: the StableHLO text of the whole program, after all derivatives were taken. Arrays that the
function closes over are arguments of the program, so that none is part of the text, nor kept by it.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from jaxlimit.core.constraints import unconstrained
from jaxlimit.core.functions import Static
from jaxlimit.core.leaves import is_array
from jaxlimit.core.sharding import explicit_sharding
from jaxlimit.core.trees import PyTree, thawed

# Compiled programs that are kept for others to use. A run of the command line has about a hundred.
MAX_SHARED = 256
# What calls back into this process is not told by its text.
NOT_IN_THE_TEXT = ("callback", "stablehlo.send", "stablehlo.recv")

# On a CPU. From jaxlib 0.10.2 on XLA hands sums of products to another library: 0.10.2 computes wrong numbers
# there where an array is broadcast (jax-ml/jax #39103), and up to 0.11.1 some programs crash (#39257).
FAULTY_SUMS = ((0, 10, 2), (0, 11, 2))  # the first version, and the first without
SOUNDLY = {"xla_cpu_experimental_ynn_fusion_type": ""}
# On a CPU, for what is called once and on little data: compiling takes less time, the call more. At level 0
# some gradients of convolutions have NaNs (seen in jaxlib 0.10.0 to 0.11.2).
QUICKLY = {"xla_backend_optimization_level": 1, "xla_llvm_disable_expensive_passes": True}

# What JAX raises where a function wants numbers while it is traced.
NEEDS_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)

_config: Any = jax.config
_shared: OrderedDict[tuple, Callable[..., list[jax.Array]]] = OrderedDict()


class _Trace(NamedTuple):
    jaxpr: ClosedJaxpr
    structure: Any  # of the results


class Traced:
    """A function of pytrees that is traced once for arguments of each shape.

    What it reads beside its arguments counts as it is at that time. So does what is no array in them.

    Args:
        fn: function of pytrees of arrays.
        rewrite: a form that computes the same, for what was traced; default: as it is.
    """

    def __init__(
        self, fn: Callable[..., PyTree], rewrite: Callable[[ClosedJaxpr], ClosedJaxpr] = lambda jaxpr: jaxpr
    ) -> None:
        self._fn, self._rewrite, self._traces = fn, rewrite, {}

    def __call__(self, *args: PyTree) -> PyTree:
        """The result, as part of what is being traced or computed."""
        args = _held(args)
        trace = self._trace(args)
        values = jaxpr_as_fun(trace.jaxpr)(*jax.tree.leaves(args))
        return trace.structure.unflatten(map(jnp.asarray, values))  # a constant is a number

    def shape(self, *args: PyTree) -> PyTree:
        """Shapes and dtypes of the result for arguments of these."""
        trace = self._trace(_held(args))
        return trace.structure.unflatten(
            [
                jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=explicit_sharding(x))
                for x in trace.jaxpr.out_avals
            ]
        )

    def jaxpr(self, *args: PyTree) -> ClosedJaxpr:
        """What was traced for arguments of these shapes and dtypes."""
        return self._trace(_held(args)).jaxpr

    def _trace(self, args: tuple[PyTree, ...]) -> _Trace:
        leaves, structure = jax.tree.flatten(args)
        key = structure, _context(), tuple(map(jax.typeof, leaves))
        if key not in self._traces:
            trace = _trace(lambda *args: self._fn(*thawed(args)), structure, [_like(x) for x in leaves])
            if jax.sharding.get_abstract_mesh().manual_axes:  # it works on a part of the arrays
                trace = trace._replace(jaxpr=unconstrained(trace.jaxpr))
            self._traces[key] = trace._replace(jaxpr=self._rewrite(trace.jaxpr))
        return self._traces[key]


class Program:
    """A function of pytrees, compiled where no program with its text is there already.

    It is traced once for arguments of each shape in the life of this object, whatever it was before. Within
    another compiled function it is a part of that.

    Args:
        fn: function of pytrees of arrays.
        donate_first: whether the memory of its first argument may be used for the results.
        once: whether it is called once and on little data, so that compiling is what counts.
    """

    def __init__(self, fn: Callable[..., PyTree], *, donate_first: bool = False, once: bool = False) -> None:
        self._fn, self._donate_first, self._once, self._calls = fn, donate_first, once, {}
        self._part = jax.jit(lambda *args: fn(*args))  # of something else that JAX traces or looks into

    def __call__(self, *args: PyTree) -> PyTree:
        """The result."""
        leaves, structure = jax.tree.flatten(args)
        if _looked_into() or any(isinstance(x, Tracer) for x in leaves):
            return self._part(*args)
        key = structure, _context(), tuple(map(_placed, leaves))
        if key not in self._calls:
            self._calls[key] = self._compile(args, leaves, structure)
        call, consts, result = self._calls[key]
        return result.unflatten(call(*consts, *leaves))

    def lower(self, *args: PyTree) -> jax.stages.Lowered:
        """What is compiled for these arguments: a function of the arrays closed over, then of all leaves."""
        leaves, structure = jax.tree.flatten(args)
        return self._lower(args, leaves, structure)[0]

    def _lower(
        self, args: tuple[PyTree, ...], leaves: list, structure: Any
    ) -> tuple[jax.stages.Lowered, _Trace]:
        trace = _trace(self._fn, structure, leaves)
        consts = trace.jaxpr.consts
        num_donated = len(jax.tree.leaves(args[0])) if self._donate_first else 0
        donated = tuple(range(len(consts), len(consts) + num_donated))
        run = jax.jit(_without_consts(trace.jaxpr), donate_argnums=donated, keep_unused=True)
        return run.lower(*consts, *leaves), trace

    def _compile(self, args: tuple[PyTree, ...], leaves: list, structure: Any) -> tuple[Callable, list, Any]:
        lowered, trace = self._lower(args, leaves, structure)
        consts = trace.jaxpr.consts
        call = _shared_program(lowered, trace.jaxpr, [*consts, *leaves], _options(self._once))
        if parts_of_one_processor([*consts, *leaves]):
            return lambda *args: jax.block_until_ready(call(*args)), consts, trace.structure
        return call, consts, trace.structure


def _options(once: bool) -> dict[str, Any]:
    """Of the compiler."""
    if jax.default_backend() != "cpu":
        return {}
    first, without = FAULTY_SUMS
    faulty = first <= jaxlib.version.__version_info__ < without
    return (SOUNDLY if faulty else {}) | (QUICKLY if once else {})


def _shared_program(
    lowered: jax.stages.Lowered, jaxpr: ClosedJaxpr, args: list, options: dict[str, Any]
) -> Callable:
    """The compiled program of a lowered one: one with the same text, types and devices, or a new one."""
    # Of JAX's inner workings; where they have other names nothing is shared, and a test says so.
    devices = getattr(lowered._lowering, "_device_list", None)
    const_args = getattr(lowered._lowering, "const_args", None)
    if devices is None or const_args is None or len(const_args) or jaxpr.effects:
        return lowered.compile(options)
    text = lowered.as_text()
    if any(mark in text for mark in NOT_IN_THE_TEXT):
        return lowered.compile(options)
    types = tuple(map(str, (jaxpr.out_avals, [jax.typeof(x) for x in args], lowered.donate_argnums)))
    digest = hashlib.sha256(text.encode()).digest()
    key = digest, types, tuple(devices), tuple(map(_placement, args)), tuple(options.items())
    if key not in _shared:
        _shared[key] = lowered.compile(options)
    _shared.move_to_end(key)
    while len(_shared) > MAX_SHARED:
        _shared.popitem(last=False)
    return _shared[key]


def _trace(fn: Callable[..., PyTree], structure: Any, leaves: list) -> _Trace:
    result = None

    def flat(*leaves: Any) -> list:  # made anew each time, since JAX keeps traces by function
        nonlocal result
        values, result = jax.tree.flatten(fn(*structure.unflatten(leaves)))
        return values

    try:
        jaxpr = jax.make_jaxpr(flat)(*leaves)
    except NEEDS_VALUES as error:
        raise ValueError(
            "a function that was handed over asks for the values of its arrays, which JAX does not have "
            "while it traces: write it with jax.numpy in place of numpy, jnp.where in place of if, and "
            f"without float(), int() and .item(). JAX says: {str(error).splitlines()[0]}"
        ) from error
    with jax.ensure_compile_time_eval():  # arrays, also where JAX traces something
        consts = [x if isinstance(x, jax.Array) else _copy(x) for x in jaxpr.consts]
    return _Trace(ClosedJaxpr(jaxpr.jaxpr, consts), result)


def _without_consts(jaxpr: ClosedJaxpr) -> Callable[..., list]:
    """The function of a jaxpr whose constants are its first arguments."""
    count = len(jaxpr.consts)

    def program(*args: Any) -> list:
        return jaxpr_as_fun(ClosedJaxpr(jaxpr.jaxpr, args[:count]))(*args[count:])

    return program


def _copy(x: Any) -> jax.Array:
    """An array of the host, which may change it, on the device."""
    return jax.device_put(np.array(x))


def parts_of_one_processor(leaves: list) -> bool:
    """Whether devices share a CPU: waiting for each other in two programs at once they may wait for ever."""
    return jax.default_backend() == "cpu" and any(
        isinstance(x, jax.Array) and len(x.sharding.device_set) > 1 for x in leaves
    )


def _looked_into() -> bool:
    """Whether JAX is to run operations one by one, or to find the one that makes a NaN."""
    return _config.jax_disable_jit or _config.jax_debug_nans or _config.jax_debug_infs


def _context() -> tuple:
    """What decides how a function is traced, beside its arguments."""
    return (
        _config.jax_enable_x64,
        _config.jax_default_matmul_precision,
        _config.jax_default_device,
        _config.jax_numpy_dtype_promotion,
        jax.sharding.get_abstract_mesh(),
    )


def _held(args: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
    """Arguments of which all leaves are arrays."""
    return jax.tree.map(lambda x: x if is_array(x) else Static(x), args)


def _like(x: Any) -> Any:
    """An argument without its values."""
    x = jax.typeof(x)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=x.weak_type, sharding=explicit_sharding(x))


def _placed(x: Any) -> tuple:
    if isinstance(x, jax.Array):  # in every call, for every leaf: `typeof` takes longer than all the rest
        return x.aval, x.sharding if x.committed else None
    return jax.typeof(x), None


def _placement(x: Any) -> Any:
    """Where an array lies, if that is not for JAX to choose."""
    return _placed(x)[1]
