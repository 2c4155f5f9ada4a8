"""An online draft on a GPU: the numbers of the CPU, memory that is given back, chunks that stay."""

import torch

from miles.rollout.speculative import DraftTrainer, Eagle3Draft, draft_loss
from tests.models import tiny, token_batch


def made(device, *, dtype=torch.float64, **settings):
    policy = tiny("llama", dtype=dtype, num_hidden_layers=4).train().to(device)
    torch.manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    draft = Eagle3Draft.from_target(tiny("llama", dtype=dtype, num_hidden_layers=4), dtype=wide)
    state = draft.state_dict()
    draft = Eagle3Draft.from_target(policy, dtype=wide)
    draft.load_state_dict(state)
    return DraftTrainer(draft, policy, lr=1e-2, share=1.0, **settings)


def train(trainer, steps=3):
    ids_BL = token_batch(8, 16).to(trainer.policy.device)
    mask_BL = torch.ones_like(ids_BL, dtype=torch.bool)
    mask_BL[:, -1] = False
    for _ in range(steps):
        with trainer.capture():
            trainer.policy(ids_BL, use_cache=False)
        trainer.observe(mask_BL)
        metrics = trainer.step()
    return {name: float(value) for name, value in metrics.items()}


def test_it_is_what_the_cpu_computes():
    there, here = train(made("cuda")), train(made("cpu"))
    for name, value in here.items():
        assert abs(there[name] - value) <= 1e-7 * max(1, abs(value)), name


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
    assert extra < 2 * 2**30, f"{extra / 2**30:.2f} GiB"
