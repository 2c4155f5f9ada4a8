"""Attention of unrolled steps without a mask says what attention with one says."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from miles.rollout.speculative import _chain_attention, _keys
from miles.rollout.speculative._chain_attention import SequenceRows
from miles.rollout.speculative._keys import UnrolledKeys

LAYOUTS = {
    "whole": None,
    "one each": [[0] * 7, [3] * 7],
    "padding behind": [[0] * 7, [0, 0, 0, 0, -1, -1, -1]],
    "padding before": [[0] * 7, [-1, -1, -1, 0, 0, 0, 0]],
    "packed": [[0, 0, 0, 1, 1, 2, 2], [5, 5, 5, 5, 6, 6, -1]],
    "padding between": [[-1, 0, 0, -1, 1, 1, 1], [0] * 7],
    "all padding": [[0] * 7, [-1] * 7],
}


def attended(seq_ids, num_steps, dtype, *, masked, monkeypatch, groups=2, seed=0):
    """Outputs at tokens of sequences, and the gradients of everything."""
    g = torch.Generator().manual_seed(seed)
    ids_BL = None if seq_ids is None else torch.tensor(seq_ids)
    real_BL = torch.ones(2, 7, dtype=torch.bool) if ids_BL is None else ids_BL >= 0
    keys = UnrolledKeys(ids_BL)
    parts = [
        [torch.randn(2, heads, 7, 8, generator=g).to(dtype).requires_grad_() for heads in sizes]
        for sizes in [(2 * groups, 2, 2)] * num_steps
    ]
    with monkeypatch.context() as patch:
        if masked:
            patch.setattr(_keys, "can_chain", lambda query: False)
        outs = [keys.attend(*step).transpose(1, 2)[real_BL] for step in parts]
    weights = [torch.randn(out.shape, generator=g).to(dtype) for out in outs]
    flat = [tensor for step in parts for tensor in step]
    total = sum((out * w).sum() for out, w in zip(outs, weights, strict=True))
    return outs, torch.autograd.grad(total, flat)


def relative(found, expected):
    found, expected = found.detach().double(), expected.detach().double()
    gap = (found - expected).norm()
    return float(gap / expected.norm().clamp(min=1e-30))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_steps", [1, 2, 4])
@pytest.mark.parametrize(
    ("dtype", "limit"),
    # bf16 has 8 bits: 2**-9 for each of the few roundings on either way
    [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)],
)
def test_it_is_masked_attention_in_value_and_gradient(layout, num_steps, dtype, limit, monkeypatch):
    seq_ids = LAYOUTS[layout]
    found, expected = (
        attended(seq_ids, num_steps, dtype, masked=masked, monkeypatch=monkeypatch)
        for masked in (False, True)
    )
    for got, wanted in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        assert got.dtype == dtype
        assert relative(got, wanted) < limit


def test_two_places_by_hand():
    """The second place of the second step: two keys of step 0, and its own."""
    query, first, later = torch.randn(3, 1, 1, 2, 8, generator=torch.Generator().manual_seed(1))
    keys = UnrolledKeys(None)
    keys.attend(query, first, 2 * first)
    out = keys.attend(query, later, 3 * later)
    seen = torch.cat([first[0, 0], later[0, 0, 1:]])
    values = torch.cat([2 * first[0, 0], 3 * later[0, 0, 1:]])
    by_hand = (seen @ query[0, 0, 1] / 8**0.5).softmax(-1) @ values
    torch.testing.assert_close(out[0, 0, 1], by_hand)


class Masks(TorchDispatchMode):
    """The most numbers of any bool tensor: a mask has length times length."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.bool:
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_mask_is_made(layout, monkeypatch):
    with Masks() as masks:
        attended(LAYOUTS[layout], 3, torch.float32, masked=False, monkeypatch=monkeypatch)
    assert masks.numel <= 2 * 7


def test_one_long_sequence_among_short_ones_is_masked():
    ids_BL = torch.tensor([[0] * 20 + [1, 2, 3, 4, 5]])
    assert SequenceRows.of(ids_BL) is None
    assert SequenceRows.of(torch.tensor([[0] * 10 + [1] * 9 + [2] * 6])) is not None


def test_moving_there_and_back_keeps_values_and_gradients():
    ids_BL = torch.tensor([[-1, 4, 4, 5, 5, 5], [0, 0, -1, -1, 2, -1]])
    rows = SequenceRows.of(ids_BL)
    tensor = torch.randn(2, 3, 6, 4, dtype=torch.float64, requires_grad=True)
    laid = rows.lay_out(tensor)
    assert laid.shape == (4, 3, 3, 4)
    assert laid[0, :, 2].eq(0).all()  # the sequence 4 has two tokens
    torch.testing.assert_close(laid[1], tensor[0, :, 3:])
    back = rows.put_back(laid)
    torch.testing.assert_close(back, tensor * (ids_BL >= 0)[:, None, :, None])
    assert torch.autograd.gradcheck(rows.lay_out, tensor)
    assert torch.autograd.gradcheck(lambda t: rows.put_back(rows.lay_out(t)), tensor)


def test_what_the_flash_kernel_does_not_take_is_masked():
    meta = torch.empty(1, 1, 2, 8, device="meta")
    assert not _chain_attention.can_chain(meta)
    assert _chain_attention.can_chain(torch.empty(1, 1, 2, 8))
