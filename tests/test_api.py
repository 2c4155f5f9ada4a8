"""The public surface is what `public_api.py` and `public_parameters.py` say."""

import importlib
import inspect

import pytest

from tests.public_api import ALL
from tests.public_parameters import PARAMETERS

ENGINES = [
    "miles.rollout.HFEngine",
    "miles.rollout.EngineProcess",
    "miles.rollout.SGLangEngine",
]


def find(path: str):
    """The object of a dotted path, whose modules are imported on the way."""
    found = importlib.import_module("miles")
    for name in path.split(".")[1:]:
        if inspect.ismodule(found) and not hasattr(found, name):
            importlib.import_module(f"{found.__name__}.{name}")
        found = getattr(found, name)
    return found


def parameters(path: str) -> str:
    names, starred = [], False
    for name, parameter in inspect.signature(find(path)).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not starred:
            names, starred = [*names, "*"], True
        names.append(name)
    bound = inspect.ismethod(find(path)) or not inspect.isfunction(find(path))
    assert not bound or "self" not in names
    return " ".join(names)


@pytest.mark.parametrize("module", ALL)
def test_public_names_are_these(module):
    assert sorted(importlib.import_module(module).__all__) == sorted(ALL[module])
    assert all(hasattr(importlib.import_module(module), name) for name in ALL[module])


@pytest.mark.parametrize("path", PARAMETERS)
def test_parameters_are_these(path):
    assert parameters(path) == PARAMETERS[path]


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_take_what_the_protocol_says(engine):
    for method in ("generate", "abort", "pause", "resume"):
        expected = PARAMETERS[f"miles.rollout.RolloutEngine.{method}"]
        assert parameters(f"{engine}.{method}") == expected
        assert inspect.iscoroutinefunction(find(f"{engine}.{method}"))
    assert isinstance(find(engine).weight_version, property)


@pytest.mark.parametrize(
    "syncer",
    [
        "CollectiveSyncer",
        "CudaIpcSyncer",
        "DiskSyncer",
        "InProcessSyncer",
        "SGLangSyncer",
        "SharedMemorySyncer",
    ],
)
def test_syncers_take_what_the_protocol_says(syncer):
    expected = PARAMETERS["miles.sync.WeightSyncer.push"]
    assert parameters(f"miles.sync.{syncer}.push") == expected


def test_every_error_is_a_miles_error_and_the_standard_one_it_refines():
    errors = importlib.import_module("miles.errors")
    for name in errors.__all__:
        kind = getattr(errors, name)
        assert issubclass(kind, errors.MilesError) and kind.__doc__
        standard = (ValueError, RuntimeError, TypeError, ImportError)
        assert kind is errors.MilesError or issubclass(kind, standard), name


def documented(module: str):
    for name in ALL[module]:
        thing = getattr(importlib.import_module(module), name)
        if inspect.isfunction(thing) or inspect.isclass(thing) or inspect.ismodule(thing):
            yield name, thing
        for member, value in vars(thing).items() if inspect.isclass(thing) else ():
            function = getattr(value, "__func__", value)
            public = inspect.isfunction(function) or isinstance(value, property)
            if public and not member.startswith("_"):
                yield f"{name}.{member}", function


@pytest.mark.parametrize("module", ALL)
def test_every_public_name_has_a_docstring(module):
    things = dict(documented(module))
    assert things
    for name, thing in things.items():
        text = thing.__doc__ or ""
        assert len(text) > 10 and not text.startswith(f"{name}("), name
