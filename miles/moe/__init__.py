"""Rollout Routing Replay: record the experts that an engine chose, replay them in a trainer."""

from miles.moe.agreement import equal_sets, routing_agreement
from miles.moe.discovery import discover, self_test
from miles.moe.families import REFUSED, ROUTER_FAMILIES, RouterFamily
from miles.moe.megatron import MegatronReplay, batch_first, sequence_first
from miles.moe.plan import RoutingPlan
from miles.moe.replay import RoutingReplay
from miles.moe.sharing import share_prefix, storage_bytes
from miles.moe.slicing import for_context_parallel, for_pipeline, for_sequence_parallel
from miles.moe.tape import RoutingSpan, RoutingTape

__all__ = [
    "REFUSED",
    "ROUTER_FAMILIES",
    "MegatronReplay",
    "RouterFamily",
    "RoutingPlan",
    "RoutingReplay",
    "RoutingSpan",
    "RoutingTape",
    "batch_first",
    "discover",
    "equal_sets",
    "for_context_parallel",
    "for_pipeline",
    "for_sequence_parallel",
    "routing_agreement",
    "self_test",
    "sequence_first",
    "share_prefix",
    "storage_bytes",
]
