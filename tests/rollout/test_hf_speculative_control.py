"""Steering an engine with a draft: abort, resume, new weights, failures, what is refused."""

import asyncio
import functools
import time

import pytest
import torch
from transformers import DynamicCache

from miles.errors import (
    EmptyBatchError,
    EngineError,
    NonFiniteError,
    SettingError,
    ShapeError,
    UnsupportedModelError,
)
from miles.losses import token_logprobs
from miles.rollout import HFEngine, Sample, Span, Status
from miles.rollout.speculative import (
    AcceptanceStats,
    CostModel,
    DraftController,
    Eagle3Draft,
    EagleDraft,
    MTPDraft,
    NgramDraft,
    StandaloneDraft,
)
from miles.rollout.speculative.draft import FINAL, Proposal
from tests.models import VOCAB, Passes, generate_all, params, serving, tiny
from tests.rollout.drafts import ScriptedDraft, half_right_rows, oracle_rows, random_rows
from tests.rollout.test_hf_speculative import PROMPTS, ROUNDING, Steps, assert_teacher_forced

kinds = pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
PROMPT, LONG = [5, 6, 7], params(50, seed=4)


def answer(engine: HFEngine, prompt, wanted=LONG) -> Sample:
    return engine.submit(prompt, wanted).result(timeout=60)


def interrupted(engine: HFEngine, prompt=PROMPT) -> Sample:
    passes = Passes(engine.model, at=4)
    future = engine.submit(prompt, LONG)
    passes.wait()
    engine.abort_now()
    passes.go_on()
    return future.result(timeout=60)


def half_right(name: str, **settings) -> ScriptedDraft:
    return ScriptedDraft(half_right_rows(tiny(name)), feature_layers=(0, FINAL), **settings)


@kinds
def test_an_aborted_answer_is_resumed_with_its_draft_state_made_anew(name):
    model, draft = tiny(name), half_right(name)
    with serving(model, draft=draft) as engine:
        first = interrupted(engine)
        second = interrupted(engine, first)
        last = answer(engine, second)
    for part in (first, second):
        assert part.status is Status.ABORTED
        assert_teacher_forced(model, part)
    assert 4 < len(first.tokens) < len(second.tokens) < len(last.tokens) == 53
    assert second.tokens[: len(first.tokens)] == first.tokens
    assert last.rollout_logprobs[3 : len(second.tokens)] == second.rollout_logprobs[3:]
    assert last.spans == [Span(3, 53, 0)]
    assert_teacher_forced(model, last)
    # The scripted draft checks that what it is told begins at 0 and has no gap.
    assert len(draft.used.ended) == 3
    counts = [sample.metadata["speculative"]["num_tokens"] for sample in (first, second, last)]
    assert counts[0] == len(first.tokens) - 4 and counts[0] < counts[1] < counts[2]
    # The first token after each prefill is not a draft's doing.
    assert counts[2] == 50 - 3


def test_a_resumed_answer_does_not_draw_its_numbers_again():
    """It would repeat the verdicts of its beginning."""
    with serving("llama", draft=ScriptedDraft(random_rows(), point=True)) as engine:
        first = interrupted(engine)
        again = answer(engine, first)
        fresh = answer(engine, first.tokens, params(30, seed=4))
    n = len(first.tokens)
    assert again.tokens[n : n + 10] != fresh.tokens[n : n + 10]


@kinds
def test_pause_holds_and_resume_goes_on(name):
    model = tiny(name)
    with serving(model, draft=half_right(name)) as engine:
        whole = answer(engine, PROMPT)
        passes = Passes(engine.model, at=4)
        future = engine.submit(PROMPT, LONG)
        passes.wait()
        asyncio.run(engine.pause())
        count = passes.count
        other = engine.submit(PROMPT, params(5))
        time.sleep(0.1)
        assert not future.done() and passes.count == count
        passes.go_on()
        asyncio.run(engine.resume())
        assert future.result(60).tokens == whole.tokens
        assert len(other.result(60).response_tokens) == 5


@kinds
@pytest.mark.parametrize("alias", [False, True])
def test_new_weights_in_mid_answer_judge_from_then_on(name, alias):
    """Log-probs and routing before are those of the old weights, after those of the new ones, on
    the old ones' keys and values; the draft goes on."""
    model, new = tiny(name), tiny(name, seed=1)
    draft = half_right(name)
    with serving(model, weight_version=3, draft=draft) as engine:
        passes = Passes(engine.model, at=4)
        future = engine.submit(PROMPT, LONG)
        passes.wait()
        state = new.state_dict()
        weights = {key: state[key].clone() for key in engine.weight_tensors()}
        engine.commit_weights(weights, version=8, alias=alias)
        passes.go_on()
        sample = future.result(60)
    cut = sample.spans[0].end
    assert sample.spans == [Span(3, cut, 3), Span(cut, 53, 8)] and 4 < cut < 50
    ids, cache = torch.tensor([sample.tokens]), DynamicCache()
    with torch.no_grad():
        before = tiny(name)(ids[:, : cut - 1], past_key_values=cache).logits[0]
        after = new(ids[:, cut - 1 : -1], past_key_values=cache).logits[0]
    expected = token_logprobs(torch.cat([before, after]), ids[0, 1:])[2:]
    got = torch.tensor(sample.rollout_logprobs[3:])
    torch.testing.assert_close(got, expected, rtol=0, atol=ROUNDING)
    if name == "qwen3_moe":
        spans = [tuple(span) for span in sample.routing.spans]
        assert spans == [(0, cut - 1, 3), (cut - 1, 52, 8)]
    assert len(draft.used.ended) == 1


def test_a_cancelled_request_leaves_inside_what_was_accepted():
    with serving("llama", max_batch=1, draft=ScriptedDraft(oracle_rows(tiny("llama")))) as engine:
        passes = Passes(engine.model, at=3)
        future = engine.submit(PROMPT, LONG)
        passes.wait()
        assert future.cancel()
        answer(engine, PROMPT, params(2))
        assert passes.count < 9


def failing(at: str, times: int = 1):
    """Raises in the draft's method `at`, the first times that it is called."""
    left = [times]

    def fail(what, slots) -> None:
        if what == at and left[0]:
            left[0] -= 1
            raise ZeroDivisionError("boom")

    return fail


@kinds
@pytest.mark.parametrize("at", ["extend", "propose", "free"])
def test_a_draft_that_raises_fails_its_requests_in_words_and_no_others(name, at):
    model = tiny(name)
    draft = half_right(name, fail=failing(at))
    with serving(model, max_batch=2, draft=draft) as engine:
        first = engine.submit(PROMPT, params(9))
        with pytest.raises(
            EngineError, match=rf"(?s)the draft \(ScriptedDraft\) failed to {at}.*boom"
        ):
            first.result(60)
        samples = generate_all(engine, PROMPTS, params(12))
        assert not engine._active and len(engine._free) == 2
    for sample in samples:
        assert_teacher_forced(model, sample)


def test_a_draft_that_cannot_move_a_request_loses_that_request():
    draft = half_right("llama", fail=failing("move"))
    with serving("llama", max_batch=2, row_tile=1, draft=draft) as engine:
        asyncio.run(engine.pause())
        short = engine.submit([5], params(4))
        moved = engine.submit([6, 7], params(30))
        asyncio.run(engine.resume())
        assert len(short.result(60).response_tokens) == 4
        with pytest.raises(EngineError, match="failed to move"):
            moved.result(60)
        assert len(answer(engine, PROMPT).tokens) == 53


def test_requests_that_the_failing_call_was_not_about_go_on():
    """One is at its last token, for which the draft is not asked."""
    draft = half_right("llama", fail=failing("propose"))
    with serving("llama", draft=draft) as engine:
        asyncio.run(engine.pause())
        short, long = engine.submit(PROMPT, params(2)), engine.submit(PROMPT, params(9))
        asyncio.run(engine.resume())
        assert len(short.result(60).response_tokens) == 2
        with pytest.raises(EngineError, match="boom"):
            long.result(60)


class Spoiled(ScriptedDraft):
    """Its proposals for slot 0 are changed on the way."""

    def __init__(self, change) -> None:
        super().__init__(random_rows())
        self.change = change

    def memory(self, **sizes):
        memory = super().memory(**sizes)
        propose = memory.propose

        def spoil(slots, **settings) -> Proposal:
            proposal = propose(slots, **settings)
            return self.change(proposal, list(slots).index(0)) if 0 in slots else proposal

        memory.propose = spoil
        return memory


def outside(proposal: Proposal, row: int) -> Proposal:
    proposal.tokens_RK[row, -1] = VOCAB
    return proposal


def negative(proposal: Proposal, row: int) -> Proposal:
    proposal.tokens_RK[row, 0] = -1
    return proposal


def unnormalised(proposal: Proposal, row: int) -> Proposal:
    proposal.probs_RKV[row, 0] *= 0.9
    return proposal


def impossible(proposal: Proposal, row: int) -> Proposal:
    proposal.probs_RKV[row, 0, proposal.tokens_RK[row, 0]] = 0
    proposal.probs_RKV[row, 0] /= proposal.probs_RKV[row, 0].sum()
    return proposal


def not_numbers(proposal: Proposal, row: int) -> Proposal:
    proposal.probs_RKV[row, 1] = torch.nan
    return proposal


def below_zero(proposal: Proposal, row: int) -> Proposal:
    others = [t for t in range(3) if t != proposal.tokens_RK[row, 0]]
    proposal.probs_RKV[row, 0, others[0]] -= 0.5
    proposal.probs_RKV[row, 0, others[1]] += 0.5
    return proposal


CHANGES = [outside, negative, unnormalised, impossible, not_numbers, below_zero]


@pytest.mark.parametrize("change", CHANGES)
def test_a_proposal_that_cannot_be_fails_its_request_alone(change):
    draft = Spoiled(change)
    with serving("qwen3_moe", max_batch=2, draft=draft) as engine:
        asyncio.run(engine.pause())
        bad, good = engine.submit(PROMPT, params(12)), engine.submit(PROMPTS[1], params(12))
        asyncio.run(engine.resume())
        with pytest.raises(EngineError, match=r"draft \(Spoiled\) proposed .*0\.\.39"):
            bad.result(60)
        assert_teacher_forced(engine.model, good.result(60))


def one_short(proposal: Proposal, row: int) -> Proposal:
    return Proposal(tokens_RK=proposal.tokens_RK[:, :-1], probs_RKV=proposal.probs_RKV)


def other_vocabulary(proposal: Proposal, row: int) -> Proposal:
    return Proposal(tokens_RK=proposal.tokens_RK, probs_RKV=proposal.probs_RKV[..., :-1])


def too_long(proposal: Proposal, row: int) -> Proposal:
    return Proposal(tokens_RK=proposal.tokens_RK, probs_RKV=proposal.probs_RKV, lengths=(9,))


def of_half(proposal: Proposal, row: int) -> Proposal:
    return Proposal(tokens_RK=proposal.tokens_RK, probs_RKV=proposal.probs_RKV.bfloat16())


def of_other_type(proposal: Proposal, row: int) -> Proposal:
    return Proposal(tokens_RK=proposal.tokens_RK.int(), probs_RKV=proposal.probs_RKV)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (one_short, r"int64 of shape \(1, 2\); expected int64 of shape \(1, 3\)"),
        (of_other_type, r"torch.int32 of shape \(1, 3\)"),
        (other_vocabulary, r"\(1, 3, 39\); expected float32 or float64 of shape \(1, 3, 40\)"),
        (of_half, r"probs_RKV is torch.bfloat16 .*expected float32 or float64"),
        (too_long, r"lengths are \(9,\); expected 1 numbers of 0 to 3"),
    ],
)
def test_a_proposal_of_another_shape_is_refused(change, text):
    with (
        serving("llama", draft=Spoiled(change)) as engine,
        pytest.raises(EngineError, match=rf"(?s)failed to propose.*{text}"),
    ):
        answer(engine, PROMPT)


def test_rows_that_propose_fewer_or_none_are_decoded_beside_the_others():
    class Sparse(ScriptedDraft):
        def memory(self, **sizes):
            memory = super().memory(**sizes)
            propose = memory.propose

            def some(slots, **settings) -> Proposal:
                full = propose(slots, **settings)
                lengths = tuple(slot % (settings["num_steps"] + 1) for slot in slots)
                # What lies beyond a row's length is nobody's business.
                for row, length in enumerate(lengths):
                    full.tokens_RK[row, length:] = -7
                return Proposal(tokens_RK=full.tokens_RK, probs_RKV=full.probs_RKV, lengths=lengths)

            memory.propose = some
            return memory

    for name in ("llama", "qwen3_moe"):
        model = tiny(name)
        with serving(model, max_batch=8, draft=Sparse(oracle_rows(tiny(name)))) as engine:
            samples = generate_all(engine, [*PROMPTS, PROMPT], params(15))
            alone = answer(engine, PROMPT, params(15))  # in slot 0, without any proposal
            stats = engine.acceptance()
        for sample in (*samples, alone):
            assert_teacher_forced(model, sample)
        assert stats.accept_rate == 1 and 1 < stats.accept_length < 4
        assert alone.metadata["speculative"]["num_proposed"] == 0


def test_a_request_whose_logits_are_nan_fails_alone():
    model = tiny("llama")
    model.get_input_embeddings().weight.data[7] = torch.nan
    # A draft that never proposes the broken token.
    rows = random_rows()

    def without(tokens, temperature):
        q_V = rows(tokens, temperature).clone()
        q_V[7] = 0
        return q_V / q_V.sum()

    with serving(model, draft=ScriptedDraft(without)) as engine:
        good = engine.submit([1, 2], params(4, temperature=0.0))
        bad = engine.submit([1, 7], params(4), request_id="bad")
        with pytest.raises(NonFiniteError, match="token 2 of bad are NaN"):
            bad.result()
        assert len(good.result().tokens) == 6
    with serving("llama", draft=ScriptedDraft(rows)) as engine:
        broken = {key: tensor.clone() for key, tensor in engine.weight_tensors().items()}
        broken["lm_head.weight"][3] = torch.inf
        passes = Passes(engine.model, at=4)
        late = engine.submit([1, 2], LONG, request_id="late")
        passes.wait()
        engine.commit_weights(broken, version=1)
        with pytest.raises(NonFiniteError, match=r"of late are NaN .* version 1"):
            late.result()


def test_what_cannot_work_is_refused_at_once():
    draft = ScriptedDraft(random_rows())
    with pytest.raises(SettingError, match="draft_steps is 0"):
        HFEngine(tiny("llama"), draft=draft, draft_steps=0)
    with pytest.raises(SettingError, match="without a draft"):
        HFEngine(tiny("llama"), controller=Steps(1))
    with pytest.raises(SettingError, match=r"draft is a LlamaForCausalLM; expected a draft"):
        HFEngine(tiny("llama"), draft=tiny("llama"))
    with pytest.raises(UnsupportedModelError, match=r"Gemma3.*DynamicSlidingWindowLayer.*draft="):
        HFEngine(tiny("gemma3"), draft=draft)
    for layers in ((0, 2), (-2,)):
        far = ScriptedDraft(random_rows(), feature_layers=layers)
        with pytest.raises(SettingError, match=r"layers \[-?2\].* has 2; expected 0\.\.1, or -1"):
            HFEngine(tiny("llama"), draft=far)
    cost = CostModel(floor=1e-2, draft_floor=1e-3)
    with pytest.raises(SettingError, match="up to 5 draft steps and draft_steps is 3"):
        HFEngine(tiny("llama"), draft=draft, controller=DraftController(cost, max_steps=5))
    three = MTPDraft.from_target(tiny("llama"), num_modules=3)
    with pytest.raises(SettingError, match="num_steps is 4; expected 1 to 3"):
        HFEngine(tiny("llama"), draft=three, draft_steps=4)
    with pytest.raises(ShapeError, match="vocab_size"):
        HFEngine(tiny("llama", vocab_size=48), draft=Eagle3Draft.from_target(tiny("llama")))
    with pytest.raises(ShapeError, match="hidden_size"):
        HFEngine(tiny("llama", hidden_size=32), draft=Eagle3Draft.from_target(tiny("llama")))


def test_a_controller_outside_the_range_fails_requests_in_words():
    text = "controller chose 4 draft steps; expected 0 to 3"
    with (
        serving("llama", draft=ScriptedDraft(random_rows()), controller=Steps(4)) as engine,
        pytest.raises(EngineError, match=text),
    ):
        answer(engine, PROMPT)


def test_acceptance_without_a_draft_or_a_verify_pass_is_an_error():
    with serving("llama") as engine:
        for reading in (engine.acceptance, engine.step_costs):
            with pytest.raises(SettingError, match="the engine has no draft"):
                reading()
        assert "speculative" not in answer(engine, PROMPT, params(3)).metadata
    with serving("llama", draft=ScriptedDraft(random_rows())) as engine:
        assert engine.acceptance() == AcceptanceStats() and engine.step_costs() == []
        with pytest.raises(EmptyBatchError):
            engine.acceptance().accept_length  # noqa: B018  # reading it raises
        # One token comes out of the prompt's pass.
        assert answer(engine, PROMPT, params(1)).metadata["speculative"]["num_verify_steps"] == 0


def test_step_costs_fit_a_cost_model():
    with serving(
        "llama", max_batch=8, draft=ScriptedDraft(random_rows()), controller=Steps(0, 1, 3)
    ) as engine:
        for batch in (1, 2, 8):
            generate_all(engine, [PROMPT] * batch, params(25))
        costs = engine.step_costs()
    assert {c.kind for c in costs} == {"decode", "verify", "draft"}
    assert {c.tokens for c in costs if c.kind == "verify"} >= {2, 4}
    assert {c.tokens for c in costs if c.kind == "draft"} >= {1, 3}
    assert {1, 2, 8} <= {c.batch for c in costs if c.kind == "decode"}
    assert CostModel.fit(costs).t_decode(1) > 0


def test_a_controller_gives_a_slow_and_bad_draft_up():
    cost = CostModel(floor=1e-3, per_token=1e-4, knee=1, draft_floor=3e-4)
    controller = DraftController(cost, max_steps=3, halflife=50, exploration=0)
    assert controller.choose(1) > 0  # by what it believes at first
    draft = ScriptedDraft(random_rows())
    with serving("llama", draft=draft, controller=controller) as engine:
        answer(engine, PROMPT)
        stats = engine.acceptance()
    assert sum(stats.proposed) < 90 and controller.choose(1) == 0


DRAFTS = {
    "eagle": EagleDraft.from_target,
    "eagle3": Eagle3Draft.from_target,
    "eagle3 of fewer tokens": lambda model: Eagle3Draft.from_target(
        model, target_ids=torch.arange(0, VOCAB, 2)
    ),
    "mtp": MTPDraft.from_target,
    "mtp of three modules": lambda model: MTPDraft.from_target(model, num_modules=3),
    "another model": lambda model: StandaloneDraft.from_target(
        model, tiny("llama", seed=5, hidden_size=8, num_hidden_layers=1)
    ),
    "the model itself": lambda model: StandaloneDraft.from_target(model, tiny("llama")),
    "n-gram": lambda model: NgramDraft(),
}
GREEDY = params(40, temperature=0.0)
SERVED = [(name, kind) for name in ("llama", "qwen3_moe") for kind in DRAFTS]
SERVED.remove(("qwen3_moe", "the model itself"))


@functools.cache
def without_a_draft(name: str) -> list[list[int]]:
    with serving(name) as plain:
        return [sample.tokens for sample in generate_all(plain, PROMPTS, GREEDY)]


@pytest.mark.parametrize(("name", "kind"), SERVED)
def test_the_drafts_of_the_package_serve(name, kind):
    model = tiny(name)
    torch.manual_seed(0)
    draft = DRAFTS[kind](model)
    mixed = [params(10 + 4 * i, seed=i, temperature=[0.0, 1.0, 0.7][i % 3]) for i in range(5)]
    with serving(model, max_batch=3, draft=draft) as engine:
        got = generate_all(engine, PROMPTS, GREEDY)
        assert [sample.tokens for sample in got] == without_a_draft(name)
        stats = engine.acceptance()
        samples = generate_all(engine, PROMPTS, mixed)
    for sample, wanted in zip(samples, mixed, strict=True):
        assert_teacher_forced(model, sample, wanted.temperature)
    assert sum(stats.proposed) > 0
    if kind == "the model itself":
        assert engine.acceptance().accept_rate == 1
