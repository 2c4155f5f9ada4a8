"""Messages between a process and the engine in another: msgpack, no pickle."""

from __future__ import annotations

from typing import Any

from miles import errors
from miles.errors import EngineError, MilesError, MissingExtraError
from miles.moe.tape import RoutingTape
from miles.rollout.sample import Sample, SamplingParams, Span, Status

try:
    import msgspec
except ImportError as error:
    raise MissingExtraError("msgspec", "hf") from error

__all__ = ["Message", "decode", "encode", "error_from_wire", "error_to_wire"]


class Message(msgspec.Struct, omit_defaults=True):
    """One request or its answer."""

    id: int
    op: str
    sample: dict[str, Any] | None = None
    params: dict[str, Any] | None = None
    request_id: str | None = None
    request_ids: list[str] | None = None
    weight_version: int = -1
    error: tuple[str, str] | None = None


_decoder = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """Bytes for the wire."""
    return msgspec.msgpack.encode(message)


def decode(data: bytes) -> Message:
    """Bytes from the wire, checked against `Message`."""
    return _decoder.decode(data)


def sample_to_wire(sample: Sample) -> dict[str, Any]:
    """Plain lists, numbers and bytes."""
    return {
        "tokens": sample.tokens,
        "loss_mask": sample.loss_mask,
        "rollout_logprobs": sample.rollout_logprobs,
        "reward": sample.reward,
        "status": str(sample.status),
        "spans": [[span.start, span.end, span.weight_version] for span in sample.spans],
        "routing": None if sample.routing is None else _tape_to_wire(sample.routing),
        "metadata": sample.metadata,
    }


def sample_from_wire(wire: dict[str, Any]) -> Sample:
    """The inverse of `sample_to_wire`; checks that everything is aligned."""
    return Sample(
        **wire
        | {
            "status": Status(wire["status"]),
            "spans": [Span(*span) for span in wire["spans"]],
            "routing": None
            if wire["routing"] is None
            else RoutingTape.from_bytes(**wire["routing"]),
        }
    )


def params_to_wire(params: SamplingParams) -> dict[str, Any]:
    """The fields by name."""
    return dict(vars(params))


def params_from_wire(wire: dict[str, Any]) -> SamplingParams:
    """The inverse of `params_to_wire`."""
    return SamplingParams(**wire | {"stop_token_ids": tuple(wire["stop_token_ids"])})


def _tape_to_wire(tape: RoutingTape) -> dict[str, Any]:
    return {
        "data": tape.to_bytes(),
        "num_layers": tape.num_layers,
        "topk": tape.topk,
        "num_experts": tape.num_experts,
        "num_experts_inferred": tape.num_experts_inferred,
        "spans": [list(span) for span in tape.spans],
    }


def error_to_wire(error: BaseException) -> tuple[str, str]:
    """Class and text."""
    if isinstance(error, MilesError):
        return type(error).__name__, str(error)
    return "EngineError", f"{type(error).__name__}: {error}"


def error_from_wire(wire: tuple[str, str]) -> MilesError:
    """The same class on this side."""
    kind = getattr(errors, wire[0], EngineError)
    return EngineError(wire[1]) if kind is MissingExtraError else kind(wire[1])
