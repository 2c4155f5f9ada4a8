"""`SGLangEngine` and `SGLangServer` with the real SGLang.

MILES_SGLANG_SITE is the server's PYTHONPATH, where it needs other packages than the trainer;
MILES_SGLANG_PYTHON its interpreter. One server serves all tests: it takes minutes to start.
"""

import asyncio
import math
import os
import subprocess
import sys
import time
import urllib.request
from contextlib import closing
from pathlib import Path

import pytest
import torch
import transformers

from miles.errors import EngineDiedError, RoutingError, SettingError
from miles.losses import token_logprobs
from miles.moe import RoutingReplay
from miles.rollout import (
    RoutingLayout,
    SamplingParams,
    SGLangEngine,
    SGLangServer,
    Status,
    collate,
)

SITE = os.environ.get("MILES_SGLANG_SITE", "")
PYTHON = os.environ.get("MILES_SGLANG_PYTHON", sys.executable)
ENV = {"PYTHONPATH": str(Path(SITE).expanduser().resolve())} if SITE else {}
FLAGS = [
    "--skip-tokenizer-init", "--attention-backend", "triton", "--sampling-backend", "pytorch",
    "--grammar-backend", "none", "--disable-cuda-graph", "--mem-fraction-static", "0.3",
    "--enable-return-routed-experts", "--weight-version", "0",
]  # fmt: skip
VOCAB = 4096
LONG = 1800
"""Tokens that take seconds, so that something can happen in between."""
CONFIG = transformers.Qwen3MoeConfig(
    vocab_size=VOCAB, hidden_size=256, intermediate_size=256, moe_intermediate_size=128,
    num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
    num_experts=16, num_experts_per_tok=4, norm_topk_prob=True, max_position_embeddings=2048,
    tie_word_embeddings=False, eos_token_id=None, bos_token_id=None, pad_token_id=0,
)  # fmt: skip
LAYOUT = RoutingLayout.from_config(CONFIG)
MEAN_GAP = 0.05
"""In nats, mean of |log-prob - rollout's|: logits with a spread of 2.5 in bf16 (8 bits) through
four layers of other kernels."""


@pytest.fixture(scope="module")
def model():
    """Random weights with activations of unit scale, so that every layer matters."""
    transformers.set_seed(0)
    made = transformers.Qwen3MoeForCausalLM(CONFIG)
    gains = {"gate.weight": 1.5, "lm_head.weight": 2.5, "embed_tokens.weight": math.sqrt(256)}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if weight.ndim > 1:
                gain = next((g for end, g in gains.items() if name.endswith(end)), 1.0)
                weight.normal_(0, gain / math.sqrt(weight.shape[-1]), generator=generator)
    made.config._experts_implementation = "grouped_mm"
    return made.to(torch.bfloat16)


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    check = "import importlib.util, sys; sys.exit(importlib.util.find_spec('sglang') is None)"
    environment = os.environ | ENV
    if subprocess.run([PYTHON, "-c", check], env=environment).returncode:
        pytest.skip("no sglang in MILES_SGLANG_SITE")
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    model.cuda().eval()
    made = SGLangServer(
        folder, args=FLAGS, env=ENV, cwd=folder, python=PYTHON, start_timeout=280,
        log=folder / "server.log",
    )  # fmt: skip
    start = time.perf_counter()
    with made:
        print(f"the server has answered after {time.perf_counter() - start:.0f} s")
        yield made


@pytest.fixture
def engine(server):
    with closing(SGLangEngine(server.url, routing=LAYOUT)) as made:
        yield made


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(3, 60, (count,), generator=generator).tolist()
    return [torch.randint(1, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def params(count: int = 32, **changes) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, ignore_eos=True, **changes)


@torch.no_grad()
def gaps(model, samples, temperature: float = 1.0) -> torch.Tensor:
    """Log-probs of the model, which takes the experts that the server took, minus the rollout's."""
    batch = collate(samples).to("cuda")
    with RoutingReplay(model).replay(batch.routing, required_N=batch.routing_required_T):
        logits = model(input_ids=batch.input_ids_BL, attention_mask=batch.attention_mask_BL).logits
    got_T = token_logprobs(logits.flatten(0, 1), batch.targets_T, temperature=temperature)
    return (got_T.double() - batch.rollout_logprobs_T.double())[batch.packed.mask_T].abs()


def generate(engine, asked, wanted):
    async def rollout():
        return await asyncio.gather(*(engine.generate(prompt, wanted) for prompt in asked))

    return asyncio.run(rollout())


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_transformers_with_the_servers_experts(model, engine, temperature):
    samples = generate(engine, prompts(16), params(temperature=temperature))
    for sample in samples:
        assert sample.num_generated_tokens == 32 and sample.status is Status.TRUNCATED
        assert sample.weight_versions == [0]
        assert len(sample.routing) == len(sample.tokens) - 1
        sample.routing.validate(num_tokens=len(sample.tokens))
    gap_T = gaps(model, samples, temperature)
    print(f"temperature {temperature}: mean gap {gap_T.mean():.4f}, largest {gap_T.max():.3f}")
    assert gap_T.mean() < MEAN_GAP / temperature
    if temperature != 1.0:
        assert gaps(model, samples, 1.0).mean() > 3 * gap_T.mean(), "the tempered distribution"


def test_greedy_takes_the_most_likely(model, engine):
    sample = generate(engine, prompts(1), params(8, temperature=0.0))[0]
    assert gaps(model, [sample]).mean() < MEAN_GAP


def test_hundreds_at_once(engine):
    asked = prompts(500)
    samples = generate(engine, asked, params(24))
    assert [s.tokens[: len(p)] for s, p in zip(samples, asked, strict=True)] == asked
    assert all(s.num_generated_tokens == 24 for s in samples)


def test_an_abort_ends_one_and_what_it_had_goes_on(model, engine):
    prompt = prompts(1)[0]

    async def rollout():
        names = ("req-1", "req-10", "7/0", "7/1")
        tasks = {
            name: asyncio.create_task(engine.generate(prompt, params(LONG), request_id=name))
            for name in names
        }
        await asyncio.sleep(0.5)
        await engine.abort(["req-1", "7/"])
        return {name: await task for name, task in tasks.items()}

    got = asyncio.run(rollout())
    ended = [name for name, sample in got.items() if sample.status is Status.ABORTED]
    assert ended == ["req-1", "7/0", "7/1"]
    part = got["req-1"]
    assert 0 < part.num_generated_tokens < LONG
    assert got["req-10"].num_generated_tokens == LONG
    wanted = params(part.num_generated_tokens + 16)
    whole = generate(engine, [part], wanted)[0]
    assert whole.tokens[: len(part.tokens)] == part.tokens
    assert whole.routing[: len(part.routing)].expert_ids.equal(part.routing.expert_ids)
    assert len(whole.routing) == len(whole.tokens) - 1
    assert gaps(model, [whole]).mean() < MEAN_GAP


@pytest.mark.parametrize("mode", ["in_place", "retract", "abort"])
def test_a_pause_holds_still(engine, mode):
    engine.pause_mode = mode

    async def rollout():
        task = asyncio.create_task(engine.generate(prompts(1)[0], params(LONG)))
        await asyncio.sleep(0.5)
        await engine.pause()
        late = asyncio.create_task(engine.generate(prompts(1)[0], params(4)))
        await asyncio.sleep(2.0)
        assert not late.done() and task.done() == (mode == "abort")
        await engine.resume()
        return await task, await late

    sample, late = asyncio.run(rollout())
    assert late.num_generated_tokens == 4
    assert sample.status is (Status.ABORTED if mode == "abort" else Status.TRUNCATED)
    assert mode == "abort" or sample.num_generated_tokens == LONG


def test_an_abort_under_a_pause_answers(engine):
    async def rollout():
        task = asyncio.create_task(engine.generate(prompts(1)[0], params(LONG)))
        await asyncio.sleep(0.5)
        await engine.pause()
        await engine.abort()
        sample = await asyncio.wait_for(task, 20)
        await engine.resume()
        return sample

    sample = asyncio.run(rollout())
    assert sample.status is Status.ABORTED and sample.routing is None


def test_bad_requests_are_refused_in_words(server, engine):
    # 0.5.17 would let these through, and its scheduler would die of a device-side assert.
    for bad in (VOCAB + 5, VOCAB, -1):
        with pytest.raises(SettingError, match=rf"is {bad}; expected an id in 0\.\.{VOCAB - 1}"):
            generate(engine, [[3, bad]], params(4))
    assert generate(engine, [[VOCAB - 1]], params(4))[0].num_generated_tokens == 4
    server.check()
    wrong = RoutingLayout(num_layers=7, topk=4, num_experts=16)
    refused = pytest.raises(RoutingError, match="the routing of request")
    with closing(SGLangEngine(server.url, routing=wrong)) as other, refused:
        generate(other, prompts(1), params(4))


def test_versions_grow_and_make_spans(server, engine):
    part = generate(engine, prompts(1), params(4))[0]
    request = urllib.request.Request(
        f"{server.url}/update_weight_version",
        b'{"new_version": "3", "abort_all_requests": false}',
        {"Content-Type": "application/json"},
    )
    urllib.request.urlopen(request, timeout=30).close()
    assert asyncio.run(engine.refresh()) == 3 == engine.weight_version
    whole = generate(engine, [part], params(8))[0]
    assert [(s.end - s.start, s.weight_version) for s in whole.spans] == [(4, 0), (4, 3)]


def test_the_last_one_kills_it(server):
    with closing(SGLangEngine(server.url, retries=1)) as engine:
        future = engine.submit(prompts(1)[0], params(LONG))
        time.sleep(0.5)
        os.kill(server.pid, 9)
        with pytest.raises(EngineDiedError, match="no server"):
            future.result(60)
    with pytest.raises(EngineDiedError, match="exit code -9"):
        server.check()
