"""A weight that grows during training, from nothing or next to it to 1."""

import math
from collections.abc import Callable
from numbers import Real

from .messages import wrong

SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: x,
    "cosine": lambda x: (1 - math.cos(math.pi * x)) / 2,
    "sigmoid": lambda x: math.exp(-5 * (1 - x) ** 2),
}


def ramp(step: float, num_steps: float, shape: str = "linear") -> float:
    r"""How much of a weight is to be there at a step: 1 from ``num_steps`` on.

    The weight is in no ``state_dict``: a run that goes on from a checkpoint sets it from its step.

    For x = step / num_steps, from 0 to 1::

        linear     x
        cosine     (1 - cos π x) / 2
        sigmoid    exp(-5 (1 - x)²), 0.0067 at the first step

    Args:
        step: where the training is: steps, or epochs that may be fractions.
        num_steps: when the weight is to be all there, in the same unit.
        shape: ``"linear"``, ``"cosine"`` or ``"sigmoid"``.

    Raises:
        TypeError, ValueError: ``step`` or ``num_steps`` is not a number of 0 or more, or ``shape`` is another.

    Example:
        >>> criterion = SelfRegularizedEntropyLoss(reg_weight=0.0, class_mean=True)
        >>> for step in range(3):
        ...     criterion.reg_weight = 0.1 * ramp(step, 2)  # compiles nothing again
        ...     print(f"{criterion.reg_weight.item():.2f}")
        0.00
        0.05
        0.10

    Source: the page of the loss says that its later versions weigh S by a number that grows from 0 to 1. The sigmoid is
    that of Laine and Aila, "Temporal Ensembling for Semi-Supervised Learning", ICLR 2017.
    """
    for argument, value in (("step", step), ("num_steps", num_steps)):
        if not isinstance(value, Real) or isinstance(value, bool):
            raise wrong(TypeError, argument, "a number of 0 or more", value)
        if not 0 <= value < math.inf:
            raise wrong(ValueError, argument, "a number of 0 or more", value)
    if not isinstance(shape, str) or shape not in SHAPES:
        raise wrong(ValueError, "shape", f"one of {', '.join(map(repr, SHAPES))}", shape)
    return SHAPES[shape](step / num_steps) if step < num_steps else 1.0
