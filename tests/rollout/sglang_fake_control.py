"""The endpoints of `sglang_fake` that end requests, pause them, and take weights."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from fastapi import Response


@dataclass(eq=False)
class Running:
    """A request at the server."""

    rid: str
    body: dict[str, Any]
    output: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    reported: int = 0
    abort_requested: bool = False
    reason: dict[str, Any] | None = None
    lost_routing: bool = False
    done: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def tokens(self) -> list[int]:
        return self.body["input_ids"] + self.output


class Refusal(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, content: Any) -> None:
        super().__init__(str(content))
        self.status, self.content = status, content


class Control:
    """What an operator or a trainer calls; a part of `FakeSGLang`, which has the attributes."""

    strict: bool
    held: bool
    died: str
    in_session: bool
    weight_version: str
    updates: list[tuple[str, dict[str, Any]]]
    weights: dict[str, list[float]]
    _engine_paused: bool
    _pausing: asyncio.Lock
    _states: dict[str, Running]
    _waiting: list[Running]
    _running: list[Running]

    def check_fields(
        self, body: Any, fields: dict[str, Any], *, required: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        """Types are checked by both versions, names that nobody knows by 0.5.21 only."""
        if not isinstance(body, dict):
            raise Refusal(400, {"error": {"message": "Input should be a valid dictionary"}})
        if self.strict and (unknown := sorted(body.keys() - fields.keys())):
            raise Refusal(400, {"error": {"message": f"unknown fields: {unknown}"}})
        for name in required:
            if name not in body:
                raise Refusal(400, {"error": {"message": f"{name}: Field required"}})
        for name, value in body.items():
            kind = fields.get(name)
            if kind is None or value is None:
                continue
            right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
            if not right and not (isinstance(kind, tuple) and isinstance(value, kind)):
                raise Refusal(400, {"error": {"message": f"{name}: wrong type {value!r:.40}"}})
        return body

    async def abort_request(self, body: Any) -> Any:
        self.check_fields(body, {"rid": str, "abort_all": bool, "abort_message": str})
        rid, everything = body.get("rid") or "", body.get("abort_all", False)
        self.abort(rid, everything)
        return Response(status_code=200)

    def abort(self, rid: str, everything: bool = False) -> None:
        if everything:
            for state in self._states.values():
                state.abort_requested = True
            rid = ""
        elif rid not in self._states:
            return  # with one tokenizer process an id that is not known goes no further
        else:
            self._states[rid].abort_requested = True
        for request in list(self._waiting):
            if request.rid.startswith(rid):
                self._waiting.remove(request)
                self._states.pop(request.rid, None)
                request.reason = {"type": "abort", "message": "Abort in waiting queue"}
                request.lost_routing = True
                request.done.set()
        for request in self._running:
            if request.rid.startswith(rid):
                request.abort_requested = True

    async def pause_generation(self, body: Any) -> Any:
        self.check_fields(body, {"mode": str})
        mode = body.get("mode", "abort")
        if mode not in ("abort", "retract", "in_place"):
            raise Refusal(400, {"error": {"message": f"mode: {mode!r} is none of the modes"}})
        async with self._pausing:
            self.held = True
            if mode == "abort":  # for good, where they are paused in place and make no step
                while self._waiting or self._running:
                    self.abort("", everything=True)
                    await asyncio.sleep(0.01)
            else:
                self._engine_paused = True
                if mode == "retract":
                    self._waiting = self._running + self._waiting
                    self._running = []
        return {"message": "Generation paused successfully.", "status": "ok"}

    async def continue_generation(self, body: Any) -> Any:
        self.check_fields(body, {"torch_empty_cache": bool})
        async with self._pausing:
            self.held = self._engine_paused = False
        return {"message": "Generation continued successfully.", "status": "ok"}

    async def flush_cache(self, body: Any) -> Any:
        if self._running or (self._waiting and not (self.strict and self._engine_paused)):
            return Response("Flush cache failed.\n", status_code=400)
        return Response("Cache flushed.\n", status_code=200)

    # Weights: what came is recorded in `updates`; tests or subclasses make more of it.

    def update(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        """Accept one call; the answer's content."""
        self.updates.append((name, body))
        return {"success": True, "message": "Success."}

    def _update(self, name: str, body: dict[str, Any], *, session: bool) -> dict[str, Any]:
        if session and self.strict and not self.in_session:
            message = f"{name} needs /begin_weight_update first"
            raise Refusal(400, {"success": False, "message": message})
        if body.get("abort_all_requests"):
            self.abort("", everything=True)
        flushes = session and not self.strict and body.get("flush_cache", True)
        if flushes and (self._running or self._waiting):  # the real scheduler dies of it
            self.died = "AssertionError: Cache flush failed after updating weights"
            raise Refusal(500, {"success": False, "message": self.died})
        answer = self.update(name, body)
        if body.get("weight_version") is not None:
            self.weight_version = body["weight_version"]
        return answer

    async def update_weights_from_tensor(self, body: Any) -> Any:
        fields = {
            "serialized_named_tensors": list, "load_format": str, "flush_cache": bool,
            "abort_all_requests": bool, "weight_version": str, "torch_empty_cache": bool,
            ("selector" if self.strict else "disable_draft_model"): (str, bool),
        }  # fmt: skip
        self.check_fields(body, fields, required=("serialized_named_tensors",))
        return self._update("update_weights_from_tensor", body, session=True)

    async def update_from_distributed(self, body: Any) -> Any:
        fields = {
            "names": list, "dtypes": list, "shapes": list, "group_name": str, "flush_cache": bool,
            "abort_all_requests": bool, "weight_version": str, "load_format": str,
            "torch_empty_cache": bool,
        }  # fmt: skip
        if self.strict:
            fields["selector"] = str
        self.check_fields(body, fields, required=("names", "dtypes", "shapes"))
        return self._update("update_weights_from_distributed", body, session=True)

    async def update_weights_from_disk(self, body: Any) -> Any:
        fields = {
            "model_path": str, "load_format": str, "abort_all_requests": bool,
            "weight_version": str, "is_async": bool, "torch_empty_cache": bool, "keep_pause": bool,
            "recapture_cuda_graph": bool, "token_step": int, "flush_cache": bool, "manifest": dict,
        }  # fmt: skip
        self.check_fields(body, fields, required=("model_path",))
        answer = self._update("update_weights_from_disk", body, session=False)
        return answer | {"num_paused_requests": 0}

    async def init_weights_update_group(self, body: Any) -> Any:
        fields = {
            "master_address": str, "master_port": int, "rank_offset": int, "world_size": int,
            "group_name": str, "backend": str,
        }  # fmt: skip
        needed = ("master_address", "master_port", "rank_offset", "world_size")
        self.check_fields(body, fields, required=needed)
        return self.update("init_weights_update_group", body)

    async def destroy_weights_update_group(self, body: Any) -> Any:
        self.check_fields(body, {"group_name": str})
        return self.update("destroy_weights_update_group", body)

    async def begin_weight_update(self, body: Any) -> Any:
        self.check_fields(body, {"selector": str})
        if self.in_session:
            raise Refusal(400, {"success": False, "message": "a weight update is under way"})
        self.in_session = True
        return self.update("begin_weight_update", body)

    async def end_weight_update(self, body: Any) -> Any:
        self.check_fields(body, {})
        if not self.in_session:
            raise Refusal(400, {"success": False, "message": "no weight update is under way"})
        self.in_session = False
        return self.update("end_weight_update", body)

    async def update_weight_version(self, body: Any) -> Any:
        fields = {"new_version": str, "abort_all_requests": bool}
        self.check_fields(body, fields, required=("new_version",))
        if body.get("abort_all_requests", True):
            self.abort("", everything=True)
        self.update("update_weight_version", body)
        self.weight_version = body["new_version"]
        message = f"Weight version updated to {self.weight_version}"
        return {"success": True, "message": message, "new_version": self.weight_version}

    async def get_weights_by_name(self, body: Any) -> Any:
        self.check_fields(body, {"name": str, "truncate_size": int}, required=("name",))
        if body["name"] not in self.weights:
            raise Refusal(400, {"error": {"message": "Get parameter by name failed"}})
        return self.weights[body["name"]][: body.get("truncate_size", 100)]

    async def weights_checker(self, body: Any) -> Any:
        fields: dict[str, Any] = {
            "action": str, "allow_quant_error": bool, "skip_tensor_list": list,
        }  # fmt: skip
        if self.strict:
            fields["selector"] = str
        self.check_fields(body, fields)
        return self.update("weights_checker", body)
