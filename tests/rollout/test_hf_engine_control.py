"""Steering the embedded engine: abort, resume, pause, new weights, failures, event loops."""

import asyncio
import gc
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from miles.errors import EngineError, NonFiniteError, RoutingError, SettingError, ShapeError
from miles.moe import RoutingTape
from miles.rollout import HFEngine, Sample, Span, Status, _kv
from tests.models import Passes, generate_all, params, serving, tiny

kinds = pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gemma3"])
PROMPT, LONG = [5, 6, 7], params(50, seed=4)


def answer(engine: HFEngine, prompt, wanted=LONG) -> Sample:
    return engine.submit(prompt, wanted).result(timeout=60)


def interrupted(engine: HFEngine) -> Sample:
    """A sample that is aborted on the way."""
    passes = Passes(engine.model)
    future = engine.submit(PROMPT, LONG)
    passes.wait()
    engine.abort_now()
    passes.go_on()
    return future.result(timeout=60)


def others_of(engine: HFEngine, name: str) -> dict[str, torch.Tensor]:
    weights = tiny(name, seed=1).state_dict()
    return {key: weights[key] for key in engine.weight_tensors()}


@kinds
def test_abort_returns_what_there_is_with_every_list_aligned(name):
    with serving(name, weight_version=2) as engine:
        whole = answer(engine, PROMPT)
        part = interrupted(engine)
    n = len(part.tokens)
    part.check()
    assert 3 + 5 <= n < 53
    assert (part.status, part.metadata["finish_reason"]) == (Status.ABORTED, "abort")
    assert part.tokens == whole.tokens[:n] and part.spans == [Span(3, n, 2)]
    if name == "qwen3_moe":
        assert part.routing == whole.routing[: n - 1]


@kinds
def test_resumed_is_uninterrupted(name):
    with serving(name) as engine:
        whole = answer(engine, PROMPT)
        part = interrupted(engine)
        resumed = answer(engine, part)
    assert resumed.tokens == whole.tokens
    assert (resumed.spans, resumed.status) == (whole.spans, Status.TRUNCATED)
    # What was cached is computed anew in one pass: float32 rounding, as in the file beside this.
    expected = pytest.approx(whole.rollout_logprobs[3:], rel=0, abs=1e-4)
    assert resumed.rollout_logprobs[3:] == expected
    held = len(part.tokens)
    assert resumed.rollout_logprobs[3:held] == part.rollout_logprobs[3:]
    assert resumed.routing == whole.routing
    assert part.status is Status.ABORTED and len(part.tokens) == held


def test_a_resumed_sample_keeps_the_routing_its_logprobs_were_sampled_with():
    with serving("qwen3_moe") as engine:
        part = interrupted(engine)
        engine.commit_weights(others_of(engine, "qwen3_moe"), version=1)
        resumed = answer(engine, part)
        fresh = answer(engine, part.tokens)
    rows, n = len(part.routing), len(part.tokens)
    assert resumed.routing[:rows] == part.routing != fresh.routing[:rows]
    assert len(resumed.routing) == len(resumed.tokens) - 1
    assert resumed.spans == [Span(3, n, 0), Span(n, 53, 1)]


def test_a_resumed_sample_that_lost_its_routing_says_which_rows_are_gone():
    with serving("qwen3_moe") as engine:
        part = interrupted(engine)
        part.routing = None
        resumed = answer(engine, part)
    gone = len(part.tokens) - 1
    assert resumed.routing.recorded_N.tolist() == [False] * gone + [True] * (52 - gone)


def test_abort_by_id_ends_that_request_only_queued_ones_too():
    with serving("llama", max_batch=2) as engine:
        whole = answer(engine, PROMPT)
        passes = Passes(engine.model)
        futures = [engine.submit(PROMPT, LONG, request_id=f"r{i}") for i in range(3)]
        passes.wait()
        engine.abort_now(["r0", "r2", "nobody"])
        passes.go_on()
        samples = [future.result(60) for future in futures]
        assert answer(engine, samples[2]).tokens == whole.tokens
    statuses = [sample.status for sample in samples]
    assert statuses == [Status.ABORTED, Status.TRUNCATED, Status.ABORTED]
    assert samples[1].tokens == whole.tokens
    assert samples[2].tokens == PROMPT and samples[2].spans == []


def test_abort_with_nothing_to_do_returns():
    with serving("llama") as engine:
        asyncio.run(engine.abort())
        assert len(answer(engine, PROMPT).tokens) == 53


def test_close_aborts_what_runs():
    engine = HFEngine(tiny("llama"))
    passes = Passes(engine.model)
    future = engine.submit(PROMPT, LONG)
    passes.wait()
    engine.close()
    assert future.result(1).status is Status.ABORTED


def test_pause_holds_and_resume_goes_on():
    with serving("qwen3_moe") as engine:
        whole = answer(engine, PROMPT)
        passes = Passes(engine.model)
        future = engine.submit(PROMPT, LONG)
        passes.wait()
        asyncio.run(engine.pause())
        held = passes.count
        late = engine.submit(PROMPT, LONG)
        time.sleep(0.1)
        assert passes.count == held and not future.done() and not late.done()
        passes.go_on()
        asyncio.run(engine.resume())
        assert future.result(60).tokens == late.result(60).tokens == whole.tokens


@kinds
def test_new_weights_in_mid_answer_give_two_spans_and_other_tokens(name):
    with serving(name, weight_version=3) as engine:
        whole = answer(engine, PROMPT)
        passes = Passes(engine.model)
        future = engine.submit(PROMPT, LONG)
        passes.wait()
        engine.commit_weights(others_of(engine, name), version=8)
        passes.go_on()
        assert engine.weight_version == 8
        sample = future.result(60)
    cut = sample.spans[0].end
    assert sample.spans == [Span(3, cut, 3), Span(cut, 53, 8)] and 3 < cut < 53
    assert sample.tokens[:cut] == whole.tokens[:cut]
    assert sample.tokens[cut:] != whole.tokens[cut:]


def test_committed_weights_are_copied_or_kept_as_asked():
    with serving("llama") as engine:
        others = others_of(engine, "llama")
        engine.commit_weights(others, version=1)
        live = engine.weight_tensors()
        assert all(torch.equal(live[name], others[name]) for name in others)
        assert all(live[name].data_ptr() != others[name].data_ptr() for name in others)
        engine.commit_weights(others, version=2, alias=True)
        live = engine.weight_tensors()
        assert all(live[name].data_ptr() == others[name].data_ptr() for name in others)
        answered = answer(engine, PROMPT)
    with serving(tiny("llama", seed=1)) as engine:
        assert answer(engine, PROMPT).tokens == answered.tokens
    assert answered.weight_versions == [2]


def interrupt() -> None:
    raise KeyboardInterrupt


def broken_off(engine: HFEngine, others: dict[str, torch.Tensor], *, by_hand: bool) -> None:
    """A commit of version 1 that ends in the middle, or after the last tensor by Ctrl-C."""
    if by_hand:
        engine.model.weights_changed = interrupt
        with pytest.raises(KeyboardInterrupt):
            engine.commit_weights(others, version=1, alias=True)
        del engine.model.weights_changed
    else:
        *_, last = others
        # torch's own error where a tensor has no values to copy
        with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
            engine.commit_weights(others | {last: others[last].to("meta")}, version=1)


@pytest.mark.parametrize("by_hand", [False, True])
def test_nothing_is_served_after_a_commit_that_was_broken_off(by_hand):
    text = "commit of version 1 was broken off.*push all weights again, as a version above 0"
    with serving(tiny("llama", seed=1)) as engine:
        wanted = answer(engine, PROMPT).tokens
    with serving("llama", max_batch=1) as engine:
        others, passes = others_of(engine, "llama"), Passes(engine.model)
        running, waiting = (engine.submit(PROMPT, LONG) for _ in range(2))
        passes.wait()
        broken_off(engine, others, by_hand=by_hand)
        passes.go_on()
        for future in (running, waiting):
            with pytest.raises(EngineError, match=text):
                future.result(60)
        with pytest.raises(EngineError, match=text):
            engine.submit(PROMPT, LONG)
        assert engine.weight_version == 0 and not engine._active and not engine._queue
        moved: list[int] = []
        engine._memory.weights_moved = lambda: moved.append(1)
        engine.commit_weights(others, version=1)
        assert moved  # parameters may be other memory since the first
        sample = answer(engine, PROMPT)
    assert (sample.tokens, sample.weight_versions) == (wanted, [1])


def test_a_paused_engine_goes_on_after_a_commit_that_was_broken_off_and_a_whole_one():
    with serving("llama") as engine:
        others, passes = others_of(engine, "llama"), Passes(engine.model)
        future = engine.submit(PROMPT, LONG)
        passes.wait()
        asyncio.run(engine.pause())
        passes.go_on()
        broken_off(engine, others, by_hand=False)
        engine.commit_weights(others, version=1)
        asyncio.run(engine.resume())
        assert future.result(60).weight_versions == [0, 1]


def test_a_commit_that_lacks_a_tensor_writes_nothing():
    with serving("llama") as engine:
        whole = answer(engine, PROMPT)
        others = others_of(engine, "llama")
        *_, last = others
        del others[last]
        with pytest.raises(KeyError, match=last):
            engine.commit_weights(others, version=1)
        assert answer(engine, PROMPT).tokens == whole.tokens


def test_weight_tensors_name_each_storage_once():
    with serving(tiny("llama", tie_word_embeddings=True)) as tied, serving("llama") as untied:
        names, all_names = set(tied.weight_tensors()), set(untied.weight_tensors())
    assert all_names - names == {"lm_head.weight"}
    assert all_names == set(tiny("llama").state_dict())


def test_a_cancelled_task_does_not_break_the_engine():
    with serving("llama", max_batch=1) as engine:
        whole = answer(engine, PROMPT)
        passes = Passes(engine.model)

        async def main() -> Sample:
            task = asyncio.create_task(engine.generate(PROMPT, LONG))
            await asyncio.to_thread(passes.wait)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            passes.go_on()
            return await engine.generate(PROMPT, LONG)

        assert asyncio.run(main()).tokens == whole.tokens
        assert len(engine._free) == 1


@kinds
def test_a_failing_forward_pass_costs_its_requests_only(name):
    with serving(name, max_batch=2) as engine:
        whole = answer(engine, PROMPT)
        calls = []

        def fail_at_third(*_) -> None:
            calls.append(0)
            if len(calls) == 3:
                raise ZeroDivisionError("boom")

        handle = engine.model.get_output_embeddings().register_forward_pre_hook(fail_at_third)
        futures = [engine.submit(PROMPT, LONG) for _ in range(2)]
        with pytest.raises(EngineError, match=r"(?s)the model failed.*Traceback.*boom"):
            futures[0].result(60)
        with pytest.raises(EngineError, match="boom"):
            futures[1].result(60)
        handle.remove()
        assert [s.tokens for s in generate_all(engine, [PROMPT] * 3, LONG)] == [whole.tokens] * 3
        assert not engine._active and len(engine._free) == 2


def test_a_request_whose_logits_are_nan_fails_alone():
    model = tiny("llama")
    head = model.get_output_embeddings()
    model.get_input_embeddings().weight.data[7] = torch.nan
    assert head.weight is not model.get_input_embeddings().weight
    with serving(model) as engine:
        good = engine.submit([1, 2], params(4))
        bad = engine.submit([1, 7], params(4), request_id="bad")
        with pytest.raises(NonFiniteError, match="token 2 of bad are NaN"):
            bad.result()
        assert len(good.result().tokens) == 6


def test_one_engine_serves_two_event_loops():
    prompts = [[5], [6, 7], [8, 9, 10]]
    with serving("llama", max_batch=4) as engine, ThreadPoolExecutor(2) as pool:
        alone = [answer(engine, prompt).tokens for prompt in prompts]
        both = list(pool.map(lambda _: generate_all(engine, prompts, LONG), range(2)))
        again = generate_all(engine, prompts, LONG)
    assert [[s.tokens for s in samples] for samples in (*both, again)] == [alone] * 3


def test_weights_pushed_from_many_threads_while_it_generates_leave_it_whole():
    with serving("llama", max_batch=2) as engine:
        weights = others_of(engine, "llama")
        threads = [
            threading.Thread(
                target=engine.commit_weights, args=(weights,), kwargs={"version": version}
            )
            for version in range(1, 5)
        ]
        futures = [engine.submit(PROMPT, LONG) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        samples = [future.result(60) for future in futures]
    assert all(len(s.tokens) == 53 and s.spans[-1].end == 53 for s in samples)


def test_a_tool_turn_goes_on_with_its_routing_and_trains():
    with serving("qwen3_moe") as engine:
        sample = answer(engine, PROMPT, params(4, seed=1))
        first = sample.routing.expert_ids
        sample.append([9, 9, 9], loss_mask=False)
        longer = answer(engine, sample, params(12, seed=1))
    assert len(longer.routing) == len(longer.tokens) - 1
    assert torch.equal(longer.routing.expert_ids[: len(first)], first)
    assert longer.loss_mask[7:10] == [False] * 3 and longer.loss_mask[10:] == [True] * 8


def test_routing_of_another_model_is_refused_and_the_engine_goes_on():
    with serving("qwen3_moe") as engine:
        sample = answer(engine, PROMPT, params(4))
        ids = torch.zeros(len(sample.tokens) - 1, 5, 2, dtype=torch.int64)
        sample.routing = RoutingTape(ids, num_experts=8)
        with pytest.raises(RoutingError, match=r"\(5, 2, 8\); expected \(2, 2, 8\)"):
            engine.submit(sample, LONG)
        assert answer(engine, PROMPT, params(4)).status is Status.TRUNCATED


def test_a_callback_may_call_the_engine():
    with serving("llama") as engine:
        done = threading.Event()

        def back(_: object) -> None:
            engine.abort_now()
            engine.commit_weights(others_of(engine, "llama"), version=9)
            done.set()

        engine.submit(PROMPT, params(3)).add_done_callback(back)
        assert done.wait(30) and engine.weight_version == 9


def test_a_resumed_sample_keeps_the_seed_it_drew():
    with serving("llama") as engine:
        first = interrupted(engine)
        seed = first.metadata["seed"]
        assert answer(engine, first, params(50, seed=None)).metadata["seed"] == seed


def test_a_cancelled_request_leaves_at_the_next_step():
    with serving("llama", max_batch=1) as engine:
        passes = Passes(engine.model)
        future = engine.submit(PROMPT, LONG)
        passes.wait()
        assert future.cancel()
        answer(engine, PROMPT, params(2))
        assert passes.count < 15


def test_a_prompt_near_the_context_and_a_long_one_among_short_ones():
    with serving(tiny("llama"), max_batch=8, max_context=20) as engine:
        samples = generate_all(engine, [list(range(18)), [1], [2, 3]], params(9, temperature=0.0))
    assert [len(s.tokens) for s in samples] == [20, 10, 11]


def test_a_prefill_leaves_the_passes_of_other_threads_alone():
    model, ids = tiny("llama"), torch.tensor([[1, 2, 3]])

    def logits():
        with torch.no_grad():
            return model(ids).logits

    with ThreadPoolExecutor(1) as other, _kv._only_positions(model, torch.tensor([2])):
        assert logits().shape[1] == 1
        assert other.submit(logits).result().shape[1] == 3


def test_a_model_in_training_mode_samples_nothing():
    with serving("llama", max_batch=1) as engine:
        engine.model.train()
        with pytest.raises(SettingError, match=r"call model\.eval\(\)"):
            engine.submit(PROMPT, LONG)
        engine.model.eval()
        passes = Passes(engine.model)
        future, waiting = engine.submit(PROMPT, LONG), engine.submit(PROMPT, LONG)
        passes.wait()
        engine.model.train()
        passes.go_on()
        for one in (future, waiting):
            with pytest.raises(EngineError, match="training mode"):
                one.result(timeout=60)
        asyncio.run(engine.pause())
        future = engine.submit(PROMPT, LONG)  # waits
        engine.model.eval()
        asyncio.run(engine.resume())
        assert len(future.result(timeout=60).tokens) == 53


def test_python_ends_while_an_engine_generates():
    lines = """
    import sys, time
    from miles.rollout import HFEngine
    from tests.models import params, tiny
    engine = HFEngine(tiny("llama", max_position_embeddings=4096))
    futures = [engine.submit([5, 6, 7], params(4000)) for _ in range(4)]
    time.sleep(0.3)
    sys.exit(3)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(lines)], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 3 and "terminate" not in done.stderr, done.stderr


def test_an_engine_that_is_closed_can_be_collected():
    engine = HFEngine(tiny("llama"))
    answer(engine, PROMPT, params(2))
    gone = weakref.ref(engine)
    engine.close()
    del engine
    gc.collect()
    assert gone() is None


def test_a_fork_of_a_busy_process_ends():
    lines = """
    import os, sys, time
    from miles.rollout import HFEngine
    from tests.models import params, tiny
    engine = HFEngine(tiny("llama", max_position_embeddings=4096))
    futures = [engine.submit([5, 6, 7], params(4000)) for _ in range(4)]
    time.sleep(0.3)
    child = os.fork()
    if not child:
        sys.exit(3)
    ended, end = 0, time.monotonic() + 20
    while not ended and time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.05)
    if not ended:
        os.kill(child, 9)
    engine.close()
    sys.exit(0 if ended else 4)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(lines)], timeout=100)
    assert done.returncode == 0


def test_weights_of_another_shape_change_nothing():
    with serving("llama") as engine:
        before = answer(engine, PROMPT).tokens
        wrong = {n: torch.zeros_like(t) for n, t in engine.weight_tensors().items()}
        wrong["lm_head.weight"] = wrong["lm_head.weight"][:, 1:]
        with pytest.raises(ShapeError, match="shapes of weights that differ"):
            engine.commit_weights(wrong, version=1)
        assert answer(engine, PROMPT).tokens == before


def test_a_text_is_no_list_of_ids():
    with (
        serving("llama") as engine,
        pytest.raises(SettingError, match=r"expected a list: \['r1'\]"),
    ):
        engine.abort_now("r1")
