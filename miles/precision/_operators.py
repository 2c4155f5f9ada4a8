"""Functions that are one step to the compiler: kernels that it cannot read.

An eager call goes past the dispatcher, which takes 10 to 20 us of each call of a Python operator.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

__all__ = ["operator"]

_F = TypeVar("_F", bound=Callable[..., Any])


def operator(name: str, like: Callable[..., Any]) -> Callable[[_F], _F]:
    """`torch.library.custom_op` without its wrappers, for where no gradient is recorded.

    Inside, autocast is off.

    Args:
        name: after `miles::`.
        like: makes tensors of the results' shapes, for the compiler.
    """

    def register(function: _F) -> _F:
        schema = torch.library.infer_schema(function, mutates_args=())

        @functools.wraps(function)
        def run(first: Tensor, *rest: Any) -> Any:
            kind = first.device.type
            if torch.is_autocast_enabled(kind):
                with torch.autocast(kind, enabled=False):
                    return function(first, *rest)
            return function(first, *rest)

        torch.library.define(f"miles::{name}", schema)
        torch.library.impl(f"miles::{name}", "default", run)
        torch.library.register_fake(f"miles::{name}", like)
        dispatched = getattr(torch.ops.miles, name).default

        @functools.wraps(function)
        def call(first: Tensor, *rest: Any) -> Any:
            # A tracer, a mode that records or replaces operators, and tensors of other classes (of
            # a mesh of GPUs, say) have to see an operator.
            plain = not torch.compiler.is_compiling() and type(first) is Tensor
            if plain and not torch._C._len_torch_dispatch_stack():
                return run(first, *rest)
            return dispatched(first, *rest)

        return cast(_F, call)

    return register
