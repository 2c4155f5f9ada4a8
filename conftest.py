"""Names that doctests use without importing them."""

import importlib.util

import pytest
import torch

from miles.packed import Denominators, Packed, count, pack, unpack

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["miles/*/_*triton.py"]


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace):
    doctest_namespace.update(
        torch=torch, Packed=Packed, Denominators=Denominators, count=count, pack=pack, unpack=unpack
    )
