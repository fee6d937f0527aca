"""Passes of passes.py, compiled by ``torch.compile`` once for every set of options and dtypes.

What is compiled holds for any number of rows and classes; only to rows of more than 1024 classes belongs another
version, whose sums are in float64. A version is compiled, for some seconds, when it pays (waiting.py), and the logger
"sre_triton" says so. Inductor keeps what it compiled where it always does, in TORCHINDUCTOR_CACHE_DIR.

Until then, without a C++ compiler or a folder to write to, where ``torch.compile`` fails or is switched off, and on a
GPU without Triton, uncompiled.py computes; on Apple's MPS and Intel's XPU ``torch.compile`` is asked as on a CPU. None
of these three devices has been tried: there was no such machine.
"""

import functools
import inspect
import itertools
import logging
import operator
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import internals
from ..messages import COMPILING, FAILED, NO_COMPILER, SWITCHED_OFF, lasting_failure, warn_user
from .columns import SHORT
from .passes import Scalars
from .waiting import count_again, pays

FEWEST = 8  # classes that are compiled for

STAND_IN_ROWS = 96  # of the shape that is compiled for; not a number of classes there

logger: logging.Logger = logging.getLogger("sre_triton")

_lock = threading.Lock()
_numbers = itertools.count()
_compiled: dict[int, Callable | None] = {}  # None where a compilation has failed
_uncompiled: set[str] = set()  # types of devices that nothing can be compiled for
_said: set[str] = set()  # why torch.compile was found switched off


INDUCTOR = {
    # Fused multiplication and addition.
    "cpp.enable_floating_point_contract_flag": "fast",
    # A value that is needed twice is stored if it is computed from more than five tensors, else computed twice. So u,
    # which the sum and the gradient need, is stored, and the gradient, which comes from u and four values of the row,
    # is not stored before it is written.
    "realize_reads_threshold": 5,
    # What the key of a version says already.
    "size_asserts": False,
    # As many threads as there are at each call, not as there were, nor as the first call's size was worth.
    "cpp.dynamic_threads": True,
}


def _stand_in(name: str, arg, is_short: bool):
    """Zeros of the dtype and number of dimensions of an argument: what is compiled depends on no shape that came."""
    if isinstance(arg, tuple):
        items = [_stand_in(name, item, is_short) for item in arg]
        return Scalars(*items) if isinstance(arg, Scalars) else tuple(items)
    if arg is None:
        return None
    num_classes = SHORT // 2 if is_short else 2 * SHORT
    shape = (num_classes,) if name == "weight" else (STAND_IN_ROWS, num_classes)[: arg.dim()]
    return torch.zeros(shape, dtype=arg.dtype, device=arg.device)  # not of the class of the argument


def _flat(args: tuple) -> list:
    """The arguments of a pass, tuples taken apart, and the numbers of rows and classes."""
    logits, target, weight, stats, scale, out, scalars = args
    return [logits, target, weight, *(stats or ()), scale, out, *scalars, *logits.shape]


def _of_shapes(guards: list) -> list[bool]:
    """Which guards Dynamo checks at a call of what torch.compile returned: those of shapes, and no other.

    The key under which a version is kept says all else: ``_compiled[key]`` of float32 logits never gets others.
    """
    return [guard.guard_type == "SHAPE_ENV" for guard in guards]


def _hold_for_all_shapes(graph_inputs: list, is_short: bool) -> bool:
    """Whether a compiled version is right for every number of rows and classes that it may be called with.

    The version was compiled for zeros of one shape, 96 rows of 512 (or 2048) classes, with N and K as symbols. On the
    way Dynamo and Inductor noted what they took for granted of the symbols, as relations: K >= 8, or N * K < 2**31 for
    indices of 32 bits. Nobody checks the relations when Inductor's result is called directly.

    So each relation is evaluated here, for shapes that stand for all others: the smallest, odd ones, the last before
    another version begins, and very large ones. N * K < 2**31 is false of 2**33 + 1 rows: such a version is called
    through torch.compile's own result, which checks the relations at each call.
    """
    import sympy

    found = internals.sizes_and_guards(graph_inputs)
    if found is None:
        return False
    sizes, relations = found
    all_classes = (8, 9, 16, 1000, SHORT) if is_short else (SHORT + 1, 2 * SHORT, 5003, 2**33, 2**33 + 1)
    for num_rows, num_classes in itertools.product((2, 3, 64, 2**33 + 1), all_classes):
        values = {symbol: num_rows if value == STAND_IN_ROWS else num_classes for symbol, value in sizes}
        if any(relation.subs(values) is not sympy.true for relation in relations):
            return False
    return True


class _Catcher:
    """A backend of torch.compile, which keeps Inductor's own result and learns how to call it.

    Inductor's result takes the arguments of a pass in one list, in an order that Dynamo chose. The order is learnt from
    one call: the arguments, flat, are [z, y, w], the graph gets (w, z), so the order is [2, 0].

    Args:
        flat: the arguments of the call that the order is learnt from, as ``_flat`` gives them.
        is_short: whether the version is for rows of ``SHORT`` classes at most.
        begins: called before Inductor compiles, unless its cache has what it is asked for.
    """

    def __init__(self, flat: list, is_short: bool, begins: Callable[[], None]) -> None:
        """The arguments are the class's."""
        self.flat, self.is_short, self.begins = flat, is_short, begins
        self.was_asked = self.for_all_shapes = False
        self.inner: Callable | None = None
        self.order: list[int] = []
        self.is_learning = True

    def __call__(self, graph: torch.fx.GraphModule, inputs: list) -> Callable:
        """What Dynamo calls in place of the graph. Dynamo may ask twice: at first it takes a number for a symbol."""
        self.was_asked = True
        whole, caught = internals.compile_and_catch(graph, inputs, INDUCTOR, self.begins)
        self.inner = caught[-1] if caught else None
        self.for_all_shapes = _hold_for_all_shapes(inputs, self.is_short)

        def run(*inputs):
            """Inductor's result for the graph's inputs, whose order the first call teaches."""
            if self.is_learning and not self.order:
                self.order.extend(map(self._place, inputs))
            return whole(*inputs)

        return run

    def _place(self, given: Tensor | int) -> int:
        """Where an input of the graph stands among the flat arguments: tensors are the same, sizes are equal."""
        is_size = isinstance(given, int)
        same = (x == given if is_size and isinstance(x, int) else x is given for x in self.flat)
        return list(same).index(True)

    def shortcut(self) -> Callable[[tuple], tuple[Tensor, ...]] | None:
        """The call of Inductor's own result, given the arguments of a pass; None where nobody can call it so."""
        self.is_learning = False
        self.flat = []  # the stand-ins, which nobody needs again
        if self.inner is None or not self.for_all_shapes or not internals.is_stance_known():
            return None
        inner, pick = internals.innermost(self.inner), operator.itemgetter(*self.order)
        return lambda args: inner(list(pick(_flat(args))))


class _Checked:
    """What torch.compile returned, called with the arguments of a pass in one tuple."""

    def __init__(self, checked: Callable) -> None:
        """Keep it."""
        self.checked = checked

    def __call__(self, args: tuple) -> tuple[Tensor, ...]:
        """Call it."""
        return self.checked(*args)


def _compile(function: Callable, args: tuple) -> Callable[[tuple], tuple[Tensor, ...]]:
    """A pass compiled: a function that takes the arguments of the pass in one tuple, and returns what the pass returns.

    One version serves every shape, so torch.compile is asked once, with zeros in place of the arguments. Later calls
    go around torch.compile. Its result would take 35 us a call to check dtypes and devices, which the key of the
    version says already. (Measured on 2 cores: a third of the time for 256 rows of 1000 classes.) So later calls go to
    Inductor's own result, which ``_Catcher`` kept. Two kinds of versions are called through torch.compile's result:
    those that are not for all shapes (on a GPU, whose indices may have 32 bits), and all where a private name is gone.
    """
    logits = args[0]
    is_short = logits.shape[1] <= SHORT
    names = inspect.signature(function).parameters
    stand_ins = tuple(_stand_in(name, arg, is_short) for name, arg in zip(names, args, strict=True))
    clone = internals.clone(function, f"{function.__name__}_{len(_compiled)}")  # each key has its own
    options = {"guard_filter_fn": _of_shapes}
    what = f"{function.__name__} for {str(logits.dtype).removeprefix('torch.')} logits on {logits.device}"
    begins = functools.partial(logger.warning, COMPILING, what)
    catcher = _Catcher(_flat(stand_ins), is_short, begins) if internals.inductor_is_open() else None
    if catcher is None:
        begins()
        options |= internals.known_options(INDUCTOR)
    checked = torch.compile(clone, backend=catcher or "inductor", dynamic=True, fullgraph=True, options=options)

    started = time.perf_counter()
    checked(*stand_ins)
    if catcher is not None and not catcher.was_asked:
        raise RuntimeError("torch.compile has compiled nothing")
    logger.info("compiled %s in %.1f s", what, time.perf_counter() - started)

    shortcut = None if catcher is None else catcher.shortcut()
    return _Checked(checked) if shortcut is None else shortcut


def _tried(function: Callable, args: tuple) -> tuple[Callable | None, str | None]:
    """The function compiled, and None; or None, and the warning that says why."""
    device = args[0].device.type
    if device == "cpu" and internals.cpp_compiler() is None:
        _uncompiled.add(device)
        return None, NO_COMPILER.format("CXX, else g++ or clang++")
    try:
        return _compile(function, args), None
    except Exception as error:
        return None, _warning_of(error, device)


def _warning_of(error: Exception, device: str) -> str:
    """What to warn of where nothing could be compiled; an error that will last is noted."""
    causes = [error]
    while (cause := getattr(causes[-1], "inner_exception", None) or causes[-1].__cause__) is not None:
        causes.append(cause)
    warning = next(filter(None, map(lasting_failure, causes)), None)
    if warning is None:
        logger.warning("torch.compile failed", exc_info=error)
        return FAILED.format(type(causes[-1]).__name__, str(causes[-1])[:200])
    _uncompiled.add(device)
    return warning


def _say(reason: str) -> None:
    """Log, once a process, why torch.compile is found switched off."""
    if reason not in _said:
        _said.add(reason)
        logger.warning(SWITCHED_OFF, reason)


def _compile_once(key: int, function: Callable, args: tuple) -> Callable | None:
    """What belongs to a key, compiled now unless another thread has come before or it may not be."""
    with _lock:
        if key in _compiled:
            return _compiled[key]
        device = args[0].device.type
        if device in _uncompiled:  # since this call has asked
            return None
        try:
            reason = internals.why_nothing_is_compiled()
        except Exception as error:  # to import torch.compile makes the folder it writes to
            _compiled[key], warning = None, _warning_of(error, device)
        else:
            if reason is not None:
                _say(reason)
                count_again(key)
                return None
            _compiled[key], warning = _tried(function, args)
    if warning is not None:  # which may be an error, once: the next call finds what failed
        warn_user(warning, RuntimeWarning)
    return _compiled[key]


def kind_of(scalars: Scalars) -> tuple[bool, ...]:
    """What of the scalars belongs to the key of a version: where λ lies, and which are not in use."""
    return scalars.reg_weight.is_cpu, *(scalar is None for scalar in scalars)


@functools.cache
def _number_of(*what: object) -> int:
    """A number for each set of what a version is compiled for."""
    return next(_numbers)


def key_of(
    function: Callable, num_classes: int, kind: tuple[bool, ...], dtype: torch.dtype, device: torch.device,
    target_dim: int, unweighted: bool, scale_dim: int | None, out_dtype: torch.dtype | None,
) -> int:  # fmt: skip
    """What a version is kept under: a number, as to look up all that it is compiled for takes 1 us."""
    is_short = num_classes <= SHORT
    return _number_of(function, is_short, kind, dtype, device, target_dim, unweighted, scale_dim, out_dtype)


def _usable(version: Callable | None) -> Callable | None:
    """The version; None for what torch.compile returned where that would compile nothing, or raise."""
    if not isinstance(version, _Checked):
        return version
    reason = internals.why_nothing_is_compiled()
    if reason is None:
        return version
    _say(reason)
    return None


def version_of(key: int) -> Callable[[tuple], tuple[Tensor, ...]] | None:
    """The version that is there, if torch.compile would call it now; nothing is counted or compiled."""
    return None if internals.is_forced_eager() else _usable(_compiled.get(key))


def stays_uncompiled(key: int, device_type: str, num_logits: int, now: bool) -> bool:
    """Whether nothing is to be compiled for this call: it does not pay yet, is not wanted, or has failed before."""
    if device_type in _uncompiled or (key in _compiled and _compiled[key] is None):
        return True
    return not now and (internals.is_forced_eager() or not pays(key, num_logits))


def compiled_pass(
    function: Callable, args: tuple[Any, ...], kind: tuple[bool, ...], num_logits: int, now: bool
) -> Callable[[tuple], tuple[Tensor, ...]] | None:
    """What takes the same ``args``, all tensors but ``out`` in the dtypes of the arithmetic, and is compiled.

    None where uncompiled.py is to do it: where it does not pay yet to compile, unless ``now`` says to compile at once;
    where nothing can or may be compiled; and for one row and fewer than eight classes, shapes that would each be
    compiled anew. ``kind`` is that of the scalars (`kind_of`).
    """
    logits, target, weight, _, scale, out, _ = args
    num_rows, num_classes = logits.shape
    if num_rows <= 1 or num_classes < FEWEST:
        return None
    if internals.is_forced_eager():
        _say(internals.why_nothing_is_compiled())
        return None
    of_scale, of_out = None if scale is None else scale.dim(), None if out is None else out.dtype
    of_tensors = logits.dtype, logits.device, target.dim(), weight is None, of_scale, of_out
    key = key_of(function, num_classes, kind, *of_tensors)
    try:
        return _usable(_compiled[key])
    except KeyError:
        if stays_uncompiled(key, logits.device.type, num_logits, now):
            return None
        return _usable(_compile_once(key, function, args))
