"""From hidden states, or logits, to GRPO's loss and back, beside liger-kernel and plain PyTorch.

    pip install --no-deps liger-kernel==0.8.5
    python benchmarks/losses_of_heads.py                  # CPU
    python benchmarks/losses_of_heads.py --device cuda

Log-probs of the sampled tokens out of the head's weight, then ratio, clip, the k3 penalty and the
mean over tokens, forward and backward into hidden states and weight (or into the logits): 4 x 512
tokens, hidden size 512, 32,768 entries, float32, on a CPU; 8 x 2048, 2048 and 151,936 in bfloat16
on a GPU. A fifth of the tokens is masked; ours is told so and leaves them out. Liger's loss of
logits may overwrite them, which is left off here, since ours keeps them.

The last columns are how far loss and gradient are from ours in float32 on the same numbers: of the
gradients, the norm of the difference over the norm.
"""

from __future__ import annotations

import gc
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from losses import write_rows
from rivals import Liger
from torch import Tensor

from miles import Packed, count
from miles.losses import linear_logprobs, policy_loss, token_logprobs

sys.path.insert(0, str(Path(__file__).parent))

KL_COEF = 0.04
Run = Callable[[], tuple[Tensor, list[Tensor]]]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Losses from hidden states and logits."""

    device: str = "cpu"
    """Where all run."""
    repeats: int = 5
    """Timed runs of each, after one that is not (and one that is compared)."""
    num_threads: int = 2
    """CPU threads of all."""
    out: Path = Path("benchmarks/results/losses_of_heads.csv")
    """The CSV; rows are appended."""
    commit: str = ""
    """What was measured; asked of git where that is left out."""


class Batch:
    """One batch, in the shapes that each library wants."""

    def __init__(self, device: str) -> None:
        on_gpu = device == "cuda"
        sizes = (8, 2048, 2048, 151_936) if on_gpu else (4, 512, 512, 32_768)
        self.dtype = torch.bfloat16 if on_gpu else torch.float32
        generator = torch.Generator(device).manual_seed(0)
        B, L, D, V = self.B, self.L, self.D, self.V = sizes

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        self.hidden_BLD = noise(B, L, D).to(self.dtype)
        self.weight_VD = (noise(V, D) / D**0.5).to(self.dtype)
        self.ids_BL = torch.randint(0, V, (B, L), generator=generator, device=device)
        self.mask_BL = torch.rand(B, L, generator=generator, device=device) < 0.8
        self.float_mask_BL = self.mask_BL.float()
        self.targets_T = torch.where(self.mask_BL, self.ids_BL, -100).flatten()
        self.advantages_B = noise(B)
        self.packed = Packed.from_padded(self.mask_BL)
        self.denominators = count(self.packed)
        self.num_tokens = int(self.denominators.num_tokens)
        with torch.no_grad():
            now_T = linear_logprobs(
                self.hidden_BLD.flatten(0, 1), self.weight_VD, self.ids_BL.flatten(),
                backend="chunked",
            ).logprobs  # fmt: skip
        now_BL = now_T.view(B, L)
        self.old_BL, self.ref_BL = now_BL + 0.1 * noise(B, L), now_BL + 0.2 * noise(B, L)

    def loss(self, logprobs_T: Tensor, packed: Packed, *, pad: int = 0) -> Tensor:
        """Ours, of `[B, L + pad]` log-probs."""
        old_T, ref_T = (
            torch.nn.functional.pad(x_BL, (0, pad)).flatten() for x_BL in (self.old_BL, self.ref_BL)
        )
        value, _ = policy_loss(
            logprobs_T, old_T, packed.per_token(self.advantages_B), packed, self.denominators,
            ref_logprobs_T=ref_T, kl_coef=KL_COEF,
        )  # fmt: skip
        return value

    @property
    def for_liger(self) -> dict[str, object]:
        return {
            "ids": self.ids_BL, "mask": self.float_mask_BL, "advantages": self.advantages_B,
            "old": self.old_BL, "ref": self.ref_BL, "kl_coef": KL_COEF,
            "num_tokens": self.num_tokens,
        }  # fmt: skip


def of_hidden(batch: Batch, liger: Liger) -> tuple[dict[str, Run], Run]:
    def step(loss: Callable[[Tensor, Tensor], Tensor], wide: bool = False) -> Run:
        def run() -> tuple[Tensor, list[Tensor]]:
            inputs = [batch.hidden_BLD, batch.weight_VD]
            leaves = [(x.float() if wide else x).detach().requires_grad_() for x in inputs]
            value = loss(*leaves)
            value.backward()
            return value.detach(), [leaf.grad for leaf in leaves]

        return run

    def ours(hidden_BLD: Tensor, weight_VD: Tensor) -> Tensor:
        out = linear_logprobs(
            hidden_BLD.flatten(0, 1), weight_VD, batch.targets_T, backend="chunked"
        )
        return batch.loss(out.logprobs, batch.packed)

    def plain(hidden_BLD: Tensor, weight_VD: Tensor) -> Tensor:
        logits_BLV = (hidden_BLD @ weight_VD.T).float()
        logprobs_BLV = logits_BLV.log_softmax(-1)
        logprobs_BL = logprobs_BLV.gather(-1, batch.ids_BL[..., None])[..., 0]
        return batch.loss(logprobs_BL.flatten(), batch.packed)

    def theirs(hidden_BLD: Tensor, weight_VD: Tensor) -> Tensor:
        return liger.loss_of_hidden(hidden_BLD, weight_VD, **batch.for_liger)

    runs = {"miles (chunked)": ours, liger.name: theirs, "PyTorch, whole logits": plain}
    return {name: step(loss) for name, loss in runs.items()}, step(ours, wide=True)


def of_logits(batch: Batch, liger: Liger) -> tuple[dict[str, Run], Run]:
    hidden_BLD = torch.nn.functional.pad(batch.hidden_BLD, (0, 0, 0, 1))
    logits_BLV = hidden_BLD @ batch.weight_VD.T
    targets_T = torch.nn.functional.pad(batch.targets_T.view(batch.B, -1), (0, 1), value=-100)
    packed = Packed.from_padded(torch.nn.functional.pad(batch.mask_BL, (0, 1)))

    def ours(leaf: Tensor) -> Tensor:
        logprobs_T = token_logprobs(leaf.flatten(0, 1), targets_T.flatten())
        return batch.loss(logprobs_T, packed, pad=1)

    def theirs(leaf: Tensor) -> Tensor:
        return liger.loss_of_logits(leaf, **batch.for_liger)

    def step(loss: Callable[[Tensor], Tensor]) -> Run:
        def run() -> tuple[Tensor, list[Tensor]]:
            leaf = logits_BLV.detach().requires_grad_()
            value = loss(leaf)
            value.backward()
            return value.detach(), [leaf.grad]

        return run

    runs = {"miles (token_logprobs)": ours, liger.name: theirs}
    return {name: step(loss) for name, loss in runs.items()}, step(ours)


def peak(run: Run, device: str) -> int:
    """The most bytes in use during a run, above what was in use before."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # starts the high-water mark anew
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def resident(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def gaps(run: Run, expected: tuple[Tensor, list[Tensor]]) -> tuple[float, float]:
    """How far the loss is away, and the worst of the gradients."""
    loss, gradients = run()
    far = [
        float((got.float() - want.float()).norm() / want.float().norm())
        for got, want in zip(gradients, expected[1], strict=True)
    ]
    return float((loss - expected[0]).abs() / expected[0].abs()), max(far)


def main(config: Config) -> None:
    from losses import timed

    torch.set_num_threads(config.num_threads)
    liger = Liger()
    batch = Batch(config.device)
    tasks = {"hidden states to loss": of_hidden(batch, liger)}
    if config.device == "cuda":
        tasks["logits to loss"] = of_logits(batch, liger)
    size = f"{batch.B * batch.L} x {batch.D} x {batch.V}, {str(batch.dtype).partition('.')[2]}"
    rows = []
    for task, (runs, exact) in tasks.items():
        expected = exact()
        found = {name: gaps(run, expected) for name, run in runs.items()}
        # A log-prob rounded to bfloat16 takes tokens over the edge of the clip, gradient and all.
        limits = (1e-4, 1e-4) if config.device == "cpu" else (0.05, 0.5)
        assert all(a < b for gap in found.values() for a, b in zip(gap, limits, strict=True)), found
        del expected
        times = timed(runs, config.repeats, config.device, warm=1)
        for name, run in runs.items():
            extra = {
                "peak_mib": f"{peak(run, config.device) / 2**20:.0f}",
                "loss_gap": f"{found[name][0]:.1e}", "gradient_gap": f"{found[name][1]:.1e}",
            }  # fmt: skip
            rows.append((f"{task}, {size}", name, times[name], extra))
            print(task, name, f"{statistics.median(times[name]) * 1e3:.1f} ms", extra)
    write_rows(config, rows)


if __name__ == "__main__":
    main(tyro.cli(Config))
