"""The texts of errors and warnings: how they are worded, those that are constants, and where a warning points.

An error about a value says the argument, what was expected, what came, and what mends it: `wrong`. Its words stand
where the value is checked: of options in options.py, of tensors in checks.py, of shards in sharding/, of the backend in
backend.py, and in modules.py and schedule.py what only they know.
"""

import errno
import reprlib
import sys
import warnings
from numbers import Integral

import torch
from torch import Tensor
from torch.masked import MaskedTensor
from torch.nn.parameter import UninitializedTensorMixin

from .internals import constant_while_compiling

LONGEST = 200  # characters of a value
MOST_DIMENSIONS = 10


def of_shape(shape: torch.Size) -> str:
    """A shape; while tracing, with the symbols of its sizes."""
    sizes = tuple(shape)
    return f"{sizes}" if len(sizes) <= MOST_DIMENSIONS else f"({', '.join(map(str, sizes[:MOST_DIMENSIONS]))}, ...)"


def _of_tensor(tensor: Tensor) -> str:
    """A tensor without its values, which a GPU would be waited for."""
    if isinstance(tensor, UninitializedTensorMixin):
        return "an uninitialized parameter"
    dtype = str(tensor.dtype).removeprefix("torch.")
    article = "an" if dtype.startswith("int") else "a"
    if tensor.is_nested:  # and may have no shape
        return f"{article} {dtype} nested tensor"
    if isinstance(tensor, MaskedTensor):
        return f"a MaskedTensor of {dtype}"
    layout = "" if str(tensor.layout) == "torch.strided" else str(tensor.layout).removeprefix("torch.").strip("_") + " "
    return f"{article} {dtype} {layout}tensor of shape {of_shape(tensor.shape)}"


class _Short(reprlib.Repr):
    """The beginning of what ``repr`` shows."""

    def __init__(self) -> None:
        """With limits that keep a message to a few lines."""
        super().__init__()
        self.maxlevel, self.maxtuple, self.maxstring, self.maxother = 3, MOST_DIMENSIONS, 80, 120

    def repr1(self, x: object, level: int) -> str:
        """What is shown of one value, and of each in a list; errors of its own ``repr`` are not raised."""
        try:
            return _of_tensor(x) if isinstance(x, Tensor) else super().repr1(x, level)
        except Exception:  # such as an int of more digits than Python writes
            return f"<{type(x).__name__}>"


_short = _Short()


def short(value: object) -> str:
    """A value in about ``LONGEST`` characters at most."""
    if isinstance(value, Tensor):
        return _of_tensor(value)
    if torch.compiler.is_compiling():  # reprlib cannot be traced
        is_long = isinstance(value, (list, tuple, dict, set))
        return f"a {type(value).__name__}" if is_long else repr(value)[:LONGEST]
    text = _short.repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def wrong(error: type[Exception], argument: str, expected: str, value: object, mend: str = "") -> Exception:
    """The error; ``mend`` says what to do where that is not plain."""
    mend = mend and f"; {mend}"
    return error(f"{argument}: expected {expected}, got {short(value)}{mend}")


def check_int(argument: str, value: object, expected: str = "an int") -> None:
    """A whole number of Python or NumPy, and no bool."""
    if not isinstance(value, (int, Integral)) or isinstance(value, bool):
        raise wrong(TypeError, argument, expected, value)


def warn_user(text: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the user's line, however deep in here and in PyTorch it is found."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(("sre_triton.", "torch.")):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, category, stacklevel=level)


# ---------------------------------------------------------------------------------------------------------------------
# Errors without a value in them, and those that several files raise.

DOUBLE_BACKWARD = (
    "sre_triton: the gradient cannot be differentiated again; pass backend='eager', which can, unless classes are "
    "sharded"
)
FORWARD_AD = (
    "sre_triton: there is no derivative in forward mode (torch.func.jvp, jacfwd, hessian, linearize, "
    "torch.autograd.forward_ad); pass backend='eager', which has one, unless classes are sharded"
)
OTHER_GRADIENTS = (
    "backend: expected 'eager' when a program is exported whose target or weight will require a gradient; detach them "
    "if you do not want one"
)
SECOND_BACKWARD = (
    "self_regularized_entropy: the gradient was computed together with the loss and handed over by the first backward; "
    "pass recompute=True to run backward through the same graph again"
)
SECOND_BACKWARD_OF_LINEAR = (
    "linear_self_regularized_entropy: the gradients were computed together with the loss and handed over by the first "
    "backward; pass reduction='none', which computes them in every backward, to run it through the same graph again"
)
DIFFERENT_CALLS = (
    "shard: expected the same call on all ranks of the group, but the numbers of rows or classes, the dtypes or the "
    "options differ{}"
)
NOT_EVERY_CLASS_ONCE = "shard: expected the shards of the group's ranks to hold each of the {} classes once"

# ---------------------------------------------------------------------------------------------------------------------
# What compiled/inductor.py warns of and logs.

COMPILING = "sre_triton compiles %s, once for each set of options: 2 to 20 seconds"
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

# By name, as they lie in modules of Inductor and Triton.
NO_COMPILER_ERRORS = ("InvalidCxxCompiler", "CppCompileError")
NO_TRITON_ERRORS = ("TritonMissing", "GPUTooOldForTriton")
# Of a folder or disk.
UNWRITABLE = (
    errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.ENOENT, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS,
)  # fmt: skip


def lasting_failure(error: BaseException) -> str | None:
    """The warning for an error of a compilation that says that nothing can be compiled here; None for any other."""
    name = type(error).__name__
    if name in NO_COMPILER_ERRORS:
        return NO_COMPILER.format(name)
    if name in NO_TRITON_ERRORS:
        return NO_TRITON.format(error)
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        return NO_FILES.format(error)
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Warnings that are said once a process.

# From this many classes on the user is warned that the plain sum S outweighs the cross entropy. Measured on Gaussian
# clusters: accuracy fell from 1.00 to 0.32 at K = 1000 and to 0.00 at K = 10000, where the class mean kept 1.00 and
# 0.97. 256 is well below, as other data may suffer earlier.
MANY_CLASSES = 256

ONCE = {
    "many classes": (
        f"The regularizer S sums over the classes, and from K = {MANY_CLASSES} on it outweighs the cross entropy: "
        "networks then learn little or nothing. Pass class_mean=True to divide it by K - 1, or class_mean=False to "
        "keep the sum and silence this."
    ),
    "plain autograd": (
        "target or weight requires a gradient, which only plain autograd gives: on a CPU it takes 10 to 30 times as "
        "long. If that gradient is not wanted, as of a teacher's probabilities, pass target.detach() (or "
        "weight.detach()); if it is, backend='eager' silences this."
    ),
    "all logits": (
        "linear: expected a plain nn.Linear without hooks; this one is called, as it may do more than multiply by its "
        "weight. So all logits, N x K, and their gradient are in memory, and not a chunk of them. To go without them, "
        "merge the adapter, remove the hooks, or use torch.nn.utils.parametrizations."
    ),
    **{
        f"a gradient of {argument}": (
            f"{argument} requires a gradient and gets none: no gradient flows through it. Pass {argument}.detach() to "
            "silence this."
        )
        for argument in ("reg_weight", "denominator")
    },
}
_warned: set[str] = set()  # of ONCE


@constant_while_compiling
def warn_once(what: str) -> None:
    """Warn with a text of ``ONCE``, once a process, at the user's line."""
    if what in _warned:
        return
    _warned.add(what)
    warn_user(ONCE[what])
