"""The log-prob gap between a real SGLang server and transformers, with and without replay.

    python benchmarks/routing_sglang.py --device cuda --server-site ~/site
    python benchmarks/routing_sglang.py --engine hf --layers 2 --prompts 4 --answer-tokens 16

A Qwen3-MoE with random weights is saved, served in bf16 with `--enable-return-routed-experts`, and
samples answers at temperature 1; then the same checkpoint is loaded in transformers, also in bf16
on the same device, and scores the answers: once with the experts its own routers choose, once with
those that the server sent. Weights are drawn so that activations have unit scale in every layer,
the router's logits a spread of `router_std` and the vocabulary's one of `logits_std`: with the
usual initialisation of 0.02 the experts' share of the residual stream, and with it what a different
choice costs, would be far below that of a trained model.

`--server-site` is the server's PYTHONPATH, for an SGLang that needs other versions than the
trainer. `--engine hf` is a dry run: `HFEngine` answers in SGLang's format, in float32.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
import tyro
from routing import append, environment
from torch import Tensor

from miles.losses import token_logprobs
from miles.moe import RoutingReplay, RoutingTape, equal_sets
from miles.rollout import HFEngine, Sample, SamplingParams, TrainBatch, collate

START = time.perf_counter()


@dataclass(frozen=True, kw_only=True)
class Config:
    """SGLang against transformers."""

    engine: Literal["sglang", "hf"] = "sglang"
    """Who samples."""
    device: str = "cpu"
    """Where the trainer runs; a server always takes the GPU."""
    server_site: str = ""
    """Folder with SGLang and what it needs, for the server alone."""
    port: int = 30_000
    """The server's port."""
    server_seconds: float = 300
    """How long the server may take to start, and then for its first answer."""
    layers: int = 8
    """Layers, each with experts."""
    hidden: int = 512
    """Width of the model."""
    moe_hidden: int = 256
    """Width of an expert."""
    num_experts: int = 32
    """Experts of a layer."""
    topk: int = 4
    """Experts a token."""
    vocabulary: int = 4096
    """Tokens there are."""
    router_std: float = 1.5
    """Spread of the router's logits."""
    logits_std: float = 2.5
    """Spread of the next-token logits."""
    prompts: int = 64
    """Requests, all at once; each prompt has 32 to 128 tokens."""
    answer_tokens: int = 256
    """Tokens of each answer."""
    out: Path = Path("benchmarks/results/routing_sglang.csv")
    """The CSV; rows are appended."""
    commit: str = ""
    """What was measured; asked of git where that is left out."""


def say(text: str) -> None:
    print(f"[{time.perf_counter() - START:5.0f} s] {text}", flush=True)


def save_model(config: Config, folder: str) -> None:
    model_config = transformers.Qwen3MoeConfig(
        vocab_size=config.vocabulary, hidden_size=config.hidden, intermediate_size=config.hidden,
        moe_intermediate_size=config.moe_hidden, num_hidden_layers=config.layers,
        num_attention_heads=config.hidden // 64, num_key_value_heads=2, head_dim=64,
        num_experts=config.num_experts, num_experts_per_tok=config.topk, norm_topk_prob=True,
        max_position_embeddings=4096, tie_word_embeddings=False,
        eos_token_id=None, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = transformers.Qwen3MoeForCausalLM(model_config)
    gains = {
        "mlp.gate.weight": config.router_std,
        "lm_head.weight": config.logits_std,
        "embed_tokens.weight": math.sqrt(config.hidden),
    }
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                gain = next((g for end, g in gains.items() if name.endswith(end)), 1.0)
                weight.normal_(0, gain / math.sqrt(weight.shape[-1]), generator=generator)
    model.to(torch.bfloat16).save_pretrained(folder)


def load_model(config: Config, folder: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    model = transformers.Qwen3MoeForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa"
    )
    model.config._experts_implementation = "grouped_mm"
    return model.to(config.device).eval()


@contextlib.contextmanager
def sglang(config: Any, folder: str, *flags: str) -> Iterator[str]:
    """The address of a server that has answered once; it is gone when the block ends."""
    command = [
        sys.executable, "-m", "sglang.launch_server", "--model-path", folder,
        "--skip-tokenizer-init", "--attention-backend", "triton", "--sampling-backend", "pytorch",
        "--grammar-backend", "none", "--disable-cuda-graph", "--mem-fraction-static", "0.3",
        "--port", str(config.port), *flags,
    ]  # fmt: skip
    if config.server_site:
        site = Path(config.server_site).expanduser().resolve()
        command = ["env", f"PYTHONPATH={site}", *command]
    log = Path(folder) / "server.log"
    say(" ".join(command))
    with log.open("wb") as file:
        server = subprocess.Popen(command, cwd=folder, stdout=file, stderr=file, process_group=0)
    url = f"http://127.0.0.1:{config.port}"
    try:
        wait_for(server, f"{url}/get_server_info", config.server_seconds)
        say("the server is up")
        body = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 4}}
        ask(url, body, timeout=config.server_seconds)
        say("and has answered")
        yield url
    except BaseException:
        print(b"\n".join(log.read_bytes().splitlines()[-80:]).decode(errors="replace"), flush=True)
        raise
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(10)
        say("the server is gone")


def wait_for(server: subprocess.Popen[bytes], url: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with code {server.returncode} before it was up")
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(1)
    raise TimeoutError(f"the server was not up after {seconds:.0f} s")


def request(prompt: Sequence[int], answer_tokens: int) -> dict[str, Any]:
    return {
        "input_ids": list(prompt),
        "sampling_params": {
            "temperature": 1.0, "top_p": 1.0, "top_k": -1,
            "max_new_tokens": answer_tokens, "ignore_eos": True,
        },
        "return_logprob": True,
        "return_routed_experts": True,
    }  # fmt: skip


def ask(url: str, body: dict[str, Any], *, timeout: float) -> dict[str, Any]:
    call = urllib.request.Request(
        f"{url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(call, timeout=timeout) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"/generate answered {error.code}: {error.read()[:2000]!r}") from error


def from_sglang(config: Config, folder: str, prompts: list[list[int]]) -> list[dict[str, Any]]:
    flag = "--enable-return-routed-experts"
    with sglang(config, folder, flag) as url, ThreadPoolExecutor(len(prompts)) as pool:
        bodies = [request(prompt, config.answer_tokens) for prompt in prompts]
        answers = [pool.submit(ask, url, body, timeout=config.server_seconds) for body in bodies]
        return [answer.result() for answer in answers]


def from_hf(config: Config, folder: str, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """What SGLang would have sent, by `HFEngine`; float32, or it would agree with the trainer."""
    model = load_model(config, folder, torch.float32)
    engine = HFEngine(model, max_batch=len(prompts), max_context=1024, record_routing=True)
    with contextlib.closing(engine):
        futures = [
            engine.submit(p, SamplingParams(max_new_tokens=config.answer_tokens, seed=seed))
            for seed, p in enumerate(prompts)
        ]
        samples = [future.result() for future in futures]
    answers = []
    for sample in samples:
        assert sample.routing is not None
        start = sample.num_prompt_tokens
        pairs = zip(sample.rollout_logprobs[start:], sample.tokens[start:], strict=True)
        payload = base64.b64encode(sample.routing.expert_ids.to(torch.int32).numpy().tobytes())
        meta = {
            "output_token_logprobs": [[logprob, token, None] for logprob, token in pairs],
            "routed_experts": payload.decode(),
        }
        answers.append({"output_ids": sample.response_tokens, "meta_info": meta})
    return answers


def to_sample(config: Config, prompt: list[int], answer: dict[str, Any], name: str) -> Sample:
    """A sample with the log-probs and the routing that the server sent."""
    meta = answer["meta_info"]
    triples = meta["output_token_logprobs"]
    tokens = [int(token) for _, token, *_ in triples]
    assert tokens == [int(token) for token in answer["output_ids"]], f"{name}: other tokens"
    sample = Sample(tokens=prompt)
    sample.append(tokens, logprobs=[float(triple[0]) for triple in triples], weight_version=0)
    sample.routing = RoutingTape.from_sglang(
        meta["routed_experts"],
        num_layers=config.layers,
        topk=config.topk,
        num_tokens=len(sample.tokens),
        num_experts=config.num_experts,
    )
    sample.routing.validate(num_tokens=len(sample.tokens), request_id=name)
    return sample


@torch.no_grad()
def score(model: Any, replay: RoutingReplay, batch: TrainBatch) -> tuple[Tensor, RoutingTape]:
    """float64 log-prob minus the rollout's at trainable positions, and the routing."""
    with replay.record() as tape:
        out = model(input_ids=batch.input_ids_BL, attention_mask=batch.attention_mask_BL)
    logprobs_T = token_logprobs(out.logits.flatten(0, 1), batch.targets_T)
    gap_T = logprobs_T.double() - batch.rollout_logprobs_T.double()
    return gap_T[batch.packed.mask_T].cpu(), tape


def compare(config: Config, model: Any, samples: list[Sample]) -> dict[str, tuple[Tensor, Tensor]]:
    """For each way to route: the gaps of all tokens, and equal sets `[N, M]` of processed ones.

    With replay the sets are those that the router would have chosen, had it been free.
    """
    replay = RoutingReplay(model)
    gaps: dict[str, list[Tensor]] = {"without": [], "replay": []}
    equal: dict[str, list[Tensor]] = {"without": [], "replay": []}
    for start in range(0, len(samples), 16):
        batch = collate(samples[start : start + 16]).to(config.device)
        tape = batch.routing
        assert tape is not None
        needed_T = batch.routing_required_T.cpu()
        gap, own = score(model, replay, batch)
        gaps["without"].append(gap)
        equal["without"].append(equal_sets(own, tape)[needed_T])
        with replay.replay(tape, required_N=needed_T, record_natural=True) as natural:
            gap, forced = score(model, replay, batch)
        assert bool((forced.expert_ids == tape.expert_ids)[needed_T].all())
        gaps["replay"].append(gap)
        equal["replay"].append(equal_sets(natural, tape)[needed_T])
    return {name: (torch.cat(gaps[name]), torch.cat(equal[name])) for name in gaps}


def summary(gap: Tensor, equal_NM: Tensor) -> dict[str, Any]:
    size = gap.abs()
    return {
        "tokens": len(gap),
        "mean": f"{float(size.mean()):.3e}",
        "p99": f"{float(size.quantile(0.99)):.3e}",
        "max": f"{float(size.max()):.3e}",
        "k3": f"{float((gap.expm1() - gap).mean()):.3e}",
        "agreement": f"{float(equal_NM.mean()):.5f}",
        "agreement_by_layer": " ".join(f"{x:.4f}" for x in equal_NM.mean(0).tolist()),
        "tokens_agreeing": f"{float(equal_NM.all(1).double().mean()):.5f}",
    }


def sglang_version(config: Any) -> str:
    found = sorted(Path(config.server_site).expanduser().glob("sglang-*.dist-info"))
    return found[0].name.removesuffix(".dist-info") if found else "sglang"


def main(config: Config) -> None:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(32, 129, (config.prompts,), generator=generator).tolist()
    prompts = [
        torch.randint(1, config.vocabulary, (length,), generator=generator).tolist()
        for length in lengths
    ]
    with tempfile.TemporaryDirectory() as folder:
        save_model(config, folder)
        say(f"{config.prompts} prompts, {config.answer_tokens} tokens to answer each")
        source = {"sglang": from_sglang, "hf": from_hf}[config.engine]
        answers = source(config, folder, prompts)
        samples = [
            to_sample(config, prompt, answer, f"prompt {index}")
            for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        ]
        say("all answers are there, each with its routing; now the trainer")
        results = compare(config, load_model(config, folder), samples)
    common = environment(config.device, config.commit) | {
        "engine": sglang_version(config) if config.engine == "sglang" else "HFEngine",
        "layers": config.layers, "num_experts": config.num_experts, "topk": config.topk,
        "router_std": config.router_std, "prompts": config.prompts,
    }  # fmt: skip
    rows = [{"variant": name} | summary(*values) for name, values in results.items()]
    for row in rows:
        say(", ".join(f"{key} {value}" for key, value in row.items()))
    append(config.out, [common | row for row in rows])


if __name__ == "__main__":
    main(tyro.cli(Config))
