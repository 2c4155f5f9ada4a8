"""What hooks read of a policy's pass: once, whatever the batch and the pass look like."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from miles import Packed, Sample
from miles.errors import (
    UnsupportedModelError,
)
from miles.rollout import collate
from miles.rollout.speculative import Eagle3Draft
from miles.rollout.speculative.draft import FINAL
from miles.rollout.speculative.trainer import DraftTrainer
from tests.models import token_batch
from tests.rollout.speculative.tiny_draft import (
    TinyDraft,
    grads,
    grads_after,
    mask_of,
    observe_once,
    policy_of,
    trainer_of,
)


def test_features_are_the_outputs_of_the_layers_and_of_the_final_norm():
    policy = policy_of()
    ids_BL = token_batch()
    draft = TinyDraft(policy, layers=(0, 2, FINAL))
    trainer = trainer_of(draft, policy)
    with trainer.capture():
        logits_BLV = policy(ids_BL).logits
    assert not [hook for module in policy.modules() for hook in module._forward_hooks]
    seen = trainer._captured
    states = policy(ids_BL, output_hidden_states=True).hidden_states  # embeddings come first
    expected = torch.cat([states[1], states[3], states[-1]], -1)
    torch.testing.assert_close(seen.features_BLF, expected.detach(), rtol=0, atol=0)
    torch.testing.assert_close(seen.target.values_BKX, logits_BLV.detach(), rtol=0, atol=0)
    assert not seen.features_BLF.requires_grad and not seen.target.values_BKX.requires_grad


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_counts_a_pass_once(reentrant):
    policy, ids_BL = policy_of(), token_batch()
    expected = grads_after(policy, ids_BL)
    draft = TinyDraft(policy)
    trainer = trainer_of(draft, policy)
    policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    embeds = policy.get_input_embeddings()
    embeds.register_forward_hook(lambda *args: args[2].requires_grad_())
    with trainer.capture():
        policy(ids_BL).logits.sum().backward()  # the second runs are inside the block too
    trainer.observe(mask_of(ids_BL))
    torch.testing.assert_close(grads(draft), expected)
    assert trainer.pending == 1


def test_a_policy_that_is_run_again_as_a_whole_counts_once():
    policy, ids_BL = policy_of(), token_batch()
    trainer = trainer_of(TinyDraft(policy), policy)
    with trainer.capture():
        logits = checkpoint(lambda ids: policy(ids).logits, ids_BL, use_reentrant=False)
        logits.sum().backward()
    trainer.observe(mask_of(ids_BL))
    torch.testing.assert_close(grads(trainer.draft), grads_after(policy, ids_BL))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("draft_of", [TinyDraft, Eagle3Draft.from_target])
def test_padded_and_packed_batches_teach_the_same(draft_of, side):
    lengths, ids_BL = [9, 4, 6], token_batch(3, 9)
    places_L, ends_B1 = torch.arange(9), torch.tensor(lengths)[:, None]
    real_BL = places_L < ends_B1
    mask_BL = (places_L >= 1) & (places_L < ends_B1 - 1)
    packed_ids, packed_mask = ids_BL[real_BL][None], mask_BL[real_BL][None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    if side == "left":
        shift = [9 - n for n in lengths]
        ids_BL, real_BL, mask_BL = (
            torch.stack([row.roll(by) for row, by in zip(x, shift, strict=True)])
            for x in (ids_BL, real_BL, mask_BL)
        )

    def made():
        policy = policy_of(dtype=torch.float64, attn_implementation="sdpa")
        torch.manual_seed(0)
        return policy, draft_of(policy)

    padded_positions = (real_BL.cumsum(1) - 1).clamp(min=0)
    policy, draft = made()
    padded = grads_after(
        policy, ids_BL, mask_BL, draft=draft,
        attention_mask=real_BL.long(), position_ids=padded_positions,
    )  # fmt: skip
    policy, draft = made()
    packed = grads_after(policy, packed_ids, packed_mask, draft=draft, position_ids=positions)
    torch.testing.assert_close(packed, padded)
    cu = torch.tensor([0, 9, 13, 19])
    policy, draft = made()
    batch = Packed.from_cu_seqlens(cu, packed_mask[0])
    packed = grads_after(policy, packed_ids, batch, draft=draft, position_ids=positions)
    torch.testing.assert_close(packed, padded)


def test_a_collated_batch_is_a_mask():
    samples = []
    for length in (3, 6):
        sample = Sample(tokens=[5, 6])
        sample.append(list(range(1, length)), logprobs=[-1.0] * (length - 1), weight_version=0)
        samples.append(sample)
    batch = collate(samples)
    policy = policy_of()
    call = {"attention_mask": batch.attention_mask_BL}
    found = grads_after(policy, batch.input_ids_BL, batch.packed, **call)
    mask_BL = batch.packed.mask_T.view_as(batch.input_ids_BL)
    expected = grads_after(policy, batch.input_ids_BL, mask_BL, **call)
    torch.testing.assert_close(found, expected)


def test_padding_may_hold_nan():
    policy, ids_BL = policy_of(), token_batch()
    mask_BL = mask_of(ids_BL)
    mask_BL[:, 5:] = False
    real_BL = (torch.arange(7) < 6).expand(3, 7)
    draft = TinyDraft(policy)
    trainer = trainer_of(draft, policy)
    with trainer.capture():
        policy(ids_BL, attention_mask=real_BL.long())
    seen = trainer._captured
    seen.features_BLF[:, 6:] = torch.nan
    trainer.observe(mask_BL)
    expected = grads_after(policy, ids_BL, mask_BL, attention_mask=real_BL.long())
    torch.testing.assert_close(grads(draft), expected)
    trainer.step()


def test_a_policy_that_returns_some_logits_or_none_teaches_the_same():
    policy, ids_BL = policy_of(), token_batch()
    mask_BL = mask_of(ids_BL)
    mask_BL[:, :4] = False
    expected = grads_after(policy, ids_BL, mask_BL)
    places = torch.tensor([6, 4, 5])
    for keep in (3, places):
        found = grads_after(policy, ids_BL, mask_BL, logits_to_keep=keep)
        torch.testing.assert_close(found, expected)
    draft = TinyDraft(policy)
    trainer = trainer_of(draft, policy)
    with trainer.capture():
        policy.model(ids_BL)  # a loss that goes from hidden states to log-probs
    trainer.observe(mask_BL)
    torch.testing.assert_close(grads(draft), expected)


def test_autocast_of_policy_and_draft():
    policy, ids_BL = policy_of(), token_batch(8, 16)
    expected = grads_after(policy, ids_BL)
    draft = TinyDraft(policy)
    trainer = trainer_of(draft, policy, autocast=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), trainer.capture():
        policy(ids_BL)
    assert trainer._captured.target.values_BKX.dtype == torch.bfloat16
    trainer.observe(mask_of(ids_BL))
    for name, grad in grads(draft).items():
        assert grad.dtype == torch.float32
        assert (grad - expected[name]).norm() < 0.2 * expected[name].norm(), name


def test_a_bf16_policy_teaches_a_float32_draft():
    policy = policy_of(dtype=torch.bfloat16)
    draft = Eagle3Draft.from_target(policy, dtype=torch.float32)
    trainer = trainer_of(draft, policy)
    observe_once(trainer, token_batch())
    trainer.step()
    assert all(tensor.dtype == torch.float32 for _, tensor in trainer.named_tensors())


def test_passes_without_a_gradient_teach_too():
    policy, ids_BL = policy_of(), token_batch()
    expected = grads_after(policy, ids_BL)
    draft = TinyDraft(policy)
    trainer = trainer_of(draft, policy)
    with torch.inference_mode(), trainer.capture():
        policy(ids_BL)
    trainer.observe(mask_of(ids_BL))
    torch.testing.assert_close(grads(draft), expected)


def test_a_compiled_layer_that_skips_hooks_is_refused_in_words():
    policy = policy_of()
    layer = policy.model.layers[1]
    layer._compiled_call_impl = layer.forward  # what nn.Module.compile() puts in place
    trainer = trainer_of(TinyDraft(policy), policy)
    with pytest.raises(UnsupportedModelError, match=r"layers \[1\]"), trainer.capture():
        policy(token_batch())


def test_logits_that_are_more_than_the_heads_output_are_not_taken_from_it():
    policy = policy_of()
    policy.config.final_logit_softcapping = 30.0
    trainer = DraftTrainer(TinyDraft(policy), policy)
    with pytest.raises(UnsupportedModelError, match="softcapping"), trainer.capture():
        policy.model(token_batch())
