"""Converted models under an engine whose decoding steps are CUDA graphs."""

import pytest

from tests.precision.engines import RECIPES, check_a_sync_is_served


@pytest.mark.parametrize("alias", [False, True], ids=["copied", "aliased"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_graphs_have_the_weights_of_the_last_sync(family, recipe, alias):
    check_a_sync_is_served(family, recipe, alias, "cuda", graphs=True)
