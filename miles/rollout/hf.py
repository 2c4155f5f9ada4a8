"""An embedded rollout engine over any transformers causal language model.

Shapes: R requests in a step, V vocabulary entries, M mixture-of-experts layers, K experts a token.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import itertools
import os
import threading
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from miles.errors import EngineError, SettingError, ShapeError
from miles.moe.tape import RoutingTape
from miles.rollout._draft_weights import DraftWeights
from miles.rollout._model import eos_of, memory_of, recorder_of
from miles.rollout._requests import (
    Request,
    check_eval,
    check_ids,
    check_request,
    check_stop_tokens,
    new_sample,
    resolve,
    seed_of,
)
from miles.rollout._routing import StepRouting
from miles.rollout._sampling import Draws, draw
from miles.rollout.sample import Sample, SamplingParams, Status
from miles.rollout.speculative.draft import Draft

if TYPE_CHECKING:
    from miles.rollout._kv import KVMemory
    from miles.rollout._speculation import Speculation, StepController
    from miles.rollout.speculative.cost import CostSample
    from miles.rollout.speculative.stats import AcceptanceStats

__all__ = ["HFEngine"]

MAX_PREFILL_TOKENS = 8192


class HFEngine:
    """Continuous batching over a transformers model, in this process.

    A finished request's slot is refilled at the next step, prompts of different length run
    together, equal prompts that arrive together are processed once, and every token comes with the
    log-prob it was sampled with and the version of the weights. Generation runs in a thread of the
    engine's own, so any event loop, or none, can wait for it.

    Args:
        model: a causal language model of transformers, on any device. It is put in eval mode.
        max_batch: requests that are generated at once.
        max_context: most tokens of prompt and answer; the model's own limit by default.
        eos_token_ids: tokens that end an answer; the model's generation config by default.
        record_routing: "auto" records expert ids if `RoutingReplay` knows the model's routers. The
            tape of a sample is validated, and its spans say which weights processed which token.
        weight_version: version of the weights that the model holds now.
        row_tile: decoding steps run a multiple of so many rows (or `max_batch`, if that is less).
            With bf16 on a CPU a request's tokens and log-probs then have the same bits whatever
            else is in the batch; elsewhere, and with a draft, its random draws are the same (with
            `NgramDraft`, while what is remembered is) and log-probs differ by the kernels'
            rounding.
        cuda_graphs: on a CUDA device, capture decoding steps and passes over a few prompts as CUDA
            graphs, one for each shape.
            Call `commit_weights` (or a syncer) after moving the model's parameters to other memory.
        draft: proposes tokens that the model then judges, several in one pass. Answers come from
            the model's own distribution, with its log-probs and routing; with the same seed they
            are other answers than without a draft, save at temperature 0.
            `sample.metadata["speculative"]` holds the counts of `SpeculativeStats`.
        draft_steps: most tokens that the draft proposes in a step.
        controller: says how many in each step, as `DraftController` does: `choose(batch,
            remaining)` before it, 0 for a step without the draft, and `observe(AcceptanceStats)`
            after it; None takes `draft_steps`.

    Example:
        >>> import asyncio
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from miles.rollout import HFEngine, SamplingParams
        >>> config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8,
        ...                      num_hidden_layers=1, num_attention_heads=1, eos_token_id=None)
        >>> engine = HFEngine(LlamaForCausalLM(config), max_batch=4, weight_version=7)
        >>> params = SamplingParams(max_new_tokens=5, seed=0)
        >>> sample = asyncio.run(engine.generate([1, 2, 3], params))
        >>> len(sample.response_tokens), sample.weight_versions, str(sample.status)
        (5, [7], 'truncated')
        >>> engine.close()
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        max_batch: int = 64,
        max_context: int | None = None,
        eos_token_ids: Iterable[int] | None = None,
        record_routing: bool | Literal["auto"] = "auto",
        weight_version: int = 0,
        row_tile: int = 16,
        cuda_graphs: bool = True,
        draft: Draft | None = None,
        draft_steps: int = 3,
        controller: StepController | None = None,
    ) -> None:
        if max_batch < 1:
            raise SettingError(f"max_batch is {max_batch}; expected 1 or more")
        if draft_steps < 1:
            raise SettingError(f"draft_steps is {draft_steps}; expected 1 or more")
        if controller is not None and draft is None:
            raise SettingError("controller= was given without a draft; expected draft= with it")
        self.model = model.eval()
        config: Any = model.config
        text_config = config.get_text_config(decoder=True)
        self._vocab_size: int = text_config.vocab_size
        limit: int | None = getattr(text_config, "max_position_embeddings", None) or max_context
        if limit is None:
            raise SettingError(
                f"{type(model).__name__} declares no longest context; expected max_context=..."
            )
        self._max_context = limit if max_context is None else min(max_context, limit)
        self._eos = frozenset(eos_of(model) if eos_token_ids is None else eos_token_ids)
        check_stop_tokens(self._eos, self._vocab_size)
        self._recorder = recorder_of(model, record_routing)
        self._step_routing = StepRouting()
        sizes = {"num_slots": max_batch, "max_context": self._max_context}
        memory: Any = memory_of(
            model, self._recorder, draft=draft, draft_steps=draft_steps, row_tile=row_tile,
            cuda_graphs=cuda_graphs, **sizes,
        )  # fmt: skip
        self._memory: KVMemory = memory
        self._speculation: Speculation | None = None
        self._draft_weights: DraftWeights | None = None
        if draft is not None:
            from miles.rollout._speculation import Speculation

            self._speculation = Speculation(
                draft, memory, self._step_routing, vocab_size=self._vocab_size,
                num_steps=draft_steps, controller=controller, **sizes,
            )  # fmt: skip
        self._version, self._mixture = weight_version, ""
        self._ids = itertools.count()
        self._queue: deque[Request] = deque()
        self._active: dict[int, Request] = {}
        self._free = sorted(range(max_batch), reverse=True)
        self._changed = threading.Condition()
        self._stepping = self._paused = self._closed = False
        self._visitors = 0
        self._thread: threading.Thread | None = None

    @property
    def weight_version(self) -> int:
        """The version of the weights that the next token will be sampled with."""
        return self._version

    @property
    def records_routing(self) -> bool:
        """Whether samples come with a `RoutingTape`."""
        return self._recorder is not None

    async def generate(
        self,
        prompt: Sequence[int] | Sample,
        params: SamplingParams,
        *,
        request_id: str | None = None,
    ) -> Sample:
        """Continue a prompt and return a new `Sample`; what was passed in stays as it was.

        Args:
            prompt: token ids, or an aborted `Sample`, whose tokens, log-probs, spans and routing
                are kept and whose answer goes on.
            params: how to sample.
            request_id: name for `abort`; one is made up by default.

        Raises:
            PromptTooLongError, StopTokenError, SettingError, EmptyBatchError: see the text.
            NonFiniteError: the model's logits for this request are NaN or infinite.
            RoutingError: the routing of a sample to resume is another model's, or what was
                recorded is nothing that a router chooses.
            EngineError: the model failed; the requests that were running are lost and the engine
                goes on with the next ones.
        """
        return await asyncio.wrap_future(self.submit(prompt, params, request_id=request_id))

    def submit(
        self,
        prompt: Sequence[int] | Sample,
        params: SamplingParams,
        *,
        request_id: str | None = None,
    ) -> Future[Sample]:
        """`generate` for code without an event loop: a `concurrent.futures.Future`."""
        sample = prompt.copy() if isinstance(prompt, Sample) else new_sample(prompt)
        if not self._paused:  # a request may wait for the end of a training step
            check_eval(self.model)
        check_request(sample, params, self._recorder, self._vocab_size, self._max_context)
        request = Request(
            request_id=f"request-{next(self._ids)}" if request_id is None else request_id,
            sample=sample,
            params=params,
            stop=frozenset(params.stop_token_ids)
            | (frozenset() if params.ignore_eos else self._eos),
            draws=Draws(seed_of(sample, params)),
            num_generated=sample.num_generated_tokens,
        )
        sample.metadata.update(request_id=request.request_id, seed=request.draws.seed)
        if self._speculation is not None:
            request.speculative = self._speculation.before(sample)
        with self._changed:
            refusal = "the engine is closed; make a new one" if self._closed else self._mixture
            if refusal:
                raise EngineError(refusal)
            self._queue.append(request)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="HFEngine", daemon=True)
                self._thread.start()
                # A thread that computes while Python ends takes the process down.
                atexit.register(self._at_exit, os.getpid())
            self._changed.notify_all()
        return request.future

    async def abort(self, request_ids: Sequence[str] | None = None) -> None:
        """End these requests (None: all). Their `generate` returns what there is, ABORTED."""
        await asyncio.to_thread(self.abort_now, request_ids)

    def abort_now(self, request_ids: Sequence[str] | None = None) -> None:
        """`abort` for code without an event loop."""
        check_ids(request_ids)
        with self._between_steps():
            ended = [
                request
                for request in [*self._active.values(), *self._queue]
                if request_ids is None or request.request_id in request_ids
            ]
            for request in ended:
                self._release(request, Status.ABORTED, "abort")
        resolve(ended)

    async def pause(self) -> None:
        """Sample no further token until `resume`; returns when the step under way is over."""
        await asyncio.to_thread(self._set_paused, True)

    async def resume(self) -> None:
        """Go on after `pause`."""
        await asyncio.to_thread(self._set_paused, False)

    def close(self) -> None:
        """Abort everything and end the engine's thread."""
        with self._between_steps():
            self._closed = True
            ended = [*self._active.values(), *self._queue]
            for request in ended:
                self._release(request, Status.ABORTED, "abort")
        resolve(ended)
        if self._thread not in (None, threading.current_thread()):
            self._thread.join()
        atexit.unregister(self._at_exit)

    @property
    def draft_weights(self) -> DraftWeights:
        """The draft's weights as a target of `miles.sync`, with a version of their own.

        Raises:
            SettingError: the engine has no draft, or one without weights.
        """
        if self._draft_weights is None:
            self._draft_weights = DraftWeights(self._drafting.draft, self._between_steps)
        return self._draft_weights

    def acceptance(self) -> AcceptanceStats:
        """How all steps so far with the draft went, by place in the draft.

        Raises:
            SettingError: the engine has no draft.
        """
        return self._drafting.acceptance

    def step_costs(self) -> list[CostSample]:
        """How long steps took lately, for `CostModel.fit`: the median of each kind and size.

        Raises:
            SettingError: the engine has no draft.
        """
        with self._between_steps():
            return self._drafting.costs.samples()

    @property
    def _drafting(self) -> Speculation:
        if self._speculation is None:
            raise SettingError("the engine has no draft; expected HFEngine(..., draft=...)")
        return self._speculation

    def weight_tensors(self) -> Mapping[str, Tensor]:
        """The live parameters and buffers by name; of tied ones, the first name."""
        seen: dict[int, str] = {}
        state = self.model.state_dict(keep_vars=True)
        return {name: t for name, t in state.items() if seen.setdefault(id(t), name) == name}

    def commit_weights(
        self, tensors: Mapping[str, Tensor], *, version: int, alias: bool = False
    ) -> None:
        """Serve `tensors` as `version` from the next step on; requests keep their caches.

        If that is broken off, by Ctrl-C too, the engine serves nothing until a whole commit.
        """
        with self._between_steps(), torch.no_grad():
            pairs = [(live, tensors[name]) for name, live in self.weight_tensors().items()]
            shapes = [(list(t.shape), list(p.shape)) for p, t in pairs if p.shape != t.shape]
            if shapes:
                raise ShapeError(f"(given, expected) shapes of weights that differ: {shapes[:4]}")
            moved = alias or bool(self._mixture)
            self._mixture = (
                f"the commit of version {version} was broken off, and the engine holds a mixture; "
                f"push all weights again, as a version above {self._version}"
            )
            for live, tensor in pairs:
                if alias:
                    live.data = tensor
                elif live.data_ptr() != tensor.data_ptr():
                    live.copy_(tensor)
                # For who counts versions: `.data` and other processes don't.
                torch.autograd.graph.increment_version(live)
            found = (getattr(m, "weights_changed", None) for m in self.model.modules())
            rounded = [forget for forget in found if callable(forget)]
            for forget in rounded:
                forget()
            if moved or rounded:  # what is made of weights anew lies elsewhere too
                self._memory.weights_moved()
            self._version, self._mixture = version, ""

    def _at_exit(self, pid: int) -> None:
        if os.getpid() == pid:  # a fork has no thread to end
            self.close()

    # Everything below runs in the engine's thread, or between two of its steps.

    @contextlib.contextmanager
    def _between_steps(self) -> Iterator[None]:
        with self._changed:
            self._visitors += 1
            try:
                self._changed.wait_for(lambda: not self._stepping)
                yield
            finally:
                self._visitors -= 1
                self._changed.notify_all()

    def _set_paused(self, paused: bool) -> None:
        with self._between_steps():
            self._paused = paused

    def _work(self) -> None:
        def may_step() -> bool:
            busy = bool(self._queue or self._active)
            return self._closed or (busy and not self._paused and not self._visitors)

        while True:
            with self._changed:
                self._changed.wait_for(may_step)
                if self._closed:
                    return
                self._stepping = True
            failure = self._mixture
            try:
                with torch.no_grad():
                    if not failure:
                        self._step()
            except Exception:  # whatever it was, it is told to all whose requests it ends
                failure = f"the model failed:\n{traceback.format_exc()}"
            with self._changed:
                useless = self._mixture or self.model.training
                held = [*self._active.values(), *(self._queue if useless else ())]
                ended = [r for r in held if r.ended or failure]
                for request in ended:
                    if not request.ended:
                        request.error = EngineError(failure)
                    self._release(request, *request.ending)
                self._stepping = False
                self._changed.notify_all()
            resolve(ended)  # last, and without the lock: callbacks may call the engine

    def _step(self) -> None:
        """Fill free slots, then one token for every active request."""
        check_eval(self.model)
        self._admit()
        running = [r for r in self._active.values() if not r.ended]
        if not running:
            return
        self._compact()
        if self._speculation is not None:
            if self._speculation.step(running, self._version, waiting=bool(self._queue)):
                return
            running = [r for r in running if not r.ended]  # a draft may fail
            if not running:
                return
        tokens = [r.sample.tokens[-1] for r in running]
        positions = [len(r.sample.tokens) - 1 for r in running]
        logits_RV, ids_RMK = self._memory.decode([r.slot for r in running], tokens, positions)
        if ids_RMK is not None:
            rows = self._step_routing.add(ids_RMK, self._version)
            for request, row in zip(running, rows, strict=True):
                request.step_routing.append(row)
        self._sample(running, logits_RV)
        if self._speculation is not None:
            self._speculation.decoded(running)

    def _admit(self) -> None:
        prompts: dict[tuple[int, ...], list[Request]] = {}
        width = 0
        with self._changed:
            while self._queue and self._free:
                prompt = tuple(self._queue[0].sample.tokens)
                width = max(width, len(prompt))
                num_prompts = len(prompts) + (prompt not in prompts)
                if prompts and num_prompts * width > MAX_PREFILL_TOKENS:
                    break
                request = self._queue.popleft()
                request.slot = self._free.pop()
                self._active[request.slot] = request
                prompts.setdefault(prompt, []).append(request)
        if not prompts:
            return
        groups = list(prompts.values())
        logits_UV, routing = self._memory.prefill(
            list(prompts), [[request.slot for request in group] for group in groups]
        )
        if routing is not None:
            for tape, group in zip(routing, groups, strict=True):
                self._note_prompt_routing(tape, group)
        rows = [index for index, group in enumerate(groups) for _ in group]
        self._sample([r for group in groups for r in group], logits_UV[rows])
        if self._speculation is not None:
            self._speculation.begin(groups)

    def _note_prompt_routing(self, tape: RoutingTape, group: list[Request]) -> None:
        """Give requests with one prompt the rows of its pass, in memory that they share.

        Rows that a resumed sample has already stay: they belong to its log-probs, and other
        weights may have computed this pass. If they are gone, they are marked so.
        """
        assert self._recorder is not None
        tape = tape.with_spans([(0, len(tape), self._version)])
        shared = tape.copy()
        for request in group:
            sample = request.sample
            if sample.spans and sample.routing is None:
                sample.routing = self._recorder.unrecorded(len(sample.tokens) - 1)
            held = 0 if sample.routing is None else len(sample.routing)
            request.prompt_routing = tape[held:].copy() if held else shared

    def _sample(self, requests: list[Request], logits_RV: Tensor) -> None:
        temperatures = [r.params.temperature for r in requests]
        if self._speculation is None:
            draws = [r.draws[r.num_generated] for r in requests]
        else:
            draws = self._speculation.draws(requests)
        tokens, logprobs = draw(logits_RV, temperatures, draws)
        for request, token, logprob in zip(requests, tokens, logprobs, strict=True):
            request.take(
                token, logprob, weight_version=self._version, max_context=self._max_context
            )

    def _compact(self) -> None:
        """Move requests from high slots to free low ones, so that a step runs few rows."""
        while self._free and self._memory.worth_moving(top := max(self._active), len(self._active)):
            low = self._free[-1]
            request = self._active.pop(top)
            self._memory.move(top, low, len(request.sample.tokens))
            if self._speculation is not None:
                self._speculation.move(request, low)
            self._free[-1] = top
            self._free.sort(reverse=True)
            request.slot = low
            self._active[low] = request

    def _release(self, request: Request, status: Status, reason: str) -> None:
        """Take a request out of the engine and complete its sample."""
        if self._active.get(request.slot) is request:
            del self._active[request.slot]
            self._memory.free(request.slot, spoilt=request.error is not None)
            if self._speculation is not None:
                self._speculation.free(request)
            self._free.append(request.slot)
            self._free.sort(reverse=True)
        else:
            self._queue.remove(request)
        request.complete(status, reason)
