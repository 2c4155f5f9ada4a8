import torch
from hypothesis import given
from hypothesis import strategies as st

from miles.sync._transforms import Grouped, Interleaved, PadRows, Then, Transpose, Unstack
from miles.sync.names import Concat, Copy, QueryGroups, Stack

small = st.integers(1, 4)


def numbered(*shape, start=0):
    size = torch.Size(shape).numel()
    return torch.arange(start, start + size).view(shape)


def exact(transform, parts):
    made = transform.forward(parts)
    back = transform.backward([part.contiguous() for part in made])
    assert len(back) == len(parts)
    assert all(torch.equal(a, b) for a, b in zip(back, parts, strict=True))
    return made


@given(small, small, small, st.sampled_from([(), (3,), (2, 5)]))
def test_query_groups_lay_each_groups_heads_together(per_group, num_groups, head_dim, rest):
    heads = per_group * num_groups
    parts = [
        numbered(n * head_dim, *rest, start=1000 * i)
        for i, n in enumerate((heads, num_groups, num_groups))
    ]
    (whole,) = exact(QueryGroups(heads, num_groups, head_dim), parts)
    for g, group in enumerate(whole.chunk(num_groups)):
        first = g * per_group * head_dim
        rows = [parts[0][first : first + per_group * head_dim]]
        rows += [part[g * head_dim : (g + 1) * head_dim] for part in parts[1:]]
        assert torch.equal(group, torch.cat(rows))


@given(small, small, small, st.booleans())
def test_experts_go_into_every_form_and_back(num, half, hidden, wide):
    parts = [numbered(half, hidden, start=100 * i) for i in range(2 * num)]
    (stacked,) = exact(Stack(Concat(), num), parts)
    assert stacked.shape == (num, 2 * half, hidden)
    exact(Stack(Copy(), 2 * num), parts)
    (matrix,) = exact(Then(Stack(Concat(), num), Grouped(num, wide)), parts)
    memory = matrix.reshape(num, hidden, 2 * half)
    assert torch.equal(memory, stacked.transpose(1, 2))


@given(small, small, small, st.data())
def test_gate_and_up_in_turns_come_apart(num, hidden, half, data):
    first = data.draw(st.integers(0, num - 1))
    chosen = range(first, data.draw(st.integers(first + 1, num)))
    turns = numbered(num, hidden, 2 * half)
    experts = Unstack(Interleaved(), num, chosen).forward([turns])
    for expert, fc1 in zip(chosen, experts, strict=True):
        gate, up = fc1.chunk(2)
        assert torch.equal(gate.t(), turns[expert, :, 0::2])
        assert torch.equal(up.t(), turns[expert, :, 1::2])
    exact(Unstack(Interleaved(), num, chosen), [turns[first : chosen.stop]])
    exact(Unstack(Interleaved(), num, range(num)), [numbered(num, 2 * half)])
    exact(Unstack(Transpose(), num, range(num)), [turns])


@given(small, small, st.integers(0, 3))
def test_padded_rows_come_off(rows, width, padding):
    (table,) = exact(PadRows(rows, rows + padding), [numbered(rows, width)])
    assert table.shape == (rows + padding, width)


@given(st.lists(small, min_size=1, max_size=4), st.sampled_from([(), (3,)]))
def test_parts_of_any_size_come_apart(sizes, rest):
    parts = [numbered(size, *rest, start=100 * i) for i, size in enumerate(sizes)]
    exact(Concat(tuple(sizes)), parts)
