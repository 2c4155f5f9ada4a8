r"""Tokens per second of rollouts with a draft and without, in `HFEngine` and an SGLang server.

    python benchmarks/speculative.py --device cuda --server-site ~/site
    python benchmarks/speculative.py --device cuda --server-site ~/site \
        --new-tokens 64 --policy runs/speculative_smollm2/served/policy \
        --draft runs/speculative_smollm2/served/draft

Without `--policy` the policy is SmolLM2-135M-Instruct as it comes; without `--draft` an EAGLE-3
draft learns the policy's answers here, from scratch, for `--train-seconds`. Prompts are those of
`examples/speculative_smollm2.py`, or random tokens for a policy without a tokenizer.

A turn is `waves` times `batch` requests, of which never more than `batch` are on their way: as one
answer comes, the next request goes out (`HFEngine` has them in its queue from the beginning). So
the batch is full until the last wave, as in a rollout; with `--waves 1` all go out at once, and
rows that a draft ends early leave the batch to shrink. A turn ends when the last answer is there,
at temperature 1; prefill counts.

Without `--until-end` every answer has the length that it is to have, whatever ends in it, so that
the work is the same for all: `--new-tokens` in one wave, and in several an even spread from
`--shortest` of that. Were lengths alike there (`--shortest 1`), rows without a draft would end
together and share a prefill, and those with one would not: in 4 waves of 8 answers of 64 tokens, 4
passes over prompts against 13, and 23 against 22 with the spread. In 4 waves of 64 it is 102
against 41, since with a draft more rows end in the same step. No `CostModel` counts them.

The draft trained here has learnt such answers; one of an RL run has never seen what comes after an
end, so `--new-tokens` has to be fewer than its answers have. With `--until-end` the tokens that
came are counted.

Variants are `plain` without a draft, `off` with one that is never asked, `K draft tokens`, and
`controller`, which chooses up to the largest K by acceptance and by a `CostModel` fitted to a
calibration in this process: plain steps and steps of every K, at powers of two up to the largest
batch. They take turns in an order that rotates, with engines that have room for `batch` requests.
Shapes of steps are captured before: on a GPU engines first answer every number of requests that has
one of its own, and four turns of one wave or two of several are not timed. `speedup` is the median
over repeats of the tokens per second over that of `plain` in the same repeat.

Both servers run at once and take turns likewise, on one GPU or on those of `--server-gpus`. They
have CUDA graphs for decoding, unless `--no-server-graphs`. SGLang 0.5.17 rejects as a draft's
distribution asks only where draft and policy share a vocabulary; for another draft the table says
`target-only`: tokens are kept with the policy's probability alone.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import routing_sglang as server
import torch
import transformers
import tyro
from routing import append, environment, spread, synchronize
from speculative_engines import Ask, Asked, InTurn, WarmedUp, answers, engines, meet_shapes, release

from miles.rollout import HFEngine, Sample, SamplingParams, SGLangEngine, SGLangServer
from miles.rollout.speculative import (
    CostModel,
    DraftController,
    DraftTrainer,
    Eagle3Draft,
    SpeculativeStats,
    export_draft,
    load_draft,
)
from miles.rollout.speculative.eagle3 import frequent_tokens

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from grpo_smollm2 import load_smollm2  # examples are no package
from speculative_rl import answers_to, train_draft
from speculative_smollm2 import WorkedSums

CALIBRATIONS = 4
SERVER_FLAGS = (
    "--skip-tokenizer-init", "--dtype", "bfloat16", "--attention-backend", "triton",
    "--sampling-backend", "pytorch", "--grammar-backend", "none", "--mem-fraction-static", "0.3",
)  # fmt: skip
PLAIN = "plain"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Rollouts with a draft against rollouts without."""

    device: str = "cpu"
    """Where the embedded engine runs; a server always takes a GPU."""
    policy: Path | None = None
    """Folder of the policy in HF format."""
    draft: Path | None = None
    """Folder of its draft, as `export_draft` writes it."""
    save: Path | None = None
    """Folder to keep `policy/` and `draft/` in; None: they go at the end."""
    train_seconds: float = 120.0
    """How long a draft learns, sampling included."""
    train_updates: int = 1000
    """Most updates of it."""
    micro_batch_size: int = 64
    """Answers of an update."""
    learning_rate: float = 1e-3
    """Of the draft."""
    draft_vocabulary: int = 0
    """Tokens of the draft's own vocabulary, the policy's most frequent; 0 for the policy's."""
    embedded: bool = True
    """Measure `HFEngine`."""
    batches: tuple[int, ...] = (1, 8, 64)
    """Requests on their way at once."""
    waves: int = 4
    """Times as many requests make a turn."""
    draft_tokens: tuple[int, ...] = (1, 3, 5)
    """Numbers of draft tokens."""
    new_tokens: int = 128
    """Tokens of the longest answer."""
    shortest: float = 0.5
    """Share of them that the shortest answer has, if there are several waves."""
    until_end: bool = False
    """Whether an answer may end before that."""
    temperature: float = 1.0
    """Of sampling."""
    num_terms: int = 6
    """Numbers of the sum that a prompt asks for."""
    repeats: int = 8
    """Timed turns of each variant."""
    server_site: str = ""
    """Folder with SGLang and what it needs, for servers alone; empty: none is started."""
    server_gpus: str = ""
    """The servers' GPUs, with commas between; empty: the one that this process sees first."""
    server_graphs: bool = True
    """Whether servers decode by CUDA graphs."""
    server_draft_tokens: int = 3
    """Draft tokens of the server with a draft."""
    server_seconds: float = 400.0
    """How long a server may take to start."""
    out: Path = Path("benchmarks/results/speculative.csv")
    """The CSV, to which rows are added as they come."""
    commit: str = ""
    """What was measured; asked of git where that is left out."""

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(
            max_new_tokens=self.new_tokens, temperature=self.temperature,
            ignore_eos=not self.until_end,
        )  # fmt: skip

    @property
    def shortest_tokens(self) -> int:
        """Tokens that no answer has fewer of, if none may end by itself."""
        alike = self.waves == 1 or self.until_end
        return self.new_tokens if alike else max(1, round(self.shortest * self.new_tokens))

    @property
    def warm_up(self) -> int:
        """Turns that are not timed."""
        return 4 if self.waves == 1 else 2


def load(config: Config) -> tuple[Any, Any]:
    """The policy as the engine runs it, and its tokenizer or None."""
    if config.waves < 1 or not 0 < config.shortest <= 1 or config.repeats < 2:
        raise SystemExit(
            f"--waves {config.waves}, --shortest {config.shortest} and --repeats {config.repeats}; "
            "expected 1 or more waves, a share above 0 and up to 1, and 2 or more repeats"
        )
    for name, folder in {"policy": config.policy, "draft": config.draft}.items():
        if folder is not None and not folder.is_dir():
            raise SystemExit(
                f"--{name} is {folder}, where there is no folder; expected one that --save or "
                f"{'save_pretrained' if name == 'policy' else 'export_draft'} has written"
            )
    if config.policy is None:
        model, tokenizer = load_smollm2()
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(config.policy)
        found = (config.policy / "tokenizer_config.json").exists()
        tokenizer = transformers.AutoTokenizer.from_pretrained(config.policy) if found else None
    dtype = torch.bfloat16 if config.device == "cuda" else torch.float32
    return model.to(config.device, dtype).eval(), tokenizer


def prompts_from(config: Config, model: Any, tokenizer: Any) -> Iterator[list[int]]:
    """Prompts without end."""
    if tokenizer is not None:
        task = WorkedSums(0, tokenizer, num_terms=config.num_terms)
        for step in itertools.count():
            for problem in task.training(64, step):
                yield list(tokenizer(problem.prompt, add_special_tokens=False)["input_ids"])
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randint(1, model.config.vocab_size, (16,), generator=generator).tolist()


def trained_draft(config: Config, model: Any, prompts: Iterator[list[int]]) -> Eagle3Draft:
    """A draft that has learnt the policy's answers, from nothing."""
    end = time.monotonic() + config.train_seconds
    engine, seeds = HFEngine(model, max_batch=4 * config.micro_batch_size), itertools.count(10**9)

    def sampled(number: int) -> list[Sample]:
        asked = list(itertools.islice(prompts, number))
        return answers_to(engine, asked, config.params, seeds)

    ids = None
    if config.draft_vocabulary:
        counts_V = torch.zeros(model.config.vocab_size, dtype=torch.int64)
        for sample in sampled(16 * config.micro_batch_size):
            counts_V += torch.tensor(sample.response_tokens).bincount(minlength=len(counts_V))
        ids = frequent_tokens(counts_V, config.draft_vocabulary).to(config.device)
    draft = Eagle3Draft.from_target(model, target_ids=ids, dtype=torch.float32)
    trainer = DraftTrainer(
        draft, model, lr=config.learning_rate, temperature=config.temperature, share=1.0,
        autocast=torch.bfloat16 if config.device == "cuda" else None,
    )  # fmt: skip
    train_draft(
        trainer, model, sampled, updates=config.train_updates, device=config.device,
        micro_batch_size=config.micro_batch_size, seconds=end - time.monotonic(),
    )  # fmt: skip
    engine.close()
    return draft


def calibrated(config: Config, model: Any, draft: Any, prompts: Iterator[list[int]]) -> CostModel:
    """What steps cost, over batches and numbers of draft tokens, measured in this process."""
    most = max(config.draft_tokens)
    batches = {2**n for n in range(max(config.batches).bit_length())} | set(config.batches)
    engine = HFEngine(
        model, max_batch=max(batches), draft=draft, draft_steps=most,
        controller=InTurn([0, *config.draft_tokens]),
    )  # fmt: skip
    for _ in range(CALIBRATIONS):  # medians, so that captures of graphs don't count
        for batch in sorted(batches):
            answers_to(engine, list(itertools.islice(prompts, batch)), config.params, range(batch))
    costs = [sample for sample in engine.step_costs() if sample.batch in batches]
    engine.close()
    cost = CostModel.fit(costs)
    for one in costs:
        fitted = {
            "decode": cost.t_decode(one.batch),
            "verify": cost.t_verify(one.batch, one.tokens),
            "draft": cost.t_step(one.batch, one.tokens) - cost.t_verify(one.batch, one.tokens + 1),
        }[one.kind]
        server.say(
            f"{one.kind} at batch {one.batch}, {one.tokens} tokens a row: "
            f"{one.seconds * 1e3:.2f} ms, fitted {fitted * 1e3:.2f} ms"
        )
    return cost


def embedded(
    config: Config, model: Any, draft: Any, prompts: Any
) -> Iterator[list[dict[str, Any]]]:
    cost = calibrated(config, model, draft, prompts)
    server.say(f"fitted: {cost}")
    most = max(config.draft_tokens)
    controller = DraftController(cost, max_steps=most)
    every = range(most + 1)
    options: dict[str, dict[str, Any]] = {PLAIN: {}}
    for number in config.draft_tokens:
        options[of_tokens(number)] = {"draft": draft, "draft_steps": number}
    options["off"] = {"draft": draft, "draft_steps": most, "controller": InTurn([0])}
    options["controller"] = {"draft": draft, "draft_steps": most}

    def asks_at(batch: int) -> AbstractContextManager[dict[str, Ask]]:
        options["controller"]["controller"] = WarmedUp(controller, every)
        graphed = config.device == "cuda"
        enough = min(config.new_tokens, 6 * (most + 2))  # for several steps of every number
        params = replace(config.params, max_new_tokens=enough)
        warm = partial(meet_shapes, prompts, params) if graphed else lambda *_: None
        return engines(model, options, batch=batch, warm=warm)

    for rows in measured(config, asks_at, prompts):
        yield [{"engine": "HFEngine"} | row for row in rows]
    for batch in config.batches:
        speedups = " ".join(f"{speedup:.2f}" for speedup in controller.speedups(batch))
        server.say(f"predicted at batch {batch} for 0 to {most} draft tokens: {speedups}")


def of_tokens(number: int) -> str:
    """The name of a variant."""
    return f"{number} draft token{'s' if number > 1 else ''}"


def servers(config: Config, model: Any, draft: Any, prompts: Any) -> Iterator[list[dict[str, Any]]]:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model.to("cpu", torch.bfloat16).save_pretrained(folder / "policy")
        export_draft(draft, folder / "draft", dtype=torch.bfloat16)
        number, name = config.server_draft_tokens, of_tokens(config.server_draft_tokens)
        flags = [
            "--speculative-algorithm", "EAGLE3",
            "--speculative-draft-model-path", str(folder / "draft"),
            "--speculative-num-steps", str(number), "--speculative-eagle-topk", "1",
            "--speculative-num-draft-tokens", str(number + 1),
        ]  # fmt: skip
        if draft.target_ids is None:
            flags.append("--speculative-use-rejection-sampling")
        else:
            name += ", target-only"
        variants = {PLAIN: [], name: flags}
        gpus = itertools.cycle(config.server_gpus.split(","))
        clients: dict[str, SGLangEngine] = {}
        for variant, more in variants.items():
            url = stack.enter_context(serving(config, folder, more, next(gpus))).url
            server.say(f"{variant}: the server has answered")
            clients[variant] = stack.enter_context(contextlib.closing(SGLangEngine(url)))

        def asks_at(batch: int) -> AbstractContextManager[dict[str, Ask]]:
            pairs = clients.items()
            return contextlib.nullcontext({n: partial(answers, one, batch) for n, one in pairs})

        for rows in measured(config, asks_at, prompts, seeded=False):
            yield [{"engine": server.sglang_version(config)} | row for row in rows]


@contextlib.contextmanager
def serving(config: Config, folder: Path, flags: Sequence[str], gpu: str) -> Iterator[SGLangServer]:
    """A server of `folder/policy` on a GPU; if it fails, the end of its log is shown."""
    size = str(max(config.batches))
    graphs = ["--disable-prefill-cuda-graph", "--cuda-graph-max-bs-decode", size]
    env = {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}
    if config.server_site:
        env["PYTHONPATH"] = str(Path(config.server_site).expanduser().resolve())
    made = SGLangServer(
        folder / "policy",
        args=[
            *SERVER_FLAGS, "--max-running-requests", size,
            *(graphs if config.server_graphs else ["--disable-cuda-graph"]), *flags,
        ],
        env=env, cwd=folder, start_timeout=config.server_seconds,
    )  # fmt: skip
    server.say(" ".join(made.command))
    try:
        with made:
            yield made
    except Exception as error:  # whatever it was: the log is gone with the folder
        server.say(f"{type(error).__name__}; the end of the server's log:\n{made.last_lines(80)}")
        raise


def measured(
    config: Config,
    asks_at: Callable[[int], AbstractContextManager[dict[str, Ask]]],
    prompts: Iterator[list[int]],
    *,
    seeded: bool = True,
) -> Iterator[list[dict[str, Any]]]:
    """For each batch a row for each variant."""
    for batch in config.batches:
        with asks_at(batch) as asks:
            speeds: dict[str, list[float]] = {name: [] for name in asks}
            counts = {name: SpeculativeStats(**dict.fromkeys(COUNTS, 0)) for name in asks}
            names = list(asks)
            for turn in range(config.repeats + config.warm_up):
                asked = turn_of(config, batch, turn, prompts, seeded=seeded)
                first = turn % len(names)
                for name in names[first:] + names[:first]:
                    synchronize()
                    start = time.perf_counter()
                    samples = asks[name](asked)
                    seconds = time.perf_counter() - start
                    if turn >= config.warm_up:
                        speeds[name].append(sum(len(s.response_tokens) for s in samples) / seconds)
                        counts[name] = sum(map(counts_of, samples), counts[name])
        yield summaries(config, batch, speeds, counts)


def turn_of(
    config: Config, batch: int, turn: int, prompts: Iterator[list[int]], *, seeded: bool
) -> list[Asked]:
    """The requests of a turn, the same for all variants."""
    number, lengths = config.waves * batch, random.Random(turn)
    return [
        (
            prompt,
            replace(
                config.params,
                seed=turn * number + index if seeded else None,
                max_new_tokens=lengths.randint(config.shortest_tokens, config.new_tokens),
            ),
        )
        for index, prompt in enumerate(itertools.islice(prompts, number))
    ]


COUNTS = ("num_verify_steps", "num_proposed", "num_accepted", "num_tokens")


def counts_of(sample: Sample) -> SpeculativeStats:
    found = sample.metadata.get("speculative") or dict.fromkeys(COUNTS, 0)
    return SpeculativeStats(**{name: found[name] for name in COUNTS})


def summaries(
    config: Config, batch: int, speeds: dict[str, list[float]], counts: dict[str, SpeculativeStats]
) -> list[dict[str, Any]]:
    rows = []
    for name, values in speeds.items():
        ratios = [value / base for value, base in zip(values, speeds[PLAIN], strict=True)]
        median, p20, p80 = spread(values)
        speedup, speedup_p20, speedup_p80 = spread(ratios)
        row: dict[str, Any] = {
            "variant": name, "batch": batch, "waves": config.waves,
            "new_tokens": config.new_tokens, "shortest": config.shortest_tokens,
            "until_end": config.until_end, "repeats": len(values),
            "tokens_per_second": round(median), "p20": round(p20), "p80": round(p80),
            "speedup": f"{speedup:.3f}", "speedup_p20": f"{speedup_p20:.3f}",
            "speedup_p80": f"{speedup_p80:.3f}", "accept_length": "", "draft_length": "",
        }  # fmt: skip
        if steps := counts[name].num_verify_steps:
            row["accept_length"] = f"{counts[name].num_accepted / steps + 1:.3f}"
            row["draft_length"] = f"{counts[name].num_proposed / steps:.2f}"
        server.say(", ".join(f"{key} {value}" for key, value in row.items()))
        rows.append(row)
    return rows


def main(config: Config) -> None:
    start = time.perf_counter()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    model, tokenizer = load(config)
    prompts = prompts_from(config, model, tokenizer)
    draft: Any
    if config.draft is None:
        draft = trained_draft(config, model, prompts)
    else:
        draft = load_draft(config.draft, model)
    draft = draft.to(dtype=model.dtype)
    if config.save is not None:
        model.save_pretrained(config.save / "policy")
        if tokenizer is not None:
            tokenizer.save_pretrained(config.save / "policy")
        export_draft(draft, config.save / "draft")
    size = len(draft.target_ids) if draft.target_ids is not None else model.config.vocab_size
    common = environment(config.device, config.commit) | {
        "policy": "SmolLM2-135M-Instruct" if config.policy is None else str(config.policy),
        "draft": f"trained here for {config.train_seconds:.0f} s"
        if config.draft is None
        else str(config.draft),
        "dtype": str(model.dtype).removeprefix("torch."), "draft_vocabulary": size,
    }  # fmt: skip
    for part in [embedded] * config.embedded + [servers] * bool(config.server_site):
        for rows in part(config, model, draft, prompts):
            append(config.out, [common | row for row in rows])
        release()
        server.say(f"{part.__name__}: {time.perf_counter() - start:.0f} s so far")


if __name__ == "__main__":
    main(tyro.cli(Config))
