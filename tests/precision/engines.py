"""A converted model that an engine serves over a weight sync, on any device."""

import functools

import torch

from miles.precision import BlockFP8, Int4, convert_
from miles.sync import InProcessSyncer
from tests.models import generate_all, params, serving, tiny

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], list(range(20))]
RECIPES = {"fp8": BlockFP8(), "int4": Int4()}
SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64}
MOE = {"moe_intermediate_size": 128, "num_experts": 4}


def model_of(family, recipe, seed, device, experts="batched_mm"):
    """A model in bfloat16, converted."""
    changes = SIZES | {"initializer_range": 0.1} | (MOE if family == "qwen3_moe" else {})
    model = tiny(family, dtype=torch.bfloat16, seed=seed, experts=experts, **changes).to(device)
    assert convert_(model, [("*", RECIPES[recipe])]).converted
    return model


def answers(engine):
    """Tokens and log-probs, prompt by prompt, so that every engine has batches of the same size."""
    wanted = params(12 if engine.model.device.type == "cuda" else 6, temperature=0.0)
    samples = [generate_all(engine, [one], wanted)[0] for one in PROMPTS]
    logprobs = [s.rollout_logprobs[-wanted.max_new_tokens :] for s in samples]
    return [s.tokens for s in samples], torch.tensor(logprobs)


@functools.cache
def of_fresh(family, recipe, device, graphs):
    """The second answers of an engine that had the new weights from the start."""
    with serving(model_of(family, recipe, 1, device), cuda_graphs=graphs) as fresh:
        answers(fresh)
        return answers(fresh)


def check_a_sync_is_served(family, recipe, alias, device, *, graphs):
    """After a sync an engine answers as a fresh one of the new weights, and no longer as before.

    Both engines answer twice, so that their memories have grown alike and, where there are graphs,
    the second answers are those of graphs.
    """
    new = model_of(family, recipe, 1, device)
    expected, logprobs = of_fresh(family, recipe, device, graphs)
    with serving(model_of(family, recipe, 0, device), cuda_graphs=graphs) as engine:
        answers(engine)
        before, _ = answers(engine)
        assert bool(captured(engine)) == graphs
        tensors = {name: new.state_dict()[name].clone() for name in engine.weight_tensors()}
        if alias:
            engine.commit_weights(tensors, version=1, alias=True)
        else:
            InProcessSyncer(engine).push(tensors.items(), version=1)
        for _ in range(2):
            got, got_logprobs = answers(engine)
            assert got == expected
            # A unit in the last place of a logit in bfloat16, should a kernel choose otherwise.
            torch.testing.assert_close(got_logprobs, logprobs, rtol=0, atol=2e-2)
        assert bool(captured(engine)) == graphs
    assert all(old != now for old, now in zip(before, expected, strict=True))


def captured(engine):
    """The decoding steps that are graphs."""
    held = engine._memory._graphs
    return {} if held is None else held._graphs
