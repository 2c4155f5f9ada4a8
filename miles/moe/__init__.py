"""Rollout Routing Replay: record the experts that an engine chose, replay them in a trainer."""

from miles.moe.replay import ROUTER_FAMILIES, RouterFamily, RoutingReplay
from miles.moe.tape import RoutingTape, routing_agreement

__all__ = ["ROUTER_FAMILIES", "RouterFamily", "RoutingReplay", "RoutingTape", "routing_agreement"]
