"""What a controller would choose, without running anything."""

import subprocess
import sys

import pytest

from miles.errors import SettingError
from miles.rollout.speculative import AcceptanceStats, DraftController, simulate
from tests.rollout.speculative.costs import COST


def test_a_simulation_is_what_a_controller_would_do():
    result = simulate(
        COST, batches=[1, 8, 64, 512], acceptances=[0.2, [0.9, 0.8, 0.1]], max_steps=3
    )
    assert result.acceptances == ((0.2,) * 3, (0.9, 0.8, 0.1))
    rows = list(result.rows())
    assert len(rows) == 2 * 4 * 4 and sum(row["chosen"] for row in rows) == 8
    for rates_K, row_B, picks in zip(
        result.acceptances, result.speedups, result.chosen, strict=True
    ):
        for batch, speedups, pick in zip(result.batches, row_B, picks, strict=True):
            assert speedups == tuple(COST.speedup(batch, rates_K[:k]) for k in range(4))
            controller = DraftController(COST, max_steps=3, exploration=0.0)
            controller.observe(_many(rates_K))
            assert controller.choose(batch) == pick
    assert result.chosen[1] == (2, 2, 0, 0) and result.chosen[0][-1] == 0


def _many(acceptance) -> AcceptanceStats:
    """So many rows that nothing else counts."""
    judged, accepted = [10**9], []
    for rate in acceptance:
        accepted.append(round(judged[-1] * rate))
        judged.append(accepted[-1])
    return AcceptanceStats(
        num_verify_steps=10**9, num_tokens=10**9 + sum(accepted), proposed=(10**9,) * 3,
        judged=tuple(judged[:-1]), accepted=tuple(accepted),
    )  # fmt: skip


def test_a_simulation_can_be_drawn():
    result = simulate(COST, batches=[1, 8, 64], acceptances=[0.5, 0.8], max_steps=3)
    axes = result.plot()
    assert len(axes.get_lines()) == 5 and axes.get_legend() is not None
    assert result.plot(axes) is axes
    solid = axes.get_lines()[0].get_ydata()
    assert all(y >= 1 for y in solid)


def test_drawing_alone_needs_matplotlib():
    code = """
import sys
sys.modules["matplotlib"] = None
sys.modules["matplotlib.figure"] = None
from miles.errors import MissingExtraError
from miles.rollout.speculative import CostModel, simulate
result = simulate(CostModel(floor=1.0), batches=[1], acceptances=[0.5], max_steps=2)
try:
    result.plot()
except MissingExtraError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "pip install 'miles[examples]'" in done.stdout, done.stderr


def test_simulations_of_nothing_are_refused():
    with pytest.raises(SettingError, match="0 batch sizes"):
        simulate(COST, batches=[], acceptances=[0.5], max_steps=2)
    with pytest.raises(SettingError, match="an acceptance of 3 positions"):
        simulate(COST, batches=[1], acceptances=[[0.5] * 3], max_steps=2)
    with pytest.raises(SettingError, match="position 0 is 2"):
        simulate(COST, batches=[1], acceptances=[2.0], max_steps=2)
