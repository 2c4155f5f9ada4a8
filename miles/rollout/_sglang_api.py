"""What SGLang's versions differ in, and what their answers look like."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from miles.errors import EngineError, MissingExtraError, SettingError

try:
    import msgspec
except ImportError as error:
    raise MissingExtraError("msgspec", "sglang") from error

__all__ = [
    "KNOWN_VERSIONS",
    "Answer",
    "Features",
    "ModelInfo",
    "ServerInfo",
    "check_sampling",
    "check_tokens",
    "decode",
    "encode",
    "features_of",
    "version_number",
    "vocab_size_of",
]

KNOWN_VERSIONS = ("0.5.17", "0.5.18", "0.5.19", "0.5.21", "0.5.22", "0.5.23")
"""0.5.20 is left out: sources of 0.5.19 and 0.5.21 differ, and which one it is like is not known.
"""

BEYOND_INPUT = 4
"""Prompt and answer together are cut so many tokens above `max_req_input_len`."""

UNSET_WEIGHT_VERSION = "default"
"""What a server says that was started without `--weight-version`."""

TRUNCATES = {
    "top_p": 1.0, "top_k": -1, "min_p": 0.0, "min_new_tokens": 0,
    "frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0,
    "logit_bias": None, "regex": None, "json_schema": None, "ebnf": None, "structural_tag": None,
}  # fmt: skip
MASKED = ("top_p", "top_k", "min_p")
"""Those whose log-probs a server can renormalise."""
OURS = ("max_new_tokens", "temperature", "stop_token_ids", "ignore_eos", "sampling_seed", "n")


@dataclass(frozen=True, kw_only=True)
class Features:
    """What one version can do."""

    version: str
    """As the server tells it."""
    weight_version_spans: bool
    """Whether an answer says which weights each token came from, not only the last."""
    update_sessions: bool
    """Whether weights are updated between /begin_weight_update and /end_weight_update."""


def features_of(version: str, *, assume: str | None = None, url: str = "the server") -> Features:
    """What a version can do.

    Args:
        version: as the server tells it; `0.5.17.post1` counts as 0.5.17.
        assume: a known version that another one is to be treated as.
        url: named in the error.

    Raises:
        EngineError: a version that is not known, and nothing to assume.
        SettingError: an assumed version that is not known either.

    Example:
        >>> from miles.rollout._sglang_api import features_of
        >>> features_of("0.5.17").update_sessions, features_of("0.5.21").update_sessions
        (False, True)
    """
    known = ", ".join(KNOWN_VERSIONS)
    if assume is not None and assume not in KNOWN_VERSIONS:
        raise SettingError(f"assume_version is {assume!r}; expected one of {known}")
    match = re.match(r"v?(\d+)\.(\d+)\.(\d+)(?![\d.]*(?:dev|rc|a|b))", version)
    release = ".".join(match.groups()) if match else ""
    if release not in KNOWN_VERSIONS:
        if assume is None:
            raise EngineError(
                f"{url} runs SGLang {version!r}; expected one of {known}. Install one of these, or "
                "pass assume_version= with the one whose interface it has"
            )
        release = assume
    patch = int(release.split(".")[2])
    return Features(version=version, weight_version_spans=patch >= 19, update_sessions=patch >= 21)


def version_number(text: str | int | None, *, url: str) -> int:
    """The weights' version as a number.

    Raises:
        EngineError: a version that is no number, which could not be compared with others.
    """
    if text is None or text == UNSET_WEIGHT_VERSION:
        return 0
    try:
        return int(text)
    except ValueError as error:
        raise EngineError(
            f"{url} says that its weight version is {text!r}; expected an integer. Start it with "
            "--weight-version 0, or send one to /update_weight_version"
        ) from error


def check_sampling(sampling: Mapping[str, Any], *, sampling_mask: bool) -> None:
    """Refuse what makes the returned log-probs those of another distribution.

    Raises:
        SettingError: naming the parameter and what to do.
    """
    truncated = any(sampling.get(name, TRUNCATES[name]) != TRUNCATES[name] for name in MASKED)
    if sampling_mask and not truncated:
        raise SettingError(
            f"return_sampling_mask=True and none of {', '.join(MASKED)} in sampling; expected one: "
            "otherwise each token was drawn from the whole vocabulary, and its mask is all of it"
        )
    for name, value in sampling.items():
        if name in OURS:
            raise SettingError(
                f"sampling holds {name!r}, which SamplingParams decides for each request; "
                "leave it out"
            )
        if name not in TRUNCATES or value == TRUNCATES[name]:
            continue
        advice = (
            "leave it out, or pass return_sampling_mask=True, so that the server renormalises them"
            if name in MASKED
            else "leave it out"
        )
        if name not in MASKED or not sampling_mask:
            raise SettingError(
                f"sampling has {name}={value!r}; expected {TRUNCATES[name]!r}: tokens would come "
                "from a changed distribution, and SGLang returns log-probs of the unchanged "
                f"softmax(logits / temperature); {advice}"
            )


def check_tokens(tokens: Sequence[int], vocab_size: int | None) -> None:
    """Refuse ids that the model has no embedding for: SGLang does not look, and its GPU dies.

    Args:
        tokens: what is to be sent.
        vocab_size: how many ids there are; None: not known, so only negative ones are refused.

    Raises:
        SettingError: naming the id and its place.

    Example:
        >>> from miles.rollout._sglang_api import check_tokens
        >>> check_tokens([3, 32], 32)
        Traceback (most recent call last):
        ...
        miles.errors.SettingError: token 1 of the prompt is 32; expected an id in 0..31, ...
    """
    highest = max(tokens, default=0)
    if min(tokens, default=0) >= 0 and (vocab_size is None or highest < vocab_size):
        return
    at, bad = next(
        (at, token)
        for at, token in enumerate(tokens)
        if token < 0 or (vocab_size is not None and token >= vocab_size)
    )
    expected = "0 or more" if vocab_size is None else f"in 0..{vocab_size - 1}"
    raise SettingError(
        f"token {at} of the prompt is {bad}; expected an id {expected}, since another one would "
        "end the server with all its requests. Look at the tokenizer, and at the vocab_size= of "
        "the engine if it was given"
    )


def vocab_size_of(model_path: str) -> int | None:
    """How many token ids a model folder's `config.json` tells of.

    Args:
        model_path: as the server tells it: a folder that can be read here, or anything else; ""
            if it does not.

    Returns:
        Its vocabulary, that of the language model where there are several; None: not known.
    """
    if not model_path:
        return None
    with contextlib.suppress(OSError, ValueError):  # no such folder here, or no such file there
        config = json.loads(Path(model_path, "config.json").read_text())
        for part in (config.get("text_config"), config) if isinstance(config, dict) else ():
            size = part.get("vocab_size") if isinstance(part, dict) else None
            if isinstance(size, int) and size > 0:
                return size
    return None


class ServerInfo(msgspec.Struct):
    """GET /server_info: how the server was started."""

    version: str
    max_req_input_len: int | None = None
    enable_return_routed_experts: bool = False
    enable_deterministic_inference: bool = False
    speculative_algorithm: str | None = None
    speculative_eagle_topk: int | None = None
    speculative_num_steps: int | None = None
    speculative_num_draft_tokens: int | None = None

    def longest_answer(self, num_tokens: int) -> int | None:
        """How many tokens may follow so many; asking for more than the context is an error."""
        if self.max_req_input_len is None:
            return None
        # Drafts are kept in the slots of the answer.
        tree = (self.speculative_eagle_topk or 0) * (self.speculative_num_steps or 0)
        reserved = max(tree, self.speculative_num_draft_tokens or 0)
        return max(1, self.max_req_input_len + BEYOND_INPUT - reserved - num_tokens)


class ModelInfo(msgspec.Struct):
    """GET /model_info: what it serves now."""

    weight_version: str | int | None
    model_path: str = ""


class VersionSpan(msgspec.Struct):
    """Output tokens `start..end-1` came from these weights."""

    version: str | int
    start: int
    end: int


class Meta(msgspec.Struct):
    """`meta_info` of an answer, as far as it is used."""

    finish_reason: dict[str, Any] | None
    weight_version: str | int | None = None
    weight_versions: list[VersionSpan] | None = None
    output_token_logprobs: list[tuple[float | None, int, str | None]] | None = None
    output_token_sampling_logprobs: list[float | None] | None = None
    output_token_sampling_mask: list[list[int] | None] | None = None
    routed_experts: str | None = None
    cached_tokens: int | None = None
    spec_verify_ct: int | None = None
    spec_num_correct_drafts: int | None = None
    spec_num_proposed_drafts: int | None = None
    spec_accepted_drafts: int | None = None
    spec_proposed_drafts: int | None = None
    spec_accept_token_num: int | None = None
    spec_draft_token_num: int | None = None
    spec_correct_drafts_histogram: list[int] | None = None
    spec_accept_histogram: list[int] | None = None


class Answer(msgspec.Struct):
    """What /generate answers for one request."""

    output_ids: list[int]
    meta_info: Meta


T = TypeVar("T")


def decode(body: bytes, kind: type[T], *, what: str) -> T:
    """A checked answer.

    Raises:
        EngineError: what came is no JSON, or other JSON than expected.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        start = body[:200].decode(errors="replace")
        raise EngineError(
            f"{what} answered {start!r}, which does not fit: {error}; expected what SGLang "
            f"{KNOWN_VERSIONS[0]} to {KNOWN_VERSIONS[-1]} send. Is this address an SGLang server, "
            "or something in front of one?"
        ) from error


encode = msgspec.json.encode
