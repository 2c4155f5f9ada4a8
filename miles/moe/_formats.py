"""Routing as others write it: SGLang's payload, and files."""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from miles.errors import RoutingError
from miles.moe import _spans
from miles.moe._ids import check_num_experts, in_range, storage

__all__ = ["decode_sglang", "read_tape", "write_tape"]

FORMAT = "miles.RoutingTape/1"


def decode_sglang(
    data: str | bytes | None,
    *,
    num_layers: int,
    topk: int,
    moe_layers: Sequence[int] | None,
    num_tokens: int | None,
) -> Tensor:
    """int32 `[rows, num_moe_layers, topk]` out of `meta_info["routed_experts"]`."""
    if num_layers < 1 or topk < 1:
        raise RoutingError(f"num_layers is {num_layers} and topk {topk}; expected 1 or more")
    if not isinstance(data, (str, bytes, bytearray, memoryview)):
        raise RoutingError(
            f"routed_experts is {data!r}; expected base64 text. Start SGLang with "
            "--enable-return-routed-experts and send return_routed_experts=true. A request that "
            "was aborted while it waited has none: use RoutingTape.unrecorded for its tokens"
        )
    try:
        raw = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RoutingError(
            f"routed_experts ({len(data)} characters) is not base64: {error}; it was truncated or "
            "altered on the way; ask the engine for the request again"
        ) from error
    row = 4 * num_layers * topk
    if len(raw) % row:
        raise RoutingError(
            f"routed_experts holds {len(raw)} bytes; expected a multiple of {row} ({num_layers} "
            f"layers x {topk} experts x 4 bytes); it was truncated, or the engine serves another "
            "model: num_layers counts every layer, dense ones too"
        )
    rows = len(raw) // row
    if num_tokens is not None and num_tokens < 1:
        raise RoutingError(f"num_tokens is {num_tokens}; expected 1 or more")
    if num_tokens is not None and rows not in (num_tokens - 1, num_tokens):
        raise RoutingError(
            f"routed_experts holds {rows} rows for {num_tokens} tokens; expected "
            f"{num_tokens - 1}, one for each token but the last; under routed_experts_start_len "
            "count the tokens after it"
        )
    ids = np.frombuffer(raw, "<i4").reshape(rows, num_layers, topk)
    if num_tokens is not None:
        ids = ids[: num_tokens - 1]
    # A copy either way, since torch takes no read-only memory.
    layers = slice(None) if moe_layers is None else _layer_index(moe_layers, num_layers)
    return torch.from_numpy(np.array(ids[:, layers], order="C"))


def _layer_index(moe_layers: Sequence[int], num_layers: int) -> list[int]:
    layers = [int(layer) for layer in moe_layers]
    wrong = [layer for layer in layers if not 0 <= layer < num_layers]
    if wrong or not layers or len(set(layers)) < len(layers):
        raise RoutingError(
            f"moe_layers is {layers}; expected distinct layers in 0..{num_layers - 1}, at least one"
        )
    return layers


def write_tape(path: Path, ids: Tensor, holes_N: Tensor | None, metadata: dict[str, Any]) -> None:
    """A safetensors file that is there whole or, if anything fails, as it was before.

    Raises:
        OSError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {"expert_ids": ids.contiguous()}
    if holes_N is not None:
        tensors["missing"] = holes_N.contiguous()
    texts = {name: json.dumps(value) for name, value in metadata.items()}
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        save_file(tensors, partial, texts | {"format": FORMAT})
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except SafetensorError as error:
        raise OSError(
            f"{path} could not be written: {error}; what was there before is unchanged; make room "
            "or choose another place, and save again"
        ) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)


def read_tape(path: Path) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """Ids and mask, memory-mapped, and the metadata of a file of `write_tape`.

    Raises:
        RoutingError: a file that is damaged or something else.
    """
    from safetensors import SafetensorError, safe_open

    path.stat()  # the usual FileNotFoundError, with the usual text
    try:
        with safe_open(path, "pt") as file:
            texts = file.metadata() or {}
            if (found := texts.pop("format", None)) != FORMAT:
                raise RoutingError(
                    f"{path} is a safetensors file of format {found!r}; expected {FORMAT!r}, as "
                    "this version's RoutingTape.save writes it; save it again from what it was "
                    "made of"
                )
            names = file.keys()  # an open file is no mapping
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise _damaged(path, str(error)) from error
    try:
        metadata = {name: json.loads(text) for name, text in texts.items()}
        ids, holes_N = tensors["expert_ids"], tensors.get("missing")
        _check_stored(ids, holes_N, metadata)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    return ids, holes_N, metadata


def _check_stored(ids: Tensor, holes_N: Tensor | None, metadata: dict[str, Any]) -> None:
    num_experts = int(metadata["num_experts"])
    check_num_experts(num_experts)
    if ids.ndim != 3 or ids.dtype != storage(num_experts):
        raise RoutingError(f"its ids are {ids.dtype} of shape {tuple(ids.shape)}")
    if holes_N is not None and (holes_N.shape != ids.shape[:1] or holes_N.dtype != torch.bool):
        raise RoutingError(
            f"its mask is {holes_N.dtype} of shape {tuple(holes_N.shape)} for {len(ids)} rows"
        )
    if not in_range(ids, num_experts):
        raise RoutingError(f"it holds expert ids outside 0..{num_experts - 1}")
    bool(metadata["num_experts_inferred"])
    _spans.checked(metadata["spans"], len(ids))


def _damaged(path: Path, why: str) -> RoutingError:
    return RoutingError(
        f"{path} is not a whole RoutingTape file: {why}; expected what RoutingTape.save writes; "
        "delete it and record or save the tape again"
    )
