"""The blocks on a CUDA device: the numbers of the CPU, and engine and trainer together."""

import asyncio
import os
import signal

import pytest
import torch

from miles import Packed, count
from miles.errors import EngineDiedError
from miles.losses import (
    group_advantages,
    mismatch_metrics,
    presets,
    reduce_metrics,
    token_logprobs,
    topk_distillation,
    truncated_is,
)
from miles.moe import RoutingReplay
from miles.rollout import EngineProcess, HFEngine, SamplingParams, collate
from miles.sync import InProcessSyncer, SharedMemoryReceiver, SharedMemorySyncer
from tests.models import MOE_FAMILIES, generate_all, params, serving, tiny

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [1, 2, 3], list(range(20))]


def grpo_on(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    packed = Packed.from_padded(torch.rand(8, 12, generator=generator) < 0.7).to(device)
    logits = torch.randn(96, 50, generator=generator, dtype=torch.float64).to(device)
    logits.requires_grad_()
    targets = torch.randint(50, (96,), generator=generator).to(device)
    rollout = (torch.randn(96, generator=generator, dtype=torch.float64) * 0.1 - 4).to(device)
    rewards = torch.rand(8, generator=generator, dtype=torch.float64).to(device)
    groups = torch.arange(8, device=device) // 4
    logprobs = token_logprobs(logits, targets, temperature=0.7)
    old = logprobs.detach() + 0.05
    loss, metrics = presets.grpo(
        logprobs,
        old,
        packed.per_token(group_advantages(rewards, groups)),
        packed,
        count(packed),
        correction=truncated_is(old, rollout, packed),
    )
    loss.backward()
    assert reduce_metrics(metrics)["ratio/max"].device.type == device
    return loss.detach().cpu(), logits.grad.cpu()


def test_grpo_on_cuda_equals_cpu_in_float64():
    for on_cpu, on_cuda in zip(grpo_on("cpu"), grpo_on("cuda"), strict=True):
        torch.testing.assert_close(on_cuda, on_cpu, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_token_logprobs_are_float32_exact_against_float64(dtype):
    logits = torch.randn(257, 50_001, device="cuda").mul(3).to(dtype)
    targets = torch.randint(50_001, (257,), device="cuda")
    exact = token_logprobs(logits.double(), targets)
    got = token_logprobs(logits, targets)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_replay_of_own_routing_is_bitwise_equal(family):
    model = tiny(family).cuda()
    ids = torch.randint(40, (3, 11), device="cuda")
    replay = RoutingReplay(model)
    with replay.record() as tape:
        natural = model(input_ids=ids).logits
    with replay.replay(tape):
        replayed = model(input_ids=ids).logits
    assert torch.equal(natural, replayed)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_greedy_tokens_equal_the_cpu_engine(family):
    greedy = params(10, temperature=0.0)
    on_gpu = tiny(family, experts="batched_mm").cuda()
    with serving(tiny(family)) as on_cpu, serving(on_gpu) as on_cuda:
        expected = generate_all(on_cpu, PROMPTS, greedy)
        got = generate_all(on_cuda, PROMPTS, greedy)
    assert [s.tokens for s in got] == [s.tokens for s in expected]


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_moe"])
def test_logprobs_equal_a_teacher_forced_pass(family):
    model = tiny(family, experts="batched_mm").cuda()
    with serving(model) as engine:
        samples = generate_all(engine, PROMPTS, params(12, temperature=0.8))
    batch = collate(samples).to("cuda")
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids_BL, attention_mask=batch.attention_mask_BL).logits
    train = token_logprobs(logits.flatten(0, 1), batch.targets_T, temperature=0.8)
    gap = mismatch_metrics(train, batch.rollout_logprobs_T, batch.packed)
    assert float(gap["mismatch/abs_max"]) < 1e-4


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_graphs_give_what_the_launches_one_by_one_give(family):
    """300 tokens: the memory grows on the way, and graphs with it."""
    model = tiny(family, experts="batched_mm", max_position_embeddings=512).cuda()
    wanted = [params(300 - 40 * i, seed=i, temperature=0.8) for i in range(len(PROMPTS))]
    with serving(model) as engine, serving(model, cuda_graphs=False) as plain:
        got = generate_all(engine, PROMPTS, wanted)
        expected = generate_all(plain, PROMPTS, wanted)
        assert engine._memory._graphs._graphs and plain._memory._graphs is None
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.tokens == theirs.tokens and ours.routing == theirs.routing
        gap = torch.tensor(ours.rollout_logprobs) - torch.tensor(theirs.rollout_logprobs)
        assert float(gap[~gap.isnan()].abs().max()) < 1e-4


@pytest.mark.parametrize("alias", [False, True])
def test_a_graph_uses_the_weights_that_were_committed(alias):
    other = tiny("llama", seed=1).cuda()
    greedy = params(20, temperature=0.0)
    with serving(other) as engine:
        expected = [s.tokens for s in generate_all(engine, PROMPTS, greedy)]
    with serving(tiny("llama").cuda()) as engine:
        assert [s.tokens for s in generate_all(engine, PROMPTS, greedy)] != expected
        state = other.state_dict()
        weights = {name: state[name].clone() for name in engine.weight_tensors()}
        engine.commit_weights(weights, version=1, alias=alias)
        assert [s.tokens for s in generate_all(engine, PROMPTS, greedy)] == expected


def test_a_model_that_cannot_be_captured_says_so_and_is_served():
    with (
        pytest.warns(UserWarning, match="cannot be captured as a CUDA graph"),
        serving(tiny("qwen3_moe", experts="eager").cuda()) as engine,
    ):
        got = generate_all(engine, PROMPTS, params(10, temperature=0.0))
    with serving(tiny("qwen3_moe")) as on_cpu:
        expected = generate_all(on_cpu, PROMPTS, params(10, temperature=0.0))
    assert [s.tokens for s in got] == [s.tokens for s in expected]


def test_in_process_sync_moves_a_trainer_to_the_engine():
    trainer = tiny("qwen3_moe", seed=1).cuda()
    with serving(tiny("qwen3_moe", dtype=torch.bfloat16).cuda()) as engine:
        report = InProcessSyncer(engine).push(trainer.state_dict().items(), version=3)
        assert engine.weight_version == report.version == 3
        for name, live in engine.weight_tensors().items():
            assert torch.equal(live, trainer.state_dict()[name].to(torch.bfloat16))


def cuda_engine(address: str) -> HFEngine:
    engine = HFEngine(
        tiny("qwen3_moe", dtype=torch.bfloat16, experts="batched_mm").cuda(), max_batch=16
    )
    SharedMemoryReceiver(engine, address)
    return engine


def test_engine_process_on_the_gpu_takes_weights_and_dies_cleanly(tmp_path):
    address = str(tmp_path / "weights")
    engine = EngineProcess(cuda_engine, address)
    syncer = SharedMemorySyncer(address)
    trainer = tiny("qwen3_moe", seed=1, dtype=torch.bfloat16, experts="batched_mm").cuda()
    try:
        syncer.push(trainer.state_dict().items(), version=1)
        with serving(trainer) as here:
            expected = generate_all(here, PROMPTS, params(8))
        got = asyncio.run(_all(engine))
        assert [s.tokens for s in got] == [s.tokens for s in expected]
        assert all(s.weight_versions == [1] for s in got)
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(EngineDiedError):
            asyncio.run(_all(engine))
    finally:
        syncer.close()
        engine.close()


async def _all(engine: EngineProcess):
    request = SamplingParams(max_new_tokens=8, seed=0)
    return await asyncio.gather(*(engine.generate(prompt, request) for prompt in PROMPTS))


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_a_repeated_id_of_topk_distillation_is_nan_without_a_stall(kind):
    packed = Packed.from_padded(torch.ones(1, 3, dtype=torch.bool, device="cuda"))
    ids = torch.tensor([[0, 1], [2, 2], [3, 0]], device="cuda")
    teacher = torch.full((3, 2), 0.25, device="cuda").log()
    student = torch.zeros(3, 5, device="cuda")
    loss_T = topk_distillation(student, teacher, ids, packed, kind=kind)
    assert loss_T.isnan().tolist() == [False, True, False]
