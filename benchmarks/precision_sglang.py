r"""The log-prob gap between an SGLang server with rounded weights and trainers with and without.

    python benchmarks/precision_sglang.py --device cuda --server-site ~/site
    python benchmarks/precision_sglang.py --device cuda --server-site ~/site --recipe int4
    python benchmarks/precision_sglang.py --device cuda --server-site ~/site --recipe int4 \
        --model ~/trained/dense-int4-master --rounded ~/trained/dense-int4
    python benchmarks/precision_sglang.py --device cuda --server-site ~/site --recipe int4 --warm-up

A model is converted and exported; a real SGLang server loads the directory as its config says and
samples answers at temperature 1; then the model scores them twice on the same device: with its bf16
weights, as a trainer that knows nothing of the engine's rounding, and as it was converted, whose
weights are bit for bit the server's.

The model is a Qwen3 with random weights and prompts of random tokens, or one that
`precision_curves.py --save` has trained, continuing text that was held out from its training.
`--rounded` is what was saved of the same weights; it has to agree with them bit for bit. Without it
the model is rounded here, whatever it was trained in.

INT4 of dense layers goes through SGLang's Marlin, which has no prebuilt operator: at the first
answer nvcc compiles one file with all its 270 variants. That takes one core minutes, of which the
server's log says nothing, and after 300 s the server's watchdog would end it. So the compiler is
told to use all cores, and the watchdog to wait. What came out stays in `~/.cache/tvm-ffi`: where
one command may not last long enough, `--warm-up` fills it, and the next run finds it. Experts in
INT4 run in Triton, which compiles for seconds.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import routing_sglang as server
import torch
import transformers
import tyro
from precision_curves import standard_library
from routing import append, environment
from torch import Tensor

from miles.losses import token_logprobs
from miles.precision import (
    BlockFP8,
    Int4,
    Recipe,
    convert_,
    high_precision,
    save,
    verify_parity,
)
from miles.rollout import Sample, SGLangServer, TrainBatch, collate

FLAGS = (
    "--skip-tokenizer-init", "--attention-backend", "triton", "--sampling-backend", "pytorch",
    "--grammar-backend", "none", "--disable-cuda-graph", "--mem-fraction-static", "0.3",
)  # fmt: skip
WATCHDOG_SECONDS = 3600
TELL_SECONDS = 15.0
"""Between two looks at a server that has not answered."""
COMPILERS = ("nvcc", "cudafe++", "cicc", "ptxas", "ninja")


@dataclass(frozen=True, kw_only=True)
class Config:
    """SGLang with rounded weights against trainers in bf16 and with the same weights."""

    device: str = "cuda"
    """Where the trainer runs; a server always takes the GPU."""
    server_site: str = ""
    """Folder with SGLang and what it needs, for the server alone."""
    port: int = 30_000
    """The server's port."""
    server_seconds: float = 900
    """How long the server may take until its first answer."""
    warm_up: bool = False
    """Compare nothing: end when the server has answered, and what it compiled is in its cache."""
    recipe: Literal["fp8", "int4"] = "fp8"
    """What is served."""
    model: Path | None = None
    """Folder of a model in bf16 over bytes; without one, weights are random."""
    rounded: Path | None = None
    """Folder of the same weights as `save` wrote them; without one, they are rounded here."""
    scale: Literal["fp32", "ue8m0"] = "fp32"
    """Of the weights' scales in FP8."""
    profiles: tuple[Literal["te", "deepgemm", "sglang", "vllm", "hf"], ...] = ("sglang", "te")
    """Ways to round the trainer's activations in FP8, each compared."""
    group_size: int = 32
    """Weights that share a scale in INT4."""
    layers: int = 12
    """Layers of the random model."""
    hidden: int = 1024
    """Its width."""
    vocabulary: int = 4096
    """Tokens it has."""
    logits_std: float = 2.5
    """Spread of its next-token logits."""
    prompts: int = 64
    """Requests, all at once; each prompt has 32 to 128 tokens."""
    answer_tokens: int = 64
    """Tokens of each answer."""
    out: Path = Path("benchmarks/results/precision_sglang.csv")
    """The CSV; rows are appended."""
    commit: str = ""
    """What was measured; asked of git where that is left out."""


def build(config: Config) -> Any:
    """The model in bf16, not converted."""
    if config.model is None:
        model = random_model(config)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            config.model.expanduser(), dtype=torch.bfloat16, attn_implementation="sdpa"
        )
        if is_moe(model):
            model.config._experts_implementation = "grouped_mm"
    return model.to(torch.bfloat16).to(config.device).eval()


def is_moe(model: Any) -> bool:
    return "moe" in model.config.model_type


def random_model(config: Config) -> Any:
    model_config = transformers.Qwen3Config(
        vocab_size=config.vocabulary, hidden_size=config.hidden,
        intermediate_size=3 * config.hidden, num_hidden_layers=config.layers,
        num_attention_heads=config.hidden // 128, num_key_value_heads=config.hidden // 256,
        head_dim=128, max_position_embeddings=4096, tie_word_embeddings=False,
        eos_token_id=None, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(model_config)
    gains = {"lm_head.weight": config.logits_std, "embed_tokens.weight": math.sqrt(config.hidden)}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                gain = next((g for end, g in gains.items() if name.endswith(end)), 1.0)
                weight.normal_(0, gain / math.sqrt(weight.shape[-1]), generator=generator)
    return model


def recipes(config: Config) -> dict[str, Recipe]:
    """Name of a trainer to what it rounds to; the weights are the same in all."""
    if config.recipe == "int4":
        return {"INT4": Int4(group_size=config.group_size)}
    return {
        f"FP8, activations as {profile}": BlockFP8(scale=config.scale, profile=profile)
        for profile in config.profiles
    }


def rules(model: Any, recipe: Recipe) -> list[tuple[str, Recipe | None]]:
    """As `precision_curves.py` trains: INT4 of a mixture of experts is of its experts alone."""
    only_experts = isinstance(recipe, Int4) and is_moe(model)
    return [("*.experts" if only_experts else "*", recipe)]


def server_flags(config: Config) -> tuple[str, ...]:
    """INT4 is told by the checkpoint's config alone; its experts have a kernel in Triton."""
    if config.recipe == "fp8":
        return ("--quantization", "fp8")
    return ("--watchdog-timeout", str(WATCHDOG_SECONDS), "--moe-runner-backend", "triton")


@contextlib.contextmanager
def serving(config: Config, folder: str) -> Iterator[str]:
    """The address of a server that has answered once; what it does until then is told."""
    site = str(Path(config.server_site).expanduser().resolve()) if config.server_site else ""
    env = {"NVCC_APPEND_FLAGS": "--split-compile=0"} | ({"PYTHONPATH": site} if site else {})
    made = SGLangServer(
        folder, args=[*FLAGS, *server_flags(config)], env=env, cwd=folder, port=config.port,
        log=Path(folder, "server.log"), start_timeout=config.server_seconds,
    )  # fmt: skip
    server.say(" ".join(made.command))
    answered = threading.Event()
    teller = threading.Thread(target=tell, args=(made, answered), daemon=True)
    teller.start()
    # `timeout` sends SIGTERM; as an exception it ends the server, and the log is told.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    try:
        with made:
            answered.set()
            server.say("the server has answered")
            yield made.url
    except BaseException as error:  # SystemExit and Ctrl-C too: the log is gone with the folder
        server.say(f"{type(error).__name__}; the end of the server's log:\n{made.last_lines(80)}")
        raise
    finally:
        answered.set()
        teller.join()
        signal.signal(signal.SIGTERM, before)
        server.say("the server is gone")


def tell(made: SGLangServer, answered: threading.Event) -> None:
    """Say now and then what a server does that has not answered."""
    while not answered.wait(TELL_SECONDS):
        last = made.last_lines(1).strip()
        compiles = f"; it runs {', '.join(names)}" if (names := compilers(made.pid)) else ""
        server.say(f"waiting for the server{compiles}; its log ends: {last[-300:]}")


def compilers(group: int | None) -> list[str]:
    """Those among the processes of a group."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            name, _, rest = file.read_text().partition(" (")[2].rpartition(") ")
            if int(rest.split()[2]) == group and name in COMPILERS:
                found.append(name)
    return sorted(set(found))


def prompts_of(config: Config) -> list[list[int]]:
    """Random tokens, or bytes of source that is held out."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(32, 129, (config.prompts,), generator=generator).tolist()
    if config.model is None:
        return [
            torch.randint(1, config.vocabulary, (length,), generator=generator).tolist()
            for length in lengths
        ]
    text = standard_library()[1]
    starts = torch.randint(len(text) - 128, (config.prompts,), generator=generator).tolist()
    return [
        text[start : start + length].tolist() for start, length in zip(starts, lengths, strict=True)
    ]


def checkpoint(config: Config, model: Any, folder: str) -> None:
    """Have in a folder, bit for bit, what the converted model computes with."""
    if config.rounded is None:
        save(model, folder)
    else:  # a copy: the server writes its log there
        shutil.copytree(config.rounded.expanduser(), folder)
    verify_parity(model, folder)


def answers_of(config: Config, folder: str, prompts: list[list[int]]) -> list[Sample]:
    bodies = [server.request(prompt, config.answer_tokens) for prompt in prompts]
    for body in bodies:
        del body["return_routed_experts"]
    pool = ThreadPoolExecutor(len(prompts))
    with pool, serving(config, folder) as url:
        if config.warm_up:
            return []
        calls = [pool.submit(server.ask, url, body, timeout=300) for body in bodies]
        answers = [call.result() for call in calls]
    samples = []
    for prompt, answer in zip(prompts, answers, strict=True):
        triples = answer["meta_info"]["output_token_logprobs"]
        sample = Sample(tokens=prompt)
        sample.append(
            [int(token) for _, token, *_ in triples],
            logprobs=[float(triple[0]) for triple in triples],
            weight_version=0,
        )
        samples.append(sample)
    return samples


@torch.no_grad()
def gap_of(model: Any, batch: TrainBatch) -> Tensor:
    """float64: trainer minus engine at every answered token."""
    out = model(input_ids=batch.input_ids_BL, attention_mask=batch.attention_mask_BL)
    logprobs_T = token_logprobs(out.logits.flatten(0, 1), batch.targets_T)
    gap_T = logprobs_T.double() - batch.rollout_logprobs_T.double()
    return gap_T[batch.packed.mask_T].cpu()


def summary(gap: Tensor) -> dict[str, Any]:
    size = gap.abs()
    return {
        "tokens": len(gap),
        "mean": f"{float(size.mean()):.3e}",
        "p99": f"{float(size.quantile(0.99)):.3e}",
        "max": f"{float(size.max()):.3e}",
        "k3": f"{float((gap.expm1() - gap).mean()):.3e}",
    }


def main(config: Config) -> None:
    model, trainers = build(config), recipes(config)
    report = convert_(model, rules(model, next(iter(trainers.values()))))
    server.say(report.table().splitlines()[-1])
    with tempfile.TemporaryDirectory() as parent:
        folder = f"{parent}/model"
        checkpoint(config, model, folder)
        samples = answers_of(config, folder, prompts_of(config))
        if config.warm_up:
            return
    batches = [collate(samples[i : i + 16]).to(config.device) for i in range(0, len(samples), 16)]
    rows = []
    with high_precision(model):
        rows.append({"trainer": "bf16"} | summary(torch.cat([gap_of(model, b) for b in batches])))
    for name, recipe in trainers.items():
        other = build(config)
        convert_(other, rules(other, recipe))
        gap = torch.cat([gap_of(other, batch) for batch in batches])
        rows.append({"trainer": name} | summary(gap))
    for row in rows:
        server.say(", ".join(f"{key} {value}" for key, value in row.items()))
    common = environment(config.device, config.commit) | {
        "engine": server.sglang_version(config), "scale": config.scale,
        "layers": model.config.num_hidden_layers, "hidden": model.config.hidden_size,
        "weights": "random" if config.model is None else config.model.name,
        "recipe": config.recipe,
    }  # fmt: skip
    append(config.out, [common | row for row in rows])


if __name__ == "__main__":
    main(tyro.cli(Config))
