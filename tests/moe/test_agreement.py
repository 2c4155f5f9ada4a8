import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles.errors import RoutingError
from miles.losses import mean_over, reduce_metrics
from miles.moe import RoutingTape, equal_sets, routing_agreement
from tests.moe.test_tape import random_tape
from tests.steps import quick

A = RoutingTape(
    torch.tensor([[[0, 1], [2, 3]], [[-1, -1], [-1, -1]], [[3, 0], [1, 2]]]), num_experts=4
)
B = RoutingTape(torch.tensor([[[1, 0], [2, 1]], [[0, 1], [0, 1]], [[3, 0], [2, 1]]]), num_experts=4)


def alike_in_part(seed: int, share: float = 0.5):
    """Two tapes, of which the second has about `share` of the first's (token, layer) pairs."""
    a, b = random_tape(seed, 8), random_tape(seed + 1, 8)
    ids, other = a.expert_ids, b.expert_ids
    pick = torch.rand(ids.shape[:2], generator=torch.Generator().manual_seed(seed)) < share
    pick &= (b.recorded_N & a.recorded_N)[:, None]
    return a, RoutingTape(torch.where(pick[..., None], ids.flip(-1), other), num_experts=300)


def test_pairs_layers_and_tokens_by_hand():
    equal_NM = equal_sets(A, B)
    assert equal_NM.dtype == torch.float64
    assert equal_NM.nan_to_num(9).tolist() == [[1, 0], [9, 9], [1, 1]]
    assert equal_NM.nanmean(0).tolist() == [1.0, 0.5]
    assert equal_NM.nanmean(1).nan_to_num(9).tolist() == [0.5, 9, 1.0]
    assert routing_agreement(A, B) == 0.75


def test_a_set_is_equal_only_if_all_of_it_is():
    a = RoutingTape(torch.tensor([[[0, 1, 2]], [[0, 1, 2]]]), num_experts=300)
    b = RoutingTape(torch.tensor([[[2, 0, 299]], [[2, 0, 1]]]), num_experts=300)
    assert equal_sets(a, b).tolist() == [[0.0], [1.0]]


@quick
@given(st.integers(0, 10_000))
def test_it_is_symmetric_and_one_on_itself(seed):
    a, b = alike_in_part(seed)
    assert torch.equal(equal_sets(a, b).nan_to_num(9), equal_sets(b, a).nan_to_num(9))
    whole = random_tape(seed, holes=False)
    assert routing_agreement(whole, whole) == 1.0


@quick
@given(st.integers(0, 10_000))
def test_the_order_of_experts_does_not_matter(seed):
    a, b = alike_in_part(seed)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    shuffled = RoutingTape(a.expert_ids[..., order], num_experts=300)
    assert torch.equal(equal_sets(a, b).nan_to_num(9), equal_sets(shuffled, b).nan_to_num(9))


@quick
@given(st.integers(0, 10_000), st.integers(0, 8))
def test_parts_weighed_by_their_counts_are_the_whole(seed, cut):
    a, b = alike_in_part(seed)
    parts = [equal_sets(a[:cut], b[:cut]), equal_sets(a[cut:], b[cut:])]
    metrics = [
        {str(layer): mean_over(p[:, layer], p[:, layer].isfinite()) for layer in range(3)}
        for p in parts
    ]
    together = reduce_metrics(metrics)
    expected_M = equal_sets(a, b).nanmean(0)
    for layer in range(3):
        torch.testing.assert_close(
            together[str(layer)], expected_M[layer], rtol=1e-12, atol=0, equal_nan=True
        )


def test_a_number_of_experts_that_nobody_told_gives_way():
    inferred = RoutingTape.from_bytes(
        B.to_bytes(), num_layers=2, topk=2, num_experts=256, num_experts_inferred=True
    )
    assert routing_agreement(A, inferred) == routing_agreement(inferred, A) == 0.75


def test_nothing_in_common_is_nan_per_layer_and_an_error_as_a_number():
    holes = RoutingTape.unrecorded(3, num_layers=2, topk=2, num_experts=4)
    assert all(math.isnan(x) for x in equal_sets(A, holes).nanmean(0).tolist())
    with pytest.raises(RoutingError, match="no row is recorded in both"):
        routing_agreement(A, holes)
    with pytest.raises(RoutingError, match="no row is recorded in both"):
        routing_agreement(A[:0], B[:0])


def others():
    ids = B.expert_ids.long()
    yield B[:2], r"\(3, 2, 2\) and \(2, 2, 2\); expected the same tokens"
    yield RoutingTape(ids[:, :1], num_experts=4), r"\(3, 1, 2\); expected the same tokens"
    yield RoutingTape(ids[..., :1], num_experts=4), r"\(3, 2, 1\); expected the same tokens"
    yield RoutingTape(ids, num_experts=8), r"tape 1 .*\(2, 2, 8\); expected \(2, 2, 4\)"


@pytest.mark.parametrize(("other", "text"), list(others()))
def test_tapes_of_other_shapes_or_models_are_refused(other, text):
    with pytest.raises(RoutingError, match=text):
        routing_agreement(A, other)
