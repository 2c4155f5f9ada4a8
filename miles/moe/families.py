"""The routers that `RoutingReplay` knows, one entry a family, and those that it refuses, by name.

E is the number of experts that a router scores, K the number that it picks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from miles.errors import UnsupportedModelError

__all__ = ["REFUSED", "ROUTER_FAMILIES", "RouterFamily", "find_routers"]


@dataclass(frozen=True, kw_only=True)
class RouterFamily:
    """How to recognise a family's router, and where it says its sizes.

    A family qualifies if one module's forward calls `topk` with k = K exactly once over scores
    whose last dimension is E, and computes its gate weights from what that call returned.
    """

    router: str
    """Name of the class whose forward calls `topk` over the scores of all experts."""
    num_experts: str = "num_experts"
    """Attribute of the router that holds E; dots reach into it: `config.num_experts`."""
    topk: str = "top_k"
    """Attribute of the router that holds K; dots reach into it."""
    group_limited: bool = False
    """The scores of losing groups are masked before the choice. A replayed expert may be in such a
    group, so its weight is taken from the scores as they were before the mask."""
    score_ndim: int = 2
    """Dimensions of the scores: 2 for `[N, E]`, 3 for `[B, L, E]`."""

    def sizes(self, module: nn.Module) -> tuple[int, int]:
        """E and K of a router of this family.

        Raises:
            UnsupportedModelError: an attribute is missing or no number.
        """
        return self._size(module, self.num_experts), self._size(module, self.topk)

    def _size(self, module: nn.Module, path: str) -> int:
        value: Any = module
        for attribute in path.split("."):
            value = getattr(value, attribute, None)
        if not isinstance(value, int):
            raise UnsupportedModelError(
                f"{self.router}.{path} is {value!r}; expected a number; name the attribute that "
                "holds it in this family's RouterFamily"
            )
        return value


ROUTER_FAMILIES: list[RouterFamily] = [
    RouterFamily(router="AfmoeTokenChoiceRouter"),
    RouterFamily(router="AriaTextTopKRouter"),
    RouterFamily(router="Cohere2MoeTopKRouter"),
    RouterFamily(router="DeepseekV4TopKRouter"),
    RouterFamily(router="Ernie4_5_MoeTopKRouter"),
    RouterFamily(router="FlexOlmoTopKRouter"),
    RouterFamily(router="FlintTopKRouter"),
    RouterFamily(router="GptOssTopKRouter"),
    RouterFamily(router="GraniteMoeHybridTopKRouter"),
    RouterFamily(router="GraniteMoeSWATopKRouter"),
    RouterFamily(router="GraniteMoeSharedTopKRouter"),
    RouterFamily(router="GraniteMoeTopKRouter"),
    RouterFamily(router="HYV3TopKRouter"),
    RouterFamily(router="HunYuanMoEV1Gate"),
    RouterFamily(router="Inkling2TopKRouter"),
    RouterFamily(router="InklingTopkRouter"),
    RouterFamily(router="JambaTopKRouter"),
    RouterFamily(router="JetMoeTopKGating"),
    RouterFamily(router="Kolibri1TopKRouter"),
    RouterFamily(router="LagunaTopKRouter"),
    RouterFamily(router="Lfm2MoeTopKRouter"),
    RouterFamily(router="Llama4Router"),
    RouterFamily(router="MellumTopKRouter"),
    RouterFamily(router="MiniMaxM2TopKRouter"),
    RouterFamily(router="MiniMaxM3VLTopKRouter"),
    RouterFamily(router="MiniMaxTopKRouter"),
    RouterFamily(router="MixtralTopKRouter"),
    RouterFamily(router="MuseSparkTopkRouter"),
    RouterFamily(router="OlmoeTopKRouter"),
    RouterFamily(router="OpenAIPrivacyFilterTopKRouter"),
    RouterFamily(router="Qwen2MoeTopKRouter"),
    RouterFamily(router="Qwen3MoeTopKRouter"),
    RouterFamily(router="Qwen3NextTopKRouter"),
    RouterFamily(router="Qwen3OmniMoeThinkerTextTopKRouter"),
    RouterFamily(router="Qwen3VLMoeTextTopKRouter"),
    RouterFamily(router="Qwen3_5MoeTopKRouter"),
    RouterFamily(router="Qwen4ExpTextTopKRouter"),
    RouterFamily(router="Step3p7TopKRouter"),
    # Groups of experts: those of the losing groups are masked before the choice.
    RouterFamily(router="AXK1TopkRouter", group_limited=True),
    RouterFamily(router="AXK2TopkRouter", group_limited=True),
    RouterFamily(router="BailingHybridTopkRouter", group_limited=True),
    RouterFamily(router="BeamTopKRouter", group_limited=True),
    RouterFamily(router="DeepseekOcr2TextTopkRouter", group_limited=True),
    RouterFamily(router="DeepseekV2TopkRouter", group_limited=True),
    RouterFamily(router="DeepseekV32TopkRouter", group_limited=True),
    RouterFamily(router="DeepseekV3TopkRouter", group_limited=True),
    RouterFamily(router="Dots1TopkRouter", group_limited=True),
    RouterFamily(router="Dots3NoteTextTopkRouter", group_limited=True),
    RouterFamily(router="ExaoneMoeTopkRouter", group_limited=True),
    RouterFamily(router="Glm4MoeLiteTopkRouter", group_limited=True),
    RouterFamily(router="Glm4MoeTopkRouter", group_limited=True),
    RouterFamily(router="Glm4vMoeTextTopkRouter", group_limited=True),
    RouterFamily(router="Glm5NextTextTopkRouter", group_limited=True),
    RouterFamily(router="GlmMoeDsaTopkRouter", group_limited=True),
    RouterFamily(router="HYV4TopkRouter", group_limited=True),
    RouterFamily(router="KimiLinearTopkRouter", group_limited=True),
    RouterFamily(router="MiMoV2FlashTopkRouter", group_limited=True),
    RouterFamily(router="Mistral4TopkRouter", group_limited=True),
    RouterFamily(router="MistralLarge4TextTopkRouter", group_limited=True),
    RouterFamily(router="NemotronHTopkRouter", group_limited=True),
    RouterFamily(router="SolarOpenTopkRouter", group_limited=True),
    RouterFamily(router="UnlimitedOcrTextTopkRouter", group_limited=True),
    # Sizes under other names.
    RouterFamily(router="DbrxFFN", num_experts="router.layer.out_features"),
    RouterFamily(
        router="Gemma4TextRouter", num_experts="config.num_experts", topk="config.top_k_experts"
    ),
    RouterFamily(router="LongcatFlashTopkRouter", num_experts="n_routed_experts"),
    RouterFamily(router="ZayaRouter", num_experts="num_router_classes", score_ndim=3),
]
"""The families that are tested; append yours to have `RoutingReplay` find it."""

REFUSED: dict[str, str] = {
    "DiffusionGemmaTextRouter": (
        "a block-diffusion model routes every token once in its encoder and several times in its "
        "decoder, so no row of a tape belongs to a token"
    ),
    "DogeCDMoE": (
        "it picks experts from the product of two key sets, with no topk over the scores of all"
    ),
    "Dots3NoteVisionTopKRouter": (
        "it routes image patches, which have no row in a tape; pass the language model alone"
    ),
    "Ernie4_5_VLMoeMoeTopKRouter": (
        "text and image tokens go to two sets of experts, so a router sees part of the tokens only"
    ),
    "NllbMoeTop2Router": (
        "its second expert is the argmax of noisy logits and its capacity drops tokens; there is "
        "no topk"
    ),
    "PhimoeTopKRouter": (
        "its sparse mixer takes one maximum after another, and its gates depend on the order; "
        "there is no topk"
    ),
    "Qwen3OmniMoeTalkerTextTopKRouter": (
        "the talker routes audio codes, the thinker text, in passes of different lengths; pass "
        "model.thinker alone"
    ),
    "SwitchTransformersTop1Router": "it takes an argmax and drops tokens over capacity",
}
"""Routers that can't be replayed: name of the class to the reason."""


def find_routers(
    model: nn.Module, families: Iterable[RouterFamily]
) -> list[tuple[str, nn.Module, RouterFamily]]:
    """The routers of a model with their names, in the order in which the modules are registered.

    Raises:
        UnsupportedModelError: the model has a router of `REFUSED`.
    """
    known = {family.router: family for family in families}
    found = []
    for name, module in model.named_modules():
        # FSDP2 gives a module a class of its own, derived from the model's.
        for kind in (cls.__name__ for cls in type(module).__mro__):
            if kind in REFUSED:
                raise UnsupportedModelError(
                    f"{name or type(model).__name__} is a {kind}, whose routing can't be recorded "
                    f"or replayed: {REFUSED[kind]}; train this model without routing replay"
                )
            if kind in known:
                found.append((name, module, known[kind]))
                break
    return found
