"""Draft models on a GPU: CUDA graphs, bfloat16, and nobody waits for the device."""

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.rollout.speculative.targets import draft_of, target, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

K = 3
KINDS = ["eagle", "eagle3", "eagle3_reduced", "eagle3_borrowed", "mtp", "mtp_3", "standalone"]


def made(kind: str, **sizes: Any) -> Any:
    draft = draft_of(kind, target("llama", max_position_embeddings=1024, **sizes).float().cuda())
    return draft.float().cuda()


def run(draft: Any, *, cuda_graphs: bool, rounds: int = 8) -> tuple[list[Tensor], list[Tensor]]:
    """Three requests side by side; of every round the tokens, and what they were drawn from."""
    generator = torch.Generator().manual_seed(3)
    memory = draft.memory(num_slots=6, max_context=600, cuda_graphs=cuda_graphs)
    slots, lengths, starts = [0, 1, 3], [5, 300, 40], [0, 0, 0]
    rows = [tokens(600, seed=i).tolist() for i in range(3)]
    features = torch.randn(3, 600, draft.num_features, generator=generator).cuda()
    drawn, probs = [], []
    for step in range(rounds):
        temperatures = [[1.0, 0.7, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 1.0]][step % 3]
        given = None
        if draft.feature_layers:
            given = [features[i, start : lengths[i] - 1] for i, start in enumerate(starts)]
        memory.extend(
            slots, [rows[i][start : lengths[i]] for i, start in enumerate(starts)], starts, given
        )
        got = memory.propose(
            slots,
            num_steps=K,
            temperatures=temperatures,
            uniforms_RK=torch.rand(3, K, generator=generator, dtype=torch.float64).cuda(),
        )
        drawn.append(got.tokens_RK.clone())
        probs += [] if got.probs_RKV is None else [got.probs_RKV.clone()]
        starts = [length - 1 for length in lengths]
        lengths = [length + 1 + (i + step) % 3 for i, length in enumerate(lengths)]
        if step == rounds // 2:  # the slots are in order now
            memory.move(3, 2)
            slots = [0, 1, 2]
    return drawn, probs


@pytest.mark.parametrize("kind", KINDS)
def test_graphs_draw_what_single_launches_draw(kind: str) -> None:
    draft = made(kind)
    graphed, plain = run(draft, cuda_graphs=True), run(draft, cuda_graphs=False)
    for got, wanted in zip(graphed[1], plain[1], strict=True):
        torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-3)
    same = torch.stack([a == b for a, b in zip(graphed[0], plain[0], strict=True)])
    assert same.float().mean() > 0.97  # a draw within rounding of a border may fall elsewhere


def test_a_graph_is_captured_anew_when_weights_are_other_memory() -> None:
    draft = made("eagle3")
    memory = draft.memory(num_slots=1, max_context=64)
    features = torch.randn(5, draft.num_features, device="cuda")

    def probs() -> Tensor:
        memory.extend([0], [[1, 2, 3, 4, 5]], [0], [features[:4]])
        got = memory.propose(
            [0],
            num_steps=K,
            temperatures=[1.0],
            uniforms_RK=torch.full((1, K), 0.5, dtype=torch.float64, device="cuda"),
        )
        assert got.probs_RKV is not None
        return got.probs_RKV.clone()

    before = [probs() for _ in range(3)]
    assert torch.equal(before[1], before[2])
    for parameter in draft.parameters():
        parameter.data = parameter.data * 1.5
    after = probs()
    alone = draft.memory(num_slots=1, max_context=64, cuda_graphs=False)
    memory = alone
    torch.testing.assert_close(after, probs(), atol=2e-5, rtol=1e-3)
    assert not torch.allclose(after, before[2], atol=1e-3)


@pytest.mark.parametrize("kind", ["eagle", "eagle3", "mtp_3"])
def test_a_proposal_waits_for_nothing(kind: str) -> None:
    draft = made(kind)
    memory = draft.memory(num_slots=2, max_context=64)
    features = torch.randn(2, 8, draft.num_features, device="cuda")
    uniforms_RK = torch.rand(2, K, dtype=torch.float64, device="cuda")

    def go() -> None:
        memory.extend([0, 1], [[1, 2, 3], [4, 5]], [0, 0], [features[0, :2], features[1, :1]])
        memory.propose([0, 1], num_steps=K, temperatures=[1.0, 0.5], uniforms_RK=uniforms_RK)

    for _ in range(3):  # the first launch, and the capture, may wait
        go()
    torch.cuda.set_sync_debug_mode("error")
    try:
        go()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_training_in_bfloat16_is_near_float32() -> None:
    draft = made("eagle3", hidden_size=256, num_attention_heads=4, intermediate_size=512)
    ids = tokens(2, 700).cuda()
    features = torch.randn(2, 700, draft.num_features, device="cuda")
    seq_ids = torch.arange(700, device="cuda").div(100, rounding_mode="floor").expand(2, -1)
    wanted = draft.unroll(ids, features, num_steps=K, seq_ids_BL=seq_ids)
    with torch.autocast("cuda", torch.bfloat16):
        got = draft.unroll(ids, features, num_steps=K, seq_ids_BL=seq_ids)
    for half, whole in zip(got, wanted, strict=True):
        error = (half.float() - whole).square().mean().sqrt() / whole.square().mean().sqrt()
        assert error < 0.1, float(error.detach())  # three layers' worth of 8 bits
        half.float().sum().backward(retain_graph=True)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in draft.parameters())


def test_milliseconds_of_a_round() -> None:
    """No claim; prints what a round of an EAGLE-3 draft takes, with graphs and without."""
    sizes: dict[str, Any] = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    }
    draft = made("eagle3", **sizes).to(torch.bfloat16)
    for batch in (1, 8, 64):
        features = torch.randn(batch, 255, draft.num_features, device="cuda").bfloat16()
        rows = [tokens(256, seed=i).tolist() for i in range(batch)]
        for cuda_graphs in (True, False):
            memory = draft.memory(num_slots=batch, max_context=512, cuda_graphs=cuda_graphs)
            slots = list(range(batch))
            memory.extend(slots, rows, [0] * batch, list(features))
            uniforms_RK = torch.rand(batch, K, dtype=torch.float64, device="cuda")
            at = 255
            for step in range(25):
                if step == 5:
                    torch.cuda.synchronize()
                    began = time.perf_counter()
                memory.propose(
                    slots, num_steps=K, temperatures=[1.0] * batch, uniforms_RK=uniforms_RK
                )
                memory.extend(slots, [[5, 6, 7]] * batch, [at] * batch, [f[:2] for f in features])
                at += 2
            torch.cuda.synchronize()
            taken = (time.perf_counter() - began) / 20 * 1e3
            print(f"batch {batch}, graphs {cuda_graphs}: {taken:.2f} ms for {K} tokens")
