"""Entries of the vocabulary that neither side can produce: -inf on both, as padding has it."""

import math

import pytest
import torch

from miles import Packed
from miles.losses import generalized_jsd, topk_distillation

ONE = Packed.from_padded(torch.tensor([[True]]))
STUDENT, TEACHER = [0.0, 1.0], [0.5, 0.0]


def graded(loss, logits):
    """Value and gradient by the logits."""
    leaf = torch.tensor([logits], dtype=torch.float64, requires_grad=True)
    value = loss(leaf)
    value.sum().backward()
    return value.item(), leaf.grad[0]


@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 0.9, 1])
def test_jsd_is_that_of_the_vocabulary_without_its_padding(beta):
    """The gradient was NaN at every entry."""

    def jsd(padding):
        teacher = torch.tensor([TEACHER + padding], dtype=torch.float64)
        return graded(lambda x: generalized_jsd(x, teacher, ONE, beta=beta), STUDENT + padding)

    (value, gradient), (expected, expected_V) = jsd([-math.inf]), jsd([])
    assert value == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(gradient[:2], expected_V)
    assert gradient[2] == 0


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_jsd_has_a_gradient_where_only_one_side_has_no_mass(beta):
    full, cut = [0.0, 1.0, 0.5], [0.5, 0.0, -math.inf]
    for student, teacher in ((full, cut), (cut, full)):
        p = torch.tensor([teacher], dtype=torch.float64)
        value, gradient = graded(lambda x, p=p: generalized_jsd(x, p, ONE, beta=beta), student)
        assert math.isfinite(value) and gradient.isfinite().all() and gradient.any()


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_nothing_outside_the_reported_ids_is_no_event(kind, dtype):
    """The value was infinite or the gradient NaN, for a rest that neither side has."""
    teacher = torch.tensor([[0.6, 0.4]], dtype=torch.float64).log().to(dtype)
    ids = torch.tensor([[0, 1]])

    def distil(student, tail):
        return graded(
            lambda x: topk_distillation(x, teacher, ids, ONE, kind=kind, tail=tail), student
        )

    value, gradient = distil([*STUDENT, -math.inf], True)
    expected, expected_V = distil(STUDENT, False)
    # tail=False renormalises the teacher, whose mass is 1 up to its own rounding.
    tolerance = {"rtol": 0, "atol": 8 * torch.finfo(dtype).eps}
    assert value == pytest.approx(expected, abs=tolerance["atol"])
    torch.testing.assert_close(gradient[:2], expected_V, **tolerance)
    assert gradient[2] == 0


def test_a_rest_that_the_teacher_has_and_the_student_has_not_is_infinitely_far():
    teacher, ids = torch.tensor([[0.5, 0.2]]).log(), torch.tensor([[0, 1]])
    student = torch.tensor([[0.0, 1.0, -math.inf]], requires_grad=True)
    assert topk_distillation(student, teacher, ids, ONE).item() == math.inf
    value = topk_distillation(student, teacher, ids, ONE, kind="reverse_kl")
    value.sum().backward()
    assert value.isfinite() and student.grad.isfinite().all()
