"""`SGLangSyncer` into the real SGLang, whose log-probs have to become the trainer's.

MILES_SGLANG_SITE is the server's PYTHONPATH, where it needs other packages than the trainer;
MILES_SGLANG_PYTHON its interpreter.
"""

import asyncio
import math
import os
import socket
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from torch.distributed.fsdp import fully_shard

from miles.errors import SyncError
from miles.losses import token_logprobs
from miles.rollout import SamplingParams, SGLangEngine, SGLangServer, Status, collate
from miles.sync import SGLangSyncer, pack_parameters_

SITE = os.environ.get("MILES_SGLANG_SITE", "")
PYTHON = os.environ.get("MILES_SGLANG_PYTHON", sys.executable)
ENV = {"PYTHONPATH": str(Path(SITE).expanduser().resolve())} if SITE else {}
FLAGS = [
    "--skip-tokenizer-init", "--attention-backend", "triton", "--sampling-backend", "pytorch",
    "--grammar-backend", "none", "--disable-cuda-graph", "--mem-fraction-static", "0.3",
    "--weight-version", "0", "--load-format", "dummy",
]  # fmt: skip
CONFIG = transformers.Qwen3Config(
    vocab_size=4096, hidden_size=512, intermediate_size=1024, num_hidden_layers=4,
    num_attention_heads=8, num_key_value_heads=2, head_dim=64, max_position_embeddings=2048,
    tie_word_embeddings=False, eos_token_id=None, bos_token_id=None, pad_token_id=0,
    architectures=["Qwen3ForCausalLM"],
)  # fmt: skip
MEAN_GAP = 0.05
"""In nats, mean of |log-prob - rollout's|: logits with a spread of 2.5 in bf16 (8 bits) through
four layers of other kernels. Other weights are apart by more than 1."""
BUCKET = 4 << 20


def model(seed: int):
    """Random weights with activations of unit scale, so that every layer matters."""
    made = transformers.Qwen3ForCausalLM(CONFIG)
    gains = {"lm_head.weight": 2.5, "embed_tokens.weight": math.sqrt(512)}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if weight.ndim > 1:
                gain = next((g for end, g in gains.items() if name.endswith(end)), 1.0)
                weight.normal_(0, gain / math.sqrt(weight.shape[-1]), generator=generator)
    return made.to("cuda", torch.bfloat16).eval()


def skip_without_sglang() -> None:
    check = "import importlib.util, sys; sys.exit(importlib.util.find_spec('sglang') is None)"
    if subprocess.run([PYTHON, "-c", check], env=os.environ | ENV).returncode:
        pytest.skip("no sglang in MILES_SGLANG_SITE")


def serve(folder: Path, *more: str, **env: str) -> SGLangServer:
    skip_without_sglang()
    CONFIG.save_pretrained(folder)
    return SGLangServer(
        folder, args=[*FLAGS, *more], env=ENV | env, cwd=folder, python=PYTHON, start_timeout=280,
        log=folder / "server.log",
    )  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("model")) as made:
        yield made


@torch.no_grad()
def gap(engine: SGLangEngine, trained, version: int) -> float:
    """Mean distance between the trainer's log-probs and those that the server sampled with."""
    params = SamplingParams(max_new_tokens=32, ignore_eos=True)

    async def main():
        return await asyncio.gather(*(engine.generate([i, 7, 9], params) for i in range(1, 9)))

    asyncio.run(engine.refresh())
    samples = asyncio.run(main())
    assert {v for sample in samples for v in sample.weight_versions} == {version}
    batch = collate(samples).to("cuda")
    logits = trained(input_ids=batch.input_ids_BL, attention_mask=batch.attention_mask_BL).logits
    got_T = token_logprobs(logits.flatten(0, 1), batch.targets_T)
    mask_T = batch.packed.mask_T
    return (got_T - batch.rollout_logprobs_T)[mask_T].abs().mean().item()


VERSIONS = iter(range(1, 1000))


@pytest.mark.parametrize("via", ["cuda_ipc", "value", "disk"])
def test_the_servers_logprobs_become_the_trainers(server, tmp_path, via):
    options = {"folder": tmp_path} if via == "disk" else {"in_place": False}
    with (
        closing(SGLangSyncer(server.url, via=via, bucket_bytes=BUCKET, **options)) as syncer,
        closing(SGLangEngine(server.url)) as engine,
    ):
        for _ in range(2):
            version = next(VERSIONS)
            trained = model(version)
            report = syncer.push(trained.state_dict().items(), version=version)
            assert report.num_buckets > 3
            assert gap(engine, trained, version) < MEAN_GAP
        print(report.summary())
    assert gap(SGLangEngine(server.url), model(0), version) > 1


def test_weights_are_read_where_they_are(server):
    with (
        closing(SGLangSyncer(server.url, bucket_bytes=1)) as syncer,  # all are worth it
        closing(SGLangEngine(server.url)) as engine,
    ):
        for how in ("of their own", "in one allocation"):
            version = next(VERSIONS)
            trained = model(version)
            if how == "in one allocation":
                pack_parameters_(trained)
            report = syncer.push(trained.state_dict().items(), version=version)
            assert report.num_buckets == 1 and report.copied_bytes == report.num_bytes
            assert gap(engine, trained, version) < MEAN_GAP
            print(how, report.summary())


def test_a_push_ends_requests_that_were_held_in_place(server):
    trained, version = model(3), next(VERSIONS)

    async def rollout(engine, syncer):
        params = SamplingParams(max_new_tokens=1900, ignore_eos=True)
        await engine.generate([1, 7, 9], replace(params, max_new_tokens=4))  # compiles kernels
        task = asyncio.create_task(engine.generate([1, 7, 9], params))
        await asyncio.sleep(1.0)
        await engine.pause()
        weights = trained.state_dict().items()
        await asyncio.to_thread(syncer.push, weights, version=version)
        sample = await asyncio.wait_for(task, 30)
        await engine.resume()
        return sample

    with (
        closing(SGLangEngine(server.url, pause_mode="in_place")) as engine,
        closing(SGLangSyncer(server.url, bucket_bytes=BUCKET)) as syncer,
    ):
        sample = asyncio.run(rollout(engine, syncer))
        assert sample.status is Status.ABORTED and 0 < sample.num_generated_tokens < 1900
        assert version not in sample.weight_versions
        assert gap(engine, trained, version) < MEAN_GAP


@pytest.fixture
def expandable():
    """Torch maps memory in pieces, which a server cannot open, as long as a test runs."""
    torch.cuda.empty_cache()  # segments that are there would be used
    torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    yield
    torch.cuda.memory._set_allocator_settings("expandable_segments:False")


def test_weights_in_expandable_segments_go_through_buckets(server, expandable):
    version = next(VERSIONS)
    trained = model(version)
    with (
        closing(SGLangSyncer(server.url, bucket_bytes=BUCKET)) as syncer,
        closing(SGLangEngine(server.url)) as engine,
    ):
        report = syncer.push(trained.state_dict().items(), version=version)
        assert report.num_buckets > 3
        # twice what lies in them; a segment of before that is still in use has room for a few
        assert report.copied_bytes > 1.8 * report.num_bytes
        assert gap(engine, trained, version) < MEAN_GAP


@pytest.mark.parametrize(("bucket", "in_place"), [(1, None), (BUCKET, False)])
def test_many_pushes_leak_nothing_on_either_side(server, bucket, in_place):
    def used():
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return total - free

    def push(times):
        trained = model(1)  # a server that kept its mapping would keep all of its memory
        with closing(SGLangSyncer(server.url, bucket_bytes=bucket, in_place=in_place)) as syncer:
            for _ in range(times):
                syncer.push(trained.state_dict().items(), version=next(VERSIONS))

    push(50)
    before = used()
    push(150)
    assert used() - before < 16 << 20


def test_a_push_that_breaks_off_leaves_the_server_paused_until_the_next(server):
    trained = model(2)

    def breaking():
        yield from list(trained.state_dict().items())[:20]
        raise SyncError("the trainer lost a rank")

    version = next(VERSIONS)
    with closing(SGLangSyncer(server.url, bucket_bytes=BUCKET)) as syncer:
        with pytest.raises(
            SyncError, match="hold a part of it: a weight version below 0, still paused"
        ):
            syncer.push(breaking(), version=version)
        syncer.push(trained.state_dict().items(), version=version)
    with closing(SGLangEngine(server.url)) as engine:
        assert gap(engine, trained, version) < MEAN_GAP


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs two GPUs")


@two_gpus
def test_weights_reach_a_server_on_another_gpu(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        master = free.getsockname()
    with (
        serve(tmp_path, "--base-gpu-id", "1", NCCL_CUMEM_ENABLE="1") as far,
        closing(
            SGLangSyncer(far.url, via="distributed", master=master, bucket_bytes=BUCKET, timeout=60)
        ) as syncer,
        closing(SGLangEngine(far.url)) as engine,
    ):
        for version in (1, 2):
            trained = model(version)
            report = syncer.push(trained.state_dict().items(), version=version)
            assert report.num_buckets > 3
            assert gap(engine, trained, version) < MEAN_GAP
        print(report.summary())


def rank_of_a_sharded_trainer(rank, url, store):
    torch.cuda.set_device(rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", init_method=f"file://{store}", rank=rank, world_size=2
    )
    with (
        closing(SGLangSyncer(url, trainers=dist.group.WORLD, bucket_bytes=BUCKET)) as syncer,
        closing(SGLangEngine(url)) as engine,
    ):
        for version in (1, 2):
            trained = fully_shard(model(version))
            report = syncer.push(trained.state_dict().items(), version=version)
            assert report.num_buckets > 3
            if not rank:
                assert gap(engine, model(version), version) < MEAN_GAP
                print(report.summary(), flush=True)
            dist.barrier()
    dist.destroy_process_group()


@two_gpus
def test_each_rank_of_a_server_reads_its_rank_of_a_sharded_trainer(tmp_path):
    flags = "--tp-size", "2", "--disable-custom-all-reduce"
    uneven = {"SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0"}  # the other server is on one of them
    with serve(tmp_path, *flags, **uneven) as both:
        mp.spawn(rank_of_a_sharded_trainer, (both.url, tmp_path / "store"), nprocs=2)
