"""When it pays to compile.

To compile takes 10 to 20 seconds of processor time, and then saves 2.5 ns a logit and 45 us a call. (Measured with 2
cores, AVX-512.) So 2^21 logits, 5 ms a call, are compiled for at once, and fewer when as much time is lost as compiling
takes: together never more than twice what the best choice would have taken. What is counted is calls, not seconds, so
that a program goes the same way each time it runs; gradients then change by roundings once, at the same step.
"""

import math
import os

CALL = 2**14  # logits that take as long as a call

VARIABLE = "SRE_TRITON_COMPILE"  # of the environment
MEANINGS = {  # logits in one call from which on it compiles at once, logits in all calls that are enough, and in words
    "": (2**21, 2**32, "when it pays: few logits run uncompiled at first"),
    "1": (0, 0, "at the first call"),
    "0": (math.inf, math.inf, "never, unless backend='compile'"),
}

if os.environ.get(VARIABLE, "") not in MEANINGS:
    _expected = "; ".join(f"{value or 'nothing'} (compile {words})" for value, (*_, words) in MEANINGS.items())
    raise ValueError(f"{VARIABLE}: expected {_expected}; got {os.environ[VARIABLE]!r}")
MANY, ENOUGH, WHEN = MEANINGS[os.environ.get(VARIABLE, "")]

_waited: dict[int, int] = {}  # by key of a version: the logits of the calls that it was not compiled for


def pays(key: int, num_logits: int) -> bool:
    """Whether it pays to compile a version, for a call with so many logits and those that came before."""
    if num_logits >= MANY:
        return True
    waited = _waited[key] = _waited.get(key, 0) + CALL + num_logits
    return waited >= ENOUGH


def count_again(key: int) -> None:
    """From nothing, where a version was not compiled when it would have paid."""
    _waited.pop(key, None)
