"""Rows that several tapes have in common, kept once: the prompt of a group of answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from miles.errors import RoutingError
from miles.moe.tape import RoutingTape

__all__ = ["share_prefix", "storage_bytes"]


def share_prefix(tapes: Sequence[RoutingTape], num_rows: int) -> list[RoutingTape]:
    """The same tapes, in which equal first rows are kept once.

    For the answers to one prompt: `share_prefix([s.routing for s in group], num_prompt_tokens)`.
    An engine that processed the prompt several times, in other batches, may have routed it in
    several ways. Such rows belong to the log-probs of their own answer, so only first rows that
    are equal bit for bit become one.

    Args:
        tapes: of one model, with at least `num_rows` rows each.
        num_rows: tokens of the prompt.

    Returns:
        Tapes equal to `tapes`, in memory of their own; spans stay those of each.

    Raises:
        RoutingError: a tape with fewer rows.

    Example:
        >>> import torch
        >>> from miles.moe import RoutingTape, share_prefix, storage_bytes
        >>> ids = torch.arange(8).view(8, 1, 1)
        >>> group = [RoutingTape(ids, num_experts=8) for _ in range(4)]
        >>> shared = share_prefix(group, 6)
        >>> shared == group, storage_bytes(group), storage_bytes(shared)
        (True, 32, 14)
    """
    kept: list[RoutingTape] = []
    out = []
    for index, tape in enumerate(tapes):
        if not 0 <= num_rows <= len(tape):
            raise RoutingError(
                f"tape {index} has {len(tape)} rows; expected at least num_rows={num_rows}; leave "
                "out what was aborted before its prompt was processed"
            )
        own = tape[:num_rows].with_spans(())
        prompt = next((other for other in kept if other == own), None)
        if prompt is None:
            prompt = own.copy()
            kept.append(prompt)
        rows = RoutingTape.cat([prompt, tape[num_rows:].copy()], copy=False)
        out.append(rows.with_spans(tape.spans))
    return out


def storage_bytes(tapes: Iterable[RoutingTape]) -> int:
    """Bytes of memory (or of a mapped file) that these tapes hold, shared ones counted once.

    A slice holds all of what it was cut from; `tape.nbytes` counts the rows of one tape alone.
    """
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tape in tapes
        for part in tape._parts
        for tensor in part
        if tensor is not None
    }
    return sum(storages.values())
