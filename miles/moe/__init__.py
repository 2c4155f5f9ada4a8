"""Rollout Routing Replay: record the experts that an engine chose, replay them in a trainer."""

from miles.moe.discovery import discover, self_test
from miles.moe.families import REFUSED, ROUTER_FAMILIES, RouterFamily
from miles.moe.replay import RoutingReplay
from miles.moe.slicing import for_context_parallel, for_pipeline, for_sequence_parallel
from miles.moe.tape import RoutingSpan, RoutingTape, routing_agreement

__all__ = [
    "REFUSED",
    "ROUTER_FAMILIES",
    "RouterFamily",
    "RoutingReplay",
    "RoutingSpan",
    "RoutingTape",
    "discover",
    "for_context_parallel",
    "for_pipeline",
    "for_sequence_parallel",
    "routing_agreement",
    "self_test",
]
