"""What an error says: the argument, what was expected, what came and what mends it, briefly whatever came."""

import reprlib

import torch
from torch import Tensor
from torch.masked import MaskedTensor
from torch.nn.parameter import UninitializedTensorMixin

LONGEST = 200  # characters of a value


def _of_tensor(tensor: Tensor) -> str:
    if isinstance(tensor, UninitializedTensorMixin):
        return "an uninitialized parameter"
    dtype = str(tensor.dtype).removeprefix("torch.")
    article = "an" if dtype.startswith("int") else "a"
    if tensor.is_nested:  # and may have no shape
        return f"{article} {dtype} nested tensor"
    if isinstance(tensor, MaskedTensor):
        return f"a MaskedTensor of {dtype}"
    layout = "" if str(tensor.layout) == "torch.strided" else str(tensor.layout).removeprefix("torch.").strip("_") + " "
    return f"{article} {dtype} {layout}tensor of shape {short(tuple(tensor.shape))}"


class _Short(reprlib.Repr):
    """The beginning of what ``repr`` shows, and tensors without their values, which a GPU would be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxtuple, self.maxstring, self.maxother = 3, 10, 80, 120

    def repr1(self, x: object, level: int) -> str:
        if torch.compiler.is_compiling() and isinstance(x, (list, dict, set)):
            return f"a {type(x).__name__}"  # reprlib cannot be traced with them
        try:
            return _of_tensor(x) if isinstance(x, Tensor) else super().repr1(x, level)
        except Exception:  # such as an int of more digits than Python writes
            return f"<{type(x).__name__}>"


_short = _Short()


def short(value: object) -> str:
    """A value in at most ``LONGEST`` characters."""
    text = _short.repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def wrong(error: type[Exception], argument: str, expected: str, value: object, mend: str = "") -> Exception:
    """The error; ``mend`` says what to do where that is not plain."""
    mend = mend and f"; {mend}"
    return error(f"{argument}: expected {expected}, got {short(value)}{mend}")
