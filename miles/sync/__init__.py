"""New weights in an engine: all of a version or none of it."""

from miles.protocols import SyncReport, WeightSyncer, WeightTarget
from miles.sync.inprocess import InProcessSyncer
from miles.sync.shm import SharedMemoryReceiver, SharedMemorySyncer

__all__ = [
    "InProcessSyncer",
    "SharedMemoryReceiver",
    "SharedMemorySyncer",
    "SyncReport",
    "WeightSyncer",
    "WeightTarget",
]
