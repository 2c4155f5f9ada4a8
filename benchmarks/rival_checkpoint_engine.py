"""checkpoint-engine's parameter server for `weight_sync_sglang.py`, where SGLang and it are.

    PYTHONPATH=~/site RANK=0 WORLD_SIZE=1 PS_MAX_BUCKET_SIZE_GB=1 \\
        python benchmarks/rival_checkpoint_engine.py JOB.json

Prints a JSON list, one object of seconds a push: `gather` is what brings a trainer's new weights to
the host's pinned memory (into the pool that the first push made), `load` the update. In that
order, a server stands still for the latter only.
"""

import json
import socket
import sys
import time

import requests
import torch
from checkpoint_engine.ps import ParameterServer
from rival_sglang_sync import weights


def main() -> None:
    with open(sys.argv[1]) as file:
        job = json.load(file)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.cuda.set_device(0)
    named = dict(weights(job["shapes"]))
    server = ParameterServer(auto_pg=False, master_addr="127.0.0.1", master_port=port)
    server.init_process_group()
    session = requests.Session()

    def post(path: str, body: dict) -> None:
        answer = session.post(job["url"] + path, json=body, timeout=600)
        answer.raise_for_status()

    times = []
    for version in range(job["first"], job["first"] + job["pushes"]):
        torch.cuda.synchronize()
        start = time.perf_counter()
        if times:
            server.unregister_checkpoint("weights")
        server.register_checkpoint("weights", named_tensors=named, use_shared_memory_pool=True)
        server.gather_metas("weights")
        gathered = time.perf_counter()
        post("/pause_generation", {"mode": "abort"})

        def ask(handles: list, version: str = str(version)) -> None:
            body = {"zmq_handles": dict(handles), "flush_cache": True, "weight_version": version}
            post("/update_weights_from_ipc", body)

        paused = time.perf_counter()
        server.update("weights", ask)
        loaded = time.perf_counter()
        post("/continue_generation", {})
        end = time.perf_counter()
        times.append({"seconds": end - start, "gather": gathered - start,
                      "load": loaded - paused, "pause": end - paused})  # fmt: skip
    print(json.dumps(times), flush=True)


if __name__ == "__main__":
    main()
