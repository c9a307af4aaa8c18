"""The private names of torch that shardkit depends on; no other module uses one.

A new release of torch may move any of them. So each appears here once, under a name that states its
purpose. A test looks for each in the installed torch, and for private names elsewhere.

Verified for torch 2.6.0, the oldest that shardkit declares, and 2.13.0, unless a comment says
otherwise: the tests of the loader ran with both, on the CPU.

Where one call for each weight counts, a name is the object of torch itself or an `attrgetter`:
either costs no more than the attribute.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from operator import attrgetter, methodcaller
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX
from torch.utils._python_dispatch import _disable_current_modes

if TYPE_CHECKING:
    from torch._ops import OpOverload

    # Any: arguments and results of operations, of which torch has thousands. Not generic in 2.6.
    Operation = OpOverload[..., Any]

# ---- nn.Module: what it holds -----------------------------------------------------------------
#
# The public iterators leave out what is None and what was seen before, and take ten times as long.

_Tensors = Callable[[nn.Module], dict[str, torch.Tensor | None]]
_Modules = Callable[[nn.Module], dict[str, nn.Module | None]]

own_parameters: _Tensors = attrgetter("_parameters")  # no dict in what torch.jit.script makes
"""The parameters that a module owns itself; the dict in which it keeps them, no copy."""

own_buffers: _Tensors = attrgetter("_buffers")  # no dict in what torch.jit.script makes
"""The buffers that a module owns itself; the dict in which it keeps them, no copy."""

PARAMETERS, BUFFERS = "_parameters", "_buffers"
"""The names under which `vars` of a module has those two dicts."""

own_modules: _Modules = attrgetter("_modules")
"""The modules directly inside a module; the dict in which it keeps them, no copy."""

non_persistent_buffers: Callable[[nn.Module], set[str]] = attrgetter("_non_persistent_buffers_set")
"""The names of those of a module's own buffers that its state dict leaves out."""

EXTRA_STATE = _EXTRA_STATE_KEY_SUFFIX
"""The last part of the key under which a state dict holds what `get_extra_state` returns."""

# ---- nn.Module: its hooks and its calls -------------------------------------------------------

_HookTables = tuple[dict[int, Any], ...]  # Any: hooks, whose signatures differ, and their flags


def forward_hook_tables(module: nn.Module) -> tuple[_HookTables, _HookTables]:
    """The forward pre-hooks and the forward hooks of *module*, each with the tables of their flags.

    To remove a hook is to remove its key from its table and from those of the flags.
    """
    tables: tuple[_HookTables, _HookTables] = (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (
            module._forward_hooks,
            module._forward_hooks_with_kwargs,
            module._forward_hooks_always_called,
        ),
    )
    return tables


def remove_load_state_dict_hook(module: nn.Module, function: Callable[..., None]) -> None:
    """Remove *function* from what `load_state_dict` of *module* calls first."""
    hooks = module._load_state_dict_pre_hooks
    for key, wrapped in list(hooks.items()):  # each a _WrappedHook
        if getattr(wrapped, "hook", None) is function:
            del hooks[key]


CALL_CODE = nn.Module._call_impl.__code__
"""The code that calls a module that has hooks: who looks for it in the stack finds its frames."""

CAST_CODE = nn.Module._apply.__code__
"""The code that moves or casts the weights of a module, as `Module.to` and `Module.half` do."""

# ---- Tensor -----------------------------------------------------------------------------------

version_of: Callable[[torch.Tensor], int] = attrgetter("_version")
"""How often a tensor was written to. Not defined for a tensor of inference mode."""

use_count: Callable[[torch.Tensor], int]
use_count = torch.Tensor._use_count  # type: ignore[attr-defined]  # not in the stubs
"""How many in C++ hold a tensor, its Python object among them."""

typed_storage: Callable[[torch.Tensor], torch.TypedStorage] = methodcaller("_typed_storage")
"""The storage of a tensor, typed, without the deprecation warning. `Paged` overrides the method."""

make_subclass = torch.Tensor._make_subclass
"""A tensor of a given class that shares memory and version with another."""

make_wrapper_subclass = torch.Tensor._make_wrapper_subclass
"""A tensor of a given class that has no memory."""

can_take_data = torch._has_compatible_shallow_copy_type
"""Whether a tensor can be given the memory of another by `tensor.data = other`."""

no_torch_function = torch._C._disabled_torch_function_impl
"""The `__torch_function__` of a class that has none, as torch documents it."""

tensor_data = vars(torch._C.TensorBase)["data"]
"""The descriptor behind `Tensor.data`, for a class that overrides it."""

tensor_requires_grad = vars(torch._C.TensorBase)["requires_grad"]
"""The descriptor behind `Tensor.requires_grad`, for a class that overrides it."""

PARAMETER_MARK = "_is_param"
"""The attribute that makes torch take a tensor of any class for an `nn.Parameter`."""

# ---- Operations -------------------------------------------------------------------------------

TO_COPY: Operation = torch.ops.aten._to_copy.default
"""What `Tensor.to` becomes below autograd."""

UNSAFE_VIEW: Operation = torch.ops.aten._unsafe_view.default
"""A view of what nobody else holds, as `matmul` makes it."""

schema: Callable[[Operation], torch.FunctionSchema] = attrgetter("_schema")
"""The arguments of an operation, with what it writes to."""

parse_to: Callable[..., tuple[Any, ...]] = torch._C._nn._parse_to
"""The arguments of `Tensor.to`, parsed: device, type, non_blocking, memory format. It knows no
*copy*.
"""


def has_decomposition(operation: str) -> bool:
    """Whether the operation of this name is made of other operations."""
    return bool(
        torch._C._dispatch_has_kernel_for_dispatch_key(operation, "CompositeImplicitAutograd")
    )


# ---- Modes, traces and transforms -------------------------------------------------------------

no_modes = _disable_current_modes
"""A context without the modes that are on, such as that of fake tensors."""

no_transforms = torch._C._DisableFuncTorch
"""A context without the transforms of torch.func that are on."""

is_tracing: Callable[[], bool] = torch._C._is_tracing
"""Whether torch.jit.trace is at work."""

current_trace: Callable[[], object | None] = torch._C._get_tracing_state
"""What torch.jit.trace has written down so far; None if it is not at work."""

set_trace: Callable[[object | None], None]
set_trace = torch._C._set_tracing_state  # type: ignore[attr-defined]  # not in the stubs
"""Suspend torch.jit.trace, with None, or resume it."""

has_autocast: Callable[[], bool] = torch._C._is_any_autocast_enabled
"""Whether autocast is on for any kind of device."""

mode_count: Callable[[], int] = torch._C._len_torch_dispatch_stack
"""How many modes are on."""

innermost_transform: Callable[[], object | None] = torch._C._functorch.peek_interpreter_stack
"""The transform of torch.func that was entered last; None if none is on."""


def has_gradient_transform() -> bool:
    """Whether a transform that is on, the innermost or not, computes gradients."""
    if innermost_transform() is None:
        return False
    transforms = torch._C._functorch.get_interpreter_stack() or ()
    return any(each.key() == torch._C._functorch.TransformType.Grad for each in transforms)


def is_graph_traced() -> bool:
    """Whether make_fx, or what is built on it, is at work."""
    module = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return module is not None and module.get_proxy_mode() is not None


# ---- The compiler -----------------------------------------------------------------------------


def is_compiler_imported() -> bool:
    """Whether somebody may have compiled something. To import the compiler takes seconds."""
    return "torch._dynamo" in sys.modules


def hide_from_compiler(function: FunctionType) -> None:
    """Let torch.compile run *function* without tracing it, which takes long and gives nothing.

    `torch.compiler.disable` does the same, but imports the compiler.
    """
    # torch 2.6 lacks the names: it warns of graph breaks, and computes the same.
    with suppress(ImportError):
        from torch._C._dynamo.eval_frame import (
            _FrameAction,
            _FrameExecStrategy,
            set_code_exec_strategy,
        )

        skip = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)
        set_code_exec_strategy(function.__code__, skip)
