"""Models in block FP8: linears and fused experts against the same numbers written as they are."""

import pytest
import torch
import torch.nn.functional as F

from miles.errors import SettingError
from miles.precision import BlockFP8, Int4, fake_quantize, quantize
from miles.precision.modules import convert_, quantized_parameters
from tests.models import tiny, token_batch

SIZES = {"hidden_size": 128, "intermediate_size": 128, "initializer_range": 0.1, "head_dim": 64}
MOE = {"moe_intermediate_size": 128, "num_experts": 4}
RECIPE = BlockFP8(fprop="fp8", dgrad="bf16", wgrad="bf16")


def build(name="qwen3_moe", **changes):
    return tiny(name, **SIZES | (MOE if name == "qwen3_moe" else {}) | changes)


def rounded(x, role="activation"):
    return fake_quantize(x, RECIPE, role=role)


class Oracle(torch.nn.Module):
    """Replaces converted modules by float32 GEMMs of rounded operands."""

    @staticmethod
    def linear(module):
        def forward(x):
            return F.linear(rounded(x), rounded(module.weight, "weight"), module.bias)

        return forward

    @staticmethod
    def experts(module):
        def forward(hidden, ids, weights):
            out = torch.zeros_like(hidden)
            gate_up, down = (
                rounded(module.gate_up_proj, "weight"),
                rounded(module.down_proj, "weight"),
            )
            for token in range(len(hidden)):
                for slot, expert in enumerate(ids[token].tolist()):
                    gate, up = F.linear(rounded(hidden[token, None]), gate_up[expert]).chunk(2, -1)
                    inner = module.act_fn(gate) * up
                    out[token] += weights[token, slot] * F.linear(rounded(inner), down[expert])[0]
            return out

        return forward


def logits_of(model):
    return model(token_batch(2, 5)).logits


def test_linears_and_experts_are_gemms_of_rounded_operands():
    model, oracle = build(), build()
    report = convert_(model, [("*", RECIPE)])
    assert {m.name for m in report.modules if m.recipe is None} == {"lm_head"} | {
        m.name for m in report.modules if "k_proj" in m.name or "v_proj" in m.name
    }
    assert all("no multiples of 128" in m.reason for m in report.modules if "k_proj" in m.name)
    for m in report.converted:
        module = oracle.get_submodule(m.name)
        make = Oracle.experts if m.name.endswith("experts") else Oracle.linear
        module.forward = make(module)
    torch.testing.assert_close(logits_of(model), logits_of(oracle), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits_of(model), logits_of(build()), atol=1e-2)


def test_gradients_reach_the_master_weights():
    """In their dtype, and near the plain ones: only the forward pass is rounded here."""
    model, plain = build("llama"), build("llama")
    convert_(model, [("*", RECIPE)])
    for one in (model, plain):
        logits_of(one).square().mean().backward()
    for (name, got), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        cosine = F.cosine_similarity(got.grad.flatten(), expected.grad.flatten(), dim=0)
        assert got.grad.dtype == torch.float32 and cosine > 0.9, name


def test_experts_take_any_routing():
    """Experts without a token, and one with all of them."""
    model = build()
    convert_(model, [("*.experts", RECIPE)])
    experts = model.model.layers[0].mlp.experts
    hidden = torch.randn(6, 128, requires_grad=True)
    for ids in ([[1, 3]] * 6, [[0, 2]] * 3 + [[2, 0]] * 3):
        ids, weights = torch.tensor(ids), torch.full((6, 2), 0.5, requires_grad=True)
        out = experts(hidden, ids, weights)
        torch.testing.assert_close(
            out, Oracle.experts(experts)(hidden, ids, weights), rtol=1e-4, atol=1e-4
        )
        out.sum().backward()
        used = experts.down_proj.grad.flatten(1).any(1)
        assert used.nonzero().flatten().tolist() == sorted(set(ids.flatten().tolist()))
        experts.zero_grad()


def test_weights_are_rounded_in_the_dtype_that_is_computed_in():
    """float32 masters under autocast: their bf16 copies round to other codes in places."""
    model = build("llama")
    convert_(model, [("*", RECIPE)], dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        logits_of(model).sum().backward()
    first = next(iter(quantized_parameters(model)))
    assert first.parameter.dtype == first.parameter.grad.dtype == torch.float32
    (part,) = first.parts()
    copy = quantize(first.parameter.detach().bfloat16(), RECIPE)
    assert torch.equal(part.codes.float(), copy.codes.float())
    unaware = build("llama")
    convert_(unaware, [("*", RECIPE)])
    autocast = torch.autocast("cpu", torch.bfloat16)
    with pytest.raises(SettingError, match=r"dtype=torch\.bfloat16"), autocast:
        logits_of(unaware)


def test_int4_under_autocast_rounds_the_copy_too():
    model = build("llama")
    convert_(model, [("*.q_proj", Int4())], dtype=torch.bfloat16)
    q_proj = model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 128)
    with torch.autocast("cpu", torch.bfloat16):
        got = q_proj(x)
    weight = fake_quantize(q_proj.weight.detach().bfloat16(), Int4())
    assert torch.equal(got, F.linear(x.bfloat16(), weight))
    got.sum().backward()
    assert q_proj.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", ["checkpointed", "compiled"])
def test_checkpointing_and_compiling_change_nothing(kind):
    layers = 1 if kind == "compiled" else 2
    model, other = (build(num_hidden_layers=layers).train() for _ in range(2))
    for one in (model, other):
        convert_(one, [("*", BlockFP8())])
    run = other
    if kind == "checkpointed":
        other.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        torch._dynamo.reset()
        run = torch.compile(other, backend="aot_eager", fullgraph=True)
    input_ids = token_batch(2, 5)
    for forward in (model, run):
        forward(input_ids, use_cache=False).logits.square().mean().backward()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_training_in_fp8_learns():
    torch.manual_seed(0)
    model = build("llama")
    convert_(model, [("*", BlockFP8())])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    ids = token_batch(4, 8)
    losses = []
    for _ in range(30):
        logits = model(ids).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
