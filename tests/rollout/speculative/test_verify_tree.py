"""Trees of candidates: chosen without chance, drawn with and without replacement."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from miles.errors import DtypeError, NonFiniteError, SettingError, ShapeError
from miles.rollout.speculative import tempered, verify_chain, verify_tree
from tests.rollout.speculative.oracle import (
    Process,
    assert_is_the_targets,
    chance,
    exact_outputs,
    outputs_of,
    path,
)

seeds = st.integers(0, 10_000)
few = settings(max_examples=25, deadline=None, derandomize=True)
temperatures = st.sampled_from([0.0, 0.4, 1.0, 2.0])
cuts = st.sampled_from([(-1, 1.0), (2, 1.0), (-1, 0.7), (2, 0.8)])
kinds = pytest.mark.parametrize("replacement", [None, True, False], ids=["chosen", "with", "out"])


@st.composite
def trees(draw, most: int = 4, widest: int = 3) -> list[int]:
    """Parents of up to `most` nodes, of which none has more than `widest` children."""
    parents: list[int] = []
    for node in range(draw(st.integers(1, most))):
        free = [n for n in range(-1, node) if parents.count(n) < widest]
        parents.append(draw(st.sampled_from(free)))
    return parents


def depth_of(parents: list[int]) -> int:
    return max(len(path(parents, [0] * len(parents), node)) for node in range(len(parents)))


# --- no loss, without sampling


@kinds
@few
@given(seeds, temperatures, cuts, trees())
@example(3, 1.0, (-1, 1.0), [-1, -1, 0, 0])
@example(3, 1.0, (-1, 1.0), [-1, -1, -1])
@example(3, 1.0, (-1, 1.0), [-1, 0, -1, 1])
def test_tree_output_is_exactly_the_targets(replacement, seed, temperature, cut, parents):
    depth = depth_of(parents)
    target = Process.random(seed, 3, depth, temperature=temperature, top_k=cut[0], top_p=cut[1])
    draft = None
    if replacement is not None:
        if temperature == 0:  # the draft's most likely token is the one child
            parents = [node - 1 for node in range(depth)]
        top_k = 2 if replacement else -1  # three siblings need three tokens
        draft = Process.random(seed + 1, 3, depth, temperature=min(temperature, 0.9), top_k=top_k)
    outputs = exact_outputs(parents, target, draft, replacement=replacement)
    assert_is_the_targets(outputs, target, depth + 1)


@kinds
def test_a_lossy_rule_is_found_without_sampling(replacement):
    target, draft = Process.random(1, 3, 2), Process.random(2, 3, 2)

    def eager(uniforms_RU):  # keeps with 0.9 of the right chance
        uniforms_RU = uniforms_RU.clone()
        uniforms_RU[:, :-1] = (uniforms_RU[:, :-1] / 0.9).clamp(max=1 - 1e-12)
        return uniforms_RU

    with pytest.raises(AssertionError, match="a verdict changes at another place"):
        exact_outputs(
            [-1, -1, 0], target, None if replacement is None else draft,
            replacement=replacement, change=eager,
        )  # fmt: skip


def test_judging_one_way_of_drawing_as_the_other_is_not_lossless():
    rows = 100_000
    torch.manual_seed(0)
    p, q = torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    tokens_RN = torch.multinomial(q, rows * 2, replacement=True).view(rows, 2)
    for replacement in (True, False):
        verified = verify_tree(
            p.log().expand(rows, 3, 4), tokens_RN, torch.full((rows, 2), -1),
            q.expand(rows, 3, 4), temperatures_R=[1.0] * rows, replacement=replacement,
            uniforms_RU=torch.rand(rows, 3, dtype=torch.float64), check=False,
        )  # fmt: skip
        counts = torch.bincount(verified.tokens_RK[:, 0], minlength=4)
        assert (chance(counts, p) > 1e-4) is replacement


# --- no loss, with sampling


def sampled_first_tokens(seed, vocab, width, replacement, *, rows, temperature=1.0, lossy=False):
    """The first token of trees of `width` children, each with `width` of its own."""
    torch.manual_seed(seed)
    parents = [-1] * width + [n for n in range(width) for _ in range(width)]
    place_P = torch.tensor([-1, *range(len(parents))])
    logits_PV = 1.5 * torch.randn(len(place_P), vocab)
    p_PV = tempered(logits_PV, [temperature] * len(place_P))
    q_PV = (1.5 * torch.randn(len(place_P), vocab)).softmax(-1)
    tokens = torch.empty(rows, len(parents), dtype=torch.int64)
    for place in range(width + 1):  # the root, and its children
        at = [n for n, parent in enumerate(parents) if parent == place - 1]
        if replacement is None:
            tokens[:, at] = q_PV[place].topk(width).indices
        else:
            q_RV = q_PV[place].expand(rows, vocab)
            tokens[:, at] = torch.multinomial(q_RV, width, replacement=replacement)
    uniforms_RU = torch.rand(rows, len(parents) + 1, dtype=torch.float64)
    if lossy:
        uniforms_RU[:, :-1] = (uniforms_RU[:, :-1] / 0.9).clamp(max=1 - 1e-12)
    verified = verify_tree(
        logits_PV.expand(rows, -1, -1), tokens, torch.tensor(parents).expand(rows, -1),
        None if replacement is None else q_PV.expand(rows, -1, -1), replacement=replacement,
        temperatures_R=[temperature] * rows, uniforms_RU=uniforms_RU,
    )  # fmt: skip
    return torch.bincount(verified.tokens_RK[:, 0], minlength=vocab), p_PV[0]


@kinds
@settings(max_examples=8, deadline=None, derandomize=True)
@given(seeds, st.integers(4, 30), st.integers(1, 3), st.sampled_from([0.5, 1.0]))
def test_tree_output_passes_a_chi_square_test(replacement, seed, vocab, width, temperature):
    counts, probs = sampled_first_tokens(
        seed, vocab, width, replacement, rows=4_000, temperature=temperature
    )
    assert chance(counts, probs) > 1e-5


@kinds
def test_the_chi_square_test_finds_a_lossy_rule(replacement):
    how = {"seed": 1, "vocab": 6, "width": 2, "replacement": replacement, "rows": 40_000}
    assert chance(*sampled_first_tokens(**how)) > 1e-3
    assert chance(*sampled_first_tokens(**how, lossy=True)) < 1e-9


# --- literals and invariances


def random_tree(seed=0, rows=5, vocab=9):
    generator = torch.Generator().manual_seed(seed)
    parents = torch.tensor([-1, -1, 0, 0, 1, 2]).expand(rows, -1)
    logits = torch.randn(rows, 7, vocab, generator=generator)
    q = torch.randn(rows, 7, vocab, generator=generator).softmax(-1)
    tokens = torch.stack([torch.randperm(vocab, generator=generator)[:6] for _ in range(rows)])
    u = torch.rand(rows, 7, dtype=torch.float64, generator=generator)
    return logits, tokens, parents, q, u


@few
@given(seeds, cuts, st.sampled_from([None, True]))
def test_a_chain_is_a_tree_without_siblings(seed, cut, replacement):
    logits, tokens, _, q, u = random_tree(seed)
    parents = torch.arange(-1, 5).expand(5, -1)
    common = {"temperatures_R": [0.5, 1.0, 1.0, 2.0, 1.5], "uniforms_RU": u}
    common |= {"lengths_R": [6, 0, 2, 6, 5], "top_k": cut[0], "top_p": cut[1]}
    chain_q, tree_q = (None, None) if replacement is None else (q[:, :-1], q)
    chain = verify_chain(logits, tokens, chain_q, **common)
    tree = verify_tree(logits, tokens, parents, tree_q, **common, replacement=replacement)
    assert torch.equal(chain.tokens_RK, tree.tokens_RK)
    torch.testing.assert_close(chain.logprobs_RK, tree.logprobs_RK, equal_nan=True)
    kept = tree.num_tokens_R[:, None] - 1
    places = torch.arange(6).expand(5, -1)
    assert torch.equal(tree.nodes_RK, torch.where(places < kept, places, -1))


@kinds
def test_a_row_depends_on_nothing_but_itself(replacement):
    logits, tokens, parents, q, u = random_tree()
    q = None if replacement is None else q
    temperatures_R, lengths_R = (
        torch.tensor([1.0, 0.7, 2.0, 1.0, 1.0]),
        torch.tensor([6, 3, 0, 5, 6]),
    )
    how = {"replacement": replacement}
    common = how | {"temperatures_R": temperatures_R, "lengths_R": lengths_R, "uniforms_RU": u}
    whole = verify_tree(logits, tokens, parents, q, **common)
    beyond = torch.arange(6) >= lengths_R[:, None]
    dirty = verify_tree(
        logits.masked_fill(torch.arange(7)[:, None] > lengths_R[:, None, None], torch.nan),
        tokens.masked_fill(beyond, -3), parents.masked_fill(beyond, 77), q, **common,
    )  # fmt: skip
    assert torch.equal(dirty.tokens_RK, whole.tokens_RK)
    assert torch.equal(dirty.nodes_RK, whole.nodes_RK)
    for row in range(5):
        n, one = int(lengths_R[row]), slice(row, row + 1)
        alone = verify_tree(
            logits[one, : n + 1], tokens[one, :n], parents[one, :n],
            None if q is None else q[one, : n + 1], temperatures_R=temperatures_R[one],
            uniforms_RU=torch.cat([u[one, :n], u[one, -1:]], 1), **how,
        )  # fmt: skip
        assert outputs_of(alone)[0] == outputs_of(whole)[row]


def test_the_nodes_are_the_path_of_the_tokens():
    logits, tokens, parents, _, u = random_tree(rows=400)
    verified = verify_tree(
        4 * logits, tokens, parents, None, temperatures_R=[1.0] * 400, uniforms_RU=u
    )
    lengths = set()
    for row, output in enumerate(outputs_of(verified)):
        nodes = verified.nodes_RK[row, : len(output) - 1].tolist()
        assert (verified.nodes_RK[row, len(nodes) :] == -1).all()
        assert [parents[row, n].item() for n in nodes] == [-1, *nodes][: len(nodes)]
        assert output[:-1] == tuple(tokens[row, nodes].tolist())
        lengths.add(len(output))
        at = [0, *(n + 1 for n in nodes)]
        expected = (4 * logits[row, at]).log_softmax(-1)[range(len(output)), list(output)]
        torch.testing.assert_close(verified.logprobs_RK[row, : len(output)], expected)
    assert lengths == {1, 2, 3, 4}


def test_greedy_takes_the_most_likely_child_wherever_it_stands():
    logits, _, parents, _, u = random_tree(rows=1)
    best = logits[0].argmax(-1)
    tokens = torch.tensor([[(best[0] + 1) % 9, best[0], 0, 0, best[2], 0]])
    q = torch.zeros(1, 7, 9)
    q[..., 3] = 1.0  # the draft's own favourite, at every place
    for probs, replacement in ((None, None), (q, True), (q, False)):
        verified = verify_tree(
            logits, tokens, parents, probs,
            temperatures_R=[0.0], uniforms_RU=u, replacement=replacement,
        )  # fmt: skip
        assert outputs_of(verified) == [tuple(best[[0, 2, 5]].tolist())]
        assert verified.nodes_RK.tolist() == [[1, 4, -1, -1, -1, -1]]


def test_children_that_cover_everything_leave_no_refusal():
    p = torch.tensor([0.2, 0.3, 0.5])
    u = torch.rand(500, 4, dtype=torch.float64)
    verified = verify_tree(
        p.log().expand(500, 4, 3), torch.tensor([[2, 0, 1]]).expand(500, 3),
        torch.full((500, 3), -1), None, temperatures_R=[1.0] * 500, uniforms_RU=u,
    )  # fmt: skip
    assert (verified.num_tokens_R == 2).all()


# --- bad input


def call(change=lambda args, how: None, check=True):
    logits, tokens, parents, q, u = random_tree(rows=2)
    args = [logits, tokens, parents.clone(), q]
    how = {"temperatures_R": [1.0, 1.0], "uniforms_RU": u, "replacement": False, "check": check}
    change(args, how)
    return verify_tree(*args, **how)


def put(index, value, at=None):
    def change(args, how):
        where = args if isinstance(index, int) else how
        if at is None:
            where[index] = value
        else:
            where[index][at] = value

    return change


def repeat(args, how):
    args[1][1, 3] = args[1][1, 2]


def impossible(args, how):
    args[3][0, 2, args[1][0, 4]] = 0.0
    args[3][0, 2] /= args[3][0, 2].sum()


VALUES = {
    "row 0 has temperature -1.0": put("temperatures_R", [-1.0, 1.0]),
    "lengths_R of row 0 is 7; expected 0 to 6": put("lengths_R", [7, 0]),
    "uniforms_RU of row 1 has 1.5 at 6": put("uniforms_RU", 1.5, (1, 6)),
    "draft token 5 of row 1 is 9; expected an id": put(1, 9, (1, 5)),
    "node 3 of row 1 has parent 3; expected -1": put(2, 3, (1, 3)),
    "node 0 of row 0 has parent -2": put(2, -2, (0, 0)),
    "the children at place 1 of row 0 sums to": put(3, 0.9, (0, 1, 3)),
    "the children at place 0 of row 1 has NaN": put(3, torch.nan, (1, 0, 3)),
    "row 1 is at temperature 0, but the draft drew the children": put("temperatures_R", [1.0, 0.0]),
    "draft token 4 of row 0, .*, has probability 0": impossible,
    "node 3 of row 1 repeats token": repeat,
}
SHAPES = {
    r"parents_RN has shape \[2, 5\]": put(2, torch.full((2, 5), -1)),
    r"parents_RN are torch.int32": put(2, torch.full((2, 6), -1, dtype=torch.int32)),
    r"distributions have shape \[2, 6, 9\]": put(3, torch.full((2, 6, 9), 1 / 9)),
    "say replacement=True if": put("replacement", None),
    "replacement=False has no effect": put(3, None),
    "top_k is -2": put("top_k", -2),
}


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


def test_what_is_not_looked_at_may_be_anything():
    call(put(3, torch.nan, (0, slice(4, 7))))  # places without children
    assert call(put("replacement", True)).tokens_RK.shape == (2, 7)

    def twice_with_replacement(args, how):
        repeat(args, how)
        how["replacement"] = True

    call(twice_with_replacement)


def test_logits_that_are_no_numbers_are_named_where_they_matter():
    logits, tokens, parents, _, u = random_tree(rows=3)
    logits[:, 0] = 0.0
    logits[2, 0, tokens[2, 0]] = 50.0  # node 0 is kept
    logits[2, 1, 4] = torch.nan
    logits[:, 2] = logits[:2, 1] = 0.0
    how = {"temperatures_R": [1.0] * 3, "uniforms_RU": u}
    with pytest.raises(NonFiniteError, match=r"row 2 .* output token 1"):
        verify_tree(logits, tokens, parents, None, **how)
    logits[2, 1, 4], logits[2, 2, 4] = 0.0, torch.nan  # below node 1, which is not reached
    verify_tree(logits, tokens, parents, None, **how)
