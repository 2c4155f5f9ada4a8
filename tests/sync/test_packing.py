"""A model's parameters in one allocation."""

import pytest
import torch
from torch import nn

from miles.errors import SettingError
from miles.sync import pack_parameters_
from tests.models import tiny


def loss_of(model):
    ids = torch.arange(12).view(2, 6)
    return model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("tied", [False, True])
def test_training_goes_on_with_the_same_numbers(tied):
    models = [tiny("llama", tie_word_embeddings=tied) for _ in range(2)]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.1) for model in models]
    for step in range(3):
        if step == 1:
            objects = list(models[0].parameters())
            pack_parameters_(models[0])
            assert all(a is b for a, b in zip(objects, models[0].parameters(), strict=True))
        losses = []
        for model, optimizer in zip(models, optimizers, strict=True):
            loss = loss_of(model)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[0] == losses[1]
    assert len({p.untyped_storage().data_ptr() for p in models[0].parameters()}) == 1
    one, other = (model.state_dict() for model in models)
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_dtypes_and_shapes_are_kept_and_each_begins_aligned():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.narrow_one = nn.Parameter(torch.randn(3, 5).bfloat16())
            self.frozen = nn.Parameter(torch.randint(9, (7,), dtype=torch.uint8), False)
            self.turned = nn.Parameter(torch.randn(4, 6).T)
            self.empty = nn.Parameter(torch.empty(0, 3))
            self.scalar = nn.Parameter(torch.tensor(2.0))

    model = Odd()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    pack_parameters_(model)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == before[name].dtype and torch.equal(parameter, before[name])
        assert parameter.storage_offset() * parameter.itemsize % 256 == 0
        assert parameter.requires_grad == (name != "frozen")
    pack_parameters_(model)  # again
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    pack_parameters_(nn.Identity())


def test_strides_are_kept_and_gradients_fit_them():
    convolution = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    other = nn.Linear(2, 2)
    model = nn.Sequential(convolution, other)
    before, stride = convolution.weight.detach().clone(), convolution.weight.stride()
    pack_parameters_(model)
    assert convolution.weight.stride() == stride and torch.equal(convolution.weight, before)
    convolution(torch.ones(1, 4, 5, 5)).sum().backward()
    assert convolution.weight.grad.stride() == stride


def test_parts_of_larger_memory_are_refused_unless_it_is_one():
    whole = torch.randn(4, 4)
    halves = {"a": nn.Parameter(whole[:2]), "b": nn.Parameter(whole[2:])}
    pack_parameters_(nn.ParameterDict(halves))  # as they are
    assert halves["a"].data_ptr() == whole.data_ptr()
    more = halves | {"c": nn.Parameter(torch.ones(1))}
    with pytest.raises(
        SettingError, match=r"\['a', 'b'\] are parts of larger memory, which an opt"
    ):
        pack_parameters_(nn.ParameterDict(more))


def test_several_devices_and_subclasses_are_refused():
    class Sharded(nn.Parameter):
        pass

    with pytest.raises(SettingError, match=r"\['w'\] are no plain parameters"):
        pack_parameters_(nn.ParameterDict({"w": Sharded(torch.ones(2))}))
    two = {"a": nn.Parameter(torch.ones(2)), "b": nn.Parameter(torch.ones(2, device="meta"))}
    with pytest.raises(SettingError, match=r"\['cpu', 'meta'\]; expected one device"):
        pack_parameters_(nn.ParameterDict(two))
