"""Converted models under an engine, without CUDA graphs; with them in `tests/gpu`."""

import pytest

from tests.precision.engines import RECIPES, check_a_sync_is_served


@pytest.mark.parametrize("alias", [False, True], ids=["copied", "aliased"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_synced_engine_answers_as_a_fresh_one(family, recipe, alias):
    check_a_sync_is_served(family, recipe, alias, "cpu", graphs=False)
