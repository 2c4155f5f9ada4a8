"""Rollout Routing Replay: record the experts that an engine chose, replay them in a trainer."""

from miles.moe.families import ROUTER_FAMILIES, RouterFamily
from miles.moe.replay import RoutingReplay
from miles.moe.tape import RoutingTape, routing_agreement

__all__ = ["ROUTER_FAMILIES", "RouterFamily", "RoutingReplay", "RoutingTape", "routing_agreement"]
