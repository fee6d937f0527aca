"""Passes of passes.py, compiled by ``torch.compile`` once for every set of options and dtypes.

What is compiled holds for any number of rows and classes; only to rows of more than 1024 classes belongs another
version, whose sums are in float64. The first call of each version compiles it, for some seconds, and the logger
"sre_triton" says so. Inductor keeps what it compiled where it always does, in TORCHINDUCTOR_CACHE_DIR.

Without a C++ compiler or a folder to write to, where ``torch.compile`` fails or is switched off, and on a GPU without
Triton, a pass runs uncompiled; on Apple's MPS and Intel's XPU ``torch.compile`` is asked as on a CPU. None of these
three devices has been tried: there was no such machine.
"""

import errno
import inspect
import itertools
import logging
import operator
import os
import sys
import threading
import time
import types
from collections.abc import Callable

import torch
from torch import Tensor

from ..messages import warn_user
from .passes import SHORT, Scalars

NO_COMPILER = (
    "sre_triton found no usable C++ compiler ({}), so the loss runs uncompiled, several times slower. "
    "Install g++ and Python's headers (Debian, Ubuntu: apt install g++ python3-dev; macOS: xcode-select --install; "
    "Windows: the Visual Studio build tools), or set CXX to a compiler."
)
NO_TRITON = "sre_triton runs uncompiled, several times slower, as torch.compile cannot serve this GPU: {}"
NO_FILES = (
    "sre_triton runs uncompiled, several times slower, as torch.compile cannot write its files ({}). "
    "Set TORCHINDUCTOR_CACHE_DIR to a folder that can be written, with space left."
)
FAILED = (
    "sre_triton runs uncompiled, several times slower, as torch.compile failed ({}: {}); the logger sre_triton has the "
    "traceback. Please report it"
)
SWITCHED_OFF = "sre_triton compiles nothing now, and runs uncompiled, several times slower: %s"
# Of a folder or disk.
UNWRITABLE = (errno.EACCES, errno.EDQUOT, errno.ENOENT, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS)

STAND_IN_ROWS = 96  # of the shape that is compiled for; not a number of classes there

logger = logging.getLogger("sre_triton")

_lock = threading.Lock()
_compiled: dict[tuple, Callable | None] = {}  # None where a compilation has failed
_uncompiled: set[str] = set()  # types of devices that nothing can be compiled for
_said: set[str] = set()  # why torch.compile was found switched off


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
        return Scalars(*items) if name == "scalars" else tuple(items)
    if arg is None:
        return None
    num_classes = SHORT // 2 if is_short else 2 * SHORT
    shape = (num_classes,) if name == "weight" else (STAND_IN_ROWS, num_classes)[: arg.dim()]
    return torch.zeros(shape, dtype=arg.dtype, device=arg.device)  # not of the class of the argument


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


def _switched_off() -> str | None:
    """Why torch.compile would return what it is given, if it would."""
    from torch._dynamo import config, eval_frame

    if config.disable or os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return "torch.compile is disabled (TORCH_COMPILE_DISABLE, TORCHDYNAMO_DISABLE or torch._dynamo.config.disable)"
    if torch.fx._symbolic_trace.is_fx_symbolic_tracing():
        return "make_fx traces, under which torch.compile compiles nothing"
    stance = eval_frame._stance
    if stance.stance == "default" and stance.backend is None:
        return None
    return f"torch.compiler.set_stance({stance.stance!r})" + (stance.backend is not None) * " forces another backend"


def _compile(function: Callable, args: tuple) -> Callable[[tuple], tuple[Tensor, ...]]:
    """The function of ``args``, compiled.

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
    inner, order, for_all_shapes, noting = None, [], False, True
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
            for given in inputs[len(order) :] if noting else ():
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
    checked(*stand_ins)
    noting = False
    if inner is None:
        raise RuntimeError("torch.compile has compiled nothing")
    if not for_all_shapes:
        return lambda args: (function if _switched_off() else checked)(*args)
    pick = operator.itemgetter(*order)
    return lambda args: inner(list(pick(_flat(args))))


def _lasting(error: Exception) -> str | None:
    """The warning for an error that says that nothing can be compiled here."""
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    if isinstance(error, (InvalidCxxCompiler, CppCompileError)):
        return NO_COMPILER.format(type(error).__name__)
    # What Inductor needs on a GPU, and is not there or does not serve this one.
    if type(error).__name__ in ("TritonMissing", "GPUTooOldForTriton"):
        return NO_TRITON.format(error)
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        return NO_FILES.format(error)
    return None


def _tried(function: Callable, args: tuple) -> Callable | None:
    """The function compiled; None, and a warning, where that has failed."""
    try:
        return _compile(function, args)
    except Exception as error:
        causes = [error]
        while (cause := getattr(causes[-1], "inner_exception", None) or causes[-1].__cause__) is not None:
            causes.append(cause)
        warning = next(filter(None, map(_lasting, causes)), None)
        if warning is None:
            logger.warning("torch.compile failed", exc_info=error)
            warning = FAILED.format(type(causes[-1]).__name__, str(causes[-1])[:200])
        else:
            _uncompiled.add(args[0].device.type)
    warn_user(warning, RuntimeWarning)
    return None


def _say(reason: str) -> None:
    if reason not in _said:
        _said.add(reason)
        logger.warning(SWITCHED_OFF, reason)


def _compile_once(key: tuple, function: Callable, args: tuple) -> Callable | None:
    """What belongs to a key, compiled now unless another thread has come before or it may not be."""
    with _lock:
        if key in _compiled:
            return _compiled[key]
        if args[0].device.type in _uncompiled:
            return None
        reason = _switched_off()
        if reason is None:
            _compiled[key] = _tried(function, args)
            return _compiled[key]
        _say(reason)
    return None


def _forced_eager() -> bool:
    """Whether a stance wants what is compiled already run uncompiled, too."""
    module = sys.modules.get("torch._dynamo.eval_frame")
    return module is not None and module._stance.stance == "force_eager"


def compiled_pass(function: Callable, args: tuple) -> Callable[[tuple], tuple[Tensor, ...]] | None:
    """What takes the same ``args``, all tensors but ``out`` in the dtypes of the arithmetic, and is compiled.

    None where the function is to run as it is: where nothing can or may be compiled; and for one row and fewer than
    eight classes, shapes that would each be compiled anew.
    """
    logits, target, weight, _, _, out, scalars = args
    num_rows, num_classes = logits.shape
    if num_rows <= 1 or num_classes < 8:
        return None
    if _forced_eager():
        _say(_switched_off())
        return None
    where = logits.dtype, logits.device, scalars.reg_weight.is_cpu
    what = target.dim(), weight is None, None if out is None else out.dtype, *(scalar is None for scalar in scalars)
    key = function, num_classes > SHORT, *where, *what
    try:
        return _compiled[key]
    except KeyError:
        return _compile_once(key, function, args)
