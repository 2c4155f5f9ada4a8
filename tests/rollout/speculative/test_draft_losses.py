"""What a draft learns: each loss by hand, by a plain loop, and in whatever way a batch is cut."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from miles.errors import DtypeError, SettingError, ShapeError
from miles.losses import reduce_metrics
from miles.rollout.speculative import _divergence
from miles.rollout.speculative.losses import MaskPolicy, TargetLogits, draft_loss

KINDS = ["kl", "hard", "tv", "lk"]
IDS_U = torch.tensor([1, 4, 2, 6, 0])


def random_batch(*, B=2, L=9, V=8, U=None, K=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    U = V if U is None else U
    return {
        "logits_list": [
            torch.randn(B, L, U, generator=g, dtype=torch.float64).requires_grad_()
            for _ in range(K)
        ],
        "target_logits_BLV": 2 * torch.randn(B, L, V, generator=g, dtype=torch.float64),
        "input_ids_BL": torch.randint(0, V, (B, L), generator=g),
        "mask_BL": torch.rand(B, L, generator=g) < 0.7,
    }


def plain(
    logits_list, target_logits_BLV, input_ids_BL, mask_BL, *, seq_ids_BL=None, kind="kl",
    decay=0.8, target_ids=None, temperature=1.0, policy=None, renormalize=True,
):  # fmt: skip
    """The same by the definition, a term at a time."""
    policy = policy or MaskPolicy()
    B, L = mask_BL.shape
    ids = torch.arange(target_logits_BLV.shape[-1]) if target_ids is None else target_ids
    total = torch.zeros((), dtype=torch.float64)
    for i, logits_BLU in enumerate(logits_list):
        for b in range(B):
            for t in range(L):
                place = t + 1 + i
                if place >= L or (seq_ids_BL is not None and (
                    seq_ids_BL[b, t] != seq_ids_BL[b, place] or seq_ids_BL[b, t] < 0
                )):  # fmt: skip
                    continue
                if policy.tokens == "response" and not mask_BL[b, place]:
                    continue
                p = (target_logits_BLV[b, place] / temperature).softmax(-1)
                q = (logits_BLU[b, t] / temperature).softmax(-1)
                inside = p[ids]
                if kind == "hard":
                    if place + 1 >= L or (
                        seq_ids_BL is not None and seq_ids_BL[b, place + 1] != seq_ids_BL[b, t]
                    ):
                        continue
                    label = input_ids_BL[b, place + 1]
                    if label not in ids:
                        continue
                    term = -q[(ids == label).nonzero()[0, 0]].log()
                elif policy.outside == "drop" and p.argmax() not in ids:
                    continue
                elif kind == "kl":
                    within = inside / inside.sum()
                    term = (within * (within.log() - q.log())).sum()
                    term = term if renormalize else term * inside.sum()
                else:
                    alpha = torch.minimum(inside, q).sum()
                    term = 1 - alpha if kind == "tv" else -alpha.log()
                total = total + decay**i * term
    return total


def grads_of(loss, batch):
    return torch.autograd.grad(loss, batch["logits_list"], allow_unused=True)


def test_each_loss_by_hand():
    p, q = [0.5, 0.25, 0.25], [0.25, 0.5, 0.25]
    policy = torch.tensor([[[9.0, 9.0, 9.0], p, [9.0, 9.0, 9.0]]]).log()
    draft = torch.tensor([[q, [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]]).log()
    ids, mask = torch.tensor([[0, 0, 2]]), torch.tensor([[True, True, False]])
    wanted = {
        "kl": 0.5 * math.log(2) - 0.25 * math.log(2),
        "hard": -math.log(0.25),
        "tv": 0.25,
        "lk": -math.log(0.75),
    }
    for kind, expected in wanted.items():
        loss, metrics = draft_loss([draft], policy, ids, mask, denominator=4, kind=kind)
        torch.testing.assert_close(loss.item(), expected / 4, rtol=1e-6, atol=0)
        assert float(metrics["draft/acceptance/step_0"]) == pytest.approx(0.75)
        assert float(metrics["draft/accept_length"]) == pytest.approx(1.75)
        assert float(metrics["draft/agreement/step_0"]) == 0.0


def test_a_reduced_vocabulary_by_hand():
    p = [0.1, 0.4, 0.3, 0.2]
    policy = torch.tensor([[p, p]]).log()
    draft = torch.tensor([[[0.5, 0.5], [0.5, 0.5]]]).log()
    ids, mask = torch.tensor([[0, 1]]), torch.tensor([[True, True]])
    call = {"denominator": 1, "target_ids": torch.tensor([3, 1])}
    within = [1 / 3, 2 / 3]
    kl = sum(x * math.log(2 * x) for x in within)
    assert draft_loss([draft], policy, ids, mask, **call)[0].item() == pytest.approx(kl)
    whole = draft_loss([draft], policy, ids, mask, renormalize=False, **call)[0]
    assert whole.item() == pytest.approx(0.6 * kl)
    loss, metrics = draft_loss([draft], policy, ids, mask, kind="tv", **call)
    assert loss.item() == pytest.approx(1 - (0.2 + 0.4))
    assert float(metrics["draft/acceptance/step_0"]) == pytest.approx(0.6)


def test_a_top_token_outside_is_dropped_from_the_loss_and_stays_in_the_readings():
    policy = torch.tensor([[[0.0, 0.0], [0.9, 0.1], [0.2, 0.8]]]).log()
    draft = torch.zeros(1, 3, 1, requires_grad=True)
    ids, mask = torch.tensor([[0, 1, 1]]), torch.ones(1, 3).bool()
    only_1 = {"denominator": 1, "target_ids": torch.tensor([1]), "kind": "tv"}
    loss, metrics = draft_loss([draft], policy, ids, mask, **only_1)
    assert loss.item() == pytest.approx(0.2)
    assert float(metrics["draft/dropped"]) == 0.5
    assert float(metrics["draft/acceptance/step_0"]) == pytest.approx(0.45)
    keep = MaskPolicy(outside="keep")
    loss, metrics = draft_loss([draft], policy, ids, mask, mask_policy=keep, **only_1)
    assert loss.item() == pytest.approx(1.1)
    assert float(metrics["draft/dropped"]) == 0.0


def test_accept_length_by_hand():
    one, half = [1.0, 0.0], [0.5, 0.5]
    policy = torch.tensor([[half, half, half, half, half]]).log()
    step_0 = torch.tensor([[half, half, one, half, half]]).log()  # at t: 1, 1, 1/2, 1
    step_1 = torch.tensor([[half, one, half, half, half]]).log()  # at t: 1, 1/2, 1
    ids, mask = torch.zeros(1, 5, dtype=torch.int64), torch.ones(1, 5).bool()
    _, metrics = draft_loss([step_0, step_1], policy, ids, mask, denominator=1)
    # 1 + 1 + 1 * 1, 1 + 1 + 1 * 1/2, 1 + 1/2 + 1/2 * 1
    assert float(metrics["draft/accept_length"]) == pytest.approx((3 + 2.5 + 2) / 3)
    assert float(metrics["draft/acceptance/step_0"]) == pytest.approx(3.5 / 4)
    assert float(metrics["draft/acceptance/step_1"]) == pytest.approx(2.5 / 3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("tokens", ["response", "all"])
def test_it_is_what_the_definition_says_in_value_and_gradient(kind, reduced, tokens):
    batch = random_batch(U=5 if reduced else None)
    for outside, renormalize, temperature in [
        ("drop", True, 1.0), ("keep", False, 1.0), ("drop", True, 0.7),
    ]:  # fmt: skip
        policy = MaskPolicy(tokens=tokens, outside=outside)
        call = {
            "kind": kind, "target_ids": IDS_U if reduced else None, "temperature": temperature,
            "renormalize": renormalize,
            "seq_ids_BL": torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, -1], [3, 3, 4, 4, 4, 4, 4, 4, 4]]),
        }  # fmt: skip
        loss, _ = draft_loss(**batch, denominator=3.0, mask_policy=policy, **call)
        expected = plain(**batch, policy=policy, **call) / 3.0
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(grads_of(loss, batch), grads_of(expected, batch))


def test_packed_rows_are_separate_sequences():
    batch = random_batch(B=1, L=12)
    seq_ids = torch.tensor([[0] * 5 + [1] * 7])
    loss, metrics = draft_loss(**batch, denominator=1, seq_ids_BL=seq_ids)
    parts = [
        draft_loss(
            [x[:, cut] for x in batch["logits_list"]],
            batch["target_logits_BLV"][:, cut],
            batch["input_ids_BL"][:, cut],
            batch["mask_BL"][:, cut],
            denominator=1,
        )
        for cut in (slice(0, 5), slice(5, 12))
    ]
    torch.testing.assert_close(loss, parts[0][0] + parts[1][0])
    merged = reduce_metrics([m for _, m in parts])
    for name, value in reduce_metrics(metrics).items():
        torch.testing.assert_close(value, merged[name], msg=name)
    whole, _ = draft_loss(**batch, denominator=1)
    assert whole != loss


@settings(max_examples=40, deadline=None)
@given(
    B=st.integers(1, 4), L=st.integers(1, 7), K=st.integers(1, 4), seed=st.integers(0, 9),
    kind=st.sampled_from(KINDS),
)  # fmt: skip
def test_micro_batches_sum_to_the_whole_step(B, L, K, seed, kind):
    batch = random_batch(B=B, L=L, K=K, seed=seed)
    loss, metrics = draft_loss(**batch, denominator=5, kind=kind)
    parts = [
        draft_loss(
            [x[b : b + 1] for x in batch["logits_list"]],
            *(batch[key][b : b + 1] for key in ("target_logits_BLV", "input_ids_BL", "mask_BL")),
            denominator=5,
            kind=kind,
        )
        for b in range(B)
    ]
    torch.testing.assert_close(loss, sum(part for part, _ in parts))
    merged = reduce_metrics([m for _, m in parts])
    for name, value in reduce_metrics(metrics).items():
        torch.testing.assert_close(value, merged[name], equal_nan=True, msg=name)
    kl, tv, lk = (draft_loss(**batch, denominator=1, kind=k)[0] for k in ("kl", "tv", "lk"))
    assert 0 <= tv <= lk
    count = float(metrics["draft/loss"].count) * 2
    assert tv**2 <= count * kl * K + 1e-9 or count == 0  # Pinsker, then Cauchy-Schwarz


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_change_nothing(kind, monkeypatch):
    batch = random_batch(L=30)
    call = {"denominator": 2, "kind": kind}
    whole, _ = draft_loss(**batch, **call)
    expected = grads_of(whole, batch)
    monkeypatch.setattr(_divergence, "CHUNK", 3 * 8)
    loss, _ = draft_loss(**batch, **call)
    torch.testing.assert_close(loss, whole, rtol=0, atol=0)
    torch.testing.assert_close(grads_of(loss, batch), expected, rtol=0, atol=0)


class Largest(TorchDispatchMode):
    """The most numbers that any float32 tensor had."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("by_head", [False, True])
def test_float32_copies_live_a_chunk_at_a_time(by_head, monkeypatch):
    monkeypatch.setattr(_divergence, "CHUNK", 4 * 64)
    g = torch.Generator().manual_seed(0)
    draft = [torch.randn(2, 50, 64, generator=g).bfloat16().requires_grad_() for _ in range(2)]
    target = torch.randn(2, 50, 64, generator=g).bfloat16()
    if by_head:
        target = TargetLogits(values_BKX=target, head_VD=torch.eye(64).bfloat16())
    ids, mask = torch.zeros(2, 50, dtype=torch.int64), torch.ones(2, 50).bool()
    with Largest() as seen:
        loss, _ = draft_loss(draft, target, ids, mask, denominator=1)
        loss.backward()
    assert seen.numel <= 4 * 64
    assert loss.dtype == torch.float32 and draft[0].grad.dtype == torch.bfloat16


class Held(TorchDispatchMode):
    """The most bytes that were held at once, of what operators read and made."""

    def __init__(self):
        super().__init__()
        self.peak, self._storages = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in (*args, *(out if isinstance(out, (tuple, list)) else [out])):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._storages = {k: v for k, v in self._storages.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._storages.values()))
        return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("K", [1, 3])
def test_a_gradient_is_made_once_and_six_chunks_live_beside_it(kind, K, monkeypatch):
    chunk, V = 64 * 512, 512
    monkeypatch.setattr(_divergence, "CHUNK", chunk)
    draft = [torch.randn(1, 1024, V).bfloat16().requires_grad_() for _ in range(K)]
    policy = torch.randn(1, 1024, V).bfloat16()
    ids, mask = torch.zeros(1, 1024, dtype=torch.int64), torch.ones(1, 1024).bool()
    given = policy.nbytes + sum(logits.nbytes for logits in draft)
    gradients = sum(logits.nbytes for logits in draft)
    with Held() as held:
        loss, _ = draft_loss(draft, policy, ids, mask, denominator=1, kind=kind)
        made = held.peak
        held.peak = 0
        loss.backward()
    assert made - given - gradients < 7 * 4 * chunk
    assert held.peak - given - gradients < 4 * chunk  # a few rows of numbers, no second gradient


def test_masked_places_may_hold_anything():
    batch = random_batch()
    clean, _ = draft_loss(**batch, denominator=1)
    expected = grads_of(clean, batch)
    used_BL = torch.zeros(2, 9).bool()
    used_BL[:, 1:] = batch["mask_BL"][:, 1:]
    batch["target_logits_BLV"][~used_BL] = torch.nan
    for i, logits_BLU in enumerate(batch["logits_list"]):
        says_BL = torch.zeros(2, 9).bool()
        says_BL[:, : 9 - 1 - i] = batch["mask_BL"][:, 1 + i :]
        logits_BLU.data[~says_BL] = torch.nan
    loss, metrics = draft_loss(**batch, denominator=1)
    torch.testing.assert_close(loss, clean)
    torch.testing.assert_close(grads_of(loss, batch), expected)
    assert all(math.isfinite(float(m)) for m in metrics.values())


@pytest.mark.parametrize("kind", KINDS)
def test_nan_at_a_used_place_is_not_hidden(kind):
    batch = random_batch()
    batch["logits_list"][1].data[0, 2] = torch.nan
    batch["mask_BL"][:] = True
    assert draft_loss(**batch, denominator=1, kind=kind)[0].isnan()


def test_logits_of_some_places_only_are_these_places():
    batch = random_batch()
    kept_K = torch.tensor([7, 2, 3, 8])
    there_L = torch.zeros(9).bool().index_fill(0, kept_K, True)
    expected, m = draft_loss(**batch | {"mask_BL": batch["mask_BL"] & there_L}, denominator=1)
    some = TargetLogits(
        values_BKX=batch["target_logits_BLV"][:, kept_K].contiguous(), positions_K=kept_K
    )
    loss, metrics = draft_loss(**batch | {"target_logits_BLV": some}, denominator=1)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(reduce_metrics(metrics), reduce_metrics(m), equal_nan=True)


def test_hidden_states_and_a_head_are_logits():
    batch = random_batch()
    hidden, head, bias = torch.randn(2, 9, 4).double(), torch.randn(8, 4).double(), torch.randn(8)
    given = TargetLogits(values_BKX=hidden, head_VD=head, head_bias_V=bias.double())
    logits = hidden @ head.T + bias
    loss, _ = draft_loss(**batch | {"target_logits_BLV": given}, denominator=1)
    expected, _ = draft_loss(**batch | {"target_logits_BLV": logits}, denominator=1)
    torch.testing.assert_close(loss, expected)


def test_no_gradient_reaches_the_policys_logits():
    batch = random_batch()
    batch["target_logits_BLV"].requires_grad_()
    draft_loss(**batch, denominator=1)[0].backward()
    assert batch["target_logits_BLV"].grad is None


def test_a_draft_that_is_the_policy_costs_nothing_and_is_always_accepted():
    batch = random_batch(K=1)
    batch["logits_list"] = [batch["target_logits_BLV"].roll(-1, 1)]
    for kind in ("kl", "tv", "lk"):
        loss, metrics = draft_loss(**batch, denominator=1, kind=kind)
        assert abs(loss) < 1e-12
    assert float(metrics["draft/accept_length"]) == pytest.approx(2.0)


def test_a_batch_without_a_place_is_zero_with_a_gradient_of_zeros():
    batch = random_batch()
    batch["mask_BL"][:] = False
    loss, metrics = draft_loss(**batch, denominator=7)
    assert loss == 0 and math.isnan(float(metrics["draft/acceptance/step_0"]))
    assert all((g == 0).all() for g in grads_of(loss, batch))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"kind": "mse"}, SettingError, "kl, hard, tv, lk"),
        ({"decay": 0.0}, SettingError, "above 0"),
        ({"temperature": 0.0}, SettingError, "train the draft at 1"),
        ({"logits_list": []}, ShapeError, "empty"),
        ({"logits_list": [torch.zeros(2, 9, 5)]}, ShapeError, "needs target_ids"),
        ({"mask_BL": torch.ones(2, 9)}, DtypeError, "torch.bool"),
        ({"mask_BL": torch.ones(2, 8).bool()}, ShapeError, r"\(2, 9\)"),
        ({"seq_ids_BL": torch.ones(2, 9)}, DtypeError, "torch.int64"),
        ({"target_logits_BLV": torch.zeros(2, 4, 8)}, ShapeError, "positions_K"),
        ({"target_logits_BLV": torch.zeros(2, 8)}, ShapeError, r"\[B, L, V\]"),
        ({"target_ids": torch.tensor([0, 8])}, SettingError, r"0\.\.7"),
        ({"target_ids": torch.tensor([3, 3])}, SettingError, "distinct"),
        ({"target_ids": torch.tensor([0.0])}, DtypeError, "int64"),
    ],
)
def test_bad_input_is_refused_in_words(changes, error, words):
    with pytest.raises(error, match=words):
        draft_loss(**random_batch() | changes, denominator=1)
    with pytest.raises(SettingError, match="response or all"):
        MaskPolicy(tokens="prompt")


def test_the_policys_rows_are_read_once_for_all_steps_and_both_passes(monkeypatch):
    monkeypatch.setattr(_divergence, "CHUNK", 5 * 8)  # 5 places of 8 tokens
    batch, read = random_batch(L=10, K=3), []
    batch["mask_BL"] = torch.ones_like(batch["mask_BL"])
    rows = TargetLogits.rows

    def counted(self, index_n):
        read.append(len(index_n))
        return rows(self, index_n)

    monkeypatch.setattr(TargetLogits, "rows", counted)
    loss, _ = draft_loss(**batch, denominator=1)
    loss.backward()
    assert read == [5, 5, 5, 3]  # the first place of each row is nobody's


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_that_is_kept_gives_the_same_gradient_twice(kind):
    batch = random_batch()
    loss, _ = draft_loss(**batch, denominator=1, kind=kind)
    once, twice = (
        torch.autograd.grad(loss, batch["logits_list"], retain_graph=True) for _ in range(2)
    )
    torch.testing.assert_close(once, twice, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_gradient_the_numbers_are_the_same_and_no_slopes_are_made(kind, monkeypatch):
    batch = random_batch()
    loss, metrics = draft_loss(**batch, denominator=1, kind=kind)
    monkeypatch.delattr(_divergence._Pair, "slope_")
    with torch.no_grad():
        alone, readings = draft_loss(**batch, denominator=1, kind=kind)
    assert alone == loss and not alone.requires_grad
    torch.testing.assert_close(reduce_metrics(readings), reduce_metrics(metrics))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_policy_that_never_says_what_the_draft_can_is_never_accepted(temperature):
    batch = random_batch(U=5)
    batch["target_logits_BLV"][0, :, IDS_U] = -torch.inf
    before = [logits.detach().clone() for logits in batch["logits_list"]]
    loss, metrics = draft_loss(
        **batch, denominator=1, target_ids=IDS_U, temperature=temperature
    )  # fmt: skip
    grads = grads_of(loss, batch)
    assert loss.isfinite() and all(grad.isfinite().all() for grad in grads)
    assert all(grad[0].eq(0).all() for grad in grads)
    assert reduce_metrics(metrics)["draft/acceptance/step_0"].isfinite()
    torch.testing.assert_close(before, [x.detach() for x in batch["logits_list"]], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["kl", "tv", "lk"])
def test_a_token_that_neither_can_say_is_as_good_as_not_there(kind):
    with_it, without = random_batch(V=8), random_batch(V=8)
    with torch.no_grad():
        with_it["target_logits_BLV"][..., 7] = -torch.inf
        for logits in with_it["logits_list"]:
            logits[..., 7] = -torch.inf
    without["target_logits_BLV"] = without["target_logits_BLV"][..., :7]
    without["logits_list"] = [x.detach()[..., :7].requires_grad_() for x in without["logits_list"]]
    without["input_ids_BL"] = without["input_ids_BL"].clamp(max=6)
    found, expected = (draft_loss(**b, denominator=1, kind=kind)[0] for b in (with_it, without))
    torch.testing.assert_close(found, expected)
    for got, wanted in zip(grads_of(found, with_it), grads_of(expected, without), strict=True):
        torch.testing.assert_close(got, torch.nn.functional.pad(wanted, (0, 1)))
