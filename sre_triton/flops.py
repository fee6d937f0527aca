"""What ``FlopCounterMode`` counts for an op: its formula is registered once torch.utils.flop_counter is imported.

Not before, as this module of PyTorch would load Triton.
"""

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable

COUNTER = "torch.utils.flop_counter"


class _WhenImported(importlib.abc.MetaPathFinder):
    """Calls a function with the module ``COUNTER`` once this has been imported."""

    def __init__(self, then: Callable) -> None:
        """``then`` takes the module."""
        self.then, self.looking = then, False

    def find_spec(self, name, path=None, target=None):
        """How ``COUNTER`` is loaded, with the call added at its end; None for any other module."""
        if name != COUNTER or self.looking:
            return None
        self.looking = True  # for what the other finders say
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.looking = False
        execute = spec.loader.exec_module

        def exec_module(module):
            """Load it as ever, then call."""
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            self.then(module)

        spec.loader.exec_module = exec_module
        return spec


def count_flops(op: Callable, formula: Callable[..., int]) -> None:
    """``formula`` takes the arguments of the op, shapes in place of tensors, and ``out_shape``."""

    def register(module):
        """Tell the module."""
        module.register_flop_formula(op)(formula)

    if COUNTER in sys.modules:
        register(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _WhenImported(register))
