"""SGLang's own client for `weight_sync_sglang.py`, in a process that has SGLang.

    PYTHONPATH=~/site python benchmarks/rival_sglang_sync.py JOB.json

Prints a JSON list, one object of seconds a push.
"""

import json
import sys
import time

import requests
import torch
from sglang.srt.utils import MultiprocessingSerializer
from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions
from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

POOL_BYTES = 1 << 31


def weights(shapes: list) -> list[tuple[str, torch.Tensor]]:
    """As `weight_sync.trainer`: views of a pool."""
    pool = torch.randn(POOL_BYTES // 2, dtype=torch.bfloat16, device="cuda")
    found, at = [], 0
    for name, shape in shapes:
        count = torch.Size(shape).numel()
        at = at if at + count <= pool.numel() else 0
        found.append((name, pool[at : at + count].view(shape)))
        at += -(-count // 256) * 256
    return found


def buckets(named: list[tuple[str, torch.Tensor]], limit: int) -> list:
    found, used = [[]], 0
    for name, tensor in named:
        if found[-1] and used + tensor.nbytes > limit:
            found.append([])
            used = 0
        found[-1].append((name, tensor))
        used += tensor.nbytes
    return found


def main() -> None:
    with open(sys.argv[1]) as file:
        job = json.load(file)
    monkey_patch_torch_reductions()
    named = weights(job["shapes"])
    session = requests.Session()

    def post(path: str, body: dict) -> None:
        answer = session.post(job["url"] + path, json=body, timeout=600)
        answer.raise_for_status()

    times = []
    for version in range(job["first"], job["first"] + job["pushes"]):
        torch.cuda.synchronize()
        start = time.perf_counter()
        post("/pause_generation", {"mode": "abort"})
        paused = time.perf_counter()
        cut = buckets(named, job["bucket_bytes"])
        for number, group in enumerate(cut):
            bucket = FlattenedTensorBucket(named_tensors=group)
            content = {
                "flattened_tensor": bucket.get_flattened_tensor(),
                "metadata": bucket.get_metadata(),
            }
            last = number == len(cut) - 1
            body = {
                "serialized_named_tensors": [
                    MultiprocessingSerializer.serialize(content, output_str=True)
                ],
                "load_format": "flattened_bucket",
                "flush_cache": last,
            }
            post(
                "/update_weights_from_tensor",
                body | ({"weight_version": str(version)} if last else {}),
            )
            del bucket, content, body
        torch.cuda.ipc_collect()
        post("/continue_generation", {})
        end = time.perf_counter()
        times.append({"seconds": end - start, "pause": end - paused})
    print(json.dumps(times))


if __name__ == "__main__":
    main()
