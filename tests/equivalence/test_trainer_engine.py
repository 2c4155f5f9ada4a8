"""The joint between engine and trainer: samples -> collate -> replayed forward pass."""

import pytest
import torch

from miles.losses import mismatch_metrics, reduce_metrics, token_logprobs
from miles.moe import RoutingReplay, routing_agreement
from miles.rollout import Sample, collate
from tests.models import MOE_FAMILIES, generate_all, params, serving, tiny, token_batch

PROMPTS = [token_batch(1, n, seed=n)[0].tolist() for n in (3, 8, 1, 5)] * 2


def sampled(name: str = "qwen3_moe") -> list[Sample]:
    """From a bfloat16 engine, as long and as mixed as a real step."""
    with serving(tiny(name, dtype=torch.bfloat16)) as engine:
        wanted = [params(8 + 5 * (i % 3), seed=i) for i in range(len(PROMPTS))]
        return generate_all(engine, PROMPTS, wanted)


def trained_logprobs(model, batch):
    logits = model(batch.input_ids_BL, attention_mask=batch.attention_mask_BL).logits
    return token_logprobs(logits.flatten(0, 1), batch.targets_T)


def replaying(replay: RoutingReplay, batch):
    return replay.replay(batch.routing, required_N=batch.routing_required_T)


def mismatch(logprobs_T, batch) -> float:
    metrics = mismatch_metrics(logprobs_T.detach(), batch.rollout_logprobs_T, batch.packed)
    return float(reduce_metrics([metrics])["mismatch/abs"])


@pytest.mark.parametrize("name", MOE_FAMILIES)
def test_replay_closes_most_of_the_gap_that_flipped_experts_open(name):
    batch, trainer = collate(sampled(name)), tiny(name)
    replay = RoutingReplay(trainer)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in replay.layers:
            weight = trainer.get_submodule(layer).weight
            weight += 0.02 * torch.randn(weight.shape, generator=noise)
    with replay.record() as natural:
        plain = mismatch(trained_logprobs(trainer, batch), batch)
    needed = batch.routing_required_T.nonzero().flatten().tolist()
    engine_rows = torch.cat([batch.routing.expert_ids[i : i + 1] for i in needed])
    natural_rows = torch.cat([natural.expert_ids[i : i + 1] for i in needed])
    flipped = (engine_rows.sort(-1).values != natural_rows.sort(-1).values).any(-1)
    assert 0.01 < flipped.float().mean() < 0.5
    with replaying(replay, batch):
        replayed = mismatch(trained_logprobs(trainer, batch), batch)
    assert replayed < 0.6 * plain


@pytest.mark.parametrize("name", MOE_FAMILIES)
def test_the_tape_of_a_replayed_pass_is_the_engines(name):
    batch, trainer = collate(sampled(name)), tiny(name, seed=1)
    replay = RoutingReplay(trainer)
    with replay.record() as seen, replaying(replay, batch):
        trained_logprobs(trainer, batch)
    recorded = batch.routing.recorded_N
    assert torch.equal(seen.expert_ids[recorded], batch.routing.expert_ids[recorded])
    assert routing_agreement(seen, batch.routing) == 1.0
    with replay.record() as natural:
        trained_logprobs(trainer, batch)
    assert routing_agreement(natural, batch.routing) < 0.5


def test_an_engine_of_the_trainers_own_numbers_has_no_gap_and_the_same_routing():
    trainer = tiny("qwen3_moe")
    with serving(trainer) as engine:
        batch = collate(generate_all(engine, PROMPTS, params(12, temperature=1.0)))
    replay = RoutingReplay(trainer)
    with replay.record() as natural:
        plain = trained_logprobs(trainer, batch)
    assert routing_agreement(natural, batch.routing) == 1.0
    # float32 on both sides; see ROUNDING in test_hf_engine.
    assert mismatch(plain, batch) < 1e-5


def gradients_of(model, replay, batches):
    model.zero_grad()
    logprobs = []
    for batch in batches:
        with replaying(replay, batch):
            logprobs_T = trained_logprobs(model, batch)
        advantages_T = torch.where(batch.packed.mask_T, batch.rollout_logprobs_T, 0).sin()
        (logprobs_T * advantages_T).sum().backward()
        logprobs.append(logprobs_T[batch.packed.mask_T].detach())
    return torch.cat(logprobs), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", MOE_FAMILIES)
def test_a_padded_batch_is_its_samples_one_by_one_in_logprobs_and_gradients(name):
    # float64, but for the routers' softmax and RMSNorm, which transformers computes in float32
    # row by row, with the same bits for the same row.
    samples, model = sampled(name), tiny(name, dtype=torch.float64)
    replay = RoutingReplay(model)
    together, gradients = gradients_of(model, replay, [collate(samples)])
    alone, gradients_alone = gradients_of(model, replay, [collate([s]) for s in samples])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-9)
    for parameter, gradient in gradients.items():
        error = (gradient - gradients_alone[parameter]).abs().max() / gradient.abs().max()
        assert error < 1e-9, parameter


def test_what_padding_holds_changes_nothing():
    samples, model = sampled(), tiny("qwen3_moe", dtype=torch.float64)
    replay = RoutingReplay(model)
    plain, gradients = gradients_of(model, replay, [collate(samples)])
    wide = collate(samples, pad_token_id=9, pad_to_multiple_of=32)
    padded, gradients_padded = gradients_of(model, replay, [wide])
    torch.testing.assert_close(padded, plain, rtol=0, atol=1e-9)
    for parameter, gradient in gradients.items():
        error = (gradient - gradients_padded[parameter]).abs().max() / gradient.abs().max()
        assert error < 1e-9, parameter
