"""Passes of passes.py, compiled by ``torch.compile`` once for every set of options and dtypes.

What is compiled holds for any number of rows and classes; only to rows of more than 1024 classes belongs another
version, whose sums are in float64. The first call of each version compiles it, for some seconds, and the logger
"sre_triton" says so. Inductor keeps what it compiled where it always does, in TORCHINDUCTOR_CACHE_DIR.

Without a C++ compiler, and on a GPU without Triton, a pass runs uncompiled; on Apple's MPS and Intel's XPU
``torch.compile`` is asked as on a CPU. None of these three devices has been tried: there was no such machine.
"""

import inspect
import itertools
import logging
import operator
import threading
import time
import types
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from .passes import SHORT, Numbers

NO_COMPILER = (
    "sre_triton found no usable C++ compiler ({}), so the loss runs uncompiled, several times slower. "
    "Install g++ and Python's headers (Debian, Ubuntu: apt install g++ python3-dev; macOS: xcode-select --install; "
    "Windows: the Visual Studio build tools), or set CXX to a compiler."
)
NO_TRITON = "sre_triton runs uncompiled, several times slower, as torch.compile cannot serve this GPU: {}"

STAND_IN_ROWS = 96  # of the shape that is compiled for; not a number of classes there

logger = logging.getLogger("sre_triton")

_lock = threading.Lock()
_compiled: dict[tuple, Callable] = {}
_uncompiled: set[str] = set()  # types of devices that nothing can be compiled for


INDUCTOR = {
    # Fused multiplication and addition.
    "cpp.enable_floating_point_contract_flag": "fast",
    # What several loops use is stored if it is made of more than five tensors: u, but not the gradient.
    "realize_reads_threshold": 5,
    # As many threads as there are at each call, not as there were, nor as the first call's size was worth.
    "cpp.dynamic_threads": True,
}


def _stand_in(name: str, arg, is_short: bool):
    """Zeros of the dtype and number of dimensions of an argument: what is compiled depends on no shape that came."""
    if isinstance(arg, tuple):
        items = [_stand_in(name, item, is_short) for item in arg]
        return Numbers(*items) if name == "numbers" else tuple(items)
    if arg is None:
        return None
    num_classes = SHORT // 2 if is_short else 2 * SHORT
    return arg.new_zeros((num_classes,) if name == "weight" else (STAND_IN_ROWS, num_classes)[: arg.dim()])


def _flat(args: tuple) -> list:
    """The arguments of a pass, tuples taken apart, and the numbers of rows and classes."""
    flat = []
    for arg in args:
        if isinstance(arg, tuple):
            flat.extend(arg)
        else:
            flat.append(arg)
    flat.extend(args[0].shape)
    return flat


def _of_shapes(guards: list) -> list[bool]:
    """Which guards Dynamo is to check, where it is called: dtypes and devices are in the key, and no mode matters."""
    return [guard.guard_type == "SHAPE_ENV" for guard in guards]


def _hold_for_all_shapes(graph_inputs: list, is_short: bool) -> bool:
    """Whether what Dynamo and Inductor took for granted of N and K is true of all that the version is for."""
    import sympy

    sizes = [size.node for size in graph_inputs if isinstance(size, torch.SymInt)]
    guards = [guard.expr for guard in sizes[0].shape_env.guards]
    all_classes = (8, 9, 16, 1000, SHORT) if is_short else (SHORT + 1, 2 * SHORT, 5003, 2**33, 2**33 + 1)
    for num_rows, num_classes in itertools.product((2, 3, 64, 2**33 + 1), all_classes):
        values = {size.expr: num_rows if size.hint == STAND_IN_ROWS else num_classes for size in sizes}
        if any(guard.subs(values) is not sympy.true for guard in guards):
            return False
    return True


def _compile(function: Callable, args: tuple) -> Callable | None:
    """The function of ``args`` compiled; None where that cannot be.

    torch.compile is asked once. At each call after that it would take 35 us to check what the key says and to arrange
    the arguments, a third of what 256 rows of 1000 classes take on two cores; so Inductor's own result is called, with
    the arguments in the order in which it was seen to get them. (Unless it is not for all shapes: on a GPU, whose
    indices may have 32 bits.)
    """
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    logits = args[0]
    what = f"{function.__name__} for {str(logits.dtype).removeprefix('torch.')} logits on {logits.device}"
    is_short = logits.shape[1] <= SHORT
    names = inspect.signature(function).parameters
    stand_ins = tuple(_stand_in(name, arg, is_short) for name, arg in zip(names, args, strict=True))
    flat = _flat(stand_ins)
    inner, order, for_all_shapes = None, [], False
    started = None

    def compile_inner(*args, **kwargs):
        nonlocal inner
        inner = compile_fx_inner(*args, **kwargs)
        return inner

    def backend(graph, inputs):
        nonlocal for_all_shapes, started
        if started is None:  # else Dynamo has started again, knowing that a number is a constant
            started = time.perf_counter()
            text = "compiling %s, once for each set of options: 2 to 15 seconds, unless Inductor has it cached"
            logger.warning(text, what)
        # The cache of AOTAutograd would return all it makes around Inductor's result; Inductor has its own.
        with torch._functorch.config.patch(enable_autograd_cache=False):
            whole = compile_fx(graph, inputs, compile_inner, dict(INDUCTOR))
        for_all_shapes = _hold_for_all_shapes(inputs, is_short)
        logger.info("compiled %s in %.1f s", what, time.perf_counter() - started)
        started = None

        def note_order(*inputs):
            for given in inputs[len(order) :]:
                same = (x == given if isinstance(given, int) and isinstance(x, int) else x is given for x in flat)
                order.append(list(same).index(True))
            return whole(*inputs)

        return note_order

    # Dynamo keeps what it compiled by code object: each key has its own.
    code = function.__code__.replace(co_name=f"{function.__name__}_{len(_compiled)}")
    clone = types.FunctionType(code, function.__globals__)
    checked = torch.compile(
        clone, backend=backend, dynamic=True, fullgraph=True, options={"guard_filter_fn": _of_shapes}
    )
    try:
        checked(*stand_ins)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        missing = (torch._inductor.exc.InvalidCxxCompiler, torch._inductor.exc.CppCompileError)
        if not isinstance(error.inner_exception, missing):
            raise
        warning = NO_COMPILER.format(type(error.inner_exception).__name__)
    except torch._dynamo.exc.ShortenTraceback as error:
        # What Inductor needs on a GPU, and is not there or does not serve this one.
        if type(error).__name__ not in ("TritonMissing", "GPUTooOldForTriton"):
            raise
        warning = NO_TRITON.format(error)
    else:
        if inner is None:  # torch.compile is switched off
            return None
        if not for_all_shapes:
            return lambda args: checked(*args)
        pick = operator.itemgetter(*order)
        return lambda args: inner(list(pick(_flat(args))))
    _uncompiled.add(logits.device.type)
    warnings.warn(warning, RuntimeWarning, stacklevel=2)
    return None


def compiles(logits: Tensor) -> bool:
    """One row and fewer than eight classes are shapes that would each be compiled anew."""
    return logits.shape[0] > 1 and logits.shape[1] >= 8 and logits.device.type not in _uncompiled


def call(function: Callable, logits, target, weight, stats, scale, out, numbers: Numbers) -> tuple[Tensor, ...]:
    """A pass, compiled where it can be. All tensors but ``out`` have the dtypes of the arithmetic."""
    args = logits, target, weight, stats, scale, out, numbers
    if not compiles(logits):
        return function(*args)
    where = logits.dtype, logits.device, numbers.reg_weight.is_cpu
    what = target.dim(), weight is None, None if out is None else out.dtype, *(number is None for number in numbers)
    key = function, logits.shape[1] > SHORT, *where, *what
    compiled = _compiled.get(key)
    if compiled is None:
        with _lock:
            compiled = _compiled.get(key) or _compile(function, args)
            if compiled is None:
                return function(*args)
            _compiled[key] = compiled
    return compiled(args)
