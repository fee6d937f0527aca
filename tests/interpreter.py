"""Triton's interpreter, which does the same work over and over, in a fraction of the time."""

import functools

try:
    from triton.runtime import interpreter
except ImportError:  # as on macOS and Windows
    interpreter = None


def patch_once_a_launch():
    """A launch replaces the functions of ``triton.language`` once, and not again at each call within the kernel.

    To launch a kernel, the interpreter replaces ``triton.language`` by functions that compute with NumPy, and puts
    everything back at the end. In between it replaces them at each call from one function of the kernel to another,
    which changes nothing more, and took three quarters of the time.
    """
    if not hasattr(interpreter, "_LangPatchScope"):  # of Triton 3.8; others do it in another way
        return
    seen = {"language": interpreter.tl, "core": interpreter.tl.core}
    patch, patched = interpreter._patch_lang, set()  # by the kernel that runs

    class OfLaunch:
        def __init__(self, scope):
            self.scope = scope

        def restore(self):
            patched.clear()
            self.scope.restore()

    @functools.cache
    def modules_of(function):
        values = function.__globals__.values()
        return {name for name, module in seen.items() if any(value is module for value in values)}

    def patch_lang(function):
        modules, is_launch = modules_of(function), not patched
        if modules and modules <= patched:
            return None
        patched.update(modules)
        scope = patch(function)
        return OfLaunch(scope) if is_launch else scope

    interpreter._patch_lang = patch_lang
