"""Chains, and the distribution that tokens are sampled from. Trees: the next file."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from miles.errors import DtypeError, NonFiniteError, SettingError, ShapeError
from miles.rollout._sampling import draw
from miles.rollout.speculative import tempered, verify, verify_chain
from tests.rollout.speculative.oracle import (
    Process,
    assert_is_the_targets,
    chance,
    exact_outputs,
    outputs_of,
    softened,
)

seeds = st.integers(0, 10_000)
few = settings(max_examples=25, deadline=None, derandomize=True)
temperatures = st.sampled_from([0.0, 0.3, 1.0, 2.0])
cuts = st.sampled_from([(-1, 1.0), (2, 1.0), (-1, 0.6), (2, 0.8), (1, 1.0), (50, 0.999)])


def uniforms(*shape: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, dtype=torch.float64, generator=generator)


def chain(num_draft: int) -> list[int]:
    return list(range(-1, num_draft - 1))


# --- the distribution


def test_equal_tokens_are_kept_by_id():
    logits = torch.tensor([[0.0, 1.0, 1.0, 1.0, -1.0]])
    third = pytest.approx(1 / 3)
    assert tempered(logits, [1.0], top_k=2).tolist() == [[0, 0.5, 0.5, 0, 0]]
    assert tempered(logits, [0.0]).tolist() == [[0, 1, 0, 0, 0]]
    assert tempered(logits, [1.0], top_k=3).tolist()[0] == [0, third, third, third, 0]
    assert tempered(torch.zeros(1, 4), [1.0], top_p=0.5).tolist() == [[0.5, 0.5, 0, 0]]
    assert tempered(torch.zeros(1, 4), [1.0], top_p=0.5001).tolist()[0][2:] == [third, 0]


def test_top_p_counts_within_what_top_k_left():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    # 0.4 of the 0.7 that is left is more than half; of everything it is less
    assert tempered(logits, [1.0], top_k=2, top_p=0.5).tolist() == [[1, 0, 0, 0]]
    assert (tempered(logits, [1.0], top_p=0.5) > 0).sum() == 2


@few
@given(seeds, temperatures, cuts, st.integers(1, 12))
def test_the_distribution_is_the_plain_one(seed, temperature, cut, vocab):
    torch.manual_seed(seed)
    logits = torch.randint(-3, 4, (2, 3, vocab)).double() / 2  # ties
    got = tempered(logits, [temperature, 1.0], *cut)
    expected = [[softened(logits[r, k].tolist(), t, *cut) for k in range(3)]
                for r, t in enumerate([temperature, 1.0])]  # fmt: skip
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_of_any_dtype_give_float64_probabilities(dtype):
    logits = torch.randn(3, 500).to(dtype)
    got = tempered(logits, [0.7] * 3, top_k=20, top_p=0.9)
    torch.testing.assert_close(got, tempered(logits.double(), [0.7] * 3, top_k=20, top_p=0.9))
    assert got.dtype == torch.float64 and (got.sum(-1) - 1).abs().max() < 1e-12


# --- no loss, without sampling


@few
@given(seeds, temperatures, cuts, st.integers(2, 3), st.integers(0, 3), st.booleans())
@example(1, 1.0, (-1, 1.0), 3, 3, True)
def test_chain_output_is_exactly_the_targets(seed, temperature, cut, vocab, depth, point):
    target = Process.random(seed, vocab, depth, temperature=temperature, top_k=cut[0], top_p=cut[1])
    # the draft has its own truncation: some of the target's tokens are never drawn, and reversed
    draft = Process.random(seed + 1, vocab, depth, temperature=min(temperature, 0.8), top_k=2)
    outputs = exact_outputs(
        chain(depth), target, None if point else draft, replacement=True, as_chain=True
    )
    assert_is_the_targets(outputs, target, depth + 1)


@pytest.mark.parametrize("point", [False, True])
def test_a_lossy_rule_is_found_without_sampling(point):
    target, draft = Process.random(1, 3, 2), Process.random(2, 3, 2)

    def eager(uniforms_RU):  # keeps with 0.9 of the right chance
        uniforms_RU = uniforms_RU.clone()
        uniforms_RU[:, :-1] = (uniforms_RU[:, :-1] / 0.9).clamp(max=1 - 1e-12)
        return uniforms_RU

    with pytest.raises(AssertionError, match="a verdict changes at another place"):
        exact_outputs(
            chain(2), target, None if point else draft,
            replacement=True, as_chain=True, change=eager,
        )  # fmt: skip


# --- no loss, with sampling


def markov(seed: int, vocab: int, sharpness: float = 1.5):
    """Logits after each token."""
    generator = torch.Generator().manual_seed(seed)
    return sharpness * torch.randn(vocab, vocab, generator=generator)


def first_two(target_VV, draft_VV, how, *, num_draft: int, rows: int, point: bool, lossy=False):
    """Counts of the first two tokens after token 0, drafted from a Markov chain."""
    vocab = len(target_VV)
    q_VV = tempered(draft_VV, [min(how[0], 1.0)] * vocab).float()
    tokens = [torch.zeros(rows, dtype=torch.int64)]
    for _ in range(num_draft):
        q_RV = q_VV[tokens[-1]]
        tokens.append(q_RV.argmax(-1) if point else torch.multinomial(q_RV, 1)[:, 0])
    before_RK = torch.stack(tokens, 1)
    uniforms_RU = torch.rand(rows, num_draft + 1, dtype=torch.float64)
    if lossy:
        uniforms_RU[:, :-1] = (uniforms_RU[:, :-1] / 0.9).clamp(max=1 - 1e-12)
    verified = verify_chain(
        target_VV[before_RK], before_RK[:, 1:], None if point else q_VV[before_RK[:, :-1]],
        temperatures_R=[how[0]] * rows, uniforms_RU=uniforms_RU, top_k=how[1], top_p=how[2],
    )  # fmt: skip
    p_VV = tempered(target_VV, [how[0]] * vocab, *how[1:])
    first_R = verified.tokens_RK[:, 0]
    own_R = torch.multinomial(p_VV[first_R], 1)[:, 0]
    second_R = torch.where(verified.num_tokens_R > 1, verified.tokens_RK[:, 1], own_R)
    counts = torch.bincount(first_R * vocab + second_R, minlength=vocab**2)
    return counts, (p_VV[0][:, None] * p_VV).flatten()


@few
@given(seeds, temperatures, cuts, st.integers(2, 20), st.integers(1, 4), st.booleans())
def test_chain_output_passes_a_chi_square_test(seed, temperature, cut, vocab, num_draft, point):
    torch.manual_seed(seed)
    counts, probs = first_two(
        markov(seed, vocab), markov(seed + 1, vocab), (temperature, *cut),
        num_draft=num_draft, rows=10_000, point=point,
    )  # fmt: skip
    assert chance(counts, probs) > 1e-5


@pytest.mark.parametrize("point", [False, True])
def test_the_chi_square_test_finds_a_lossy_rule(point):
    torch.manual_seed(0)
    how = {"how": (1.0, -1, 1.0), "num_draft": 2, "rows": 60_000, "point": point}
    counts, probs = first_two(markov(0, 8), markov(1, 8), **how)
    assert chance(counts, probs) > 1e-3
    counts, probs = first_two(markov(0, 8), markov(1, 8), **how, lossy=True)
    assert chance(counts, probs) < 1e-9


# --- literals and invariances


def test_literals():
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.25, 0.25, 0.5])
    verified = verify_chain(
        p.log().expand(4, 3, 3),
        torch.tensor([[2, 0], [2, 0], [0, 1], [1, 2]]),
        q.expand(4, 2, 3),
        temperatures_R=[1.0] * 4,
        # 2 is kept below 0.4; the residual of p - q is 5/6 on 0 and 1/6 on 1
        uniforms_RU=torch.tensor(
            [[0.41, 0.0, 0.83], [0.39, 0.99, 0.81], [0.99, 0.99, 0.1], [0.9, 0.5, 0.84]],
            dtype=torch.float64,
        ),
    )
    assert verified.tokens_RK.tolist() == [[0, -1, -1], [2, 0, 2], [0, 1, 0], [1, 1, -1]]
    assert verified.num_tokens_R.tolist() == [1, 3, 3, 2]
    assert verified.logprobs_RK.dtype == torch.float32 and verified.nodes_RK is None
    for row, tokens in enumerate(outputs_of(verified)):
        expected = p.log()[list(tokens)]
        torch.testing.assert_close(verified.logprobs_RK[row, : len(tokens)], expected)
        assert verified.logprobs_RK[row, len(tokens) :].isnan().all()


def random_chain(seed=0, rows=6, num_draft=3, vocab=11):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, num_draft + 1, vocab, generator=generator)
    q = torch.randn(rows, num_draft, vocab, generator=generator).softmax(-1)
    tokens = torch.multinomial(q.view(-1, vocab), 1, generator=generator).view(rows, num_draft)
    return logits, tokens, q, uniforms(rows, num_draft + 1, seed=seed)


@few
@given(seeds, cuts, st.booleans())
def test_a_row_depends_on_nothing_but_itself(seed, cut, point):
    logits, tokens, q, u = random_chain(seed)
    q = None if point else q
    temperatures_R = torch.tensor([1.0, 0.5, 2.0, 1.0, 0.7, 1.0])
    lengths_R = torch.tensor([3, 0, 1, 2, 3, 2])
    cut = dict(zip(("top_k", "top_p"), cut, strict=True))
    how = {"temperatures_R": temperatures_R, "lengths_R": lengths_R, "uniforms_RU": u, **cut}
    whole = verify_chain(logits, tokens, q, **how)
    # garbage beyond a row's length changes nothing
    beyond = torch.arange(3) >= lengths_R[:, None]
    places = torch.arange(4) > lengths_R[:, None]
    dirty = verify_chain(
        logits.masked_fill(places[..., None], torch.nan), tokens.masked_fill(beyond, -7),
        None if point else q.masked_fill(beyond[..., None], torch.nan), **how,
    )  # fmt: skip
    assert outputs_of(dirty) == outputs_of(whole)
    for row in range(6):
        n = int(lengths_R[row])
        alone = verify_chain(
            logits[row : row + 1, : n + 1], tokens[row : row + 1, :n],
            None if point else q[row : row + 1, :n],
            temperatures_R=temperatures_R[row : row + 1],
            uniforms_RU=torch.cat([u[row : row + 1, :n], u[row : row + 1, -1:]], 1), **cut,
        )  # fmt: skip
        assert outputs_of(alone)[0] == outputs_of(whole)[row]
        torch.testing.assert_close(
            alone.logprobs_RK[0], whole.logprobs_RK[row, : n + 1], equal_nan=True
        )


def test_no_draft_is_plain_decoding():
    logits, _, _, u = random_chain(rows=50, num_draft=0)
    temperatures_R = [0.0, 1.0, 0.5, 2.0, 0.0] * 10
    tokens = torch.empty(50, 0, dtype=torch.int64)
    for probs in (None, torch.empty(50, 0, 11)):
        verified = verify_chain(logits, tokens, probs, temperatures_R=temperatures_R, uniforms_RU=u)
        expected, logprobs = draw(logits[:, 0], temperatures_R, u[:, 0].tolist())
        assert verified.tokens_RK[:, 0].tolist() == expected
        torch.testing.assert_close(verified.logprobs_RK[:, 0], torch.tensor(logprobs))


def test_greedy_keeps_what_the_target_would_have_said():
    logits, tokens, _, u = random_chain(rows=200)
    best = logits.argmax(-1)
    tokens = torch.where(torch.rand(200, 3) < 0.7, best[:, :-1], tokens)
    q = torch.nn.functional.one_hot(tokens, 11).float()
    for probs in (None, q):
        verified = verify_chain(logits, tokens, probs, temperatures_R=[0.0] * 200, uniforms_RU=u)
        for row, got in enumerate(outputs_of(verified)):
            agreed = (tokens[row] == best[row, :-1]).long().cumprod(0).sum().item()
            assert got == tuple(best[row, : agreed + 1].tolist())
        at = verified.tokens_RK.clamp(min=0)[..., None]
        expected = logits.log_softmax(-1).gather(-1, at)[..., 0]
        real = verified.tokens_RK >= 0
        torch.testing.assert_close(verified.logprobs_RK[real], expected[real])


def test_a_draft_that_is_the_target_is_never_refused():
    logits, _, _, u = random_chain(rows=300, vocab=1000)
    q = logits[:, :-1].softmax(-1)
    tokens = torch.multinomial(q.view(-1, 1000), 1).view(300, 3)
    # float32 makes p / q as small as 1 - 1e-6
    verified = verify_chain(logits, tokens, q, temperatures_R=[1.0] * 300, uniforms_RU=u * 0.999)
    assert (verified.num_tokens_R == 4).all() and (verified.tokens_RK[:, :3] == tokens).all()


def test_a_refusal_by_rounding_alone_still_has_something_to_draw():
    p = torch.tensor([[[0.5, 0.5]] * 2], dtype=torch.float64)
    q = p[:, :1] * (1 + 1e-6)
    u = torch.tensor([[1 - 1e-9, 0.7]], dtype=torch.float64)
    verified = verify_chain(p.log(), torch.tensor([[0]]), q, temperatures_R=[1.0], uniforms_RU=u)
    assert outputs_of(verified) == [(1,)]


def test_the_ends_of_the_uniform_range_give_possible_tokens():
    logits = torch.tensor([-torch.inf, 0.0, 0.0, -torch.inf]).expand(2, 2, 4)
    u = torch.tensor([[0.0, 0.0], [1 - 2**-53, 1 - 2**-53]], dtype=torch.float64)
    tokens = torch.tensor([[0], [3]])  # of probability 0: refused even by 0 < 0
    verified = verify_chain(logits, tokens, None, temperatures_R=[1.0, 1.0], uniforms_RU=u)
    assert outputs_of(verified) == [(1,), (2,)]


def test_rows_may_be_judged_in_parts(monkeypatch):
    logits, tokens, q, u = random_chain(rows=7)
    whole = verify_chain(logits, tokens, q, temperatures_R=[1.0] * 7, uniforms_RU=u)
    monkeypatch.setattr(verify, "CHUNK", 70)
    parts = verify_chain(logits, tokens, q, temperatures_R=[1.0] * 7, uniforms_RU=u)
    assert torch.equal(parts.tokens_RK, whole.tokens_RK)


# --- bad input


def call(change=lambda args, how: None, check=True):
    logits, tokens, q, u = random_chain(rows=2)
    args, how = [logits, tokens, q], {"temperatures_R": [1.0, 1.0], "uniforms_RU": u}
    change(args, how)
    return verify_chain(*args, **how, check=check)


def put(index, value, at=None):
    def change(args, how):
        where = args if isinstance(index, int) else how
        if at is None:
            where[index] = value
        else:
            where[index] = where[index].clone()
            where[index][at] = value

    return change


def nothing_drawn(args, how):
    args[2] = args[2].scatter(-1, args[1][..., None], 0.0)
    args[2] /= args[2].sum(-1, keepdim=True)


VALUES = {
    "row 1 has temperature -0.5": put("temperatures_R", [1.0, -0.5]),
    "row 0 has temperature nan": put("temperatures_R", [torch.nan, 1.0]),
    "lengths_R of row 1 is 4; expected 0 to 3": put("lengths_R", [0, 4]),
    "lengths_R of row 0 is -1": put("lengths_R", [-1, 0]),
    "uniforms_RU of row 1 has 1.0 at 2": put("uniforms_RU", 1.0, (1, 2)),
    "draft token 2 of row 0 is 11; expected an id": put(1, 11, (0, 2)),
    "draft token 0 of row 1 is -1; expected an id": put(1, -1, (1, 0)),
    "draft token 1 of row 0 sums to": put(2, 0.9, (0, 1, 3)),
    "draft token 0 of row 1 has NaN": put(2, torch.nan, (1, 0, 3)),
    "has probability 0 under the distribution": nothing_drawn,
    "row 1 is at temperature 0, but the draft drew": put("temperatures_R", [1.0, 0.0]),
}
SHAPES = {
    "draft tokens have shape": put(1, torch.zeros(2, 2, dtype=torch.int64)),
    r"logits have shape \[2, 11\]": put(0, torch.zeros(2, 11)),
    r"distributions have shape \[2, 4, 11\]": put(2, torch.full((2, 4, 11), 1 / 11)),
    r"uniforms_RU has shape \[2, 3\]": put("uniforms_RU", uniforms(2, 3)),
    r"temperatures_R has shape \[3\]": put("temperatures_R", [1.0] * 3),
    r"lengths_R has shape \[1\]": put("lengths_R", [1]),
    "draft tokens are torch.int32": put(1, torch.zeros(2, 3, dtype=torch.int32)),
    "uniforms_RU is torch.float32": put("uniforms_RU", torch.zeros(2, 4)),
    "distributions are torch.bfloat16": put(2, torch.zeros(2, 3, 11, dtype=torch.bfloat16)),
    "logits are torch.int64": put(0, torch.zeros(2, 4, 11, dtype=torch.int64)),
    "lengths_R is torch.float32": put("lengths_R", [1.0, 2.0]),
    "top_k is 0": put("top_k", 0),
    "top_p is 0": put("top_p", 0.0),
    "top_p is 1.5": put("top_p", 1.5),
}


def test_the_valid_call_is_valid():
    assert call().tokens_RK.shape == (2, 4)


@pytest.mark.parametrize("text", VALUES)
def test_wrong_values_are_refused_in_words(text):
    with pytest.raises((SettingError, NonFiniteError), match=text):
        call(VALUES[text])
    call(VALUES[text], check=False)  # does not look


@pytest.mark.parametrize("text", SHAPES)
@pytest.mark.parametrize("check", [True, False])
def test_wrong_shapes_and_dtypes_are_always_refused(text, check):
    with pytest.raises((SettingError, ShapeError, DtypeError), match=text):
        call(SHAPES[text], check=check)


def test_a_greedy_row_with_a_token_off_its_distribution_is_refused():
    logits, tokens, _, u = random_chain(rows=1)
    q = torch.nn.functional.one_hot((tokens + 1) % 11, 11).float()
    with pytest.raises(SettingError, match="not the one that its distribution lies on"):
        verify_chain(logits, tokens, q, temperatures_R=[0.0], uniforms_RU=u)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("cut", [(-1, 1.0), (3, 1.0), (-1, 0.9)])
def test_logits_that_are_no_numbers_are_named_where_they_matter(bad, temperature, cut):
    logits, _, _, u = random_chain(rows=3)
    tokens = logits[:, :-1].argmax(-1)
    logits[1, 1, 5] = bad
    how = {"temperatures_R": [temperature] * 3, "uniforms_RU": u, "top_k": cut[0], "top_p": cut[1]}
    u[1] = torch.tensor([0.0, 0.0, 0.0, 0.5])  # keeps the first
    with pytest.raises(NonFiniteError, match=r"row 1 .* output token 1"):
        verify_chain(logits, tokens, None, **how)
    unseen = verify_chain(logits, tokens, None, **how, check=False)
    assert unseen.logprobs_RK[1, :2].isnan().tolist() == [False, True]
    # not reached: the place is beyond the row's only proposal
    tokens[1, 0] = (tokens[1, 0] + 1) % 11
    u[1, 0] = 1 - 1e-9
    assert verify_chain(logits, tokens, None, **how).num_tokens_R[1] == 1


def test_a_place_without_any_possible_token_is_named():
    logits, tokens, q, u = random_chain(rows=2)
    logits[1] = -torch.inf
    with pytest.raises(NonFiniteError, match="-inf for every token"):
        verify_chain(logits, tokens, q, temperatures_R=[1.0, 1.0], uniforms_RU=u)


def test_what_has_no_distribution_is_refused():
    with pytest.raises(ShapeError, match=r"expected \[rows, vocabulary\]"):
        tempered(torch.zeros(3), [1.0])
    with pytest.raises(ShapeError, match=r"temperatures_R has shape \[1\]"):
        tempered(torch.zeros(2, 3), [1.0])
    with pytest.raises(SettingError, match="row 1 has temperature -1"):
        tempered(torch.zeros(2, 3), [1.0, -1.0])
    with pytest.raises(SettingError, match="top_k is 0"):
        tempered(torch.zeros(1, 3), [1.0], top_k=0)
