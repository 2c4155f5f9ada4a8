"""What examples/routing_replay.py promises, on fewer samples."""

from pathlib import Path

import pytest
import torch
import tyro

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("source", ["engine", "trainer"])
def test_replay_takes_most_of_the_gap(monkeypatch, capsys, source):
    monkeypatch.syspath_prepend(EXAMPLES)
    from routing_replay import Config, main

    args = [f"--source={source}", "--num-samples=8", "--num-tokens=12"]
    (natural, replayed), (own, live) = main(tyro.cli(Config, args=args))
    assert 0 < replayed.mean() < natural.mean() / 2 and replayed.max() < natural.max() / 2
    # The first router sees the same either way; the later ones see what the earlier ones did.
    assert own[0] == live[0] < 1 and own[-1] < live[-1] < 1
    assert torch.stack([own, live]).min() > 0.5
    shown = capsys.readouterr().out
    assert f"now - {source}'s" in shown and "bytes of routing each" in shown
