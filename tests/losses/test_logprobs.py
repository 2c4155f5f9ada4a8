import pytest
import torch

from miles.errors import DtypeError, SettingError, ShapeError
from miles.losses.logprobs import token_logprobs

T, V = 6, 11


def random_logits(dtype=torch.float64, scale=4.0):
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(T, V, generator=rng, dtype=torch.float64) * scale
    return logits.to(dtype), torch.randint(0, V, (T,), generator=rng)


def reference(logits_TV, targets_T, temperature=1.0):
    logprobs_TV = torch.log_softmax(logits_TV.double() / temperature, -1)
    return logprobs_TV.gather(-1, targets_T[:, None])[:, 0]


def test_literal():
    logits = torch.tensor([[0.0, 0.0], [torch.tensor(3.0).log(), 0.0]])
    got = token_logprobs(logits, torch.tensor([0, 0])).exp()
    assert got.tolist() == pytest.approx([0.5, 0.75])


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_float64_equals_log_softmax_in_value_and_gradient(temperature):
    logits, targets = random_logits()
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    upstream = torch.linspace(-2, 3, T, dtype=torch.float64)
    got = token_logprobs(ours, targets, temperature=temperature)
    expected = reference(theirs, targets, temperature)
    (got * upstream).sum().backward()
    (expected * upstream).sum().backward()
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-13)


def test_gradcheck():
    logits, targets = random_logits(scale=1.0)
    targets[2] = -100
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: token_logprobs(x, targets, temperature=0.7), logits)


@pytest.mark.parametrize(
    ("dtype", "grad_error"), [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)]
)
def test_low_precision_logits_give_float32_logprobs(dtype, grad_error):
    logits, targets = random_logits(dtype)
    exact = logits.double().requires_grad_()
    logits.requires_grad_()
    got = token_logprobs(logits, targets, temperature=0.7)
    expected = reference(exact, targets, 0.7)
    got.sum().backward()
    expected.sum().backward()
    assert got.dtype == torch.float32 and logits.grad.dtype == dtype
    assert (got - expected).abs().max() < 5e-6
    assert (logits.grad - exact.grad).abs().max() < grad_error


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
def test_ignored_rows_give_zero_and_no_gradient_whatever_they_hold(dtype, garbage):
    logits, targets = random_logits(dtype)
    clean = logits.clone().requires_grad_()
    ignored = torch.tensor([1, 4])
    logits[ignored] = garbage
    masked_targets = targets.index_fill(0, ignored, -100)
    logits.requires_grad_()
    got = token_logprobs(logits, masked_targets)
    upstream = torch.ones(T).index_fill(0, ignored, torch.nan)
    got.backward(upstream.to(got.dtype))
    expected = token_logprobs(clean, masked_targets)
    expected.sum().backward()
    assert got[ignored].tolist() == [0.0, 0.0]
    assert (logits.grad[ignored] == 0).all()
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    torch.testing.assert_close(logits.grad, clean.grad, rtol=0, atol=0)


def test_nan_in_a_row_with_a_target_is_not_hidden():
    logits, targets = random_logits()
    logits[2, (targets[2] + 1) % V] = torch.nan
    logits.requires_grad_()
    got = token_logprobs(logits, targets)
    got.sum().backward()
    assert got.isnan().tolist() == [False, False, True, False, False, False]
    assert logits.grad[2].isnan().any() and logits.grad[3].isfinite().all()


def test_a_forbidden_vocabulary_entry_takes_no_probability_and_no_gradient():
    logits = torch.tensor([[0.0, -torch.inf, 0.0]], requires_grad=True)
    got = token_logprobs(logits, torch.tensor([0]))
    got.sum().backward()
    assert got.exp().item() == pytest.approx(0.5)
    assert logits.grad[0].tolist() == pytest.approx([0.5, 0.0, -0.5])


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[1e4, 0.0]])
    assert token_logprobs(logits, torch.tensor([0])).item() == 0.0
    assert token_logprobs(logits, torch.tensor([1])).item() == -1e4


def test_temperature_scales_the_logits_and_not_the_logprob():
    """prime-rl PR 697 divided the log-prob by the temperature."""
    logits = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    targets = torch.tensor([0])
    got = token_logprobs(logits, targets, temperature=2.0)
    torch.testing.assert_close(got, token_logprobs(logits / 2, targets))
    assert not torch.isclose(got, token_logprobs(logits, targets) / 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_temperature_for_each_token_equals_token_by_token(dtype):
    logits, targets = random_logits(dtype)
    targets[3] = -100
    temperature = torch.linspace(0.3, 2.5, T)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    got = token_logprobs(ours, targets, temperature=temperature)
    expected = torch.cat(
        [
            token_logprobs(theirs[i : i + 1], targets[i : i + 1], temperature=x.item())
            for i, x in enumerate(temperature)
        ]
    )
    got.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0)


def test_the_temperature_of_an_ignored_row_is_not_looked_at():
    logits, targets = random_logits()
    targets[3] = -100
    logits.requires_grad_()
    temperature = torch.ones(T).index_fill(0, torch.tensor([3]), 0.0)
    token_logprobs(logits, targets, temperature=temperature).sum().backward()
    assert (logits.grad[3] == 0).all() and logits.grad.isfinite().all()


def test_one_temperature_in_a_tensor_is_that_of_all():
    logits, targets = random_logits()
    got = token_logprobs(logits, targets, temperature=torch.tensor(0.5))
    assert torch.equal(got, token_logprobs(logits, targets, temperature=0.5))


def test_bf16_logits_do_not_give_bf16_logprobs():
    """TRL's selective_log_softmax returned bf16 log-probs: wrong by up to 0.042 nats."""
    rng = torch.Generator().manual_seed(0)
    logits = (torch.randn(64, 1000, generator=rng) * 2).bfloat16()
    targets = torch.randint(0, 1000, (64,), generator=rng)
    exact = reference(logits, targets)
    assert (token_logprobs(logits, targets) - exact).abs().max() < 1e-5
    assert (exact.bfloat16() - exact).abs().max() > 0.01


def test_no_tokens():
    assert token_logprobs(torch.zeros(0, V), torch.zeros(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (ShapeError, r"\(6, 11\).*\(5,\); expected", {"targets_T": torch.zeros(5).long()}),
        (ShapeError, r"\(11,\).*expected \[T, V\]", {"logits_TV": torch.zeros(V)}),
        (DtypeError, "torch.int64.*expected floating", {"logits_TV": torch.zeros(T, V).long()}),
        (DtypeError, "torch.float32; expected.*int64", {"targets_T": torch.zeros(T)}),
        (SettingError, r"temperature is 0.*above 0", {"temperature": 0.0}),
        (SettingError, r"temperature is nan.*above 0", {"temperature": float("nan")}),
        (SettingError, r"temperature is -0.5.*above 0", {"temperature": -0.5}),
        (SettingError, r"is \[0.0, .*at tokens \[0, 1, 2", {"temperature": torch.zeros(T)}),
        (SettingError, r"is \[nan, .*above 0", {"temperature": torch.full((T,), torch.nan)}),
        (ShapeError, r"temperature.*\(11,\); expected", {"temperature": torch.ones(V)}),
        (DtypeError, "temperature is torch.int64", {"temperature": torch.ones(T).long()}),
        (SettingError, r"holds \[11, .*expected 0\.\.10", {"targets_T": torch.full((T,), V)}),
        (SettingError, r"holds \[-1, .*or -100", {"targets_T": torch.full((T,), -1)}),
    ],
)
def test_bad_input(error, match, change):
    logits, targets = random_logits()
    with pytest.raises(error, match=match):
        token_logprobs(**({"logits_TV": logits, "targets_T": targets} | change))
