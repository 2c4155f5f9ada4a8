"""Plans to replay, and what a training step gives under them."""

import torch

from miles.moe import RoutingReplay, RoutingTape


def random_plan(replay: RoutingReplay, rows: int, seed: int = 1) -> RoutingTape:
    """Experts that have nothing to do with what the routers would choose."""
    scores = torch.rand(
        rows,
        len(replay.layers),
        replay.num_experts,
        generator=torch.Generator().manual_seed(seed),
    )
    ids = scores.argsort(-1)[..., : replay.topk]
    return RoutingTape(ids, num_experts=replay.num_experts)


def with_holes(tape: RoutingTape, every: int) -> RoutingTape:
    """The same tape with every `every`-th row not recorded."""
    ids = tape.expert_ids
    ids[::every] = -1
    return RoutingTape(ids, num_experts=tape.num_experts)


def weighted(logits: torch.Tensor) -> torch.Tensor:
    """A loss in which every logit counts differently."""
    return (logits * torch.linspace(-1, 1, logits.numel()).to(logits).view_as(logits)).sum()


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def loss_and_gradients(model, input_ids):
    model.zero_grad()
    logits = model(input_ids).logits
    weighted(logits).backward()
    return logits.detach(), gradients(model)


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Bitwise."""
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
