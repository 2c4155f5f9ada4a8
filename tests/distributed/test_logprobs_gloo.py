"""Log-probs of a vocabulary that is spread over 2 and 4 processes equal those of one.

Each layout is spawned once and computes everything; the tests compare the results.
"""

import pytest
import torch
import torch.distributed as dist

from miles.errors import SettingError
from miles.losses.linear import Nucleus, chunked, explain, linear_logprobs
from miles.losses.linear.api import CHUNKED_ABOVE
from miles.losses.logprobs import token_logprobs
from tests.distributed.gloo import run

T, D, V = 9, 5, 24
BACKENDS = ["reference", "chunked"]
OPTIONS = {
    "plain": [],
    "temperature": ["temperature"],
    "bias": ["bias"],
    "nucleus": ["keep"],
    "all": ["temperature", "bias", "softcap", "keep"],
}
LINEAR = [
    (backend, option, entropy)
    for backend in BACKENDS
    for option in OPTIONS
    for entropy in (False, True)
]


def compute(sharded: bool) -> dict[str, dict]:
    """`shared`: the same on every rank; `sharded`: gradients of this rank's vocabulary."""
    chunked.TOKENS_PER_TILE, chunked.VOCAB_PER_TILE = 4, 5
    rng = torch.Generator().manual_seed(0)
    hidden, weight, logits = (
        torch.randn(*shape, generator=rng, dtype=torch.float64) * 2
        for shape in [(T, D), (V, D), (T, V)]
    )
    bias = torch.randn(V, generator=rng, dtype=torch.float64)
    bias[:6] = -torch.inf  # the whole shard of the first of four ranks
    logits[:, 18:] = -torch.inf
    targets = torch.randint(6, 18, (T,), generator=rng)
    kept = torch.rand(T, V, generator=rng) < 0.3
    kept[torch.arange(T), targets] = True
    kept[4] = False
    targets[[1, 6]] = -100
    hidden[1], logits[1] = torch.nan, torch.nan
    temperature = torch.linspace(0.5, 2.0, T, dtype=torch.float64)
    extras = {"temperature": temperature, "softcap": 3.0, "keep": Nucleus.from_mask(kept)}
    upstream = torch.linspace(-2, 3, T, dtype=torch.float64)
    upstream[3] = 0

    group, shard = None, slice(None)
    if sharded:
        group, size = dist.group.WORLD, V // dist.get_world_size()
        shard = slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)
    shared, parts = {}, {}
    for backend, option, entropy in LINEAR:
        kwargs = {name: extras[name] for name in OPTIONS[option] if name != "bias"}
        leaves = [x.clone().requires_grad_() for x in (hidden, weight[shard], bias[shard])]
        if "bias" in OPTIONS[option]:
            if option == "all":  # the cap makes a finite logit of -inf
                leaves[2] = bias[shard].clamp(min=-1).requires_grad_()
            kwargs["bias"] = leaves[2]
        settings = {"entropy": entropy, "vocab_group": group, "backend": backend}
        out = linear_logprobs(*leaves[:2], targets, **settings, **kwargs)
        outputs = [x for x in out if x is not None]
        torch.autograd.backward(outputs, [upstream, upstream.flip(0)][: len(outputs)])
        name = f"{backend} {option} {entropy}"
        shared[name] = [*(x.detach() for x in outputs), leaves[0].grad]
        parts[name] = [x.grad for x in leaves[1:] if x.grad is not None]
    for name, tempered in {"one": 0.7, "of each": temperature}.items():
        leaf = logits[:, shard].clone().requires_grad_()
        got = token_logprobs(leaf, targets, temperature=tempered, vocab_group=group)
        got.backward(upstream)
        shared[f"token {name}"] = [got.detach()]
        parts[f"token {name}"] = [leaf.grad.T]
    low = [x.float().requires_grad_() for x in (hidden, weight[shard])]
    got = linear_logprobs(*low, targets, vocab_group=group, backend="chunked").logprobs
    got.backward(upstream.float())
    shared["float32"], parts["float32"] = [got.detach(), low[0].grad], [low[1].grad]
    none = torch.full((T,), -100)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight[shard])]
    got = linear_logprobs(*leaves, none, vocab_group=group, backend="chunked").logprobs
    got.sum().backward()
    shared["ignored"], parts["ignored"] = [got.detach(), leaves[0].grad], [leaves[1].grad]
    return {"shared": shared, "sharded": parts, "refusals": refusals() if sharded else []}


def refusals() -> list[str]:
    """What is said about a target of no rank, about a foreign group, and about the choice."""
    size, world = 8, dist.get_world_size()
    hidden, weight = torch.zeros(1, 1), torch.zeros(size, 1)
    said = []
    try:
        targets = torch.tensor([size * world])
        linear_logprobs(hidden, weight, targets, vocab_group=dist.group.WORLD)
    except SettingError as error:
        said.append(str(error))
    first = dist.new_group([0])
    try:
        token_logprobs(torch.zeros(1, size), torch.tensor([0]), vocab_group=first)
    except SettingError as error:
        said.append(str(error))
    many = torch.zeros(CHUNKED_ABOVE // size, 1)
    said.append(explain(many, weight, vocab_group=dist.group.WORLD))
    return said


@pytest.fixture(scope="module")
def single():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "TOKENS_PER_TILE", chunked.TOKENS_PER_TILE)
        patch.setattr(chunked, "VOCAB_PER_TILE", chunked.VOCAB_PER_TILE)
        yield compute(sharded=False)


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory):
    return run(compute, request.param, tmp_path_factory.mktemp(f"tp{request.param}"), True)


def assert_match(ranks, single, name, expected_name=None, tolerance=1e-12):
    for rank in ranks:
        torch.testing.assert_close(
            rank["shared"][name],
            single["shared"][expected_name or name],
            rtol=tolerance,
            atol=tolerance,
        )
    parts = zip(*(rank["sharded"][name] for rank in ranks), strict=True)
    torch.testing.assert_close(
        [torch.cat(part) for part in parts],
        single["sharded"][expected_name or name],
        rtol=tolerance,
        atol=tolerance,
    )


@pytest.mark.parametrize(("backend", "option", "entropy"), LINEAR)
def test_linear_logprobs_and_every_gradient_match(ranks, single, backend, option, entropy):
    name = f"{option} {entropy}"
    assert_match(ranks, single, f"{backend} {name}", f"reference {name}")
    grads = single["shared"][f"reference {name}"][-1:] + single["sharded"][f"reference {name}"]
    assert all(grad.isfinite().all() and grad.abs().max() > 1e-2 for grad in grads)


@pytest.mark.parametrize("name", ["one", "of each"])
def test_token_logprobs_and_the_gradient_of_each_shard_match(ranks, single, name):
    assert_match(ranks, single, f"token {name}")
    assert single["shared"][f"token {name}"][0].isfinite().all()


def test_float32_matches(ranks, single):
    assert_match(ranks, single, "float32", tolerance=1e-5)


def test_all_rows_ignored_is_zero_everywhere(ranks, single):
    assert_match(ranks, single, "ignored")
    assert all((x == 0).all() for x in single["shared"]["ignored"] + single["sharded"]["ignored"])


def test_every_rank_has_the_same_bits(ranks):
    for name, values in ranks[0]["shared"].items():
        for rank in ranks[1:]:
            torch.testing.assert_close(rank["shared"][name], values, rtol=0, atol=0, msg=name)


def test_ids_are_of_the_whole_vocabulary_and_so_is_the_choice_of_backend(ranks):
    world = len(ranks)
    for i, rank in enumerate(ranks):
        target, *foreign, choice = rank["refusals"]
        assert f"holds [{8 * world}]; expected 0..{8 * world - 1}" in target
        assert [f"does not hold this process (rank {i})" in text for text in foreign] == [True] * (
            i > 0
        )
        assert choice == f"chunked: T * V = 2097152 * {8 * world} is more than 16777216"
