"""New weights in an engine: all of a version or none of it."""

from miles.protocols import SyncReport, WeightSyncer, WeightTarget
from miles.sync.collective import CollectiveReceiver, CollectiveSyncer
from miles.sync.cuda_ipc import CudaIpcReceiver, CudaIpcSyncer
from miles.sync.delta import DeltaReport, apply_delta, encode_delta, measure_delta
from miles.sync.disk import DiskReceiver, DiskSyncer
from miles.sync.inprocess import InProcessSyncer
from miles.sync.names import MegatronNames, NameMap, NameRule, SGLangNames, families, name_map
from miles.sync.packing import pack_parameters_
from miles.sync.probe import ProbeReport, model_logprobs, probe
from miles.sync.sglang import SGLangSyncer
from miles.sync.shm import SharedMemoryReceiver, SharedMemorySyncer
from miles.sync.weight_cache import SGLangWeightCacheSyncer

__all__ = [
    "CollectiveReceiver",
    "CollectiveSyncer",
    "CudaIpcReceiver",
    "CudaIpcSyncer",
    "DeltaReport",
    "DiskReceiver",
    "DiskSyncer",
    "InProcessSyncer",
    "MegatronNames",
    "NameMap",
    "NameRule",
    "ProbeReport",
    "SGLangNames",
    "SGLangSyncer",
    "SGLangWeightCacheSyncer",
    "SharedMemoryReceiver",
    "SharedMemorySyncer",
    "SyncReport",
    "WeightSyncer",
    "WeightTarget",
    "apply_delta",
    "encode_delta",
    "families",
    "measure_delta",
    "model_logprobs",
    "name_map",
    "pack_parameters_",
    "probe",
]
