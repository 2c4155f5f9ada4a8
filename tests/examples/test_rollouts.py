"""The engine of the examples dies exactly while weights go to it, or before it is asked."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_an_engine_killed_in_the_middle_of_a_sync_gets_those_weights_all_the_same(
    tmp_path, monkeypatch, forked_engines
):
    monkeypatch.syspath_prepend(EXAMPLES)
    from arithmetic import build_model, build_tokenizer
    from rollouts import Rollouts, local_engine

    from miles.rollout import SamplingParams

    class Log:
        said = ""

        def say(self, text):
            self.said += text

        def advance(self):
            pass

    class Trainer(torch.nn.Module):
        """Its weights kill the engine as they are read, once."""

        killed = False

        def state_dict(self):
            return self

        def items(self):
            for index, pair in enumerate(model.named_parameters()):
                if index == 3 and not self.killed and rollouts._engine.weight_version == 1:
                    self.killed = True
                    kill()
                yield pair

    def kill():
        os.kill(rollouts._engine.pid, signal.SIGKILL)
        rollouts._engine._process.join()

    model, tokenizer, log = build_model(0), build_tokenizer(), Log()
    model.save_pretrained(tmp_path)
    trainer = Trainer()
    config = SimpleNamespace(engine_process=True, device="cpu", max_batch=4)
    rollouts = Rollouts(trainer, local_engine, config, tmp_path, log)
    try:
        rollouts.sync(1)
        with torch.no_grad():
            model.lm_head.weight.add_(1)
        rollouts.sync(2)
        assert trainer.killed and "starting a new engine" in log.said
        params = SamplingParams(max_new_tokens=2, seed=0)
        prompt = tokenizer("1+2=")["input_ids"]
        samples = rollouts.generate([(prompt, params)] * 3, version=2)
        assert [sample.weight_versions for sample in samples] == [[2]] * 3
        kill()
        again = rollouts.generate([(prompt, params)] * 3, version=2)
        assert [sample.tokens for sample in again] == [sample.tokens for sample in samples]
    finally:
        rollouts.close()
