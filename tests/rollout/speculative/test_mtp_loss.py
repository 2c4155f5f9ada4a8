"""MTP's auxiliary loss: labels rolled within a sequence, over padding, packing and ranks."""

import pytest
import torch

from miles import Packed
from miles.errors import SettingError, ShapeError
from miles.losses import reduce_metrics
from miles.rollout.speculative.losses import draft_loss, mtp_loss, shift_tokens
from tests.distributed.gloo import run


class MTP(torch.nn.Module):
    """Depth K; each depth mixes the state with the next token's embedding."""

    def __init__(self, D=4, K=2):
        super().__init__()
        torch.manual_seed(3)
        self.mix = torch.nn.ModuleList([torch.nn.Linear(2 * D, D).double() for _ in range(K)])

    def forward(self, trunk_TD, embedding, ids_T, packed):
        hidden_TD, out = trunk_TD.detach(), []
        for k, mix in enumerate(self.mix, 1):
            ids_k = shift_tokens(ids_T, packed, by=k)
            hidden_TD = mix(torch.cat([hidden_TD, embedding(ids_k).detach()], -1)).tanh()
            out.append(hidden_TD)
        return out


def mtp_step(lengths=(5, 1, 6), V=7, D=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    T = sum(lengths)
    cu = torch.tensor([0, *lengths]).cumsum(0)
    mask_T = torch.rand(T, generator=g) < 0.7
    mask_T[cu[1:] - 1] = False
    packed = Packed.from_cu_seqlens(cu, mask_T)
    ids_T = torch.randint(0, V, (T,), generator=g)
    trunk_TD = torch.randn(T, D, generator=g, dtype=torch.float64)
    torch.manual_seed(1)
    return packed, ids_T, trunk_TD, torch.nn.Embedding(V, D).double(), torch.randn(V, D).double()


def test_mtp_loss_by_hand():
    packed = Packed.from_cu_seqlens(
        torch.tensor([0, 4, 6]), torch.tensor([False, True, True, False, True, False])
    )
    ids = torch.tensor([0, 1, 2, 0, 1, 2])
    logits = torch.arange(18.0).view(6, 3).sin()
    logp = logits.log_softmax(-1)
    # Depth 1: t = 0 predicts x_2, which position 1 trains on; t = 1 predicts x_3. The second
    # sequence has two tokens, so nothing two places after its first.
    first = -(logp[0, 2] + logp[1, 0])
    # Depth 2: t = 0 predicts x_3, by position 2.
    second = -logp[0, 0]
    loss, metrics = mtp_loss([logits, logits], ids, packed, denominator=3)
    torch.testing.assert_close(loss, 0.2 / 2 * (first + second) / 3)
    assert float(metrics["mtp/loss/depth_1"]) == pytest.approx(float(first) / 2)
    assert float(metrics["mtp/loss/depth_2"]) == pytest.approx(float(second))
    assert float(metrics["mtp/loss"]) == pytest.approx(float(first + second) / 3)


def test_only_mtp_parameters_get_a_gradient_whatever_the_policys_loss_is():
    packed, ids_T, trunk_TD, embedding, head_VD = mtp_step()
    mtp, found = MTP(), []
    head_VD.requires_grad_()
    for factor in (0.0, 1.0, 1e3):
        trunk = trunk_TD.clone().requires_grad_()
        loss, _ = mtp_loss(
            mtp(trunk, embedding, ids_T, packed), ids_T, packed, denominator=5, head_VD=head_VD
        )
        mtp.zero_grad()
        (factor * trunk.sum() + loss).backward()
        assert (trunk.grad == factor).all() and head_VD.grad is None
        assert embedding.weight.grad is None
        found.append([p.grad.clone() for p in mtp.parameters()])
        assert all((g != 0).any() for g in found[-1])
    assert all(
        torch.equal(a, b) for grads in found[1:] for a, b in zip(grads, found[0], strict=True)
    )


def test_it_is_the_drafts_loss_with_hard_labels_and_equal_weights():
    packed, ids_T, *_ = mtp_step()
    logits = [torch.randn(12, 7, dtype=torch.float64) for _ in range(3)]
    loss, _ = mtp_loss(logits, ids_T, packed, denominator=5)
    expected, _ = draft_loss(
        [x[None] for x in logits], torch.zeros(1, 12, 7), ids_T[None], packed.mask_T[None],
        seq_ids_BL=packed.seq_ids_T[None], denominator=5, kind="hard", decay=1.0,
    )  # fmt: skip
    torch.testing.assert_close(loss, 0.2 / 3 * expected)


def test_mtp_modules_of_a_model_are_all_that_learns():
    from miles.rollout.speculative import MTPDraft  # not above: the ranks would import it too
    from tests.models import tiny, token_batch

    policy, ids_BL = tiny("llama"), token_batch()
    mtp = MTPDraft.from_target(policy, num_modules=2)
    packed = Packed.from_padded(torch.ones_like(ids_BL).bool())
    hidden_BLD = policy.model(ids_BL).last_hidden_state
    states = mtp.unroll_states(ids_BL, hidden_BLD, num_steps=2)
    loss, metrics = mtp_loss(
        [x.flatten(0, 1) for x in states], ids_BL.flatten(), packed,
        denominator=10, head_VD=policy.lm_head.weight,
    )  # fmt: skip
    loss.backward()
    assert all(p.grad is None for p in policy.parameters())
    assert all((p.grad != 0).any() for p in mtp.parameters())
    assert float(metrics["mtp/loss/depth_2"]) > 0


def test_mtp_labels_do_not_cross_a_boundary_and_padding_is_nothing():
    lengths = (5, 1, 6)
    packed, ids_T, trunk_TD, embedding, head_VD = mtp_step(lengths)
    mtp = MTP()

    def loss_of(ids, trunk, where):
        out = mtp(trunk, embedding, ids, where)
        return mtp_loss(out, ids, where, denominator=5, head_VD=head_VD)[0]

    whole = loss_of(ids_T, trunk_TD, packed)
    cuts = [slice(0, 5), slice(5, 6), slice(6, 12)]
    parts = [
        loss_of(ids_T[c], trunk_TD[c], Packed.from_padded(packed.mask_T[c][None])) for c in cuts
    ]
    torch.testing.assert_close(whole, sum(parts))
    ids_BL, mask_BL = torch.full((3, 7), 6), torch.zeros(3, 7).bool()
    trunk_BLD = torch.full((3, 7, 4), 1e3, dtype=torch.float64)
    for b, c in enumerate(cuts):
        ids_BL[b, : lengths[b]], mask_BL[b, : lengths[b]] = ids_T[c], packed.mask_T[c]
        trunk_BLD[b, : lengths[b]] = trunk_TD[c]
    padded = loss_of(ids_BL.flatten(), trunk_BLD.flatten(0, 1), Packed.from_padded(mask_BL))
    torch.testing.assert_close(whole, padded)


SHARDS = {  # which of 12 tokens lie on which rank
    2: {"halves": [range(0, 6), range(6, 12)], "zigzag": [[0, 1, 2, 9, 10, 11], range(3, 9)]},
    3: {
        "zigzag": [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]],
        "shuffled": [[11, 3, 0], [7, 5, 1, 10, 2], [4, 6, 8, 9]],
        "one_empty": [range(0, 7), range(7, 12), []],
    },
}


def mtp_shards(world_size):
    rank, found = torch.distributed.get_rank(), {}
    for name, shards in SHARDS[world_size].items():
        packed, ids_T, trunk_TD, embedding, head_VD = mtp_step()
        index_T = torch.tensor(list(shards[rank]), dtype=torch.int64)
        here = Packed(
            seq_ids_T=packed.seq_ids_T[index_T],
            mask_T=packed.mask_T[index_T],
            num_seqs=packed.num_seqs,
            positions_T=packed.positions_T[index_T],
            seq_group=torch.distributed.group.WORLD,
        )
        mtp = MTP()
        loss, metrics = mtp_loss(
            mtp(trunk_TD[index_T], embedding, ids_T[index_T], here),
            ids_T[index_T], here, denominator=5, head_VD=head_VD,
        )  # fmt: skip
        loss.backward()
        found[name] = {
            "loss": loss.detach(),
            "grads": [p.grad for p in mtp.parameters()],
            "metrics": reduce_metrics(metrics, group=torch.distributed.group.WORLD),
            "index": index_T,
            "shifted": shift_tokens(trunk_TD[index_T].float(), here, by=3, fill=-7),
        }
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_context_parallel_shards_sum_to_one_process(world_size, tmp_path):
    packed, ids_T, trunk_TD, embedding, head_VD = mtp_step()
    mtp = MTP()
    loss, metrics = mtp_loss(
        mtp(trunk_TD, embedding, ids_T, packed), ids_T, packed, denominator=5, head_VD=head_VD
    )
    loss.backward()
    shifted = shift_tokens(trunk_TD.float(), packed, by=3, fill=-7)
    ranks = run(mtp_shards, world_size, tmp_path, world_size)
    for name in SHARDS[world_size]:
        parts = [rank[name] for rank in ranks]
        torch.testing.assert_close(sum(p["loss"] for p in parts), loss.detach())
        for i, parameter in enumerate(mtp.parameters()):
            torch.testing.assert_close(sum(p["grads"][i] for p in parts), parameter.grad)
        for part in parts:
            torch.testing.assert_close(part["metrics"], reduce_metrics(metrics))
            torch.testing.assert_close(part["shifted"], shifted[part["index"]], rtol=0, atol=0)


def test_bad_mtp_input_is_refused_in_words():
    packed, ids_T, *_ = mtp_step()
    with pytest.raises(SettingError, match="empty"):
        mtp_loss([], ids_T, packed, denominator=1)
    with pytest.raises(SettingError, match="scaling"):
        mtp_loss([torch.zeros(12, 7)], ids_T, packed, denominator=1, scaling=-1)
    with pytest.raises(ShapeError, match="input_ids_T"):
        mtp_loss([torch.zeros(12, 7)], ids_T[:3], packed, denominator=1)
    bare = Packed(seq_ids_T=packed.seq_ids_T, mask_T=packed.mask_T, num_seqs=3)
    with pytest.raises(SettingError, match="positions_T"):
        mtp_loss([torch.zeros(12, 7)], ids_T, bare, denominator=1)
