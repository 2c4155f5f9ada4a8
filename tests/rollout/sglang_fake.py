"""A server that speaks SGLang's protocol, as of 0.5.17 or 0.5.21, and computes next to nothing.

What a token, its log-prob and its experts are follows from a small table, the weights' version, and
where the token stands, so that a test can say what must come out. Scheduling is the real one's in
what a client can see of it: requests wait or run; a running one ends a step after its abort, a
waiting one at once, with what was last reported; an abort names the beginning of ids, and is
ignored unless the whole is one; a pause holds new requests back at the door, and one that aborts
lets nobody continue before all have ended, which those that are paused in place do not. A token id
that the model does not have is accepted, and ends the server as it is computed.

`python -m tests.rollout.sglang_fake --model-path M --port P` runs one as a process.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from tests.rollout.sglang_fake_control import Control, Refusal, Running
from tests.rollout.sglang_fake_model import (
    VOCAB,
    Layout,
    acceptance,
    experts,
    layout_of,
    logprob,
    next_token,
    runs_of,
)

GENERATE_FIELDS = {
    "rid": str, "text": str, "input_ids": list, "sampling_params": dict, "return_logprob": bool,
    "logprob_start_len": int, "top_logprobs_num": int, "token_ids_logprob": list,
    "return_text_in_logprobs": bool, "stream": bool, "return_hidden_states": (bool, str),
    "return_routed_experts": bool, "routed_experts_start_len": int, "return_indexer_topk": bool,
    "return_sampling_mask": bool, "priority": int, "extra_key": str, "lora_path": str,
    "session_params": dict, "custom_logit_processor": str, "routed_dp_rank": int, "no_logs": bool,
}  # fmt: skip
SAMPLING_FIELDS = {
    "max_new_tokens", "stop", "stop_token_ids", "stop_regex", "temperature", "top_p", "top_k",
    "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty", "min_new_tokens", "n",
    "json_schema", "regex", "ebnf", "structural_tag", "ignore_eos", "skip_special_tokens",
    "spaces_between_special_tokens", "no_stop_trim", "logit_bias", "sampling_seed",
}  # fmt: skip


class Server(uvicorn.Server):
    """Ends at once: uvicorn's looks ten times a second whether it should, and then waits."""

    async def main_loop(self) -> None:
        while not await self.on_tick(0):
            await asyncio.sleep(0.01)

    async def shutdown(self, sockets: Any = None) -> None:
        for listener in self.servers:
            listener.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        await asyncio.sleep(0.01)  # they close meanwhile


class FakeSGLang(Control):
    """One server: `app` is the FastAPI application, `start` serves it from a thread.

    Args:
        version: "0.5.17" or "0.5.21".
        weight_version: what `--weight-version` would say.
        step_seconds: how long a step takes; each running request gets a token.
        max_running: requests that run at once; others wait.
        layout: experts, if routing is recorded.
        report_every: tokens after which an unfinished request's are reported.
        context_length: of prompt and answer together.
        extra_row: send the row of routing that a stop token sometimes leaves.
        speculative: key names of acceptance statistics: "old", "both" or "new".
        model_path: what it says that it serves.

    Tests read and set:
        updates: (endpoint, body) of every weight endpoint that was called and accepted.
        requests: bodies of /generate, in order of arrival.
        calls: paths in order of arrival.
        held: whether new requests wait at the door, as during a pause.
        died: what killed it, if something did.
        meddle: called with each answer of /generate, may change it or raise `Refusal`.
    """

    def __init__(
        self,
        version: str = "0.5.17",
        *,
        port: int = 0,
        weight_version: str = "0",
        step_seconds: float = 0.0,
        max_running: int = 4096,
        api_key: str | None = None,
        admin_api_key: str | None = None,
        layout: Layout | None = None,
        deterministic: bool = True,
        report_every: int = 50,
        context_length: int = 4096,
        extra_row: bool = False,
        speculative: str | None = None,
        model_path: str = "fake",
    ) -> None:
        self.version, self.weight_version = version, weight_version
        self.architectures: list[str] = []
        self.strict = tuple(map(int, version.split(".")[:3])) >= (0, 5, 21)
        self.spans = tuple(map(int, version.split(".")[:3])) >= (0, 5, 19)
        self.step_seconds, self.max_running = step_seconds, max_running
        self.api_key, self.admin_api_key = api_key, admin_api_key
        self.layout, self.deterministic = layout, deterministic
        self.report_every, self.context_length = report_every, context_length
        self.extra_row, self.speculative = extra_row, speculative
        self.model_path = model_path
        self.updates: list[tuple[str, dict[str, Any]]] = []
        self.requests: list[dict[str, Any]] = []
        self.calls: list[str] = []
        self.meddle: Callable[[dict[str, Any]], Any] = lambda answer: answer
        self.weights: dict[str, list[float]] = {"model.norm.weight": [1.0, 2.0]}
        self.in_session = False
        self.died = ""
        self.max_seen_running = 0
        self._port = port
        self._states: dict[str, Running] = {}
        self._waiting: list[Running] = []
        self._running: list[Running] = []
        self.held = self._engine_paused = False
        self._pausing = asyncio.Lock()
        self._stepper: asyncio.Task[None] | None = None
        self._server: Server | None = None
        self._thread: threading.Thread | None = None
        self.app = self._application()

    # Serving.

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> FakeSGLang:
        config = uvicorn.Config(
            self.app, host="127.0.0.1", port=self._port, log_level="error", timeout_keep_alive=5,
            backlog=4096, lifespan="off",
        )  # fmt: skip
        self._server = Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive(), "the fake did not start"
            time.sleep(0.005)
        self._port = self._server.servers[0].sockets[0].getsockname()[1]
        return self

    def stop(self) -> None:
        """End it; open connections are cut, as when a process is killed."""
        if self._server is None:
            return
        with contextlib.suppress(RuntimeError):  # it has died, and its loop is closed
            for listener in self._server.servers:
                listener.get_loop().call_soon_threadsafe(listener.close)
        self.cut()
        while self._server.server_state.connections and self._thread.is_alive():
            time.sleep(0.005)
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()
        self._server = self._stepper = None
        self._states, self._waiting, self._running = {}, [], []
        self._pausing = asyncio.Lock()
        self.held = self._engine_paused = False

    def cut(self) -> None:
        """End every connection, but not the server."""
        assert self._server is not None
        for connection in list(self._server.server_state.connections):
            with contextlib.suppress(RuntimeError):
                connection.loop.call_soon_threadsafe(connection.transport.abort)

    def die(self, reason: str) -> None:
        """End it from within, as when its scheduler's process does."""
        assert self._server is not None
        self.died = reason
        for listener in self._server.servers:
            listener.close()
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()
        self._server.should_exit = self._server.force_exit = True

    def __enter__(self) -> FakeSGLang:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    # The application.

    def _application(self) -> FastAPI:
        app = FastAPI(openapi_url=None)
        admin, both = True, ["GET", "POST"]
        routes: list[tuple[str, list[str], bool, Callable[..., Any]]] = [
            ("/health", ["GET"], False, self.health),
            ("/server_info", ["GET"], False, self.server_info),
            ("/get_server_info", ["GET"], False, self.server_info),
            ("/model_info", ["GET"], False, self.model_info),
            ("/generate", ["POST", "PUT"], False, self.generate),
            ("/abort_request", ["POST"], admin, self.abort_request),
            ("/pause_generation", ["POST"], admin, self.pause_generation),
            ("/continue_generation", ["POST"], admin, self.continue_generation),
            ("/flush_cache", both, admin, self.flush_cache),
            ("/update_weight_version", ["POST"], admin, self.update_weight_version),
            ("/update_weights_from_tensor", ["POST"], admin, self.update_weights_from_tensor),
            ("/update_weights_from_distributed", ["POST"], admin, self.update_from_distributed),
            ("/update_weights_from_disk", ["POST"], admin, self.update_weights_from_disk),
            ("/init_weights_update_group", ["POST"], admin, self.init_weights_update_group),
            ("/destroy_weights_update_group", ["POST"], admin, self.destroy_weights_update_group),
            ("/get_weights_by_name", both, admin, self.get_weights_by_name),
            ("/weights_checker", both, admin, self.weights_checker),
        ]
        if self.strict:
            routes += [
                ("/begin_weight_update", ["POST"], admin, self.begin_weight_update),
                ("/end_weight_update", ["POST"], admin, self.end_weight_update),
            ]
        for path, methods, is_admin, handler in routes:
            app.add_api_route(path, self._endpoint(path, is_admin, handler), methods=methods)
        return app

    def _endpoint(self, path: str, admin: bool, handler: Callable[..., Any]) -> Callable[..., Any]:
        async def endpoint(request: Request) -> Response:
            self.calls.append(path)
            if not path.startswith("/health") and not self._allowed(request, admin):
                return JSONResponse({"error": "Unauthorized"}, 401)
            try:
                raw = await request.body()
                try:
                    body = await request.json() if raw else {}
                except ValueError as error:
                    raise Refusal(400, {"error": {"message": str(error)}}) from error
                content = await handler(body)
            except Refusal as refusal:
                return JSONResponse(refusal.content, refusal.status)
            if isinstance(content, Response):
                return content
            return JSONResponse(content)

        return endpoint

    def _allowed(self, request: Request, admin: bool) -> bool:
        wanted = (self.admin_api_key or self.api_key) if admin else self.api_key
        return wanted is None or request.headers.get("authorization") == f"Bearer {wanted}"

    # Information.

    async def health(self, body: Any) -> Any:
        return Response(status_code=200 if self.requests else 503)

    async def server_info(self, body: Any) -> Any:
        return {
            "version": self.version,
            "model_path": self.model_path,
            "weight_version": self.weight_version,
            "enable_return_routed_experts": self.layout is not None,
            "enable_deterministic_inference": self.deterministic,
            "speculative_algorithm": "EAGLE" if self.speculative else None,
            "max_req_input_len": self.context_length - 6,
            "skip_tokenizer_init": True,
            "tp_size": 1,
            "internal_states": [{}],
        }

    async def model_info(self, body: Any) -> Any:
        return {
            "model_path": self.model_path, "is_generation": True,
            "weight_version": self.weight_version, "architectures": self.architectures,
        }  # fmt: skip

    # Generating.

    async def _steps(self) -> None:
        while True:
            await asyncio.sleep(self.step_seconds)
            if self._engine_paused:
                continue
            while self._waiting and len(self._running) < self.max_running:
                self._running.append(self._waiting.pop(0))
            self.max_seen_running = max(self.max_seen_running, len(self._running))
            for request in list(self._running):
                if any(not 0 <= token < VOCAB for token in request.tokens):
                    return self.die("CUDA error: device-side assert triggered")
                self._step(request)
            if not self._running and not self.step_seconds:
                await asyncio.sleep(0.001)

    @property
    def _number(self) -> int:
        return int(self.weight_version) if self.weight_version.isdigit() else 0

    def _step(self, request: Running) -> None:
        sampling = request.body["sampling_params"]
        if not request.abort_requested:
            tokens, version = request.tokens, self._number
            token = next_token(tokens[-1], len(tokens), version)
            if token in (sampling.get("stop_token_ids") or ()):
                request.reason = {"type": "stop", "matched": token}
            temperature = sampling.get("temperature", 1.0)
            request.output.append(token)
            request.logprobs.append(logprob(tokens[-1], token, version, temperature))
            request.versions.append(version)
            if len(request.output) % self.report_every == 0:
                request.reported = len(request.output)
        if request.abort_requested:
            request.reason = {"type": "abort", "message": "Abort before prefill"}
        elif request.reason is None and len(request.output) >= sampling["max_new_tokens"]:
            request.reason = {"type": "length", "length": len(request.output)}
        if request.reason is not None:
            request.reported = len(request.output)
            self._running.remove(request)
            self._states.pop(request.rid, None)
            request.done.set()

    async def generate(self, body: Any) -> Any:
        self.check_fields(body, GENERATE_FIELDS)
        sampling = body.setdefault("sampling_params", {}) or {}
        sampling.setdefault("max_new_tokens", 128)
        self._check_request(body, sampling)
        left = self.context_length - 2 - len(body["input_ids"])  # the scheduler's own cut
        sampling["max_new_tokens"] = min(sampling["max_new_tokens"], max(1, left))
        self.requests.append(body)
        rid = body.get("rid") or f"auto-{len(self.requests)}-{os.urandom(4).hex()}"
        if rid in self._states:
            raise Refusal(400, {"error": {"message": f"Duplicate request ID detected: {rid}"}})
        request = Running(rid, body)
        self._states[rid] = request
        if self._stepper is None:
            self._stepper = asyncio.create_task(self._steps())
        while self.held:
            await asyncio.sleep(0.005)
        if request.abort_requested:
            del self._states[rid]
            raise Refusal(499, {"error": {"message": f"Request {rid} was aborted"}})
        self._waiting.append(request)
        await request.done.wait()
        answer = self._answer(request)
        changed = self.meddle(answer)
        return changed

    def _check_request(self, body: dict[str, Any], sampling: dict[str, Any]) -> None:
        def refuse(message: str) -> None:
            raise Refusal(400, {"error": {"message": message}})

        if self.strict and (unknown := sorted(sampling.keys() - SAMPLING_FIELDS)):
            refuse(f"unknown sampling fields: {unknown}")
        ids = body.get("input_ids")
        if not ids or not all(isinstance(i, int) for i in ids):
            refuse("input_ids should be a list of integers")
        if len(ids) >= self.context_length:
            refuse(
                f"The input ({len(ids)} tokens) is longer than the model's context length "
                f"({self.context_length} tokens)."
            )
        if len(ids) + sampling["max_new_tokens"] > self.context_length:
            refuse("Requested token count exceeds the model's maximum context length")
        if body.get("return_routed_experts") and self.layout is None:
            refuse("return_routed_experts needs --enable-return-routed-experts")
        if not 0 <= body.get("routed_experts_start_len", 0) <= len(ids):
            refuse("routed_experts_start_len must be in [0, prompt_tokens]")

    def _answer(self, request: Running) -> dict[str, Any]:
        count = request.reported
        body, output = request.body, request.output[:count]
        meta: dict[str, Any] = {
            "id": request.rid,
            "finish_reason": request.reason,
            "weight_version": self.weight_version,
            "prompt_tokens": len(body["input_ids"]),
            "completion_tokens": count,
            "cached_tokens": 0,
        }
        if self.spans:
            meta["weight_versions"] = runs_of(request.versions[:count])
        if body.get("return_logprob"):
            pairs = zip(request.logprobs[:count], output, strict=True)
            meta["output_token_logprobs"] = [[value, token, None] for value, token in pairs]
            meta["output_token_logprobs_length"] = count
        if body.get("return_sampling_mask"):
            meta["output_token_sampling_mask"] = [[token, 0] for token in output]
            meta["output_token_sampling_logprobs"] = [v / 2 for v in request.logprobs[:count]]
        if body.get("return_routed_experts") and not request.lost_routing:
            meta["routed_experts"] = self._experts(request)
        if self.speculative:
            meta |= acceptance(self.speculative, count)
        return {"output_ids": output, "meta_info": meta}

    def _experts(self, request: Running) -> str:
        assert self.layout is not None
        start = request.body.get("routed_experts_start_len", 0)
        tokens = request.tokens if self.extra_row else request.tokens[:-1]
        prompt = len(request.body["input_ids"])
        rows = [
            experts(token, request.versions[max(0, at + 1 - prompt)] if request.versions and
                    at + 1 - prompt < len(request.versions) else self._number, self.layout)
            for at, token in enumerate(tokens)
        ]  # fmt: skip
        shape = (-1, self.layout.num_layers, self.layout.topk)
        ids = np.array(rows[start:], np.int32).reshape(shape)
        return base64.b64encode(ids.tobytes()).decode()


def main() -> None:
    """What `sglang.launch_server` would be."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--api-key")
    parser.add_argument("--admin-api-key")
    parser.add_argument("--max-running-requests", type=int, default=4096)
    parser.add_argument("--enable-return-routed-experts", action="store_true")
    for name in ("skip-tokenizer-init", "disable-cuda-graph"):
        parser.add_argument(f"--{name}", action="store_true", help="ignored")
    for name in (
        "dtype", "attention-backend", "sampling-backend", "grammar-backend", "mem-fraction-static",
        "quantization", "moe-runner-backend", "watchdog-timeout",
    ):  # fmt: skip
        parser.add_argument(f"--{name}", help="ignored")
    parser.add_argument("--version", default="0.5.17")
    parser.add_argument("--weight-version", default="default")
    parser.add_argument("--context-length", type=int, default=4096)
    parser.add_argument("--step-seconds", type=float, default=0.0)
    parser.add_argument("--start-seconds", type=float, default=0.0)
    parser.add_argument("--die-after", type=float)
    parser.add_argument("--stubborn", action="store_true")
    parser.add_argument("--with-child", action="store_true")
    given = parser.parse_args()
    print(f"serving {given.model_path}", flush=True)
    if given.stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if given.with_child and os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print(f"child {os.getpid()}", flush=True)
        time.sleep(600)
        sys.exit()
    if given.die_after is not None:
        time.sleep(given.die_after)
        print("RuntimeError: no memory is left", flush=True)
        sys.exit(3)
    time.sleep(given.start_seconds)
    layout = layout_of(given.model_path) if given.enable_return_routed_experts else None
    fake = FakeSGLang(
        given.version, port=given.port, weight_version=given.weight_version,
        api_key=given.api_key, admin_api_key=given.admin_api_key, step_seconds=given.step_seconds,
        context_length=given.context_length, model_path=given.model_path, layout=layout,
        max_running=given.max_running_requests,
    ).start()  # fmt: skip
    if not given.stubborn:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    print(f"listening on {fake.url}", flush=True)
    while not fake.died:
        time.sleep(0.05)
    print(fake.died, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
