"""What a `DraftTrainer` is made of, looked at."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from miles.errors import CheckpointError, EmptyBatchError, NonFiniteError, SettingError
from miles.rollout.speculative._capture import unwrapped

__all__ = [
    "VOCABULARY_MAPS",
    "check_made_for",
    "check_ranks",
    "check_settings",
    "check_state",
    "least_of",
    "load_optimizer",
    "optimizer_of",
    "own_parameters",
    "own_tensors",
    "trouble_of",
]

VOCABULARY_MAPS = ("d2t", "t2d")

ADAFACTOR_FACTORS = ("row_var", "col_var")
"""The one state of torch's optimizers that has another shape than its parameter."""


def check_settings(
    steps: int, share: float, warmup_steps: int, max_grad_norm: float | None
) -> None:
    """Raise `SettingError` for what is out of range."""
    if steps < 1:
        raise SettingError(f"steps is {steps}; expected 1 or more")
    if not 0 < share <= 1:
        raise SettingError(f"share is {share}; expected above 0 and at most 1")
    if warmup_steps < 0:
        raise SettingError(f"warmup_steps is {warmup_steps}; expected 0 or more")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise SettingError(f"max_grad_norm is {max_grad_norm}; expected above 0, or None")


def own_parameters(draft: Any, policy: nn.Module | None) -> dict[str, nn.Parameter]:
    """What a draft trains; `SettingError` if that is nothing, some of it is the policy's, or of a
    dtype in which AdamW divides by 0."""
    if not hasattr(draft, "named_parameters"):
        raise SettingError(
            f"{type(draft).__name__} has no weights to train; expected a draft with some, such as "
            "Eagle3Draft"
        )
    named = {name: p for name, p in draft.named_parameters() if p.requires_grad}
    if not named:
        raise SettingError("the draft has no parameter that requires a gradient")
    half = [name for name, p in named.items() if p.dtype == torch.float16]
    if half:
        raise SettingError(
            f"the draft's {half[:8]} are float16, too coarse for the optimizer: the squares of "
            "small gradients are 0 in it; keep the draft in float32 and give autocast="
        )
    policys = {id(p) for p in policy.parameters()} if policy is not None else set()
    shared = [name for name, parameter in named.items() if id(parameter) in policys]
    if shared:
        raise SettingError(
            f"the draft's {shared[:8]} are parameters of the policy, which its optimizer would "
            "train; hold them by reference, outside named_parameters(), or freeze them"
        )
    return named


def own_tensors(draft: Any, policy: nn.Module | None) -> dict[str, Tensor]:
    """All that makes a draft what it is, by name: its parameters, frozen ones too, and the buffers
    that modules save, but nothing that it shares with the policy, nor maps of its vocabulary."""
    shared = [*policy.parameters(), *policy.buffers()] if policy is not None else []
    left_out, saved = {id(tensor) for tensor in shared}, draft.state_dict(keep_vars=True)
    buffers = {name: buffer for name, buffer in draft.named_buffers() if name in saved}
    return {
        name: tensor
        for name, tensor in (dict(draft.named_parameters()) | buffers).items()
        if id(tensor) not in left_out and name not in VOCABULARY_MAPS
    }


def check_made_for(draft: Any, policy: nn.Module | None, steps: int) -> None:
    """Raise what the draft itself has against policy or steps, if it looks."""
    if hasattr(draft, "check_steps"):
        draft.check_steps(steps)
    inner = unwrapped(policy, "get_decoder")
    if inner is not None and hasattr(draft, "check_target"):
        draft.check_target(inner)


def check_ranks(
    draft: Any, policy: nn.Module | None, device: torch.device, group: ProcessGroup
) -> None:
    """Raise `SettingError`, on every rank, unless all have the same draft, bit by bit."""
    tensors = own_tensors(draft, policy) | {"target_ids": draft.target_ids}
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if tensor is not None:
            digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    mine = torch.tensor([int.from_bytes(digest.digest()[:7])], device=device)
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, mine, group=group)
    numbers: list[int] = torch.cat(found).tolist()
    others = [rank for rank, number in enumerate(numbers) if number != numbers[0]]
    if others:
        raise SettingError(
            f"the drafts of ranks {others[:8]} of the group are not that of rank 0; expected the "
            "same on all: make them under one seed, or load one's weights or state into all, "
            "before the first step()"
        )


def least_of(counts: Sequence[int], device: torch.device, group: ProcessGroup) -> list[int]:
    """Each count as it is on the rank where it is least; on all ranks the same."""
    least = torch.tensor(counts, dtype=torch.int64, device=device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN, group=group)
    numbers: list[int] = least.tolist()
    return numbers


def optimizer_of(
    params: Sequence[nn.Parameter], given: torch.optim.Optimizer | None, lr: float
) -> torch.optim.Optimizer:
    """The one given, `SettingError` unless it is over just these parameters, or else AdamW."""
    fused = all(p.is_cuda for p in params) or None
    optimizer = given or torch.optim.AdamW(
        params, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=fused
    )
    theirs = {id(p) for settings in optimizer.param_groups for p in settings["params"]}
    if theirs != {id(p) for p in params}:
        raise SettingError(
            f"the optimizer holds {len(theirs)} parameters that are not the draft's {len(params)}; "
            "build it over the draft's parameters that require a gradient"
        )
    return optimizer


def check_state(
    state: Mapping[str, Any],
    named: Mapping[str, Tensor],
    target_ids: Tensor | None,
    policy: nn.Module | None,
) -> None:
    """Raise `CheckpointError` unless the state is of these tensors and this vocabulary, and, where
    no policy says which are its own, of the same frozen parameters."""
    keys = ("draft", "optimizer", "optimizer_class", "version", "target_ids")
    missing = [key for key in keys if key not in state]
    if missing:
        raise CheckpointError(f"the state lacks {missing}; expected what state_dict() returned")
    shapes = {name: tuple(tensor.shape) for name, tensor in state["draft"].items()}
    expected = {name: tuple(tensor.shape) for name, tensor in named.items()}
    if shapes != expected:
        wrong = {n for n in shapes.keys() | expected if shapes.get(n) != expected.get(n)}
        raise CheckpointError(
            f"the state is of another draft; {sorted(wrong)[:8]} differ: got "
            f"{[shapes.get(n) for n in sorted(wrong)[:8]]}, expected "
            f"{[expected.get(n) for n in sorted(wrong)[:8]]}"
        )
    ids = [None if ids is None else ids.tolist() for ids in (state["target_ids"], target_ids)]
    if ids[0] != ids[1]:
        raise CheckpointError(
            "the state is of a draft with other target_ids: its tokens stand for others of the "
            "policy's; build the draft with target_ids=state['target_ids']"
        )
    if policy is not None:
        return
    frozen = {n: p for n, p in named.items() if isinstance(p, nn.Parameter) and not p.requires_grad}
    others = [name for name, p in frozen.items() if not state["draft"][name].to(p).equal(p)]
    if others:
        raise CheckpointError(
            f"the state's {others[:8]} are frozen, have other values than the draft's, and may be "
            "a policy's that would be overwritten; expected the same values where the trainer has "
            "no policy: give policy=, or load the draft's weights first"
        )


def load_optimizer(optimizer: torch.optim.Optimizer, state: Any, kind: str) -> None:
    """Raise `CheckpointError`, and change nothing, unless the state is of such an optimizer; `kind`
    is the name of its class."""
    before = optimizer.state_dict()  # loading makes others of its parts
    try:
        _check_optimizer_state(optimizer, state, kind)
        optimizer.load_state_dict(state)
        for theirs, ours in zip(optimizer.param_groups, before["param_groups"], strict=True):
            # Torch has filled in what an older one did not write. Loading adds to the defaults
            # what not every group has, and a schedule of the learning rate to the groups.
            if lacking := (optimizer.defaults.keys() & ours.keys()) - theirs.keys():
                raise ValueError(f"a group lacks {sorted(lacking)}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        optimizer.load_state_dict(before)
        raise CheckpointError(
            f"the state's optimizer is another one, or incomplete: {error!r}; expected what "
            "state_dict() returned with an optimizer of the same class and groups"
        ) from error


def _check_optimizer_state(optimizer: torch.optim.Optimizer, state: Any, kind: str) -> None:
    """Raise `ValueError` for what torch would load, and fail of at the next step or never."""
    own = type(optimizer)
    if kind != own.__name__:
        raise ValueError(f"it is {kind}, the trainer's is {own.__name__}")
    for theirs, ours in zip(state["param_groups"], optimizer.param_groups, strict=False):
        if not own.__module__.startswith("torch.optim"):  # may keep tensors of any shape
            continue
        for number, parameter in zip(theirs["params"], ours["params"], strict=False):
            for key, value in state["state"].get(number, {}).items():
                if (
                    isinstance(value, Tensor)
                    and value.ndim
                    and value.shape != parameter.shape
                    and key not in ADAFACTOR_FACTORS
                ):
                    raise ValueError(
                        f"{key} of parameter {number} has shape {tuple(value.shape)}, not "
                        f"{tuple(parameter.shape)} (are the parameters in another order?)"
                    )


def trouble_of(
    count: float, wrong_features: float, *numbers: float, version: int
) -> EmptyBatchError | NonFiniteError | None:
    """Why no step can be taken, if none can: `numbers` are the losses and the gradient's norm."""
    *losses, norm = numbers
    named = [(f"the loss of unrolled step {i}", loss) for i, loss in enumerate(losses)]
    named.append(("the norm of its gradient", norm))
    bad = [f"{name} is {number}" for name, number in named if not math.isfinite(number)]
    if wrong_features:
        bad.insert(0, f"{wrong_features:.0f} features of the policy are NaN or infinite")
    if bad:
        return NonFiniteError(
            f"of the draft's step, {', '.join(bad)}; expected numbers; the draft stays at version "
            f"{version}, and what was observed is dropped (look at the policy's hidden states "
            "and logits, or lower lr)"
        )
    if not count:
        return EmptyBatchError(
            "there is no place to learn from on any rank; look at the mask, at which logits "
            "the policy returned and, with a reduced vocabulary, at draft/dropped"
        )
    return None
