"""A report's numbers by hand, and the layer that breaks at its top."""

import itertools
import math

import pytest
import torch
from torch import nn

from miles.errors import EmptyBatchError, NonFiniteError, SettingError, ShapeError
from miles.precision import MXFP8, NVFP4, BlockFP8, Int4, quantize
from miles.precision.modules import convert_
from miles.precision.report import _Shift, quantization_report
from tests.precision.data import tensor


def model_of(*sizes: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    pairs = itertools.pairwise(sizes)
    return nn.Sequential(*(nn.Linear(*pair, bias=False) for pair in pairs))


def report_of(model, x, targets, **settings):
    return quantization_report(model, lambda: model(x), targets=targets, **settings)


@pytest.fixture
def tiny_moe():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=80, hidden_size=64, intermediate_size=64, moe_intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        num_experts=4, num_experts_per_tok=2, initializer_range=0.1,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config)


def test_the_worst_module_comes_first():
    model = model_of(64, 64, 64, 16)
    with torch.no_grad():
        model[1].weight[:, ::32] *= 200  # an outlier in each group: the rest rounds to zero
    convert_(model, [("*", Int4())])
    x = torch.randn(8, 64) * (torch.arange(64) % 32 != 0)
    report = report_of(model, x, torch.randint(16, (8,)))
    assert report.modules[0].name == "1"
    assert [row.kl for row in report.modules] == sorted(
        (row.kl for row in report.modules), reverse=True
    )
    assert report.table().splitlines()[2].startswith("1 ")


def test_a_module_alone_is_the_model_with_only_that_weight_rounded():
    model = model_of(64, 64, 16)
    x, targets = torch.randn(8, 64), torch.randint(16, (8,))
    plain = [layer.weight.detach().clone() for layer in model]
    rounded = [quantize(weight, Int4()).dequantize() for weight in plain]
    convert_(model, [("*", Int4())])
    report = report_of(model, x, targets)
    full = (x @ plain[0].T @ plain[1].T).log_softmax(-1)

    def expected(first, second):
        other = (x @ first.T @ second.T).log_softmax(-1)
        change = (other - full).gather(-1, targets[:, None])[:, 0]
        return (
            float((full.exp() * (full - other)).sum(-1).mean()),
            float((change.exp() - 1 - change).mean()),
            float(change.abs().mean()),
        )

    rows = {row.name: (row.kl, row.k3, row.logprob_abs) for row in report.modules}
    assert rows["0"] == pytest.approx(expected(rounded[0], plain[1]), rel=1e-3)
    assert rows["1"] == pytest.approx(expected(plain[0], rounded[1]), rel=1e-3)
    every = report.all_modules
    assert (every.kl, every.k3, every.logprob_abs) == pytest.approx(expected(*rounded), rel=1e-3)


def test_the_kl_of_a_hair_is_not_lost_in_the_normalisers_rounding():
    """p log(p / q) in float32 is off by 1e-7 here, and often negative."""
    torch.manual_seed(0)
    logits, moved = 30 + 5 * torch.randn(40, 2000), 1e-4 * torch.randn(40, 2000)
    shift = _Shift.of(logits, torch.zeros(40, dtype=torch.long))
    p, q = (x.double().log_softmax(-1) for x in (logits, logits + moved))
    exact = float((p.exp() * (p - q)).sum(-1).mean())
    assert exact < 1e-8
    assert shift.to(logits + moved)[1] == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("other", [0.0, 200.0])
def test_the_kl_of_distributions_far_apart(other):
    logits, moved = torch.tensor([[0.0, -200.0]]), torch.tensor([[0.0, other]])
    kl = _Shift.of(logits, torch.tensor([0])).to(moved)[1]
    assert kl == pytest.approx(math.log(2) if not other else 200.0)


def test_readings_of_a_weight_by_hand():
    model = model_of(64, 2)
    weight = torch.zeros(2, 64)
    weight[0, 0], weight[0, 1], weight[1, 40] = 7.0, 3.25, -14.0
    model[0].weight.data.copy_(weight)
    convert_(model, [("*", Int4())])
    row = report_of(model, torch.zeros(1, 64), torch.tensor([0])).modules[0]
    assert row.recipe == "Int4 g32"
    assert row.snr_db == pytest.approx(10 * math.log10((49 + 3.25**2 + 196) / 0.25**2))
    assert row.saturated == 2 / 128
    assert (row.zero_blocks, row.num_blocks) == (2, 4)
    assert row.kl == row.k3 == row.logprob_abs == row.logit_rms == 0  # the input is zero


@pytest.mark.parametrize(
    ("recipe", "blocks"),
    [(Int4(), 256 * 8), (Int4.compressed_tensors(), 256 * 8), (MXFP8(), 256 * 8),
     (NVFP4(), 256 * 16)],
    ids=str,
)  # fmt: skip
def test_a_zero_half_is_told_in_every_format(recipe, blocks):
    model = model_of(256, 256)
    model[0].weight.data.copy_(tensor("normal", (256, 256), torch.float32))
    model[0].weight.data[128:] = 0
    convert_(model, [("*", recipe)])
    row = report_of(model, torch.randn(4, 256), torch.zeros(4, dtype=torch.long)).modules[0]
    assert (row.zero_blocks, row.num_blocks) == (blocks // 2, blocks)
    assert row.saturated > 0 and 15 < row.snr_db < 40


@pytest.mark.parametrize("fprop", ["fp8", "dequant"])
def test_block_fp8_counts_squares_and_rounds_activations_too(fprop):
    model = model_of(256, 384)
    model[0].weight.data[128:256] = 0
    convert_(model, [("*", BlockFP8(fprop=fprop))])
    row = report_of(model, torch.randn(4, 256), torch.zeros(4, dtype=torch.long)).modules[0]
    assert (row.zero_blocks, row.num_blocks) == (2, 6)
    assert row.recipe == "BlockFP8 fp32" and row.snr_db > 25 and row.kl > 0


def test_a_model_of_experts_with_a_padded_batch(tiny_moe):
    convert_(tiny_moe, [("*.experts", Int4()), ("*_proj", MXFP8())])
    ids = torch.randint(80, (2, 6))
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    report = quantization_report(tiny_moe, {"input_ids": ids, "attention_mask": mask})
    assert report.num_positions == 5 + 3
    recipes = {row.name: row.recipe for row in report.modules}
    assert recipes["model.layers.0.mlp.experts"] == "Int4 g32"
    assert recipes["model.layers.1.self_attn.q_proj"] == "MXFP8"
    experts = next(row for row in report.modules if row.name == "model.layers.0.mlp.experts")
    assert experts.num_blocks == 4 * (64 * 64 + 64 * 32) / 32  # of gate_up_proj and down_proj
    assert len(report.table().splitlines()) == 2 + len(report.modules)


def test_the_default_targets_are_the_next_tokens(tiny_moe):
    convert_(tiny_moe, [("*.experts", Int4())])
    ids = torch.randint(80, (1, 5))
    shifted = torch.cat([ids[:, 1:], torch.tensor([[-100]])], -1)
    by_default = quantization_report(tiny_moe, {"input_ids": ids})
    given = quantization_report(tiny_moe, lambda: tiny_moe(input_ids=ids).logits, targets=shifted)
    assert by_default == given
    labels = ids.clone()
    labels[:, :4] = -100
    last = quantization_report(tiny_moe, {"input_ids": ids, "labels": labels})
    assert last.num_positions == 1


def test_the_model_is_as_before(tiny_moe):
    convert_(tiny_moe, [("*.experts", Int4())])
    tiny_moe.train()
    tiny_moe.lm_head.eval()
    ids = torch.randint(80, (1, 5))
    state = {name: value.clone() for name, value in tiny_moe.state_dict().items()}
    logits = tiny_moe(ids).logits
    quantization_report(tiny_moe, {"input_ids": ids})
    assert torch.equal(tiny_moe(ids).logits, logits)
    assert tiny_moe.training and not tiny_moe.lm_head.training
    assert all(torch.equal(state[name], value) for name, value in tiny_moe.state_dict().items())
    assert all(parameter.grad is None for parameter in tiny_moe.parameters())


def test_only_modules_that_match_are_run_alone():
    model = model_of(64, 64, 16)
    convert_(model, [("*", Int4())])
    runs = []
    x, targets = torch.randn(2, 64), torch.tensor([1, 2])
    report = quantization_report(
        model, lambda: runs.append(1) or model(x), targets=targets, match="1"
    )
    assert [row.name for row in report.modules] == ["1"] and len(runs) == 3


def test_rounded_logits_that_are_not_finite_are_the_worst_of_all():
    class Fragile(nn.Module):
        """Its logits are NaN as soon as anything differs from what it was made with."""

        def __init__(self):
            super().__init__()
            self.layers = model_of(64, 64, 16)
            self.x = torch.randn(2, 64)
            self.hidden = self.layers[0](self.x).detach()

        def forward(self):
            hidden = self.layers[0](self.x)
            broken = float("nan") if not torch.equal(hidden, self.hidden) else 1.0
            return self.layers[1](hidden) * broken

    model = Fragile()
    convert_(model, [("*", Int4())])
    report = quantization_report(model, model, targets=torch.tensor([1, 2]))
    assert report.modules[0].name == "layers.0" and report.modules[0].kl == math.inf
    assert report.all_modules.logprob_abs == math.inf and report.modules[1].kl < math.inf


def test_what_makes_no_report_is_refused():
    model = model_of(64, 16)
    x, targets = torch.randn(2, 64), torch.tensor([1, 2])
    with pytest.raises(SettingError, match="none of the 0 converted modules"):
        report_of(model, x, targets)
    convert_(model, [("*", Int4())])
    with pytest.raises(SettingError, match=r"match='\*\.experts' fits none of the 1"):
        report_of(model, x, targets, match="*.experts")
    with pytest.raises(SettingError, match="a function and no targets"):
        quantization_report(model, lambda: model(x))
    with pytest.raises(SettingError, match=r"batch of \['inputs_embeds'\]"):
        quantization_report(model, {"inputs_embeds": x})
    with pytest.raises(ShapeError, match=r"\(2, 16\) and the targets \(3,\)"):
        report_of(model, x, torch.tensor([1, 2, 3]))
    with pytest.raises(EmptyBatchError, match="every target"):
        report_of(model, x, torch.tensor([-100, -100]))
    with pytest.raises(NonFiniteError, match="in high precision"):
        report_of(model, x * math.inf, targets)
    model[0].weight.data[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"logits in high precision|0\.weight"):
        report_of(model, x, targets)
