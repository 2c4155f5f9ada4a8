"""Log-probs out of hidden states: the reference by hand, the chunked backend by the reference."""

from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from miles.errors import DtypeError, SettingError, ShapeError
from miles.losses.linear import Nucleus, chunked, explain, linear_logprobs
from miles.losses.linear.api import CHUNKED_ABOVE

BACKENDS = ["reference", "chunked"]
T, D, V = 7, 5, 23
OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "temperature of each": {"temperature": "rows"},
    "bias": {"bias": True},
    "softcap": {"softcap": 2.0},
    "nucleus": {"keep": True},
    "all": {"temperature": "rows", "bias": True, "softcap": 2.0, "keep": True},
}


@contextmanager
def tile(tokens, vocab):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "TOKENS_PER_TILE", tokens)
        patch.setattr(chunked, "VOCAB_PER_TILE", vocab)
        yield


@pytest.fixture(autouse=True)
def small_tiles():
    with tile(3, 8):
        yield


def head(num_tokens=T, vocab=V, dtype=torch.float64, seed=0, ignored=(2,)):
    """Hidden states, weight, bias, targets and a nucleus (every third row without limit)."""
    rng = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)
        for shape in [(num_tokens, D), (vocab, D), (vocab,)]
    )
    targets = torch.randint(0, vocab, (num_tokens,), generator=rng)
    kept = torch.rand(num_tokens, vocab, generator=rng) < 0.3
    kept[torch.arange(num_tokens), targets] = True
    kept[::3] = False
    targets[[i for i in ignored if i < num_tokens]] = -100
    return hidden, weight, bias, targets, Nucleus.from_mask(kept)


def arguments(option, bias, keep, num_tokens=T):
    chosen = dict(OPTIONS[option])
    if chosen.get("temperature") == "rows":
        chosen["temperature"] = torch.linspace(0.5, 2.0, num_tokens, dtype=torch.float64)
    if "bias" in chosen:
        chosen["bias"] = bias
    if "keep" in chosen:
        chosen["keep"] = keep
    return chosen


def run(backend, hidden, weight, targets, *, bias=None, upstream=None, entropy=True, **kwargs):
    """Log-probs, entropy and the gradients of a weighted sum of both."""
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    if bias is not None:
        kwargs["bias"] = leaves[2]
    out = linear_logprobs(*leaves[:2], targets, entropy=entropy, backend=backend, **kwargs)
    if upstream is None:
        upstream = torch.linspace(-2, 3, len(targets), dtype=torch.float64)
    grads = [upstream.to(out.logprobs.dtype), upstream.flip(0).to(out.logprobs.dtype)]
    outputs = [x for x in out if x is not None]
    torch.autograd.backward(outputs, grads[: len(outputs)])
    return [*outputs, *(leaf.grad for leaf in leaves)]


def assert_close(got, expected, tolerance):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_literal(backend):
    hidden, targets = torch.tensor([[1.0], [0.0], [5.0]]), torch.tensor([0, 1, -100])
    weight = torch.tensor([3.0, 1.0, 1.0]).log()[:, None]
    out = linear_logprobs(hidden, weight, targets, entropy=True, backend=backend)
    assert out.logprobs.exp().tolist() == pytest.approx([0.6, 1 / 3, 1.0])
    skewed = -(0.6 * torch.tensor(0.6).log() + 0.4 * torch.tensor(0.2).log()).item()
    assert out.entropy.tolist() == pytest.approx([skewed, torch.tensor(3.0).log().item(), 0.0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_literals_of_bias_cap_temperature_and_nucleus(backend):
    hidden, weight = torch.zeros(2, 1), torch.zeros(3, 1)
    bias = torch.tensor([4.0, 2.0, 1.0]).log()
    targets = torch.tensor([0, 1])
    keep = Nucleus(torch.tensor([2, 1]), torch.tensor([0, 0, 2]))

    def probs(**kwargs):
        out = linear_logprobs(hidden, weight, targets, bias=bias, backend=backend, **kwargs)
        return out.logprobs.exp().tolist()

    assert probs() == pytest.approx([4 / 7, 2 / 7])
    assert probs(keep=keep) == pytest.approx([4 / 7, 2 / 3])
    assert probs(temperature=0.5) == pytest.approx([16 / 21, 4 / 21])
    assert probs(temperature=torch.tensor([1.0, 0.5])) == pytest.approx([4 / 7, 4 / 21])
    capped = (0.1 * (bias / 0.1).tanh() / 0.5).softmax(0)  # the cap first, then the temperature
    assert probs(softcap=0.1, temperature=0.5) == pytest.approx(capped[:2].tolist())


@pytest.mark.parametrize("backend", BACKENDS)
def test_entropy_is_none_unless_asked_for(backend):
    hidden, weight, _, targets, _ = head()
    assert linear_logprobs(hidden, weight, targets, backend=backend).entropy is None


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("entropy", [False, True])
def test_chunked_equals_reference_in_value_and_gradient(option, entropy):
    hidden, weight, bias, targets, keep = head()
    kwargs = arguments(option, bias, keep) | {"entropy": entropy}
    expected = run("reference", hidden, weight, targets, **kwargs)
    assert_close(run("chunked", hidden, weight, targets, **kwargs), expected, 1e-12)


@settings(max_examples=60, deadline=None)
@given(
    num_tokens=st.integers(0, 9),
    vocab=st.integers(1, 20),
    tokens=st.integers(1, 10),
    ids=st.integers(1, 21),
    option=st.sampled_from(sorted(OPTIONS)),
    seed=st.integers(0, 1000),
)
def test_chunked_equals_reference_at_any_size(num_tokens, vocab, tokens, ids, option, seed):
    hidden, weight, bias, targets, keep = head(num_tokens, vocab, seed=seed)
    kwargs = arguments(option, bias, keep, num_tokens)
    expected = run("reference", hidden, weight, targets, **kwargs)
    with tile(tokens, ids):
        assert_close(run("chunked", hidden, weight, targets, **kwargs), expected, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("option", ["plain", "all"])
def test_gradcheck(backend, option):
    hidden, weight, bias, targets, keep = head(4, 9)
    kwargs = arguments(option, bias, keep, 4)

    def function(hidden, weight, bias):
        return tuple(
            linear_logprobs(
                hidden,
                weight,
                targets,
                entropy=True,
                backend=backend,
                **kwargs | ({"bias": bias} if "bias" in kwargs else {}),
            )
        )

    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    leaves.append(bias.clone().requires_grad_("bias" in kwargs))
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "grad_error"), [(torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)]
)
def test_low_precision_gives_float32_within_1e_5_of_float64(backend, dtype, grad_error):
    """Gradients are rounded once, to the dtype they come back in."""
    hidden, weight, bias, targets, keep = head(dtype=dtype)
    kwargs = {"bias": bias, "keep": keep, "temperature": 0.7}
    got = run(backend, hidden, weight, targets, **kwargs)
    kwargs["bias"] = bias.double()
    expected = run("reference", hidden.double(), weight.double(), targets, **kwargs)
    assert [x.dtype for x in got] == [torch.float32] * 2 + [dtype] * 3
    assert_close([x.double() for x in got[:2]], expected[:2], 1e-5)
    assert_close([x.double() for x in got[2:]], expected[2:], grad_error)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_hidden_states_do_not_give_bf16_logprobs(backend):
    """TRL's selective_log_softmax returned bf16 log-probs: wrong by up to 0.042 nats."""
    hidden, weight, _, targets, _ = head(64, 1000, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = linear_logprobs(hidden, weight, targets, backend=backend).logprobs
    exact = linear_logprobs(hidden.double(), weight.double(), targets, backend="reference").logprobs
    assert (got - exact).abs().max() < 1e-5
    assert (exact.bfloat16() - exact).abs().max() > 0.005


@pytest.mark.parametrize("backend", BACKENDS)
def test_temperature_scales_the_logits_and_not_the_logprob(backend):
    """prime-rl PR 697 divided the log-prob by the temperature."""
    hidden, weight, _, targets, _ = head()
    got = run(backend, hidden, weight, targets, temperature=2.0)[0]
    torch.testing.assert_close(got, run("reference", hidden / 2, weight, targets)[0])
    assert not torch.allclose(got, run("reference", hidden, weight, targets)[0] / 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("option", ["plain", "all"])
def test_ignored_rows_change_nothing_whatever_they_hold(backend, garbage, option):
    hidden, weight, bias, targets, keep = head(ignored=(1, 5))
    kwargs = arguments(option, bias, keep)
    upstream = torch.linspace(-2, 3, T, dtype=torch.float64)
    expected = run(backend, hidden, weight, targets, upstream=upstream, **kwargs)
    ignored = targets == -100
    hidden[ignored], upstream[ignored] = garbage, torch.nan
    if option == "all":
        kwargs["temperature"][ignored] = 0.0
    got = run(backend, hidden, weight, targets, upstream=upstream, **kwargs)
    assert got[0][ignored].tolist() == got[1][ignored].tolist() == [0.0, 0.0]
    assert (got[2][ignored] == 0).all()
    assert_close(got, expected, 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_in_a_row_with_a_target_is_not_hidden(backend):
    hidden, weight, _, targets, _ = head()
    hidden[1, 0] = torch.nan
    got = run(backend, hidden, weight, targets)
    assert got[0].isnan().nonzero().flatten().tolist() == [1]
    assert got[1].isnan().nonzero().flatten().tolist() == [1]
    assert got[3].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_forbidden_id_takes_no_probability_and_no_gradient(backend):
    """A bias of -inf is how padding of the vocabulary is kept out; here a whole tile of it."""
    hidden, weight, bias, targets, _ = head()
    targets = targets.where(targets < 0, targets.clamp(min=9))
    bias[:9] = -torch.inf
    got = run(backend, hidden, weight, targets, bias=bias)
    shorter = targets.where(targets < 0, targets - 9)
    expected = run("reference", hidden, weight[9:], shorter, bias=bias[9:])
    assert (got[3][:9] == 0).all() and (got[4][:9] == 0).all()
    assert_close([*got[:3], got[3][9:], got[4][9:]], expected, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits_neither_overflow_nor_cancel(backend):
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[1e4], [1e4], [0.0]])
    out = linear_logprobs(hidden, weight, torch.tensor([0]), entropy=True, backend=backend)
    assert out.logprobs.exp().item() == pytest.approx(0.5, abs=1e-6)
    assert out.entropy.exp().item() == pytest.approx(2.0, abs=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nucleus_of_one_id_is_certain_and_pulls_nowhere(backend):
    hidden, weight, _, targets, _ = head(ignored=())
    keep = Nucleus(targets, torch.arange(T + 1))
    logprobs, entropy, *grads = run(backend, hidden, weight, targets, keep=keep)
    assert logprobs.tolist() == entropy.tolist() == [0.0] * T
    assert all(grad.abs().max() < 1e-14 for grad in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradients_that_are_needed_are_given(backend):
    hidden, weight, bias, targets, _ = head()
    for wanted in range(3):
        leaves = [hidden, weight, bias]
        leaves[wanted] = leaves[wanted].clone().requires_grad_()
        out = linear_logprobs(*leaves[:2], targets, bias=leaves[2], backend=backend)
        out.logprobs.sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [i == wanted for i in range(3)]


class Recorder(TorchDispatchMode):
    """The largest tensor that any operation returned, and the rows of every multiplication."""

    def __init__(self):
        super().__init__()
        self.largest = 0
        self.multiplied = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
        if func is torch.ops.aten.mm.default:
            self.multiplied.append((args[0].shape[0], args[0].shape[1], args[1].shape[1]))
        return out


@pytest.mark.parametrize("option", ["plain", "all"])
def test_chunked_never_holds_all_logits(option):
    hidden, weight, bias, targets, keep = head(60, 300)
    recorders = {backend: Recorder() for backend in BACKENDS}
    for backend, recorder in recorders.items():
        with tile(16, 64), recorder:
            run(backend, hidden, weight, targets, **arguments(option, bias, keep, 60))
    assert recorders["reference"].largest >= 60 * 300
    ids = keep.ids_K.numel() if option == "all" else 0
    assert recorders["chunked"].largest <= max(weight.numel(), ids, 16 * 65)


def test_dead_rows_cost_nothing_in_the_backward_pass():
    """Of 7 rows one is ignored, three get no gradient at all and one only that of its entropy."""
    hidden, weight, _, targets, _ = head()
    hidden.requires_grad_(), weight.requires_grad_()
    with tile(T, V):
        with Recorder() as forward:
            out = linear_logprobs(hidden, weight, targets, entropy=True, backend="chunked")
        of_logprobs = torch.tensor([0, 1.0, 1, 0, 0, 0, 2], dtype=torch.float64)
        of_entropy = torch.tensor([0, 0, 1.0, 0, 0, 3, 0], dtype=torch.float64)
        with Recorder() as backward:
            torch.autograd.backward([out.logprobs, out.entropy], [of_logprobs, of_entropy])
    assert forward.multiplied == [(6, D, V)]
    assert backward.multiplied == [(3, D, V), (3, V, D), (V, 3, D)]
    assert (hidden.grad != 0).any(-1).tolist() == [False, True, False, False, False, True, True]


def test_a_row_without_gradient_keeps_its_nan_out_of_the_weight():
    hidden, weight, _, targets, _ = head()
    upstream = torch.tensor([0.0, 1, 1, 1, 1, 1, 0], dtype=torch.float64)
    expected = run("chunked", hidden, weight, targets, upstream=upstream)
    hidden[0] = torch.nan
    got = run("chunked", hidden, weight, targets, upstream=upstream)
    assert got[0][0].isnan()
    assert_close(got[2:], expected[2:], 0)


@pytest.mark.parametrize("upstream", [torch.zeros(T), torch.ones(T)])
def test_no_live_row_gives_zero_gradients(upstream):
    hidden, weight, bias, targets, keep = head()
    if upstream.any():
        targets[:] = -100
    got = run("chunked", hidden, weight, targets, upstream=upstream, bias=bias, keep=keep)
    assert all((grad == 0).all() for grad in got[2:])


def test_weight_gradient_is_summed_in_float32():
    """4096 rows that pull by 2^-10 each: in bf16 the sum would stop growing at 2^-2."""
    hidden, weight = torch.ones(4096, 1).bfloat16(), torch.zeros(2, 1).bfloat16()
    targets, upstream = torch.zeros(4096, dtype=torch.int64), torch.full((4096,), 2.0**-9)
    with tile(1, 2):
        got = run("chunked", hidden, weight, targets, upstream=upstream, entropy=False)
    assert got[2].flatten().tolist() == [4.0, -4.0]


def test_a_nucleus_of_its_mask_and_back():
    mask = torch.tensor([[True, False, True], [False, False, False], [False, True, False]])
    nucleus = Nucleus.from_mask(mask)
    assert (nucleus.ids_K.tolist(), nucleus.offsets_T1.tolist()) == ([0, 2, 1], [0, 2, 2, 3])
    assert nucleus.rows_K.tolist() == [0, 0, 2]
    mask[1] = True  # no ids: no truncation
    assert torch.equal(nucleus.mask(3), mask)
    assert torch.equal(nucleus.to("cpu").mask(3), mask)


def test_explain_and_auto_follow_one_rule():
    weight = torch.zeros(1024, 1)
    hidden = torch.zeros(CHUNKED_ABOVE // 1024, 1)
    assert explain(hidden, weight) == f"reference: T * V = {len(hidden)} * 1024 is at most 16777216"
    longer = torch.zeros(len(hidden) + 1, 1)
    assert explain(longer, weight).startswith("chunked: T * V = 16385 * 1024 is more than")
    assert explain(longer, weight, backend="reference") == "reference: asked for by name"
    recorder = Recorder()
    with tile(512, 512), recorder:
        linear_logprobs(longer, weight, torch.full((len(longer),), -100))
        linear_logprobs(longer, weight, torch.arange(len(longer)) % 1024 % 1000)
    assert recorder.largest <= 512 * 512


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (ShapeError, r"\(7, 4\).*expected \[T, D\] and \[V, D\]", {"hidden_TD": torch.zeros(T, 4)}),
        (ShapeError, r"\(5,\).*expected \[T, D\]", {"hidden_TD": torch.zeros(D)}),
        (ShapeError, "expected V of 1 or more", {"weight_VD": torch.zeros(0, D)}),
        (ShapeError, r"targets_T.*\(6,\); expected \[T\]", {"targets_T": torch.zeros(6).long()}),
        (ShapeError, r"bias.*\(7,\); expected \[V\]", {"bias": torch.zeros(T)}),
        (ShapeError, r"temperature.*\(23,\); expected", {"temperature": torch.ones(V)}),
        (ShapeError, "keep has 2 rows", {"keep": Nucleus.from_mask(torch.ones(2, V).bool())}),
        (DtypeError, "int64; expected floating", {"weight_VD": torch.zeros(V, D).long()}),
        (DtypeError, "float32; expected int64", {"targets_T": torch.zeros(T)}),
        (DtypeError, "bias is torch.int64", {"bias": torch.zeros(V).long()}),
        (DtypeError, "temperature is torch.int64", {"temperature": torch.ones(T).long()}),
        (SettingError, r"holds \[23, .*expected 0\.\.22", {"targets_T": torch.full((T,), V)}),
        (SettingError, r"temperature is 0.*above 0", {"temperature": 0.0}),
        (SettingError, r"temperature is -1.*above 0", {"temperature": -1.0}),
        (SettingError, r"is \[0.0, .*\] at tokens \[0, 1, 3", {"temperature": torch.zeros(T)}),
        (SettingError, r"is \[nan, .*above 0", {"temperature": torch.full((T,), torch.nan)}),
        (SettingError, "softcap is 0.*above 0", {"softcap": 0.0}),
        (SettingError, "backend is 'fast'; expected 'auto' or.*'chunked'", {"backend": "fast"}),
        (
            SettingError,
            r"leaves out the target of token 1: 3 is not in \[0\] \(1 ids, 5 such tokens\)",
            {
                "keep": Nucleus(torch.tensor([3, *[0] * 6]), torch.arange(T + 1)),
                "targets_T": torch.tensor([3, 3, -100, 3, 3, 3, 3]),
            },
        ),
        (
            SettingError,
            r"keep holds the ids \[23\]; expected 0\.\.22",
            {"keep": Nucleus(torch.tensor([V]), torch.tensor([0, 1, 1, 1, 1, 1, 1, 1]))},
        ),
    ],
)
def test_bad_input(error, match, change):
    hidden, weight, _, targets, _ = head()
    arguments = {"hidden_TD": hidden, "weight_VD": weight, "targets_T": targets}
    with pytest.raises(error, match=match):
        linear_logprobs(**(arguments | change))


@pytest.mark.parametrize(
    ("error", "ids", "offsets"),
    [
        (ShapeError, torch.zeros(1, 1).long(), torch.tensor([0, 1])),
        (ShapeError, torch.zeros(0).long(), torch.zeros(0).long()),
        (DtypeError, torch.zeros(1), torch.tensor([0, 1])),
        (SettingError, torch.zeros(1).long(), torch.tensor([0, 2])),
        (SettingError, torch.zeros(1).long(), torch.tensor([0, 2, 1])),
        (SettingError, torch.zeros(1).long(), torch.tensor([1, 1])),
    ],
)
def test_bad_nucleus(error, ids, offsets):
    with pytest.raises(error, match="expected"):
        Nucleus(ids, offsets)
