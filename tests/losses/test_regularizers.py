import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles import Packed
from miles.errors import DtypeError, EmptyBatchError, NonFiniteError, SettingError, ShapeError
from miles.losses.logprobs import token_logprobs
from miles.losses.regularizers import (
    entropy_quantile_mask,
    generalized_jsd,
    kl_penalty,
    nll,
    topk_distillation,
    value_loss,
)
from tests.steps import poison, quick, random_step

VALUES = ["k1", "k2", "k3", "abs"]
PACKED = Packed.from_padded(torch.ones(1, 2).bool())


@pytest.mark.parametrize(
    ("value", "expected", "gradient"),
    [
        ("k1", [0.5, -1.0], [1.0, 1.0]),
        ("k2", [0.125, 0.5], [0.5, -1.0]),
        ("k3", [math.exp(-0.5) - 0.5, math.e - 2], [1 - math.exp(-0.5), 1 - math.e]),
        ("abs", [0.5, 1.0], [1.0, -1.0]),
    ],
)
@pytest.mark.parametrize("grad", ["pathwise", "reverse_kl"])
def test_literals_and_their_gradients(value, expected, gradient, grad):
    logprobs_T = torch.tensor([-1.0, -3.0], dtype=torch.float64, requires_grad=True)
    ref_T = torch.tensor([-1.5, -2.0], dtype=torch.float64)
    kl_T = kl_penalty(logprobs_T, ref_T, PACKED, value=value, grad=grad)
    kl_T.sum().backward()
    assert kl_T.tolist() == pytest.approx(expected)
    wanted = gradient if grad == "pathwise" else [0.5, -1.0]
    assert logprobs_T.grad.tolist() == pytest.approx(wanted)


def test_defaults_are_k3_pathwise():
    step = random_step()
    got = kl_penalty(step.logprobs_T, step.ref_T, step.packed)
    explicit = kl_penalty(step.logprobs_T, step.ref_T, step.packed, value="k3", grad="pathwise")
    assert torch.equal(got, explicit)


@pytest.mark.parametrize("value", VALUES)
def test_gradcheck(value):
    logprobs_T = torch.tensor([-1.0, -3.0], dtype=torch.float64, requires_grad=True)
    ref_T = torch.tensor([-1.5, -2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: kl_penalty(x, ref_T, PACKED, value=value), logprobs_T)


@quick
@given(st.integers(0, 10_000))
def test_k2_k3_and_abs_are_never_negative(seed):
    step = random_step(seed)
    for value in ("k2", "k3", "abs"):
        assert (kl_penalty(step.logprobs_T, step.ref_T, step.packed, value=value) >= 0).all()


@pytest.mark.parametrize("grad", ["pathwise", "reverse_kl"])
@pytest.mark.parametrize("value", VALUES)
def test_equal_policies_have_no_penalty(value, grad):
    logprobs_T = torch.tensor([-1.0, -2.0], dtype=torch.float32)
    assert kl_penalty(logprobs_T, logprobs_T.clone(), PACKED, value=value, grad=grad).tolist() == [
        0,
        0,
    ]


def test_k3_of_a_tiny_float32_gap_is_not_rounded_away():
    k3_T = kl_penalty(torch.full((2,), 1e-3), torch.zeros(2), PACKED)
    assert k3_T.tolist() == pytest.approx([1e-6 / 2 - 1e-9 / 6] * 2, rel=1e-3)


def test_reverse_kl_gradient_is_that_of_the_exact_reverse_kl_in_expectation():
    logits = torch.tensor([0.3, -1.0, 0.8], dtype=torch.float64, requires_grad=True)
    ref = torch.log_softmax(torch.tensor([0.0, 0.5, -0.5], dtype=torch.float64), 0)
    logp = torch.log_softmax(logits, 0)
    exact = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits, retain_graph=True)[0]
    every_token = Packed.from_padded(torch.ones(1, 3).bool())
    kl_V = kl_penalty(logp, ref, every_token, value="k1", grad="reverse_kl")
    expected = torch.autograd.grad((logp.exp().detach() * kl_V).sum(), logits)[0]
    torch.testing.assert_close(expected, exact)


@pytest.mark.parametrize("grad", ["pathwise", "reverse_kl"])
@pytest.mark.parametrize("value", VALUES)
def test_masked_garbage_gives_zero_and_no_gradient(value, grad):
    step = random_step()
    mask_T = step.packed.mask_T
    logprobs_T, ref_T = step.leaf(), step.ref_T.clone().requires_grad_()
    kl_T = kl_penalty(logprobs_T, ref_T, step.packed, value=value, grad=grad)
    kl_T.sum().backward()
    assert (kl_T[~mask_T] == 0).all() and (logprobs_T.grad[~mask_T] == 0).all()
    assert kl_T.isfinite().all() and logprobs_T.grad.isfinite().all()
    assert ref_T.grad is None and kl_T.dtype == torch.float64


@pytest.mark.parametrize("grad", ["pathwise", "reverse_kl"])
@pytest.mark.parametrize("value", VALUES)
def test_a_trainable_nan_is_not_hidden(value, grad):
    new_T, old_T = torch.tensor([torch.nan, 0.0]), torch.tensor([0.0, torch.nan])
    assert kl_penalty(new_T, old_T, PACKED, value=value, grad=grad).isnan().all()


def test_bad_input():
    two, three = torch.zeros(2), torch.zeros(3)
    with pytest.raises(ShapeError, match=r"ref_logprobs_T has shape \(3,\); expected \(2,\)"):
        kl_penalty(two, three, PACKED)
    with pytest.raises(SettingError, match="value is 'k4'; expected k1"):
        kl_penalty(two, two, PACKED, value="k4")
    with pytest.raises(SettingError, match="grad is 'forward'; expected pathwise"):
        kl_penalty(two, two, PACKED, grad="forward")


def float64(*values, grad: bool = False) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def packed_of(length: int) -> Packed:
    return Packed.from_padded(torch.ones(1, length).bool())


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "gradient"),
    [
        (1.0, 1.0, 3.0, 2.0, -2.0),
        (1.1, 1.0, 3.0, 0.5 * 1.9**2, -1.9),
        (2.0, 1.0, 3.0, 0.5 * 1.8**2, 0.0),  # moved too far towards the return
        (0.0, 1.0, 3.0, 4.5, -3.0),  # moved away from it
        (2.0, 1.0, 1.0, 0.5, 1.0),
        (3.0, 1.0, 1.3, 0.5 * 1.7**2, 1.7),
    ],
)
def test_value_loss_literals(value, old, target, loss, gradient):
    values_T = float64(value, grad=True)
    loss_T = value_loss(values_T, float64(old), float64(target), packed_of(1))
    loss_T.sum().backward()
    assert loss_T.item() == pytest.approx(loss)
    assert values_T.grad.item() == pytest.approx(gradient)


def test_value_loss_without_a_clip_is_half_the_square():
    values_T = float64(2.0, -1.0, grad=True)
    old_T, returns_T = float64(0.0, torch.nan), float64(3.0, 1.0)
    loss_T = value_loss(values_T, old_T, returns_T, PACKED, clip=None)
    loss_T.sum().backward()
    assert loss_T.tolist() == [0.5, 2.0] and values_T.grad.tolist() == [-1.0, -2.0]


@quick
@given(st.integers(0, 10_000), st.floats(0.05, 1.0))
def test_value_loss_matches_scalar_arithmetic(seed, clip):
    step = random_step(seed)
    inputs = (step.logprobs_T, step.old_T, step.ref_T)
    got = value_loss(*inputs, step.packed, clip=clip)
    for t in step.packed.mask_T.nonzero().flatten().tolist():
        v, old, target = (values_T[t].item() for values_T in inputs)
        near = min(max(v, old - clip), old + clip)
        assert got[t].item() == pytest.approx(0.5 * max((v - target) ** 2, (near - target) ** 2))


def test_value_loss_and_nll_are_clean_at_masked_positions_and_detached_elsewhere():
    step = random_step()
    mask_T = step.packed.mask_T
    leaves = [x.clone().requires_grad_() for x in (step.logprobs_T, step.old_T, step.ref_T)]
    upstream = torch.full_like(step.old_T, torch.nan).where(~mask_T, 1.0)
    for loss_T in (value_loss(*leaves, step.packed), nll(leaves[0], step.packed)):
        leaves[0].grad = None
        loss_T.backward(upstream)
        assert (loss_T[~mask_T] == 0).all() and loss_T.isfinite().all()
        assert (leaves[0].grad[~mask_T] == 0).all() and leaves[0].grad.isfinite().all()
    assert leaves[1].grad is None and leaves[2].grad is None


@pytest.mark.parametrize("clip", [0.2, None])
def test_a_nan_among_values_is_not_hidden(clip):
    for which in range(3 if clip else 1):
        inputs = [float64(0.5), float64(0.5), float64(0.5)]
        inputs[which] = float64(torch.nan)
        assert value_loss(*inputs, packed_of(1), clip=clip).isnan().all()
    assert nll(float64(torch.nan), packed_of(1)).isnan().all()


def test_nll_literals():
    logprobs_T = float64(-1.5, -0.25, grad=True)
    loss_T = nll(logprobs_T, PACKED)
    loss_T.sum().backward()
    assert loss_T.tolist() == [1.5, 0.25] and logprobs_T.grad.tolist() == [-1.0, -1.0]


def test_gradcheck_of_value_loss():
    old_T, returns_T = float64(0.0, 0.0, 0.0), float64(1.0, 1.0, -1.0)
    values_T = float64(0.1, 0.5, 0.5, grad=True)
    assert torch.autograd.gradcheck(
        lambda v: value_loss(v, old_T, returns_T, packed_of(3)), values_T
    )


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a)


STUDENT, TEACHER = [0.2, 0.3, 0.5], [0.6, 0.3, 0.1]


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_generalized_jsd_literals_in_the_convention_of_trl(beta):
    # 0 is the forward KL(teacher || student), 1 the reverse; else the mixture is beta teacher
    mixture = [beta * p + (1 - beta) * q for p, q in zip(TEACHER, STUDENT, strict=True)]
    expected = beta * kl(TEACHER, mixture) + (1 - beta) * kl(STUDENT, mixture)
    if beta == 0:
        expected = kl(TEACHER, STUDENT)
    if beta == 1:
        expected = kl(STUDENT, TEACHER)
    logits = (float64(STUDENT).log(), float64(TEACHER).log())
    assert generalized_jsd(*logits, packed_of(1), beta=beta).item() == pytest.approx(expected)


def test_generalized_jsd_over_beta_tends_to_the_kls():
    logits = (float64(STUDENT).log(), float64(TEACHER).log())
    near = [generalized_jsd(*logits, packed_of(1), beta=b).item() / 1e-6 for b in (1e-6, 1 - 1e-6)]
    assert near == pytest.approx([kl(TEACHER, STUDENT), kl(STUDENT, TEACHER)], rel=1e-4)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_generalized_jsd_gradients(beta):
    rng = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 5, generator=rng, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()

    def loss_of(x):
        return generalized_jsd(x, teacher, packed_of(3), beta=beta, temperature=0.7)

    assert torch.autograd.gradcheck(loss_of, student)
    assert (loss_of(student) > 0).all()
    assert generalized_jsd(teacher, teacher, packed_of(3), beta=beta).abs().max() < 1e-15


def test_forward_kl_pulls_the_student_by_the_difference_of_probabilities():
    student = float64(STUDENT).log().requires_grad_()
    generalized_jsd(student, float64(TEACHER).log(), packed_of(1), beta=0).sum().backward()
    gap = [q - p for p, q in zip(TEACHER, STUDENT, strict=True)]
    assert student.grad[0].tolist() == pytest.approx(gap)


def test_temperature_divides_both_logits():
    student, teacher = float64([0.0, 2.0]), float64([1.0, -1.0])
    got = generalized_jsd(student, teacher, packed_of(1), temperature=2.0)
    assert torch.equal(got, generalized_jsd(student / 2, teacher / 2, packed_of(1)))


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_a_token_the_teacher_cannot_emit_costs_nothing_by_itself(beta):
    student = float64([0.0, 0.0, 1.0], grad=True)
    teacher = float64([0.0, 0.0, -torch.inf])
    loss_T = generalized_jsd(student, teacher, packed_of(1), beta=beta)
    loss_T.sum().backward()
    assert loss_T.isfinite().all() and student.grad.isfinite().all() and student.grad[0, 2] > 0


def topk_inputs(seed: int, T: int = 6, V: int = 7, K: int = 3):
    rng = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(T, V, generator=rng, dtype=torch.float64) for _ in range(2))
    logprobs, ids = teacher.log_softmax(-1).topk(K)
    return student, teacher, logprobs, ids


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("tail", [True, False])
def test_topk_distillation_literals(kind, tail):
    # the teacher reports tokens 0 and 2, with 0.6 and 0.1; the rest is 0.3
    ids, logprobs = torch.tensor([[0, 2]]), float64([0.6, 0.1]).log()
    p, q = ([0.6, 0.1, 0.3], [0.2, 0.5, 0.3]) if tail else ([6 / 7, 1 / 7], [2 / 7, 5 / 7])
    expected = kl(p, q) if kind == "forward_kl" else kl(q, p)
    student = float64(STUDENT).log()
    got = topk_distillation(student, logprobs, ids, packed_of(1), kind=kind, tail=tail)
    assert got.item() == pytest.approx(expected)


@quick
@given(st.integers(0, 10_000), st.integers(1, 6), st.booleans())
def test_topk_distillation_is_a_divergence_and_at_most_the_whole_one(seed, K, tail):
    student, teacher, logprobs, ids = topk_inputs(seed, K=K)
    for kind, beta in (("forward_kl", 0.0), ("reverse_kl", 1.0)):
        got_T = topk_distillation(student, logprobs, ids, packed_of(6), kind=kind, tail=tail)
        assert (got_T > -1e-12).all()
        if tail:  # merging events loses some of the divergence, never adds
            whole_T = generalized_jsd(student, teacher, packed_of(6), beta=beta)
            assert (got_T <= whole_T + 1e-12).all()


@pytest.mark.parametrize("tail", [True, False])
def test_topk_distillation_over_the_whole_vocabulary_is_the_kl(tail):
    student, teacher, logprobs, ids = topk_inputs(0, K=7)
    for kind, beta in (("forward_kl", 0.0), ("reverse_kl", 1.0)):
        got_T = topk_distillation(student, logprobs, ids, packed_of(6), kind=kind, tail=tail)
        expected_T = generalized_jsd(student, teacher, packed_of(6), beta=beta)
        torch.testing.assert_close(got_T, expected_T)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("tail", [True, False])
def test_topk_distillation_gradients(kind, tail):
    student, _, logprobs, ids = topk_inputs(1)
    assert torch.autograd.gradcheck(
        lambda x: topk_distillation(x, logprobs, ids, packed_of(6), kind=kind, tail=tail),
        student.requires_grad_(),
    )


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_a_rest_below_rounding_gives_a_finite_loss(kind):
    student = torch.tensor([[40.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    logprobs, ids = torch.tensor([[0.0], [1e-7]]), torch.tensor([[0], [0]])
    loss_T = topk_distillation(student, logprobs, ids, PACKED, kind=kind)
    loss_T.sum().backward()
    assert loss_T.isfinite().all() and student.grad.isfinite().all()
    if kind == "forward_kl":
        assert loss_T[1].item() == pytest.approx(math.log(4), rel=1e-4)


@pytest.mark.parametrize("loss", ["jsd 0", "jsd 0.5", "jsd 1", "forward_kl", "reverse_kl"])
def test_distillation_is_clean_at_masked_rows_and_shows_a_trainable_nan(loss):
    packed = Packed.from_padded(torch.tensor([[True, False, True, False, False, True]]))
    mask_T = packed.mask_T
    student, teacher, logprobs, ids = topk_inputs(0)

    def loss_of(student, teacher, logprobs, ids):
        if loss.startswith("jsd"):
            return generalized_jsd(student, teacher, packed, beta=float(loss[4:]))
        return topk_distillation(student, logprobs, ids, packed, kind=loss)

    def garbage(x_TV):
        return poison(x_TV.flatten(), mask_T.repeat_interleave(x_TV.shape[1])).view_as(x_TV)

    results = []
    bad_ids = torch.where(mask_T[:, None], ids, -100)
    dirty = (garbage(student), garbage(teacher), garbage(logprobs), bad_ids)
    for inputs in ((student, teacher, logprobs, ids), dirty):
        leaves = [x.clone().requires_grad_() for x in inputs[:3]]
        loss_T = loss_of(*leaves, inputs[3])
        loss_T.backward(torch.full_like(loss_T, torch.nan).where(~mask_T, 1.0))
        assert leaves[1].grad is None and leaves[2].grad is None
        results.append((loss_T.detach(), leaves[0].grad))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert (results[0][0][~mask_T] == 0).all() and (results[0][1][~mask_T] == 0).all()
    for which in range(3):
        inputs = [student.clone(), teacher.clone(), logprobs.clone()]
        inputs[which][2, 0] = torch.nan
        if which in (0, 1 if loss.startswith("jsd") else 2):
            assert loss_of(*inputs, ids)[2].isnan()


@pytest.mark.parametrize(("dtype", "out"), [(torch.bfloat16, torch.float32), (torch.float64,) * 2])
def test_distillation_is_at_least_float32(dtype, out):
    student, teacher, logprobs, ids = topk_inputs(0)
    assert generalized_jsd(student.to(dtype), teacher.to(dtype), packed_of(6)).dtype == out
    assert topk_distillation(student.to(dtype), logprobs, ids, packed_of(6)).dtype == out


def test_forward_kl_of_a_teacher_that_is_sure_is_the_nll():
    student, _, _, ids = topk_inputs(0, K=1)
    got_T = topk_distillation(student, torch.zeros(6, 1).double(), ids, packed_of(6))
    expected_T = nll(token_logprobs(student, ids[:, 0]), packed_of(6))
    torch.testing.assert_close(got_T, expected_T, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("share", "kept"),
    [
        (0.2, [1]),
        (0.39, [1]),
        (0.4, [1, 3]),
        (0.6, [1, 3, 5, 6]),  # two tie for the third place
        (0.01, [1]),
        (1.0, [0, 1, 3, 5, 6]),
    ],
)
def test_entropy_quantile_mask_literals(share, kept):
    packed = Packed.from_padded(torch.tensor([[True, True, False, True, False, True, True]]))
    entropy_T = float64(0.1, 2.0, torch.nan, 1.0, torch.inf, 0.5, 0.5)
    got = entropy_quantile_mask(entropy_T, packed, share=share)
    assert got.dtype == torch.bool and got.nonzero().flatten().tolist() == kept


@quick
@given(st.integers(0, 10_000), st.floats(0.01, 1.0))
def test_entropy_quantile_mask_keeps_the_share_of_highest(seed, share):
    step = random_step(seed)
    keep_T = entropy_quantile_mask(step.logprobs_T, step.packed, share=share)
    mask_T = step.packed.mask_T
    assert keep_T.sum() == max(1, math.floor(share * int(mask_T.sum()) + 1e-9))
    assert not (keep_T & ~mask_T).any()
    rest_T = mask_T & ~keep_T
    if rest_T.any():
        assert step.logprobs_T[keep_T].min() > step.logprobs_T[rest_T].max()


def test_a_share_that_rounding_leaves_just_short_counts():
    assert 0.29 * 100 < 29
    entropy_T = torch.arange(100.0)
    assert entropy_quantile_mask(entropy_T, packed_of(100), share=0.29).sum() == 29


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_entropy_that_is_not_finite_is_refused(value):
    with pytest.raises(NonFiniteError, match="NaN or infinite at 1 trainable tokens"):
        entropy_quantile_mask(float64(0.5, value), PACKED)


def test_bad_input_of_the_others():
    two, three = torch.zeros(2), torch.zeros(3)
    with pytest.raises(ShapeError, match=r"returns_T has shape \(3,\); expected \(2,\)"):
        value_loss(two, two, three, PACKED)
    with pytest.raises(SettingError, match=r"clip is 0\.0; expected a number above 0"):
        value_loss(two, two, two, PACKED, clip=0.0)
    with pytest.raises(ShapeError, match=r"logprobs_T has shape \(3,\)"):
        nll(three, PACKED)
    with pytest.raises(ShapeError, match=r"entropy_T has shape \(3,\)"):
        entropy_quantile_mask(three, PACKED)
    with pytest.raises(SettingError, match=r"share is 20; expected a fraction"):
        entropy_quantile_mask(two, PACKED, share=20)
    with pytest.raises(EmptyBatchError, match="no trainable token on any rank"):
        entropy_quantile_mask(two, Packed.from_padded(torch.zeros(1, 2).bool()))
    logits = torch.zeros(2, 4)
    with pytest.raises(
        ShapeError, match=r"student_logits_TV has shape \(3, 4\); expected \[2, V\]"
    ):
        generalized_jsd(torch.zeros(3, 4), torch.zeros(3, 4), PACKED)
    with pytest.raises(ShapeError, match=r"teacher_logits_TV has shape \(2, 5\)"):
        generalized_jsd(logits, torch.zeros(2, 5), PACKED)
    with pytest.raises(SettingError, match=r"beta is 1\.5; expected a number from 0 to 1"):
        generalized_jsd(logits, logits, PACKED, beta=1.5)
    with pytest.raises(SettingError, match="temperature is 0; expected a finite number above 0"):
        generalized_jsd(logits, logits, PACKED, temperature=0)
    logprobs, ids = torch.zeros(2, 3), torch.arange(3).expand(2, 3)
    with pytest.raises(SettingError, match="kind is 'kl'; expected forward_kl or reverse_kl"):
        topk_distillation(logits, logprobs, ids, PACKED, kind="kl")
    with pytest.raises(ShapeError, match=r"teacher_ids_TK has shape \(2, 2\)"):
        topk_distillation(logits, logprobs, ids[:, :2], PACKED)
    with pytest.raises(ShapeError, match="reports 5 tokens; expected 1 to 4"):
        topk_distillation(logits, torch.zeros(2, 5), torch.zeros(2, 5).long(), PACKED)
    with pytest.raises(DtypeError, match=r"teacher_ids_TK is torch\.int32"):
        topk_distillation(logits, logprobs, ids.int(), PACKED)
    with pytest.raises(SettingError, match=r"holds values from 2 to 4; expected 0\.\.3"):
        topk_distillation(logits, logprobs, ids + 2, PACKED)
    with pytest.raises(SettingError, match=r"holds values from -1 to 1; expected 0\.\.3"):
        topk_distillation(logits, logprobs, ids - 1, PACKED)


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_an_id_that_a_teacher_reports_twice_is_refused(kind, tail):
    packed = Packed.from_padded(torch.tensor([[True, False, True]]))
    logits, logprobs = torch.zeros(3, 4), torch.full((3, 3), 0.2).log()
    ids = torch.tensor([[0, 1, 2], [3, 3, 3], [2, 0, 1]])  # what a masked row holds is not read
    settings = {"kind": kind, "tail": tail}
    assert topk_distillation(logits, logprobs, ids, packed, **settings).isfinite().all()
    ids[2] = torch.tensor([2, 0, 2])
    with pytest.raises(
        SettingError, match=r"repeats an id in 1 rows, the first of them row 2: \[2, 0, 2\]"
    ):
        topk_distillation(logits, logprobs, ids, packed, **settings)
