"""A model's parameters in one allocation."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from miles.errors import SettingError

__all__ = ["pack_parameters_"]

ALIGNMENT = 256


def pack_parameters_(module: nn.Module) -> None:
    """Move a model's parameters into one allocation, unless they are in one; the same objects stay.

    `SGLangSyncer(via="cuda_ipc")` then hands it to servers in one call and copies nothing. Values,
    gradients and optimizers are what they were; tied parameters stay tied. Until the old memory is
    free, there are two of each weight.

    Args:
        module: with all its parameters on one device. Under `expandable_segments` memory cannot be
            handed to other processes, and packing is of no use.

    Raises:
        SettingError: parameters on several devices, sharded ones, ones that overlap, or parts of
            larger memory.

    Example:
        >>> import torch
        >>> from miles.sync import pack_parameters_
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
        >>> pack_parameters_(model)
        >>> len({p.untyped_storage().data_ptr() for p in model.parameters()})
        1
    """
    named = list(module.named_parameters())
    if not named:
        return
    sharded = [name for name, p in named if type(p) is not Parameter]
    if sharded:
        raise SettingError(
            f"{sharded[:3]} are no plain parameters (sharded ones are gathered for each push); "
            "expected those of an unsharded model"
        )
    devices = {p.device for _, p in named}
    if len(devices) > 1:
        raise SettingError(
            f"parameters are on {sorted(map(str, devices))}; expected one device: move the model"
        )
    if len({p.untyped_storage().data_ptr() for _, p in named if p.numel()}) <= 1:
        return
    parts = [name for name, p in named if p.untyped_storage().nbytes() > max(p.nbytes, 16)]
    if parts:
        raise SettingError(
            f"{parts[:3]} are parts of larger memory, which an optimizer may write to (ZeRO's, "
            "Megatron's) or others share; expected parameters with memory of their own"
        )
    _check_apart(named)
    starts, end = [], 0
    for _, parameter in named:
        starts.append(end)
        end += -(-parameter.nbytes // ALIGNMENT) * ALIGNMENT
    memory = torch.empty(end, dtype=torch.uint8, device=devices.pop())
    for (_, parameter), start in zip(named, starts, strict=True):
        part = memory[start : start + parameter.nbytes].view(parameter.dtype)
        stride = torch.empty_like(
            parameter, device="meta"
        ).stride()  # as gradients and moments have
        parameter.data = part.as_strided(parameter.shape, stride).copy_(parameter.data)


def _check_apart(named: list[tuple[str, Parameter]]) -> None:
    """Moved one by one, weights that share elements would share them no more."""
    spans = sorted(
        (tensor.data_ptr(), tensor.data_ptr() + _extent(tensor), name)
        for name, tensor in named
        if tensor.numel()
    )
    for (_, end, one), (start, _, other) in pairwise(spans):
        if start < end:
            raise SettingError(
                f"{one} and {other} lie in the same memory; expected parameters that share "
                "nothing, or that are one object (tied)"
            )


def _extent(tensor: Tensor) -> int:
    """Bytes from the first to the last element."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((size - 1) * stride for size, stride in steps)) * tensor.itemsize
