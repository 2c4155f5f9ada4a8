"""An online draft on a GPU: the numbers of the CPU, memory that is given back, chunks that stay,
and a host that does not wait."""

import pytest
import torch

from miles import Packed
from miles.rollout.speculative import DraftTrainer, Eagle3Draft, draft_loss
from miles.rollout.speculative._host import HostCopies, upload
from tests.models import tiny, token_batch


def made(device, *, dtype=torch.float64, **settings):
    policy = tiny("llama", dtype=dtype, num_hidden_layers=4).train().to(device)
    torch.manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    draft = Eagle3Draft.from_target(tiny("llama", dtype=dtype, num_hidden_layers=4), dtype=wide)
    state = draft.state_dict()
    draft = Eagle3Draft.from_target(policy, dtype=wide)
    draft.load_state_dict(state)
    return DraftTrainer(draft, policy, **{"lr": 1e-2, "share": 1.0} | settings)


def batch_of(layout, device):
    """Ids, mask and what else the policy is called with."""
    ids_BL = token_batch(8, 16).to(device)
    mask_BL = torch.ones_like(ids_BL, dtype=torch.bool)
    mask_BL[:, -1] = False
    if layout == "whole":
        return ids_BL, mask_BL, {}
    real_BL = torch.arange(16, device=device) < torch.arange(9, 17, device=device)[:, None]
    if layout == "padded":
        return ids_BL, mask_BL, {"attention_mask": real_BL.long()}
    lengths = real_BL.sum(1)
    positions = (real_BL.cumsum(1) - 1)[real_BL][None]
    packed = Packed.from_cu_seqlens(
        torch.cat([lengths[:1] * 0, lengths.cumsum(0)]), mask_BL[real_BL]
    )
    return ids_BL[real_BL][None], packed, {"position_ids": positions}


def train(trainer, steps=3, layout="whole"):
    ids_BL, mask, call = batch_of(layout, trainer.policy.device)
    for _ in range(steps):
        with trainer.capture(mask):
            trainer.policy(ids_BL, use_cache=False, **call)
        trainer.observe()
        metrics = trainer.step()
    return {name: float(value) for name, value in metrics.items()}


@pytest.mark.parametrize("layout", ["whole", "padded", "packed"])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_it_is_what_the_cpu_computes(layout, share):
    there, here = (train(made(device, share=share), layout=layout) for device in ("cuda", "cpu"))
    for name, value in here.items():
        assert abs(there[name] - value) <= 1e-7 * max(1, abs(value)), name


@pytest.mark.parametrize("layout", ["whole", "padded", "packed"])
@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])  # float64 attends by a mask
def test_nothing_is_waited_for_in_backward_pass_and_draft(layout, share, dtype):
    autocast = torch.bfloat16 if dtype == torch.bfloat16 else None
    trainer = made("cuda", dtype=dtype, autocast=autocast, share=share)
    train(trainer, layout=layout)  # what is made once, and memory that is kept
    ids_BL, mask, call = batch_of(layout, "cuda")
    with trainer.capture(mask):
        logits = trainer.policy(ids_BL, use_cache=False, **call).logits
    torch.cuda.set_sync_debug_mode("error")
    try:
        logits.logsumexp(-1).mean().backward()
        trainer.observe()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    trainer.step()


def test_the_host_runs_ahead_of_a_draft_whose_mask_is_on_the_cpu():
    trainer = made("cuda")
    ids_BL, mask_BL, _ = batch_of("whole", "cuda")
    host_BL = mask_BL.cpu()
    for _ in range(2):
        with trainer.capture():
            trainer.policy(ids_BL, use_cache=False)
        torch.cuda._sleep(2 * 10**9)
        slept = torch.cuda.Event()
        slept.record()
        trainer.observe(host_BL)
        ahead = not slept.query()
        trainer.step()
    assert ahead


def test_a_host_copy_is_of_the_values_when_it_was_begun():
    whole = torch.arange(12, device="cuda").view(3, 4)
    parts = [whole[:, 1:], whole.T, whole[:1].expand(2, 4), whole > 5]
    expected = [part.cpu() for part in parts]
    copies = HostCopies()
    copies.begin(*parts, None)
    torch.cuda._sleep(10**8)
    whole.add_(100)
    for part, values in zip(parts, expected, strict=True):
        assert copies.of(part).device.type == "cpu" and copies.of(part).equal(values)
    assert copies.of(whole).equal(torch.arange(100, 112).view(3, 4))  # one that was not begun
    assert upload(expected[1], whole.device).equal(torch.arange(12, device="cuda").view(3, 4).T)


def test_a_bf16_policy_under_checkpointing_teaches_a_float32_draft():
    trainer = made("cuda", dtype=torch.bfloat16, autocast=torch.bfloat16)
    trainer.policy.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    first = train(trainer, 1)
    last = train(trainer, 60)
    assert last["draft/acceptance/step_0"] > first["draft/acceptance/step_0"] + 0.1


def test_a_state_loaded_while_offloaded_trains_on():
    one, two = made("cuda"), made("cuda")
    train(one), train(two)
    two.offload_()
    two.load_state_dict(one.state_dict())
    two.onload_()
    assert train(two) == train(one)


def test_offloading_frees_the_device_and_changes_no_number():
    one, two = made("cuda"), made("cuda")
    train(one), train(two)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    two.offload_()
    moments = [s["exp_avg"] for s in two.optimizer.state.values()]
    params = list(two.draft.parameters())
    assert all(tensor.device.type == "cpu" for tensor in [*params, *moments])
    assert all(tensor.device.type == "cpu" for _, tensor in two.named_tensors())
    freed = sum(3 * p.nbytes for p in params)
    assert before - torch.cuda.memory_allocated() >= freed
    two.onload_()
    assert all(p.device.type == "cuda" for p in params)
    assert train(two) == train(one)


def test_float32_copies_of_the_logits_live_a_chunk_at_a_time():
    T, V = 16384, 65536  # whole in float32, one would be 4 GiB
    draft = torch.randn(1, T, V, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    policy = torch.randn(1, T, V, device="cuda", dtype=torch.bfloat16)
    ids = torch.zeros(1, T, dtype=torch.int64, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    loss, _ = draft_loss([draft], policy, ids, ids == 0, denominator=T)
    loss.backward()
    extra = torch.cuda.max_memory_allocated() - start - draft.grad.nbytes
    assert extra < 2**30, f"{extra / 2**30:.2f} GiB"
