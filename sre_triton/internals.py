"""Every private name of PyTorch that this package reads, and what is done where a release has it no longer.

Each function answers a question that PyTorch's public functions do not answer, or answer slowly. It reads a private
name; its docstring says which, the public behaviour that the name stands for, and the public route that is taken where
the name is gone. That route is slower, or less is known then, but every loss and gradient stays right.

A name is looked up once: at import, or at its first use if it lies in a module that ``import torch`` does not load.
No other file of this package reads one of them. (layer.py looks at the hooks and parameters that an nn.Module keeps.)
"""

import contextlib
import functools
import os
import pkgutil
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

if TYPE_CHECKING:
    import sympy

Function = TypeVar("Function", bound=Callable)


@functools.cache
def find(path: str) -> object | None:
    """What a private name holds, or None where it is gone; ``find("torch._C:_get_tracing_state")``.

    The module, which is imported, stands before the colon.
    """
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError):
        return None


# ---------------------------------------------------------------------------------------------------------------------
# Who looks at what is computed. The first five functions are called several times a step, so each reads a name that was
# found at import; where the name is gone, another function takes its place.


class _Legacy(torch.autograd.Function):
    """A Function without ``setup_context``, which torch.func transforms refuse with an error."""

    @staticmethod
    def forward(ctx):
        """Nothing."""

    @staticmethod
    def backward(ctx):
        """Nothing."""


def _legacy_function_fails() -> bool:
    """Whether a torch.func transform refuses a Function, as it does by its documentation; True while compiling."""
    if torch.compiler.is_compiling():  # where nobody refuses, and True is the careful answer
        return True
    try:
        _Legacy.apply()
    except RuntimeError:
        return True
    return False


_are_transforms_active = find("torch._C:_are_functorch_transforms_active") or _legacy_function_fails
_num_dispatch_modes = find("torch._C:_len_torch_dispatch_stack") or (lambda: 1)


def under_functorch() -> bool:
    """Whether a transform of ``torch.func`` (grad, vmap, jvp) runs.

    Private: ``torch._C._are_functorch_transforms_active``. It stands for what a transform does to a Function without
    ``setup_context``: calling it raises. If the name is gone, such a Function is called, 5 us; while compiling, where
    it would not raise, the answer is True.
    """
    return _are_transforms_active()


def is_watched() -> bool:
    """Whether a tracer, a transform or a dispatch mode looks at what is computed, and values may not be there.

    Private: ``torch._C._len_torch_dispatch_stack``, and that of :func:`under_functorch`. It stands for the calls that a
    ``TorchDispatchMode`` receives. If the name is gone, there may always be one: the registered ops are called, in
    place of Python functions, no value is read, and class indices out of range give NaN and no error.
    """
    return torch.compiler.is_compiling() or _are_transforms_active() or _num_dispatch_modes() > 0


def in_forward_mode() -> bool:
    """Whether a level of forward-mode AD is entered (``forward_ad.dual_level``, ``torch.func.jvp``).

    Private: ``torch.autograd.forward_ad._current_level``. It tells what ``forward_ad.make_dual`` tells, which raises
    outside of a level. If the name is gone, a dual number is made, 5 us; while compiling the answer is True.
    """
    return forward_ad._current_level >= 0


_ZERO = torch.zeros((), device="cpu")


def _dual_number_is_made() -> bool:
    """Whether ``forward_ad.make_dual`` finds a level; True while compiling."""
    if torch.compiler.is_compiling():
        return True
    try:
        forward_ad.make_dual(_ZERO, _ZERO)
    except RuntimeError:
        return False
    return True


if find("torch.autograd.forward_ad:_current_level") is None:
    in_forward_mode = _dual_number_is_made


def is_transformed() -> bool:
    """Whether somebody differentiates or batches whose tensors need not say that they require a gradient."""
    return under_functorch() or in_forward_mode()


_is_legacy_batched = find("torch._C:_functorch.is_legacy_batchedtensor") or (lambda tensor: True)


def is_batched(tensor: object) -> bool:
    """Whether ``torch.autograd.grad(is_grads_batched=True)`` runs, whose tensors hide their batch dimension.

    Private: ``torch._C._functorch.is_legacy_batchedtensor``. It stands for tensors that only PyTorch's own operations
    and registered ops can take apart. If the name is gone, each tensor may be one: the registered ops are called.
    """
    return isinstance(tensor, Tensor) and _is_legacy_batched(tensor)


def is_jit_tracing() -> bool:
    """Whether ``torch.jit.trace`` records what is computed. This one is public."""
    return torch.jit.is_tracing()


_num_function_modes = find("torch._C:_len_torch_function_stack")
_pop_function_mode = find("torch._C:_pop_torch_function_stack")
_push_function_mode = find("torch._C:_push_on_torch_function_stack")
_no_function_modes = find("torch._C:DisableTorchFunction") or contextlib.nullcontext


def is_seen_by_modes() -> bool:
    """Whether a ``TorchFunctionMode`` may see what is computed. Private names as of :func:`hidden_from_modes`."""
    return _num_function_modes is None or _num_function_modes() > 0


def hidden_from_modes(function: Function) -> Function:
    """The function, of which a ``TorchFunctionMode`` sees nothing.

    What is compiled cannot show itself to modes, and kernels have nothing to show. So that the same call has the same
    result everywhere, the operations around them are not shown either. (A backward shows itself to no mode: PyTorch
    has set them all aside by then.)

    Private: ``torch._C._len_torch_function_stack``, ``_pop_torch_function_stack``, ``_push_on_torch_function_stack``
    and ``DisableTorchFunction``. They stand for a call outside of every mode. If one is gone, modes see the operations
    around the kernels, as they see any of PyTorch's: right for modes that only look on.
    """
    if _num_function_modes is None or _pop_function_mode is None or _push_function_mode is None:
        return function

    @functools.wraps(function)
    def call(*args):
        """Set all modes aside for the length of the call."""
        if not _num_function_modes():
            return function(*args)
        if torch.compiler.is_compiling():
            with _no_function_modes():
                return function(*args)
        modes = [_pop_function_mode() for _ in range(_num_function_modes())]
        try:
            return function(*args)
        finally:
            for mode in reversed(modes):
                _push_function_mode(mode)

    return call


# ---------------------------------------------------------------------------------------------------------------------
# Dynamo, as it traces this package within a user's torch.compile.


def constant_while_compiling(function: Callable) -> Callable:
    """The function itself, which Dynamo calls once as it traces, taking the result as a constant.

    Private: the attribute ``_dynamo_marked_constant``. It stands for ``torch.compiler.assume_constant_result``, which
    sets no more than this attribute, but loads Dynamo, for a second. If Dynamo no longer reads it, the function is
    traced, and the graph may break there.
    """
    function._dynamo_marked_constant = True
    return function


# Dynamo takes torch.compiler's own for true in torch 2.11.
@constant_while_compiling
def is_exporting() -> bool:
    """Whether torch.export traces a program, which keeps the ops and none of the Functions around them."""
    return torch.compiler.is_exporting()


@constant_while_compiling
def _is_there(path: str) -> bool:
    """Whether a private name is found. Dynamo cannot trace how it is looked up."""
    return find(path) is not None


def may_hold(condition: bool) -> bool:
    """Whether it holds, or is of a number that a graph computes (``x.item()``), which while tracing nobody knows.

    Private: ``torch.fx.experimental.symbolic_shapes.guard_or_true``. It stands for a question that makes no guard and
    never raises. If the name is gone, the condition itself is asked: Dynamo compiles for one answer, and breaks the
    graph where there is none.
    """
    if torch.compiler.is_compiling():
        if not _is_there("torch.fx.experimental.symbolic_shapes:guard_or_true"):
            return bool(condition)
        return torch.fx.experimental.symbolic_shapes.guard_or_true(condition)
    return condition


# ---------------------------------------------------------------------------------------------------------------------
# Autograd, pytrees, modules, process groups.

_will_engine_execute = find("torch._C:_will_engine_execute_node")


def will_execute(node: torch.autograd.graph.Node) -> bool:
    """Whether the backward that runs goes on to a node.

    Private: ``torch._C._will_engine_execute_node``. It stands for the gradients that ``torch.autograd.grad`` was asked
    for. If the name is gone, the answer is True: gradients are computed that nobody wants.
    """
    if _will_engine_execute is None:
        return True
    try:
        return _will_engine_execute(node)
    except RuntimeError:  # of a leaf whose gradient autograd.grad is to return, or in no backward at all
        return True


def register_namedtuple(kind: type, name: str) -> None:
    """Let ``torch.export.save`` write programs that return a NamedTuple, under a name.

    Private: ``torch.utils._pytree._register_namedtuple``. If it is gone, such programs run, but cannot be saved.
    """
    register = find("torch.utils._pytree:_register_namedtuple")
    if register is not None:
        register(kind, serialized_type_name=name)


_has_any_global_hook = find("torch.nn.modules.module:_has_any_global_hook") or (lambda: True)
_GLOBAL_HOOKS = tuple(
    find(f"torch.nn.modules.module:{name}")
    for name in (
        "_global_forward_pre_hooks",
        "_global_forward_hooks",
        "_global_backward_pre_hooks",
        "_global_backward_hooks",
    )
)


def global_hooks() -> Iterable[Callable[..., Any]] | None:
    """The hooks of all modules (``torch.nn.modules.module.register_module_forward_hook``), or None if unknown.

    Private: ``torch.nn.modules.module._has_any_global_hook``, and its dictionaries ``_global_forward_pre_hooks``,
    ``_global_forward_hooks``, ``_global_backward_pre_hooks``, ``_global_backward_hooks``. They stand for what calling
    a module does besides its ``forward``. If the first is gone, the dictionaries are looked through each time; if one
    of those is, there may be hooks: a layer is called, and not multiplied by.
    """
    if not _has_any_global_hook():
        return ()
    if None in _GLOBAL_HOOKS:
        return None
    return [hook for hooks in _GLOBAL_HOOKS for hook in hooks.values()]


_disabled_torch_function = find("torch._C:_disabled_torch_function_impl")


def without_torch_function(kind: type) -> bool:
    """Whether a class of tensors has switched off its ``__torch_function__``, so that it behaves as a Tensor.

    Private: ``torch._C._disabled_torch_function_impl``, which PyTorch's notes on extending it tell authors of classes
    to set. If it is gone, the answer is False: such a weight may do anything.
    """
    return _disabled_torch_function is not None and kind.__torch_function__ is _disabled_torch_function


# Groups that shards were made for in this process, by name.
_groups: weakref.WeakValueDictionary = weakref.WeakValueDictionary()


def remember_group(group: "torch.distributed.ProcessGroup") -> str:
    """The name of a process group, by which :func:`group_named` finds it while it is there."""
    _groups[group.group_name] = group
    return group.group_name


def group_named(name: str) -> "torch.distributed.ProcessGroup":
    """The process group of a name; RuntimeError if there is none.

    Private: ``torch.distributed.distributed_c10d._resolve_process_group``. It stands for the group that ``new_group``
    returned. If the name is gone, groups are known that a shard was made for in this process: a shard that another
    process sent needs one made here first.
    """
    resolve = find("torch.distributed.distributed_c10d:_resolve_process_group")
    if resolve is not None:
        return resolve(name)
    if name not in _groups:
        raise RuntimeError(f"no process group {name}")
    return _groups[name]


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile, as compiled/inductor.py asks it. All of it is looked up at the first use, as it loads Dynamo.


def clone(function: Callable, name: str) -> Callable:
    """The function again, with a code object of its own. Dynamo keeps what it has compiled by code object."""
    return types.FunctionType(function.__code__.replace(co_name=name), function.__globals__)


def _identity(x: Tensor) -> Tensor:
    """The same numbers."""
    return x + 0


@functools.cache
def _compiled_identity() -> Callable:
    """A function that torch.compile has seen."""
    return torch.compile(clone(_identity, "identity"), backend="eager")


def is_fx_tracing() -> bool:
    """Whether ``make_fx`` or ``torch.fx`` traces, under which torch.compile compiles nothing.

    Private: ``torch.fx._symbolic_trace.is_fx_symbolic_tracing``. It stands for the error that a compiled function
    raises then. If the name is gone, one is called, 35 us.
    """
    is_tracing = find("torch.fx._symbolic_trace:is_fx_symbolic_tracing")
    if is_tracing is not None:
        return is_tracing()
    try:
        _compiled_identity()(_ZERO)
    except Exception:  # which says so in its text alone
        return True
    return False


def would_compile() -> bool:
    """Whether torch.compile, given a new function and a backend, would ask the backend now. Takes milliseconds."""
    asked = []

    def backend(graph, inputs):
        """Note the graph, and compile nothing."""
        asked.append(graph)
        return graph.forward

    try:
        torch.compile(clone(_identity, "asked"), backend=backend)(_ZERO)
    except Exception:  # as the stance "fail_on_recompile" wants
        return False
    return bool(asked)


def is_stance_known() -> bool:
    """Whether :func:`is_forced_eager` knows. If not, what torch.compile returned is called, which obeys by itself."""
    return find("torch._dynamo.eval_frame:_stance.stance") is not None


def is_forced_eager() -> bool:
    """Whether ``torch.compiler.set_stance("force_eager")`` wants what is compiled already run uncompiled, too.

    Private: ``torch._dynamo.eval_frame._stance``. If it is gone, the answer is False: see :func:`is_stance_known`.
    """
    module = sys.modules.get("torch._dynamo.eval_frame")
    return module is not None and is_stance_known() and module._stance.stance == "force_eager"


def why_nothing_is_compiled() -> str | None:
    """Why torch.compile would return what it is given, if it would; None where it compiles.

    Private: ``torch._dynamo.config.disable``, ``torch._dynamo.eval_frame._stance``, and that of
    :func:`is_fx_tracing`. They stand for ``TORCH_COMPILE_DISABLE`` and ``torch.compiler.set_stance``. If one is gone,
    torch.compile is given a small function, and it is seen whether it asks its backend, in milliseconds.
    """
    if is_fx_tracing():
        return "make_fx traces, under which torch.compile compiles nothing"
    if find("torch._dynamo.config:disable") is None or not is_stance_known():
        return None if would_compile() else "torch.compile compiles nothing now (set_stance, TORCH_COMPILE_DISABLE)"
    from torch._dynamo import config, eval_frame

    if config.disable or os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return "torch.compile is disabled (TORCH_COMPILE_DISABLE, TORCHDYNAMO_DISABLE or torch._dynamo.config.disable)"
    stance = eval_frame._stance
    if stance.stance == "default" and stance.backend is None:
        return None
    return f"torch.compiler.set_stance({stance.stance!r})" + (stance.backend is not None) * " forces another backend"


def known_options(options: dict[str, object]) -> dict[str, object]:
    """Those of Inductor's options that this release has; none if ``torch._inductor.list_options`` is gone.

    They make what is compiled faster, and change no result.
    """
    names = find("torch._inductor:list_options")
    return {} if names is None else {name: options[name] for name in options.keys() & set(names())}


def inductor_is_open() -> bool:
    """Whether Inductor can be asked directly, which :func:`compile_and_catch` does.

    Private: ``torch._inductor.compile_fx.compile_fx`` and ``compile_fx_inner``. They stand for the backend "inductor"
    of torch.compile. If one is gone, what torch.compile returns is called, which takes 35 us more at each call.
    """
    names = "torch._inductor.compile_fx:compile_fx", "torch._inductor.compile_fx:compile_fx_inner"
    return all(find(name) is not None for name in names)


def cpp_compiler() -> str | None:
    """The C++ compiler that Inductor finds, if one answers. torch.compile looks for it after seconds of tracing.

    Private: ``torch._inductor.cpp_builder.get_cpp_compiler``. It stands for the error that torch.compile raises. If the
    name is gone, the answer is "c++", wherever that may be: torch.compile is asked, and its error says so.
    """
    look = find("torch._inductor.cpp_builder:get_cpp_compiler")
    try:
        return "c++" if look is None else look()
    except Exception:  # one of its own, which has another name elsewhere
        return None


@contextlib.contextmanager
def _told(begins: Callable[[], None]) -> Iterator[None]:
    """While Inductor is asked: ``begins`` is called before it writes code, if its cache does not have the code.

    Private: ``torch._inductor.compile_fx.fx_codegen_and_compile``. It stands for the seconds that compiling takes. If
    the name is gone, ``begins`` is always called.
    """
    generate = find("torch._inductor.compile_fx:fx_codegen_and_compile")
    if generate is None:
        begins()
        yield
        return

    def generate_and_tell(*args, **keywords):
        """As Inductor, after the word."""
        begins()
        return generate(*args, **keywords)

    module = sys.modules["torch._inductor.compile_fx"]
    module.fx_codegen_and_compile = generate_and_tell
    try:
        yield
    finally:
        module.fx_codegen_and_compile = generate


def compile_and_catch(
    graph: torch.fx.GraphModule,
    inputs: list[Tensor | torch.SymInt],
    options: dict[str, object],
    begins: Callable[[], None],
) -> tuple[Callable[..., Any], list[Callable[..., Any]]]:
    """The graph compiled by Inductor, and a list of what Inductor itself returned in there.

    The first takes the inputs of the graph. The second takes a list of those that are used, and is called with no check
    before it; the list is empty if nobody asked Inductor. ``begins`` is called if there is something to compile.

    Private: see :func:`inductor_is_open`; and ``torch._functorch.config.patch(enable_autograd_cache=False)``, as the
    cache of AOTAutograd would return all it makes around Inductor's result (Inductor has a cache of its own). If the
    last is gone, the list may be empty.
    """
    compile_fx = find("torch._inductor.compile_fx:compile_fx")
    compile_fx_inner = find("torch._inductor.compile_fx:compile_fx_inner")
    has_cache = find("torch._functorch.config:enable_autograd_cache") is not None
    caught = []

    def compile_inner(*args, **keywords):
        """As Inductor, whose result is kept."""
        caught.append(compile_fx_inner(*args, **keywords))
        return caught[-1]

    without_cache = contextlib.nullcontext()
    if has_cache:
        from torch._functorch import config

        without_cache = config.patch(enable_autograd_cache=False)
    with without_cache, _told(begins):
        return compile_fx(graph, inputs, compile_inner, known_options(options)), caught


def innermost(compiled: Callable) -> Callable:
    """What Inductor's result calls after it has looked for a cache of autotuning and a profiler.

    Private: ``current_callable`` of ``torch._inductor.output_code.CompiledFxGraph``. If it is gone, the result itself
    is called, which takes 10 us more.
    """
    return getattr(compiled, "current_callable", None) or compiled


def sizes_and_guards(
    inputs: list[Tensor | torch.SymInt],
) -> tuple[list[tuple["sympy.Expr", int]], list["sympy.Basic"]] | None:
    """The symbol and first value of each size among the inputs of a graph, and what Dynamo took for granted of them.

    For a matrix of 96 rows and 512 classes: [(s0, 96), (s1, 512)], and relations of SymPy such as s1 >= 8.

    Private: ``node`` of a SymInt, and its ``expr``, ``hint`` and ``shape_env.guards``. They stand for the check that
    torch.compile's result makes at each call. If one is gone, None: this check is made.
    """
    try:
        nodes = [size.node for size in inputs if isinstance(size, torch.SymInt)]
        guards = [guard.expr for guard in nodes[0].shape_env.guards]
        return [(node.expr, node.hint) for node in nodes], guards
    except (AttributeError, IndexError):
        return None
