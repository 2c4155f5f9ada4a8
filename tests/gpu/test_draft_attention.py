"""Attention of an online draft's unrolled steps through the flash kernel."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from miles.rollout.speculative import DraftTrainer, Eagle3Draft, _keys
from miles.rollout.speculative._keys import UnrolledKeys
from tests.models import tiny, token_batch

L = 200
LAYOUTS = {
    "whole": [0] * L,
    "padding behind": [0] * 130 + [-1] * 70,
    "padding before": [-1] * 33 + [0] * 167,
    "packed": [0] * 70 + [1] * 65 + [2] * 65,
}


def attended(dtype, seq_ids_BL, num_steps):
    """Outputs at tokens of sequences, and gradients, of numbers that bf16 can hold."""
    g = torch.Generator().manual_seed(0)
    keys, real_BL = UnrolledKeys(seq_ids_BL), (seq_ids_BL >= 0).cuda()
    parts = [
        [
            torch.randn(2, heads, L, 64, generator=g).bfloat16().to("cuda", dtype).requires_grad_()
            for heads in (4, 2, 2)
        ]
        for _ in range(num_steps)
    ]
    outs = [keys.attend(*step).transpose(1, 2)[real_BL] for step in parts]
    weights = [torch.randn(out.shape, generator=g).bfloat16().to("cuda", dtype) for out in outs]
    total = sum((out * weight).sum() for out, weight in zip(outs, weights, strict=True))
    return [*outs, *torch.autograd.grad(total, [tensor for step in parts for tensor in step])]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_steps", [1, 3])
def test_the_flash_kernel_and_its_merge_are_attention_in_float64(layout, num_steps):
    ids_BL = torch.tensor([LAYOUTS["whole"], LAYOUTS[layout]]).cuda()
    found, expected = (
        attended(dtype, ids_BL, num_steps) for dtype in (torch.bfloat16, torch.float64)
    )
    for got, wanted in zip(found, expected, strict=True):
        got, wanted = got.detach().double(), wanted.detach()
        # bf16 rounds by 2**-9, a few times on either way
        assert (got - wanted).norm() < 2e-2 * wanted.norm()


def test_a_bf16_trainer_goes_through_it_with_a_fused_optimizer(monkeypatch):
    policy = tiny("llama", dtype=torch.bfloat16, num_hidden_layers=4).cuda()
    draft = Eagle3Draft.from_target(policy, dtype=torch.float32)
    trainer = DraftTrainer(draft, policy, autocast=torch.bfloat16, share=1.0)
    ids_BL = token_batch(4, 16).cuda()

    def masked(self, query_BHLD):
        raise AssertionError("attention with a mask")

    monkeypatch.setattr(_keys.UnrolledKeys, "attend_masked", masked)
    with profile(activities=[ProfilerActivity.CUDA]) as kernels:
        with trainer.capture():
            policy(ids_BL, use_cache=False)
        trainer.observe(torch.ones_like(ids_BL, dtype=torch.bool))
        trainer.step()
    names = [event.key for event in kernels.key_averages()]
    assert any("flash" in name for name in names)
    assert trainer.optimizer.param_groups[0]["fused"]
