"""NVFP4 weights that engines fuse are under one global scale, in the trainer and on disk."""

import copy
import io

import pytest
import torch
from torch.func import functional_call

from miles.errors import NonFiniteError
from miles.precision import NVFP4, convert_, export, fake_quantize, quantize, quantized_parameters
from miles.precision.loading import load, verify_parity
from miles.precision.saving import save
from tests.precision.checkpoints import same_bits, tiny

GROUPS = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
]


def uneven(family="llama", **changes):
    """A converted model, each of whose weights has another largest magnitude."""
    model = tiny(family, **changes)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.mul_(1 + index % 7)
        for name, parameter in model.named_parameters():
            if name.endswith("gate_up_proj"):
                parameter[:, : parameter.shape[1] // 2].mul_(3)
    convert_(model, [("*", NVFP4())])
    return model


def global_scales(model):
    suffix = ".weight_scale_2"
    return {n.removesuffix(suffix): t for n, t in export(model) if n.endswith(suffix)}


def test_two_weights_by_hand():
    model = torch.nn.Module()
    model.gate_proj, model.up_proj, model.down_proj = (
        torch.nn.Linear(16, 1, bias=False) for _ in range(3)
    )
    for module, largest in zip(model.children(), (6.0, 2688.0, 6.0), strict=True):
        module.weight.data.fill_(0).view(-1)[0] = largest
    convert_(model, [("*", NVFP4())])
    # 2688 = 6 x 448: the largest code times the largest scale of a block.
    found = {name: t.item() for name, t in global_scales(model).items()}
    assert found == pytest.approx({"gate_proj": 1.0, "up_proj": 1.0, "down_proj": 6 / 2688})
    # Under its own global scale a block's scale is 448; under the shared one, 1.
    assert dict(export(model))["gate_proj.weight_scale"].float().tolist() == [[1.0]]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3"])
def test_what_is_fused_has_one_scale_and_what_is_not_has_its_own(family):
    scales = global_scales(uneven(family))
    by_module = {}
    for name, scale in scales.items():
        prefix, _, last = name.rpartition(".")
        by_module.setdefault(prefix, {})[last] = scale
    shared = 0
    for found in by_module.values():
        for group in (["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"],
                      ["q_a_proj", "kv_a_proj_with_mqa"]):  # fmt: skip
            members = [found[name] for name in group if name in found]
            shared += len(members) > 1
            assert all(torch.equal(members[0], other) for other in members)
        alone = [found[n] for n in ("o_proj", "down_proj") if n in found]
        rest = [scale for name, scale in found.items() if name not in ("o_proj", "down_proj")]
        assert all(not torch.equal(one, other) for one in alone for other in rest)
    assert shared >= 4


def test_the_scale_is_that_of_the_largest_weight_and_the_forward_pass_has_it():
    model = uneven()
    for layer in range(2):
        for group in GROUPS:
            modules = [model.get_submodule(f"model.layers.{layer}.{name}") for name in group]
            together = torch.cat([module.weight.detach() for module in modules])
            wanted = fake_quantize(together, NVFP4()).split([len(m.weight) for m in modules])
            alone = [fake_quantize(module.weight.detach(), NVFP4()) for module in modules]
            assert not all(map(torch.equal, wanted, alone))
            for module, rounded in zip(modules, wanted, strict=True):
                x = torch.eye(module.in_features, dtype=torch.bfloat16)
                assert torch.equal(module(x), rounded.t())


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_what_is_saved_is_what_is_computed_with_and_comes_back(family, tmp_path):
    model, other = uneven(family), uneven(family, seed=1)
    save(model, tmp_path / "step")
    verify_parity(model, tmp_path / "step")
    load(other, tmp_path / "step")
    ids = torch.arange(8)[None]
    torch.testing.assert_close(other(ids).logits, model(ids).logits, rtol=0, atol=0.1)


def test_experts_round_gate_and_up_as_one():
    (q, *_) = [q for q in quantized_parameters(uneven("qwen3_moe")) if "gate_up" in q.name]
    whole = quantize(q.parameter.detach(), NVFP4())
    gate, up = q.parts()
    assert torch.equal(gate.global_scale, up.global_scale)
    assert same_bits(torch.cat([gate.codes, up.codes], -2), whole.codes)


def test_another_weight_of_the_group_makes_it_new():
    model = uneven()
    attention = model.model.layers[0].self_attn
    x = torch.randn(2, 128, dtype=torch.bfloat16)
    before, own = attention.q_proj(x), attention.o_proj(x)
    with torch.no_grad():
        attention.v_proj.weight.mul_(100)
    assert not torch.equal(attention.q_proj(x), before)
    assert torch.equal(attention.o_proj(x), own)


def test_temporary_weights_of_the_group_are_not_kept():
    attention = uneven().model.layers[0].self_attn
    q, x = attention.q_proj, torch.randn(2, 128, dtype=torch.bfloat16)

    def with_largest(largest):
        other = torch.zeros_like(attention.v_proj.weight)
        other[0, 0] = largest
        with torch.no_grad():
            return functional_call(Call(attention), {"attention.v_proj.weight": other}, (x,))

    class Call(torch.nn.Module):
        def __init__(self, attention):
            super().__init__()
            self.attention = attention

        def forward(self, x):
            return self.attention.q_proj(x)

    kept = q(x)
    for largest in (50.0, 100.0, 50.0):
        own = torch.cat([q.weight.detach(), torch.full((1, 128), largest).bfloat16()])
        expected = torch.nn.functional.linear(x, fake_quantize(own, NVFP4())[:-1])
        assert torch.equal(with_largest(largest), expected)
    assert torch.equal(q(x), kept)


def test_a_group_is_of_converted_members_only():
    model = tiny("llama")
    convert_(model, [("*.v_proj", None), ("*_proj", NVFP4())])
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        attention.v_proj.weight.mul_(100)
        attention.k_proj.weight.mul_(3)
    scales = global_scales(model)
    q, k = (scales[f"model.layers.0.self_attn.{name}_proj"] for name in "qk")
    largest = max(attention.q_proj.weight.abs().amax(), attention.k_proj.weight.abs().amax())
    assert torch.equal(q, k) and q.item() == pytest.approx(largest.item() / 2688)


def test_copies_and_pickles_share_among_themselves():
    model = uneven()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    x = torch.randn(2, 128, dtype=torch.bfloat16)
    expected = model.model.layers[0].self_attn.q_proj(x)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        attention = other.model.layers[0].self_attn
        assert torch.equal(attention.q_proj(x), expected)
        assert attention.q_proj._together[2] is attention.v_proj
        with torch.no_grad():
            attention.v_proj.weight.mul_(100)
        assert not torch.equal(attention.q_proj(x), expected)
    assert torch.equal(model.model.layers[0].self_attn.q_proj(x), expected)


def test_gradients_pass_straight_through_each():
    attention = uneven().model.layers[0].self_attn
    x = torch.randn(2, 128, dtype=torch.bfloat16)
    (attention.q_proj(x) + attention.k_proj(x)).sum().backward()
    assert torch.equal(attention.q_proj.weight.grad, attention.k_proj.weight.grad)
    assert attention.v_proj.weight.grad is None


def test_compiled_it_is_one_graph_and_the_same():
    torch._dynamo.reset()
    model = uneven(num_hidden_layers=1)
    ids = torch.arange(8)[None]
    expected = model(ids, use_cache=False).logits
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, rtol=0, atol=0)


def test_nan_in_one_is_named_or_told_of():
    model = uneven()
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        attention.v_proj.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"v_proj\.weight \(weight\) holds 1 NaN"):
        attention.v_proj(torch.ones(1, 128, dtype=torch.bfloat16))
    with pytest.raises(NonFiniteError, match=r"q_proj.*a weight under the same global scale"):
        attention.q_proj(torch.ones(1, 128, dtype=torch.bfloat16))
