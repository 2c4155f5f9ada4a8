"""What the engine's tapes say: whose weights, which request, and rows that stay as they are."""

import asyncio

import pytest
import torch

from miles.errors import RoutingError
from miles.moe import RoutingReplay, RoutingTape, share_prefix, storage_bytes
from miles.rollout import HFEngine, Sample, Status, _wire, collate
from tests.models import Passes, generate_all, params, serving, tiny, token_batch

PROMPT, LONG = [5, 6, 7], params(50, seed=4)
ROW = 2 * 2  # bytes of a row: two layers, two experts


def answer(engine: HFEngine, prompt, wanted=LONG) -> Sample:
    return engine.submit(prompt, wanted).result(timeout=60)


def interrupted(engine: HFEngine, prompt=PROMPT) -> Sample:
    """A sample that is aborted on the way."""
    passes = Passes(engine.model)
    future = engine.submit(prompt, LONG)
    passes.wait()
    engine.abort_now()
    passes.go_on()
    return future.result(timeout=60)


def serve_seed(engine: HFEngine, seed: int) -> None:
    """Weights of version `seed`."""
    weights = tiny("qwen3_moe", seed=seed).state_dict()
    engine.commit_weights({n: weights[n] for n in engine.weight_tensors()}, version=seed)


def routed_by(seed: int, tokens: list[int]) -> torch.Tensor:
    """Expert ids of one pass over the tokens with the weights of version `seed`."""
    model = tiny("qwen3_moe", seed=seed)
    with torch.no_grad(), RoutingReplay(model).record() as tape:
        model(torch.tensor([tokens]))
    return tape.expert_ids


def triples(sample: Sample) -> list[tuple[int, int, int]]:
    return [tuple(span) for span in sample.routing.spans]


def test_rows_carry_the_version_of_the_weights_that_processed_them():
    with serving("qwen3_moe", weight_version=7) as engine:
        sample = answer(engine, PROMPT, params(4))
        one = answer(engine, PROMPT, params(1))
    assert triples(sample) == [(0, 6, 7)] and triples(one) == [(0, 3, 7)]


@pytest.mark.parametrize("pause", [False, True])
def test_new_weights_in_mid_answer_start_a_span_at_the_token_they_process_first(pause):
    with serving("qwen3_moe") as engine:
        whole = answer(engine, PROMPT)
        passes = Passes(engine.model)
        future = engine.submit(PROMPT, LONG)
        passes.wait()
        if pause:
            asyncio.run(engine.pause())
        serve_seed(engine, 1)
        passes.go_on()
        if pause:
            asyncio.run(engine.resume())
        sample = future.result(60)
    cut = sample.spans[0].end
    # Token `cut` was the first that the new weights sampled, out of token `cut - 1`.
    assert triples(sample) == [(0, cut - 1, 0), (cut - 1, 52, 1)]
    assert torch.equal(sample.routing[: cut - 1].expert_ids, whole.routing[: cut - 1].expert_ids)
    assert bool(sample.routing.recorded_N.all())


def test_a_resumed_answer_keeps_old_rows_bitwise_and_adds_those_of_the_new_weights():
    with serving("qwen3_moe") as engine:
        first = interrupted(engine)
        serve_seed(engine, 1)
        second = interrupted(engine, first)
        serve_seed(engine, 2)
        last = answer(engine, second)
    a, b = len(first.tokens) - 1, len(second.tokens) - 1
    assert first.status is second.status is Status.ABORTED and 3 < a < b < 52
    assert triples(last) == [(0, a, 0), (a, b, 1), (b, 52, 2)]
    assert last.routing[:a] == first.routing and last.routing[:b] == second.routing
    # The pass that went over the old tokens again chose other experts, which are not taken.
    passes = [routed_by(seed, last.tokens) for seed in range(3)]
    assert torch.equal(
        last.routing.expert_ids, torch.cat([passes[0][:a], passes[1][a:b], passes[2][b:52]])
    )
    assert not torch.equal(passes[0][:a], passes[1][:a])
    assert not torch.equal(passes[1][a:b], passes[2][a:b])


def test_rows_that_were_lost_are_missing_and_belong_to_no_version():
    with serving("qwen3_moe") as engine:
        part = interrupted(engine)
        part.routing = None
        resumed = answer(engine, part)
    gone = len(part.tokens) - 1
    assert triples(resumed) == [(gone, 52, 0)]
    assert bool((resumed.routing.expert_ids[:gone] == -1).all())
    assert bool(resumed.routing[gone:].recorded_N.all())


def test_a_tape_with_holes_is_resumed_with_its_holes():
    with serving("qwen3_moe") as engine:
        part = interrupted(engine)
        ids = part.routing.expert_ids
        ids[1:4] = -1
        part.routing = RoutingTape(ids, num_experts=8, spans=[(0, 1, 0)])
        resumed = answer(engine, part)
    held = len(ids)
    assert torch.equal(resumed.routing.expert_ids[:held], ids)
    assert triples(resumed) == [(0, 1, 0), (held, 52, 0)]


def test_a_request_aborted_in_the_queue_has_no_rows_and_is_resumed_as_if_new():
    with serving("qwen3_moe", max_batch=1) as engine:
        whole = answer(engine, PROMPT)
        passes = Passes(engine.model)
        running = engine.submit(PROMPT, LONG)
        queued = engine.submit(PROMPT, LONG, request_id="queued")
        passes.wait()
        engine.abort_now(["queued"])
        passes.go_on()
        waited = queued.result(60)
        running.result(60)
        part = interrupted(engine)
        resumed = answer(engine, waited)
        # One that was aborted twice, the second time before its turn, keeps what it had.
        passes = Passes(engine.model, at=1)
        running = engine.submit(PROMPT, LONG)
        again = engine.submit(part, LONG, request_id="again")
        engine.abort_now(["again"])
        passes.go_on()
        kept = again.result(60)
        running.result(60)
    assert waited.routing is None and waited.tokens == PROMPT
    assert resumed.routing == whole.routing
    assert kept.routing == part.routing and kept.tokens == part.tokens


def test_rows_that_came_with_a_prompt_stay():
    with serving("qwen3_moe") as engine:
        whole = answer(engine, PROMPT)
        other = RoutingTape(
            (whole.routing[:2].expert_ids + 1) % 8, num_experts=8, spans=[(0, 2, 5)]
        )
        sample = answer(engine, Sample(tokens=PROMPT, routing=other))
    assert sample.routing[:2] == other and sample.routing[2:] == whole.routing[2:]
    assert triples(sample) == [(0, 2, 5), (2, 52, 0)]


def test_a_number_of_experts_that_nobody_told_is_the_models():
    with serving("qwen3_moe") as engine:
        part = interrupted(engine)
        told = part.routing
        sizes = {"num_layers": 2, "topk": 2, "num_experts": 256, "num_experts_inferred": True}
        part.routing = RoutingTape.from_bytes(told.to_bytes(), **sizes)
        resumed = answer(engine, part)
        ids = torch.tensor([[[0, 9], [1, 2]]])
        part.routing = RoutingTape.from_bytes(RoutingTape(ids, num_experts=256).to_bytes(), **sizes)
        with pytest.raises(RoutingError, match=r"expert id 9; expected 0\.\.7"):
            engine.submit(part, LONG)
    assert resumed.routing.num_experts == 8 and not resumed.routing.num_experts_inferred
    assert torch.equal(resumed.routing[: len(told)].expert_ids, told.expert_ids)


def zeros_from(engine: HFEngine, *methods: str) -> None:
    """Have the engine's memory report what a broken capture does."""

    def silent(routing):
        if isinstance(routing, list):
            return [silent(tape) for tape in routing]
        if isinstance(routing, torch.Tensor):
            return torch.zeros_like(routing)
        return RoutingTape(torch.zeros_like(routing.expert_ids), num_experts=routing.num_experts)

    def broken(method):
        def call(*args):
            logits, routing = method(*args)
            return logits, silent(routing)

        return call

    for name in methods:
        setattr(engine._memory, name, broken(getattr(engine._memory, name)))


@pytest.mark.parametrize(
    ("methods", "text"),
    [
        (("prefill", "decode"), "request 'mine': the routing is all zero"),
        (("decode",), "request 'mine': token 3, layer 0 has expert ids .0, 0."),
    ],
)
def test_what_no_router_chose_fails_the_request_by_name_and_no_other(methods, text):
    with serving("qwen3_moe", max_batch=2) as engine:
        whole = answer(engine, PROMPT)
        before = {name: getattr(engine._memory, name) for name in methods}
        zeros_from(engine, *methods)
        with pytest.raises(RoutingError, match=text):
            engine.submit(PROMPT, params(4), request_id="mine").result(60)
        vars(engine._memory).update(before)
        assert answer(engine, PROMPT).routing == whole.routing


def test_an_abort_of_a_request_with_a_broken_capture_does_not_raise_in_the_caller():
    with serving("qwen3_moe") as engine:
        zeros_from(engine, "prefill", "decode")
        passes = Passes(engine.model)
        future = engine.submit(PROMPT, LONG)
        passes.wait()
        engine.abort_now()
        with pytest.raises(RoutingError, match="all zero"):
            future.result(60)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_a_group_keeps_the_rows_of_its_prompt_once(name):
    prompt, n = token_batch(1, 20)[0].tolist(), 4
    with serving(name, max_batch=8) as engine:
        alone = [answer(engine, prompt, params(6, seed=seed)) for seed in range(n)]
        group = generate_all(engine, [prompt] * n, [params(6, seed=seed) for seed in range(n)])
    assert [s.routing for s in group] == [s.routing for s in alone]
    assert sum(s.routing.nbytes for s in group) == n * 25 * ROW
    assert storage_bytes(s.routing for s in group) == (20 + n * 5) * ROW
    # Samples that came apart, or through another process, are brought together afterwards.
    assert storage_bytes(s.routing for s in alone) == n * 25 * ROW
    shared = share_prefix([s.routing for s in alone], group[0].num_prompt_tokens)
    assert storage_bytes(shared) == (20 + n * 5) * ROW
    batch = collate(group)
    assert batch.routing[:25].expert_ids.tolist() == group[0].routing.expert_ids.tolist()


def test_a_resumed_member_of_a_group_goes_on_sharing():
    with serving("qwen3_moe", max_batch=8) as engine:
        passes = Passes(engine.model)
        asyncio.run(engine.pause())  # so that one pass takes both
        futures = [engine.submit(PROMPT * 7, params(30, seed=seed)) for seed in range(2)]
        asyncio.run(engine.resume())
        passes.wait()
        engine.abort_now()
        passes.go_on()
        parts = [future.result(60) for future in futures]
        resumed = [answer(engine, part, params(30)) for part in parts]
    assert storage_bytes(s.routing for s in resumed) == (21 + 2 * 29) * ROW


def test_spans_holes_and_a_bound_on_experts_survive_the_wire():
    ids = torch.tensor([[[255, 0]], [[-1, -1]], [[3, 4]]])
    told = RoutingTape(ids, num_experts=256, spans=[(0, 1, 4), (2, 3, 5)])
    bound = RoutingTape.from_bytes(
        told.to_bytes(), num_layers=1, topk=2, num_experts=256, num_experts_inferred=True
    ).with_spans(told.spans)
    in_parts = RoutingTape.cat([told[:1], told[1:]], copy=False)
    for tape in (told, bound, in_parts):
        message = _wire.Message(
            1, "generate", sample=_wire.sample_to_wire(Sample(tokens=[1, 2, 3], routing=tape))
        )
        back = _wire.sample_from_wire(_wire.decode(_wire.encode(message)).sample).routing
        assert back == tape and back.spans == told.spans
        assert back.num_experts_inferred == tape.num_experts_inferred
