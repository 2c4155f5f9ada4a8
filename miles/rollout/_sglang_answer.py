"""A sample out of what SGLang answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from miles.errors import EngineError, NonFiniteError, RoutingError
from miles.moe.tape import RoutingTape
from miles.rollout._sglang_api import Answer, Meta, version_number
from miles.rollout.sample import Sample, Span, Status
from miles.rollout.speculative.stats import SpeculativeStats

__all__ = ["RoutingLayout", "SpeculativeStats", "complete"]

STATUS = {"stop": Status.COMPLETED, "length": Status.TRUNCATED, "abort": Status.ABORTED}


@dataclass(frozen=True, kw_only=True)
class RoutingLayout:
    """How to read the expert ids that a server sends: it does not say so itself.

    Example:
        >>> from miles.rollout import RoutingLayout
        >>> RoutingLayout(num_layers=48, topk=8, num_experts=128).num_layers
        48
    """

    num_layers: int
    """Decoder layers, dense ones too."""
    topk: int
    """Experts a token."""
    num_experts: int
    """Experts of a layer."""
    moe_layers: tuple[int, ...] | None = None
    """Which layers are mixtures of experts; None: all."""

    @classmethod
    def from_config(cls, config: Any) -> RoutingLayout:
        """The layout of a transformers configuration.

        Raises:
            RoutingError: a configuration without experts.

        Example:
            >>> from transformers import Qwen3MoeConfig
            >>> config = Qwen3MoeConfig(num_hidden_layers=3, num_experts=8, num_experts_per_tok=2,
            ...                         mlp_only_layers=[0])
            >>> RoutingLayout.from_config(config)
            RoutingLayout(num_layers=3, topk=2, num_experts=8, moe_layers=(1, 2))
        """

        def first(*names: str) -> int | None:
            return next((v for n in names if (v := getattr(config, n, None)) is not None), None)

        num_experts = first("num_experts", "n_routed_experts", "num_local_experts")
        topk = first("num_experts_per_tok", "experts_per_token", "moe_topk")
        layers = first("num_hidden_layers")
        if num_experts is None or topk is None or layers is None:
            raise RoutingError(
                f"{type(config).__name__} has no experts that are known by name; expected a "
                "mixture of experts; write RoutingLayout(num_layers=..., topk=..., num_experts=...)"
            )
        dense = set(range(first("first_k_dense_replace") or 0))
        dense |= set(getattr(config, "mlp_only_layers", None) or ())
        step = first("decoder_sparse_step") or 1
        dense |= {layer for layer in range(layers) if (layer + 1) % step}
        moe = tuple(layer for layer in range(layers) if layer not in dense)
        return cls(
            num_layers=layers, topk=topk, num_experts=num_experts,
            moe_layers=moe if dense else None,
        )  # fmt: skip

    def tape(self, data: str | None, *, num_tokens: int) -> RoutingTape:
        """What the server sent, for so many tokens."""
        return RoutingTape.from_sglang(
            data, num_layers=self.num_layers, topk=self.topk, moe_layers=self.moe_layers,
            num_tokens=num_tokens, num_experts=self.num_experts,
        )  # fmt: skip

    def unrecorded(self, num_tokens: int) -> RoutingTape:
        """Rows that say that nothing was recorded."""
        layers = self.num_layers if self.moe_layers is None else len(self.moe_layers)
        return RoutingTape.unrecorded(
            num_tokens, num_layers=layers, topk=self.topk, num_experts=self.num_experts
        )


def complete(
    sample: Sample,
    answer: Answer,
    *,
    sent_version: int,
    routing: RoutingLayout | None,
    routing_start: int,
    sampling_mask: bool,
    max_new_tokens: int,
    who: str,
    url: str,
) -> None:
    """Add what came to `sample`, or nothing if something is wrong with it.

    Args:
        sample: what was sent.
        answer: what came.
        sent_version: version that the server had when it was sent.
        routing: how to read expert ids; None: they were not asked for.
        routing_start: the first row that was asked for.
        sampling_mask: whether log-probs are those after truncation, and masks were asked for.
        max_new_tokens: how many tokens were asked for at most.
        who: the request, for errors.
        url: the server, for errors.

    Raises:
        EngineError: tokens, log-probs, masks or versions that do not fit each other.
        NonFiniteError: a log-prob that is not a number.
        RoutingError: expert ids that are missing or do not fit.
    """
    meta, tokens = answer.meta_info, answer.output_ids
    reason = (meta.finish_reason or {}).get("type")
    if reason not in STATUS:
        raise EngineError(
            f"{url} ended {who} with finish_reason {meta.finish_reason!r}; expected a type among "
            f"{', '.join(STATUS)}"
        )
    # One that is aborted as a draft model's tokens are accepted may have more.
    if len(tokens) > max_new_tokens and reason != "abort":
        raise EngineError(
            f"{url} sent {len(tokens)} tokens for {who}; expected {max_new_tokens} at most, which "
            "were asked for; look at what is between this process and the server"
        )
    logprobs = _logprobs(meta, tokens, sampling_mask=sampling_mask, who=who, url=url)
    spans = _spans(meta, len(tokens), sent_version=sent_version, who=who, url=url)
    grown = sample.copy()
    for start, end, version in spans:
        grown.append(tokens[start:end], logprobs=logprobs[start:end], weight_version=version)
    if routing is not None:
        grown.routing = _routing(grown, meta, routing, start=routing_start, who=who)
    sample.tokens, sample.loss_mask = grown.tokens, grown.loss_mask
    sample.rollout_logprobs, sample.spans = grown.rollout_logprobs, grown.spans
    sample.routing = grown.routing
    sample.status = STATUS[reason]
    _note(sample, meta, reason=reason, sent_version=sent_version, num_tokens=len(tokens), url=url)


def _logprobs(
    meta: Meta, tokens: list[int], *, sampling_mask: bool, who: str, url: str
) -> list[float]:
    triples = meta.output_token_logprobs or []
    if len(triples) != len(tokens):
        raise EngineError(
            f"{url} sent {len(triples)} log-probs for the {len(tokens)} tokens of {who}; expected "
            "one each"
        )
    other = [i for i, (triple, token) in enumerate(zip(triples, tokens, strict=True))
             if triple[1] != token]  # fmt: skip
    if other:
        at = other[0]
        raise EngineError(
            f"{url} sent token {tokens[at]} and the log-prob of token {triples[at][1]} at place "
            f"{at} of {who}; expected the same token"
        )
    values: Sequence[float | None] = [triple[0] for triple in triples]
    if sampling_mask:
        truncated = meta.output_token_sampling_logprobs
        if truncated is None and not tokens:  # of one that was aborted while it waited
            truncated = []
        if truncated is None or len(truncated) != len(tokens):
            got = "none" if truncated is None else len(truncated)
            raise EngineError(
                f"{url} sent {got} log-probs after truncation for the {len(tokens)} tokens of "
                f"{who}; expected one each, since return_sampling_mask was asked for. Without "
                "them, sample from the whole distribution"
            )
        values = truncated
        _check_masks(meta.output_token_sampling_mask or [], tokens, who=who, url=url)
    bad = [index for index, value in enumerate(values) if value is None]
    if bad:
        raise NonFiniteError(
            f"{url} sent no number as log-prob of token {bad[0]} of {who}; look at the weights of "
            f"version {meta.weight_version}"
        )
    return [value for value in values if value is not None]


def _check_masks(masks: list[list[int] | None], tokens: list[int], *, who: str, url: str) -> None:
    if len(masks) != len(tokens):
        raise EngineError(
            f"{url} sent {len(masks)} sampling masks for the {len(tokens)} tokens of {who}; "
            "expected one each, since return_sampling_mask was asked for. Without them, sample "
            "from the whole distribution"
        )
    for at, (mask, token) in enumerate(zip(masks, tokens, strict=True)):
        if mask is None or token not in mask:
            raise EngineError(
                f"{url} sent token {token} at place {at} of {who} and the sampling mask "
                f"{mask!r:.200}; expected one that holds the token"
            )


def _spans(
    meta: Meta, count: int, *, sent_version: int, who: str, url: str
) -> list[tuple[int, int, int]]:
    """(start, end, version) of the new tokens."""
    if meta.weight_versions is None:
        # Only the last version is known. If another was served when the request was sent, the
        # older one is the safe guess: a token counts as staler than it may be, never as fresher.
        last = _version(meta.weight_version, sent_version, url=url)
        return [(0, count, min(last, sent_version))] if count else []
    spans = [
        (s.start, s.end, _version(s.version, sent_version, url=url)) for s in meta.weight_versions
    ]
    spans = [span for span in spans if span[0] < span[1]]
    ends = [0, *(end for _, end, _ in spans)]
    if [start for start, _, _ in spans] != ends[:-1] or ends[-1] != count:
        raise EngineError(
            f"{url} sent weight versions for the tokens {spans} of {who}; expected them to cover "
            f"0..{count} without a gap"
        )
    return spans


def _version(text: str | int | None, sent_version: int, *, url: str) -> int:
    """A negative one says that an update is under way: the version before is the safe guess."""
    version = version_number(text, url=url)
    return sent_version if version < 0 else version


def _routing(
    sample: Sample, meta: Meta, layout: RoutingLayout, *, start: int, who: str
) -> RoutingTape | None:
    held = sample.routing
    if meta.routed_experts is None:
        # A request that was aborted while it waited, or was put back to wait, has none.
        if meta.finish_reason is None or meta.finish_reason.get("type") != "abort":
            layout.tape(None, num_tokens=1)  # says what is missing
        if held is None:
            return None
        missing = len(sample.tokens) - 1 - len(held)
        return RoutingTape.cat([held, layout.unrecorded(missing)]) if missing > 0 else held
    try:
        new = layout.tape(meta.routed_experts, num_tokens=len(sample.tokens) - start)
        new.validate(num_tokens=len(sample.tokens) - start, request_id=who)
    except RoutingError as error:
        raise RoutingError(f"the routing of {who}: {error}") from error
    new = new.with_spans(_routing_spans(sample.spans, start, len(new)))
    if held is None:
        held = layout.unrecorded(start)
    return RoutingTape.cat([held, new]) if start else new


def _routing_spans(spans: list[Span], start: int, rows: int) -> list[tuple[int, int, int]]:
    """Which weights processed rows `start..start+rows-1`: those that sampled the next token."""
    out = []
    first = start
    for span in spans:
        end = min(span.end - 1, start + rows)
        if end > first:
            out.append((first - start, end - start, span.weight_version))
            first = end
    return out


def _note(
    sample: Sample, meta: Meta, *, reason: str, sent_version: int, num_tokens: int, url: str
) -> None:
    notes: dict[str, Any] = {"finish_reason": reason, "server": url}
    if reason == "abort" and meta.finish_reason is not None:
        notes["abort_message"] = meta.finish_reason.get("message", "")
    if meta.weight_versions is None:
        last = _version(meta.weight_version, sent_version, url=url)
        if last != sent_version and num_tokens:
            notes["weight_versions_mixed"] = [sent_version, last]
    if meta.cached_tokens is not None:
        notes["cached_tokens"] = meta.cached_tokens
    if meta.output_token_sampling_mask is not None:
        notes["sampling_mask"] = [
            *sample.metadata.get("sampling_mask", []),
            *meta.output_token_sampling_mask,
        ]
    stats = SpeculativeStats.from_meta(meta, num_tokens)
    if stats is not None:
        before = sample.metadata.get("speculative", {})
        notes["speculative"] = {k: v + before.get(k, 0) for k, v in asdict(stats).items()}
    sample.metadata.update(notes)
