"""Verification on a device: the same verdicts as on the CPU, without waiting for it."""

import pytest
import torch

from miles.rollout.speculative import verify_chain, verify_tree

ROWS, VOCAB = 33, 5_003
PARENTS = [-1, -1, 0, 0, 1, 2]
cuts = pytest.mark.parametrize(("top_k", "top_p"), [(-1, 1.0), (50, 1.0), (-1, 0.9), (50, 0.9)])


def problem(nodes: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 8 * torch.randn(ROWS, nodes + 1, VOCAB, generator=generator)
    probs = (logits + torch.randn(logits.shape, generator=generator)).softmax(-1)
    temperatures = torch.tensor([0.0, 0.7, 1.0] * (ROWS // 3), dtype=torch.float64)
    best = torch.nn.functional.one_hot(probs.argmax(-1), VOCAB).float()
    probs = torch.where((temperatures == 0)[:, None, None], best, probs)
    return {
        "logits": logits.to(dtype),
        "probs": probs,
        "temperatures_R": temperatures,
        "uniforms_RU": torch.rand(ROWS, nodes + 1, dtype=torch.float64, generator=generator),
        "lengths_R": torch.randint(0, nodes + 1, (ROWS,), generator=generator),
    }


def on(device: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def same_without_waiting(run, tensors) -> None:
    expected = run(**on("cpu", tensors))
    tensors = on("cuda", tensors)
    run(**tensors)  # what a first call allocates or compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = run(**tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got.tokens_RK.cpu(), expected.tokens_RK)
    torch.testing.assert_close(got.logprobs_RK.cpu(), expected.logprobs_RK, equal_nan=True)
    assert len(expected.num_tokens_R.unique()) > 2


@cuts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("point", [False, True])
def test_chains_come_out_as_on_the_cpu(top_k, top_p, dtype, point):
    tensors = problem(4, dtype)
    tokens = tensors["probs"][:, :-1].topk(2).indices[..., 0]

    def run(logits, probs, tokens, **how):
        probs = None if point else probs[:, :-1]
        return verify_chain(logits, tokens, probs, **how, top_k=top_k, top_p=top_p, check=False)

    same_without_waiting(run, tensors | {"tokens": tokens})


@cuts
@pytest.mark.parametrize("replacement", [None, True, False])
def test_trees_come_out_as_on_the_cpu(top_k, top_p, replacement):
    tensors = problem(len(PARENTS), torch.float32)
    places = torch.tensor(PARENTS) + 1
    rank = torch.tensor([PARENTS[:n].count(p) for n, p in enumerate(PARENTS)])
    tokens = tensors["probs"].topk(2).indices[:, places, rank]
    parents = torch.tensor(PARENTS).expand(ROWS, -1)

    def run(logits, probs, tokens, parents, **how):
        probs = None if replacement is None else probs
        return verify_tree(
            logits, tokens, parents, probs, **how,
            replacement=replacement, top_k=top_k, top_p=top_p, check=False,
        )  # fmt: skip

    same_without_waiting(run, tensors | {"tokens": tokens, "parents": parents})
