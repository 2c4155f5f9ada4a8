"""Converted models: what they compute, what stays as it was, and when weights are rounded."""

import copy
import io
import itertools
import pickle
from contextlib import closing

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.func import functional_call

import miles.precision._modules as modules
from miles.errors import NonFiniteError, SettingError
from miles.precision import BlockFP8, Int4, _kept, fake_quantize
from miles.precision.modules import (
    convert_,
    drop_cache,
    high_precision,
    quantized_parameters,
)
from miles.rollout import HFEngine
from tests.models import tiny, token_batch

INT4 = Int4(group_size=8)
MOE = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}


def model_of(name, **settings):
    """A tiny model whose sizes groups of eight divide."""
    if name in ("qwen2_moe", "qwen3_moe"):
        settings = MOE | settings
    return tiny(name, **settings)


def step(model, input_ids=None):
    model.zero_grad()
    logits = model(token_batch() if input_ids is None else input_ids).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), gradients


def with_rounded_weights(model, recipe):
    """The same model, its master weights replaced by what they round to."""
    rounded = copy.deepcopy(model)
    names = {q.name for q in quantized_parameters(model)}
    plain = model_of(
        model.config.model_type, experts=model.config._experts_implementation or "eager"
    )
    plain.load_state_dict(rounded.state_dict())
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if name in names:
                parameter.copy_(fake_quantize(parameter, recipe))
    return plain


@pytest.fixture(params=["llama", "qwen3_moe", "mixtral"])
def name(request):
    return request.param


@pytest.fixture(params=["eager", "grouped_mm"])
def experts(request):
    return request.param


def test_int4_computes_with_rounded_weights_and_trains_the_master(name, experts):
    model = model_of(name, experts=experts)
    before = {n: p.clone() for n, p in model.named_parameters()}
    report = convert_(model, [("*", INT4)])
    assert report.converted
    got, gradients = step(model)
    expected, expected_gradients = step(with_rounded_weights(model, INT4))
    assert torch.equal(got, expected)
    assert gradients.keys() == expected_gradients.keys()
    assert all(torch.equal(gradients[n], expected_gradients[n]) for n in gradients)
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in before.items()
    }
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_what_stays_high_precision_and_why():
    model = model_of("qwen3_moe")
    report = convert_(model, [("*.layers.0.*", None), ("*", INT4)])
    reasons = {m.name: m.reason for m in report.modules}
    assert reasons["model.layers.0.self_attn.q_proj"] == "rule '*.layers.0.*' keeps it"
    assert reasons["lm_head"].startswith("the head stays")
    assert reasons["model.layers.1.mlp.experts"] == ""
    assert {q.name for q in quantized_parameters(model)} == {
        *(f"model.layers.1.self_attn.{x}_proj.weight" for x in "qkvo"),
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.down_proj",
    }
    table = report.table()
    assert "lm_head" in table and "MiB" in table and str(INT4) in table


def test_the_head_and_a_router_are_converted_only_if_named_in_full():
    model = model_of("qwen2_moe")
    report = convert_(model, [("model.layers.0.mlp.shared_expert_gate", INT4), ("lm_head", INT4)])
    assert {m.name for m in report.converted} == {
        "lm_head",
        "model.layers.0.mlp.shared_expert_gate",
    }
    again = model_of("qwen2_moe")
    kept = {m.name for m in convert_(again, [("*", INT4)]).modules if m.recipe is None}
    assert kept == {"lm_head", *(f"model.layers.{i}.mlp.shared_expert_gate" for i in (0, 1))}


def test_a_weight_is_rounded_once_a_step(monkeypatch):
    model = model_of("qwen3_moe")
    convert_(model, [("*", INT4)])
    rounded = []
    original = modules._fake
    monkeypatch.setattr(
        modules, "_fake", lambda weight, *a: rounded.append(weight.shape) or original(weight, *a)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    per_step = 2 * (4 + 2 + 1)  # the halves of gate_up_proj count twice
    for turn in range(1, 4):
        optimizer.zero_grad()
        for seed in range(3):
            model(token_batch(seed=seed)).logits.sum().backward()
        optimizer.step()
        assert len(rounded) == turn * per_step
    rounded.clear()
    model.load_state_dict(model_of("qwen3_moe", seed=1).state_dict())
    model(token_batch())
    assert len(rounded) == per_step
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.data.mul_(2)
    stale = model(token_batch()).logits
    drop_cache(model)
    assert not torch.equal(model(token_batch()).logits, stale)


def test_what_the_cache_holds_is_what_the_weights_round_to_after_every_step():
    model = model_of("llama")
    convert_(model, [("*", INT4)])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for seed in range(3):
        got, _ = step(model, token_batch(seed=seed))
        expected, _ = step(with_rounded_weights(model, INT4), token_batch(seed=seed))
        assert torch.equal(got, expected)
        optimizer.step()


def test_parts_are_gate_and_up():
    model = model_of("qwen3_moe")
    convert_(model, [("*.mlp.experts", INT4)])
    first = next(iter(quantized_parameters(model)))
    gate, up = first.parts()
    assert first.name.endswith("gate_up_proj") and gate.shape == up.shape == (8, 16, 16)
    assert torch.equal(
        torch.cat([gate.dequantize(), up.dequantize()], 1), fake_quantize(first.parameter, INT4)
    )


def test_high_precision_computes_with_the_master_weights():
    model, plain = model_of("qwen3_moe"), model_of("qwen3_moe")
    convert_(model, [("*", INT4)])
    with high_precision(model):
        assert torch.equal(model(token_batch()).logits, plain(token_batch()).logits)
    assert not torch.equal(model(token_batch()).logits, plain(token_batch()).logits)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    model, checkpointed = model_of("qwen3_moe").train(), model_of("qwen3_moe").train()
    for one in (model, checkpointed):
        convert_(one, [("*", INT4)])
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed.enable_input_require_grads()
    expected, got = step(model), step(checkpointed)
    assert torch.equal(expected[0], got[0])
    assert all(torch.equal(expected[1][n], got[1][n]) for n in expected[1])


def test_torch_compile_takes_a_converted_model_as_one_graph():
    torch._dynamo.reset()
    model = model_of("qwen3_moe", experts="grouped_mm", num_hidden_layers=1)
    convert_(model, [("*", INT4)])
    expected, gradients = step(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    model.zero_grad()
    logits = compiled(token_batch(), use_cache=False).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("recipe", "operators"),
    [
        (BlockFP8(), ["fp8_encode_weights", "fp8_matmul", "fp8_matmul"]),
        (BlockFP8(wgrad="fp8"), ["fp8_encode_weights", "fp8_matmul", "fp8_matmul", "fp8_wgrad"]),
        (Int4(), ["int4_fake_quantize"]),
    ],
    ids=["fp8", "fp8 wgrad", "int4"],
)
def test_every_kernel_of_a_compiled_layer_is_one_operator(recipe, operators):
    """What the compiler can't read, launches on a GPU, is inside of operators: nothing breaks."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, x = linears(128, 128, recipe=recipe), torch.randn(2, 3, 128, requires_grad=True)
    graphs = []

    def keep(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    compiled = torch.compile(model, backend=backend)
    results = []
    for function in (model, compiled):
        y = function(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, model[0].weight))))
    assert all(map(torch.equal, *results))
    assert not torch._dynamo.utils.counters["graph_break"] and len(graphs) == 2
    found = [target for graph in graphs for target in graph if target.startswith("miles.")]
    assert found == [f"miles.{name}.default" for name in operators]


def test_copies_keep_their_own_cache():
    model = model_of("llama")
    convert_(model, [("*", INT4)])
    model(token_batch())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    expected = with_rounded_weights(twin, INT4)(token_batch()).logits
    assert torch.equal(twin(token_batch()).logits, expected)
    assert list(twin.state_dict()) == list(model_of("llama").state_dict())


def test_bad_rules_are_told():
    model = model_of("llama")
    with pytest.warns(UserWarning, match=r"rule '\*\.experts' matches no module"):
        convert_(model, [("*.experts", INT4), ("*.q_proj", INT4)])
    with pytest.raises(SettingError, match="q_proj is converted already"):
        convert_(model, [("*", INT4)])
    report = convert_(model_of("llama"), [("*", Int4(group_size=64))])
    assert not report.converted
    reasons = [m.reason for m in report.modules if "q_proj" in m.name]
    assert all("16 columns, no multiple of group_size 64" in reason for reason in reasons)
    with pytest.raises(SettingError, match=r"layers\.0\.mlp\.up_proj can't be Int4"):
        convert_(model_of("llama"), [("model.layers.0.mlp.up_proj", Int4(group_size=64))])


def test_nan_in_a_weight_is_named():
    model = model_of("llama")
    convert_(model, [("*", INT4)])
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 2] = float("nan")
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        model(token_batch())


def test_pickling_says_nothing_of_the_cache():
    model = torch.nn.Sequential(torch.nn.Linear(16, 8))
    convert_(model, [("0", INT4)])
    model(torch.ones(1, 16))
    state = pickle.loads(pickle.dumps(model.state_dict()))
    assert list(state) == ["0.weight", "0.bias"]


@pytest.mark.parametrize("alias", [False, True])
def test_an_engine_rounds_the_weights_that_it_was_given(alias):
    models = [model_of("llama", seed=seed) for seed in range(3)]
    served = model_of("llama", seed=0)
    convert_(served, [("*", INT4)])
    # The second of two buffers is skipped, so that the first comes back with other numbers.
    buffer = {name: t.detach().clone() for name, t in models[0].state_dict(keep_vars=True).items()}
    other = {name: t.detach().clone() for name, t in models[1].state_dict(keep_vars=True).items()}
    with closing(HFEngine(served)) as engine:
        engine.commit_weights(buffer, version=1, alias=alias)
        with torch.no_grad():
            served(token_batch())
        engine.commit_weights(other, version=2, alias=alias)
        for name, tensor in models[2].state_dict().items():
            buffer[name].copy_(tensor)
        engine.commit_weights(buffer, version=3, alias=alias)
        with torch.no_grad():
            got = served(token_batch()).logits
    convert_(models[2], [("*", INT4)])
    assert torch.equal(got, models[2](token_batch()).logits)


FP8 = BlockFP8()
both_recipes = pytest.mark.parametrize("recipe", [INT4, FP8], ids=["int4", "fp8"])


def linears(*sizes, recipe, **settings):
    """Linear layers without bias, converted."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(n, m, bias=False) for n, m in itertools.pairwise(sizes)]
    model = torch.nn.Sequential(*layers)
    assert len(convert_(model, [("*", recipe)], **settings).converted) == len(layers)
    return model


@both_recipes
def test_two_sets_of_weights_for_one_module_are_rounded_apart(recipe):
    model, x = linears(128, 128, recipe=recipe), torch.randn(3, 128)
    policy = {"0.weight": model[0].weight.detach().clone()}
    for _ in range(20):
        one = functional_call(model, {"0.weight": policy["0.weight"] * 1}, (x,))
        other = functional_call(model, {"0.weight": policy["0.weight"] * 2}, (x,))
        assert torch.equal(2 * one, other)


@both_recipes
def test_training_goes_on_after_an_evaluation_in_inference_mode(recipe):
    model, x = linears(128, 128, recipe=recipe), torch.randn(3, 128)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        with torch.inference_mode():
            evaluated = model(x)
        assert torch.equal(evaluated, model(x).detach())
        model(x).sum().backward()
        optimizer.step()


@both_recipes
def test_a_frozen_weight_is_rounded_once(recipe, monkeypatch):
    model, x = linears(128, 128, recipe=recipe).requires_grad_(False), torch.randn(3, 128)
    counted = []
    original = _kept._check_finite
    monkeypatch.setattr(_kept, "_check_finite", lambda *a: counted.append(a[-1]) or original(*a))
    other = torch.nn.Parameter(torch.zeros(1))
    other.grad = torch.ones(1)
    for _ in range(3):
        model(x)
        torch.optim.SGD([other], lr=0.1).step()
    assert counted == ["0.weight"]


@both_recipes
def test_copies_and_pickles_compute_the_same(recipe):
    model, x = linears(128, 128, recipe=recipe), torch.randn(3, 128)
    expected = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert type(other[0]) is type(model[0]) and torch.equal(other(x), expected)
        assert [q.name for q in quantized_parameters(other)] == ["0.weight"]
    inner = copy.deepcopy(model)
    assert [ref() for ref in inner[0]._above] == [inner, inner[0]]


def test_what_computes_in_its_own_way_is_left_alone():
    class Scaled(torch.nn.Linear):
        def forward(self, input):
            return 3 * super().forward(input)

    normed = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(8, 8))
    attention = torch.nn.MultiheadAttention(8, 2)
    report = convert_(torch.nn.Sequential(Scaled(8, 8), normed, attention), [("*", INT4)])
    assert not report.converted
    reasons = {module.name: module.reason for module in report.modules}
    assert reasons["0"] == "Scaled computes in its own way"
    assert reasons["1"] == "its weight is computed from other parameters"
    assert "does not call it" in reasons["2.out_proj"]


def test_second_derivatives_raise():
    model, x = linears(128, 128, recipe=FP8), torch.randn(3, 128, requires_grad=True)
    with pytest.raises(SettingError, match="no second derivatives"):
        torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with high_precision(model):
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    assert gradient.requires_grad


def test_a_dtype_that_the_exporter_does_not_round_raises():
    model, x = linears(128, 128, recipe=FP8), torch.randn(3, 128)
    with pytest.raises(SettingError, match=r"0 got torch.bfloat16 and rounds weights of .*float32"):
        model(x.bfloat16())
    model = linears(128, 128, recipe=FP8, dtype=torch.bfloat16)
    assert model(x.bfloat16()).dtype == torch.bfloat16
    for call in (model, torch.compile(model, backend="eager")):
        with pytest.raises(SettingError, match=r"0 got torch.float32 and rounds"):
            call(x)


def test_experts_without_tokens():
    model = tiny("qwen3_moe", hidden_size=128, moe_intermediate_size=128)
    experts, ids = model.model.layers[0].mlp.experts, torch.empty(0, 2, dtype=torch.long)
    convert_(model, [("*.experts", FP8)])
    assert experts(torch.empty(0, 128), ids, torch.empty(0, 2)).shape == (0, 128)
