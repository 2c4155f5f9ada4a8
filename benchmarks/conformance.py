"""Which settings of `miles.losses` equal which of TRL's and verl's, by running both.

    pip install --no-deps trl==1.16.0 verl==0.9.1
    python benchmarks/conformance.py

The cases are in `conformance_cases.py` and `conformance_policies.py`. Each holds one line of our
code, which is evaluated as it stands, and a call of theirs. Both run on the same random padded
batch on the CPU. A case says whether value and gradient are equal, and to what tolerance; the
script writes the table and the CSV, and fails when a case is not as it says.
"""

from __future__ import annotations

import copy
import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from conformance_cases import ROWS, SPLITS, VERSIONS, Batch, Case
from conformance_cases import STAGES as OTHER_STAGES
from conformance_policies import STAGES as POLICY_STAGES
from torch import Tensor

import miles.losses
from miles import Packed, count
from miles.losses import (
    Reject,
    covariance_statistics,
    importance_weights,
    log_ratio,
    terminal_rewards,
)

REJECT = [Reject(level="token", statistic="k3", high=0.1)]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Conformance to TRL and verl."""

    table: Path = Path("docs/conformance.md")
    """Written anew."""
    out: Path = Path("benchmarks/results/conformance.csv")
    """Written anew."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """Relative differences; None where there is no gradient."""

    value: float
    gradient: float | None


def make_batch(seed: int = 0, rows: int = ROWS, width: int = 32) -> Batch:
    """Random, float64, padded on the right, with masked holes; 4 groups of uneven sizes."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lengths = torch.randint(4, width + 1, (rows,), generator=generator)
    lengths[0] = width
    attention = torch.arange(width) < lengths[:, None]
    holes = torch.rand(rows, width, generator=generator) < 0.1
    holes[:, 0] = False
    old = -(1.5 * noise(rows, width)).abs() - 0.05
    new, rollout = (-(old + s * noise(rows, width)).abs() for s in (0.9, 0.4))
    ref = -(new + 0.5 * noise(rows, width)).abs()
    v = noise(rows, width)
    A_S = noise(rows).abs() + 0.2
    A_S[::2] *= -1
    A_S[1:2] = 0
    A = A_S[:, None].expand(rows, width).clone()
    return Batch(
        attention=attention, mask=attention & ~holes, new=new, old=old, rollout=rollout, ref=ref,
        A=A, A_tokens=A + noise(rows, width), v=v,
        v_old=v + 0.3 * noise(rows, width), returns=noise(rows, width),
        rewards=noise(rows, width), r=noise(rows), R=noise(rows, 2),
        g=torch.tensor([3, 0, 1, 0, 2, 0, 3, 2, 1, 3, 0, 2])[:rows],
        ids=torch.arange(rows * width).view(rows, width),
    )  # fmt: skip


def with_statistics(batch: Batch) -> Batch:
    """Adds what belongs to the whole step and stays when it is split."""
    packed = Packed.from_padded(batch.mask)
    flat = [x.flatten() for x in (batch.new, batch.A_tokens)]
    ids = batch.ids.flatten()
    batch.cov = covariance_statistics(*flat, packed, token_ids_T=ids, share=0.05)
    batch.cov_all = covariance_statistics(*flat, packed, token_ids_T=ids, share=1.0, cov_min=0.5)
    batch.n = count(packed)
    return batch


def batches() -> dict[str, Batch]:
    """Those of the cases, by name."""
    usual = make_batch()
    out = {"usual": usual}
    out["binary rewards"] = Batch(**vars(usual) | {"r": (usual.r > 0).double()})
    padding = {k: usual.__dict__[k].masked_fill(~usual.mask, -torch.inf) for k in ("new", "old")}
    out["-inf in the padding"] = Batch(**vars(usual) | padding)
    mask = usual.mask.clone()
    mask[2] = False
    out["an empty sequence"] = Batch(**vars(usual) | {"mask": mask})
    wide = {
        k: torch.cat([x, torch.zeros_like(x)], 1)
        for k, x in vars(usual).items()
        if x.shape == usual.mask.shape
    }
    out["twice the padding"] = Batch(**vars(usual) | wide)
    new, old = usual.new.clone(), usual.old.clone()
    row = int((usual.A[:, 0] < 0).nonzero()[0])
    new[row, 0], old[row, 0] = -5.0, -30.0
    out["a log-ratio of 25"] = Batch(**vars(usual) | {"new": new, "old": old})
    ref = usual.ref.clone()
    ref[0, 0] = usual.new[0, 0] + 3
    out["a token with d = -3"] = Batch(**vars(usual) | {"ref": ref})
    out["one sample"] = make_batch(1, 1, 4)
    out["one sample"].r, out["one sample"].g = torch.tensor([0.7]).double(), torch.tensor([0])
    out["eight of 0.3"] = make_batch(1, 8, 4)
    out["eight of 0.3"].r, out["eight of 0.3"].g = torch.full((8,), 0.3), torch.zeros(8).long()
    return {name: with_statistics(copy.copy(batch)) for name, batch in out.items()}


def rows_of(batch: Batch, rows: slice) -> Batch:
    """A micro-batch; what is not a tensor stays that of the whole step."""
    return Batch(**{k: x[rows] if isinstance(x, Tensor) else x for k, x in vars(batch).items()})


def names(batch: Batch) -> dict[str, Any]:
    """What a line of ours can use: `miles.losses` and the batch, laid out flat."""
    packed = Packed.from_padded(batch.mask)
    flat = {
        k: x.flatten() if isinstance(x, Tensor) and x.ndim == 2 and k != "R" else x
        for k, x in vars(batch).items()
    }
    more = {
        "packed": packed,
        "count": count,
        "L": batch.mask.shape[1],
        "lengths": batch.mask.sum(1),
        "lr": log_ratio(flat["new"], flat["old"], packed),
        "final": terminal_rewards(batch.r.double(), packed),
        "log": math.log,
        "c": importance_weights(flat["old"], flat["rollout"], packed, weight=None, reject=REJECT),
    }
    return {k: getattr(miles.losses, k) for k in miles.losses.__all__} | flat | more


def evaluate(run: Callable[[Batch], Tensor], batch: Batch, leaf: str) -> tuple[Tensor, Any]:
    """The value, 0 where masked, and its gradient."""
    batch = copy.copy(batch)
    tensor = getattr(batch, leaf).detach().clone().requires_grad_()
    setattr(batch, leaf, tensor)
    value = run(batch)
    if value.ndim:
        shape = batch.mask.shape
        value = value[:, None].expand(shape) if value.shape == batch.r.shape else value
        value = torch.where(batch.mask, value.reshape(shape), 0)
    if not value.requires_grad:
        return value, None
    (gradient,) = torch.autograd.grad(value.sum(), tensor)
    return value.detach(), torch.where(batch.mask, gradient, 0)


def in_parts(run: Callable[[Batch], Tensor], batch: Batch, leaf: str) -> tuple[Tensor, Tensor]:
    """The same, summed over micro-batches of equal numbers of sequences."""
    size = len(batch.mask) // SPLITS
    parts = [rows_of(batch, slice(i * size, (i + 1) * size)) for i in range(SPLITS)]
    values, gradients = zip(*(evaluate(run, part, leaf) for part in parts), strict=True)
    return sum(values), torch.cat(gradients)


def relative(a: Tensor | None, b: Tensor | None) -> float | None:
    """The norm of the difference by the larger norm of the two."""
    if a is None or b is None:
        return None
    scale = float(torch.maximum(a.double().norm(), b.double().norm()))
    return float((a.double() - b.double()).norm()) / scale if scale else 0.0


def compare(a: tuple[Tensor, Any], b: tuple[Tensor, Any]) -> Result:
    value = relative(a[0], b[0])
    assert value is not None
    return Result(value=value, gradient=relative(a[1], b[1]))


def wrong(result: Result, differs: str, tolerance: float) -> list[str]:
    """What is not as a case says; NaN counts as different."""
    out = []
    for part, x in (("value", result.value), ("gradient", result.gradient)):
        expected = differs in (part, "both")
        if x is not None and (not x <= max(tolerance, 1e-4 * expected)) != expected:
            out.append(f"{part} {'equal' if expected else 'different'}: {x:.1e}")
    return out


def run(case: Case, batch: Batch) -> tuple[Result, Result | None, Result | None, list[str]]:
    """Ours to theirs; whole to split of ours and of theirs; what is not as it should be."""

    def ours(part: Batch) -> Tensor:
        out: Tensor = eval(case.ours, names(part))
        return out

    a, b = evaluate(ours, batch, case.leaf), evaluate(case.run, batch, case.leaf)
    result = compare(a, b)
    problems = wrong(result, case.differs, case.tolerance)
    if case.differs and not case.remark:
        problems.append("differs without a remark")
    if not case.split:
        return result, None, None, problems
    our_split = compare(a, in_parts(ours, batch, case.leaf))
    their_split = compare(b, in_parts(case.run, batch, case.leaf))
    problems += [f"ours split: {p}" for p in wrong(our_split, "", 1e-12)]
    differs = "both" if case.split == "differs" else ""
    problems += [f"theirs split: {p}" for p in wrong(their_split, differs, 1e-7)]
    return result, our_split, their_split, problems


def shown(x: float | None) -> str:
    if x is None:
        return ""
    if math.isnan(x):
        return "nan"
    return "< 1e-14" if x < 1e-14 else f"{x:.0e}"


def line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def table(header: list[str], rows: list[list[str]]) -> str:
    return line(header) + "|" + "---|" * len(header) + "\n" + "".join(line(row) for row in rows)


HEADER = ["", "ours", "theirs", "value", "gradient", "remark"]
INTRODUCTION = """# Conformance

Which setting of `miles.losses` equals which of {versions}.
Written by `benchmarks/conformance.py`, which runs both on random padded batches of 12 sequences
with holes in the mask, in float64 on the CPU, and fails, when it is run, if a row no longer holds.

`value` and `gradient` are the norm of the difference by the larger norm of the two. A row without
a remark is equal to 1e-12; what differs is asserted to differ. In a line of ours, all is laid out
flat, `[T]`:

- `new`, `old`, `rollout`, `ref`: log-probs; `lr = log_ratio(new, old, packed)`;
- `A`: advantages, one number a sequence; `A_tokens`: one a token;
- `r`, `g`: reward and group of each sequence; `R`: two rewards of each;
  `final = terminal_rewards(r, packed)`;
- `packed`: where tokens live; `n = count(packed)`; `L`: the padded width; `lengths`: trainable
  tokens of each sequence;
- `v`, `v_old`, `returns`, `rewards`: of each token;
- `c = importance_weights(old, rollout, packed, weight=None, reject=[Reject(level="token",
  statistic="k3", high=0.1)])`;
- `cov = covariance_statistics(new, A_tokens, packed, token_ids_T=ids, share=0.05)`; `cov_all` the
  same with `share=1.0, cov_min=0.5`.

TRL computes advantages and importance ratios inside its generation method, which cannot be called
apart, so they were not run. Its code reads as `group_advantages(r, g, eps=1e-4)`,
`multi_reward_advantages(R, g, eps=1e-4)` for `normalize_then_sum`, and
`masked_is(old, rollout, packed, level="sequence_sum", low=0.0, high=3.0)` for its default ratios.
"""
SPLIT = f"""
## Micro-batches

Theirs over the whole step, and the sum of theirs over {SPLITS} micro-batches of 4 sequences each,
given the counts of the whole step (verl) or the number of accumulation steps (TRL). Ours is the
same in every row, to 1e-12.

"""


def main(config: Config) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data, text, problems = batches(), INTRODUCTION.format(versions=VERSIONS), []
    records: list[list[str]] = []
    splits: list[list[str]] = []
    for stage, cases in (OTHER_STAGES | POLICY_STAGES).items():
        rows = []
        for case in cases:
            result, our_split, their_split, found = run(case, data[case.batch])
            problems += [f"{stage}, {case.name}, {case.theirs}: {p}" for p in found]
            numbers = [result.value, result.gradient]
            name = case.name if case.batch == "usual" else f"{case.name}; {case.batch}"
            remark = f"**Differs.** {case.remark}" if case.differs else case.remark
            left = [name, f"`{case.ours}`", case.theirs]
            rows.append([*left, *map(shown, numbers), remark])
            verdict = f"differs: {case.differs}" if case.differs else "equal"
            record = [stage, name, case.ours, case.theirs]
            records.append(
                [
                    "ours to theirs",
                    *record,
                    *map(shown, numbers),
                    verdict,
                    f"{case.tolerance:g}",
                    case.remark,
                ]
            )
            if our_split is not None and their_split is not None:
                for side, split in (("ours", our_split), ("theirs", their_split)):
                    numbers = [split.value, split.gradient]
                    equal = side == "ours" or case.split == "same"
                    verdict = "equal" if equal else "differs: both"
                    comparison = f"{side}, whole to split"
                    records.append(
                        [
                            comparison,
                            *record,
                            *map(shown, numbers),
                            verdict,
                            "1e-12" if side == "ours" else "1e-07",
                            "",
                        ]
                    )
                splits.append([name, case.theirs, *map(shown, numbers)])
        text += f"\n## {stage}\n\n" + table(HEADER, rows)
    text += SPLIT + table(["", "theirs", "value", "gradient"], splits)
    assert not problems, "\n".join(["not as the cases say:", *problems])
    config.table.write_text(text)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    with config.out.open("w", newline="") as file:
        writer = csv.writer(file)
        header = ["comparison", "stage", "case", "ours", "theirs", "value", "gradient"]
        writer.writerow([*header, "verdict", "tolerance", "remark"])
        writer.writerows(records)
    print(f"{len(records)} comparisons hold; wrote {config.table} and {config.out}")


if __name__ == "__main__":
    main(tyro.cli(Config))
