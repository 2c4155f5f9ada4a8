"""Every line of code in docs/papers.md runs as it stands."""

import re
from pathlib import Path

import pytest
import torch

from miles import Packed, count, losses
from miles.losses import group_advantages, log_ratio, presets, terminal_rewards, token_ids

PAGE = Path(__file__).parents[2] / "docs" / "papers.md"


def lines_of_code():
    """What stands in backticks in the columns "one line", where it calls something."""
    column = None
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if "one line" in cells:
            column = cells.index("one line")
        elif not line.startswith("|"):
            column = None
        elif column is not None:
            yield from (code for code in re.findall("`([^`]+)`", cells[column]) if "(" in code)


def names():
    """What the page says, and what it leaves to the reader to guess."""
    rng = torch.Generator().manual_seed(0)
    S, L, V = 4, 5, 7
    T = S * L
    g = torch.tensor([0, 0, 1, 1])
    packed = Packed.from_padded(torch.rand(S, L, generator=rng) < 0.9, g)
    new, teacher, values_T = (-torch.rand(T, generator=rng) for _ in range(3))
    old, r = new + 0.1, torch.rand(S, generator=rng)
    student_TV, teacher_TV = torch.randn(2, T, V, generator=rng)
    teacher_TK, ids_TK = teacher_TV.log_softmax(-1).topk(3)
    pairs = {name: -torch.rand(2, generator=rng) - 0.1 for name in ("w", "l", "ref_w", "ref_l")}
    rewards_T = terminal_rewards(r, packed)
    mine = {
        "x": log_ratio(new, old, packed), "A": packed.per_token(group_advantages(r, g)),
        "d": count(packed), "ref": old, "rollout": old + 0.01, "returns_T": rewards_T,
        "lengths_S": torch.tensor([3, 4, 5, 2]), "r_SR": torch.rand(S, 2, generator=rng),
        "truncated_S": g == 1, "right_S": r > r.mean(), "versions_T": torch.full((T,), 4),
        "entropy_T": -new, "ids_T": token_ids(packed, torch.arange(S)), "torch": torch,
        "count": count, "presets": presets,
    }  # fmt: skip
    return {name: getattr(losses, name) for name in losses.__all__} | locals() | pairs | mine


@pytest.mark.parametrize("code", list(lines_of_code()))
def test_a_line_of_the_page_runs(code):
    assert "..." not in code
    result = eval(code, names())
    tensors = result if isinstance(result, tuple) else (result,)
    floats = [x for x in tensors if isinstance(x, torch.Tensor) and x.is_floating_point()]
    assert all(x.isfinite().all() for x in floats)


def test_the_page_has_a_line_for_every_preset():
    code = " ".join(lines_of_code())
    assert [name for name in presets.__all__ if f"presets.{name}(" not in code] == []
