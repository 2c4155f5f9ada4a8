"""What speculation has to come to, in plain Python: slow, obvious, and written from the papers.

A process is a table from prefixes (tuples of tokens after the last settled one) to distributions.
"""

import itertools
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from miles.rollout.speculative import Verified, verify_chain, verify_tree

Dist = list[float]
NEAR = 1e-9
"""How far from a step of a staircase its level is read."""


def softened(logits: Dist, temperature: float, top_k: int = -1, top_p: float = 1.0) -> Dist:
    """Temperature, then top-k, then top-p, as the documentation of `tempered` tells it."""
    ids = sorted(range(len(logits)), key=lambda v: (-logits[v], v))
    if temperature == 0:
        return [float(v == ids[0]) for v in range(len(logits))]
    ids = ids[:top_k] if top_k > 0 else ids
    weights = {v: math.exp((logits[v] - logits[ids[0]]) / temperature) for v in ids}
    total = sum(weights.values())
    kept, reached = [], 0.0
    for v in ids:
        if reached < top_p:
            kept.append(v)
        reached += weights[v] / total
    total = sum(weights[v] for v in kept)
    return [weights[v] / total if v in kept else 0.0 for v in range(len(logits))]


@dataclass
class Process:
    """Logits after every prefix, and how they are sampled from."""

    logits: dict[tuple[int, ...], Dist]
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0

    @classmethod
    def random(cls, seed: int, vocab: int, depth: int, **how) -> "Process":
        rng = random.Random(seed)
        prefixes = [p for n in range(depth + 1) for p in itertools.product(range(vocab), repeat=n)]
        return cls({p: [rng.gauss(0, 1.5) for _ in range(vocab)] for p in prefixes}, **how)

    def after(self, prefix: tuple[int, ...]) -> Dist:
        return softened(self.logits[prefix], self.temperature, self.top_k, self.top_p)

    def probability(self, tokens: Sequence[int], known: int = 0) -> float:
        """Of these tokens, the first `known` given."""
        places = range(known, len(tokens))
        return math.prod(self.after(tuple(tokens[:k]))[tokens[k]] for k in places)


def path(parents: Sequence[int], tokens: Sequence[int], node: int) -> tuple[int, ...]:
    """Tokens from the root down to `node`; -1 is the root."""
    return () if node < 0 else (*path(parents, tokens, parents[node]), tokens[node])


def children(parents: Sequence[int], node: int) -> list[int]:
    return [n for n, parent in enumerate(parents) if parent == node]


def without(q: Dist, token: int) -> Dist:
    rest = [0.0 if v == token else x for v, x in enumerate(q)]
    return [x / sum(rest) for x in rest] if sum(rest) > 0 else rest


def drawn(
    parents: Sequence[int], draft: Process, replacement: bool | None
) -> Iterator[tuple[list[int], float]]:
    """Every draft tree, with its probability; one if no chance is involved."""
    if replacement is None:
        rng = random.Random(repr((parents, draft.logits[()])))
        yield [rng.randrange(len(draft.logits[()])) for _ in parents], 1.0
        return

    def grow(tokens: list[int], probability: float) -> Iterator[tuple[list[int], float]]:
        node = len(tokens)
        if node == len(parents):
            yield tokens, probability
            return
        q = draft.after(path(parents, tokens, parents[node]))
        for elder in children(parents, parents[node]):
            if elder < node and not replacement:
                q = without(q, tokens[elder])
        for v, x in enumerate(q):
            if x > 0:
                yield from grow([*tokens, v], probability * x)

    yield from grow([], 1.0)


def pieces(
    parents: Sequence[int],
    tokens: Sequence[int],
    target: Process,
    draft: Process | None,
    replacement: bool | None,
) -> tuple[list[float], list[Dist]]:
    """The probability of keeping each node once it is judged, and what is drawn from at each place
    after all its children were refused."""
    keep, rest = [0.0] * len(parents), []
    for place in range(-1, len(parents)):
        prefix = path(parents, tokens, place)
        p = target.after(prefix)
        q = draft.after(prefix) if draft else [1.0] * len(p)
        for node in children(parents, place):
            x = tokens[node]
            keep[node] = min(1.0, p[x] / q[x]) if q[x] else float(p[x] > 0)
            if draft:
                left = [max(0.0, a - b) for a, b in zip(p, q, strict=True)]
            else:
                left = [0.0 if v == x else a for v, a in enumerate(p)]
            p = [a / sum(left) for a in left] if sum(left) > 1e-12 else p
            q = q if replacement is not False else without(q, x)
        rest.append(p)
    return keep, rest


def stairs(edges: Sequence[float]) -> list[tuple[float, float]]:
    """Intervals between the edges, 0 and 1."""
    found = sorted({0.0, *edges, 1.0})
    return [(a, b) for a, b in itertools.pairwise(found) if b - a > 4 * NEAR]


def exact_outputs(
    parents: Sequence[int],
    target: Process,
    draft: Process | None,
    *,
    replacement: bool | None = None,
    as_chain: bool = False,
    change: Callable[[Tensor], Tensor] = lambda uniforms_RU: uniforms_RU,
) -> dict[tuple[int, ...], float]:
    """The distribution of what comes out, the uniform numbers integrated without sampling.

    The verdicts are staircases in the uniform numbers. Each is read at both ends of every step of
    the ones that `pieces` expects, which must agree, so an edge in another place is found.
    """
    outputs: dict[tuple[int, ...], float] = defaultdict(float)
    origin = draft or target
    for tokens, probability in drawn(parents, origin, replacement if draft else None):
        keep, rest = pieces(parents, tokens, target, draft, replacement)
        ends = [edge for dist in rest for edge in itertools.accumulate(dist)]
        cells = list(itertools.product(*map(stairs, [*([k] for k in keep), ends])))
        low_RU = torch.tensor([[a + NEAR for a, _ in cell] for cell in cells], dtype=torch.float64)
        high_RU = torch.tensor([[b - NEAR for _, b in cell] for cell in cells], dtype=torch.float64)
        mixed_RU = torch.where(torch.rand_like(low_RU) < 0.5, low_RU, high_RU)
        seen = [
            _run(parents, tokens, target, draft, change(uniforms_RU), replacement, as_chain)
            for uniforms_RU in (low_RU, high_RU, mixed_RU)
        ]
        assert seen[0] == seen[1] == seen[2], "a verdict changes at another place"
        for cell, output in zip(cells, seen[0], strict=True):
            outputs[output] += probability * math.prod(b - a for a, b in cell)
    return outputs


def _run(parents, tokens, target, draft, uniforms_RU, replacement, as_chain):
    prefixes = [path(parents, tokens, node) for node in range(-1, len(parents))]
    rows = len(uniforms_RU)

    def table(values) -> Tensor:
        stacked = torch.tensor([values(prefix) for prefix in prefixes], dtype=torch.float64)
        return stacked.expand(rows, *stacked.shape)

    logits = table(target.logits.__getitem__)
    common = {
        "temperatures_R": [target.temperature] * rows,
        "uniforms_RU": uniforms_RU, "top_k": target.top_k, "top_p": target.top_p,
    }  # fmt: skip
    tokens_RN = torch.tensor(tokens, dtype=torch.int64).expand(rows, -1)
    probs = table(draft.after) if draft else None
    if as_chain:
        chain_probs = None if probs is None else probs[:, :-1]
        verified = verify_chain(logits, tokens_RN, chain_probs, **common)
    else:
        parents_RN = torch.tensor(parents, dtype=torch.int64).expand(rows, -1)
        how = {"replacement": replacement} if draft else {}
        verified = verify_tree(logits, tokens_RN, parents_RN, probs, **common, **how)
    outputs = outputs_of(verified)
    _check_logprobs(verified, outputs, target)
    return outputs


def outputs_of(verified: Verified) -> list[tuple[int, ...]]:
    """The real tokens of each row."""
    counts = verified.num_tokens_R.tolist()
    rows = verified.tokens_RK.tolist()
    assert all(token == -1 for row, n in zip(rows, counts, strict=True) for token in row[n:])
    return [tuple(row[:n]) for row, n in zip(rows, counts, strict=True)]


def _check_logprobs(verified, outputs, target: Process) -> None:
    likely = Process(target.logits, target.temperature or 1.0, target.top_k, target.top_p)
    for output, got in {o: g for o, g in zip(outputs, verified.logprobs_RK, strict=True)}.items():
        expected = [math.log(likely.after(output[:k])[x]) for k, x in enumerate(output)]
        torch.testing.assert_close(got[: len(output)], torch.tensor(expected), rtol=0, atol=1e-5)


def assert_is_the_targets(outputs: dict[tuple[int, ...], float], target: Process, depth: int):
    """Outputs of any length, gone on with by the target itself, are `depth` tokens of the target's.

    Summed over outputs that are a beginning of, or begin with, each possible run of tokens.
    """
    vocab = len(target.logits[()])
    for run in itertools.product(range(vocab), repeat=depth):
        got = sum(
            weight * target.probability(run, known=min(len(output), depth))
            for output, weight in outputs.items()
            if output[:depth] == run[: len(output)]
        )
        assert abs(got - target.probability(run)) < 1e-6, (run, got, target.probability(run))


def chance(counts: Tensor, probs: Tensor) -> float:
    """p-value of Pearson's chi-square test; cells with fewer than 5 expected are put together."""
    expected = probs.double() * counts.sum()
    few = expected < 5
    assert counts[probs == 0].sum() == 0, "an impossible outcome"
    cells = torch.cat(
        [
            torch.stack([expected, counts.double()])[:, ~few],
            torch.stack([expected[few].sum(), counts[few].sum().double()])[:, None],
        ],
        1,
    )
    if cells[0, -1] < 5:  # too few even together
        cells = cells[:, :-1]
    if cells.shape[1] < 2:
        return 1.0
    statistic = ((cells[1] - cells[0]).square() / cells[0]).sum()
    freedom = torch.tensor((cells.shape[1] - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))
