"""Run by `test_policy.py` in a process of its own: Triton's interpreter is chosen at import."""

import itertools

import torch

from miles.losses import _policy_closed, _policy_triton


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    T = 3000

    def noise(scale: float) -> torch.Tensor:
        return scale * torch.randn(T, generator=generator)

    mask_T = torch.rand(T, generator=generator) < 0.7
    old_T = -noise(1.0).abs()
    new_T, ref_T, advantages_T = old_T + noise(0.4), old_T + noise(0.3), noise(1.0)
    for garbage_T in (new_T, old_T, ref_T, advantages_T):
        garbage_T[~mask_T] = torch.nan
    options = {
        "per_sequence_S": torch.rand(7, generator=generator, dtype=torch.float64),
        "weights_T": 2 * torch.rand(T, generator=generator),
        "keep_T": mask_T & (torch.rand(T, generator=generator) < 0.9),
        "ref_T": ref_T,
    }
    for given in itertools.product([False, True], repeat=4):
        chosen = {k: v if on else None for (k, v), on in zip(options.items(), given, strict=True)}
        settings = chosen | {
            "old_T": old_T, "advantages_T": advantages_T, "mask_T": mask_T,
            "seq_ids_T": torch.arange(T) % 7, "factor": 2.0, "divisor": mask_T.sum(),
            "kl_coef": 0.1 if given[3] else 0.0, "kl_rejected": given[0], "ratio_min": 0.8,
            "ratio_max": 1.2, "dual_clip": 3.0,
        }  # fmt: skip
        got = _policy_triton.one_pass(new_T, **settings)
        expected = _policy_closed.closed_form(new_T, **settings)
        for ours, theirs in zip(got, expected, strict=True):
            ours = ours[: len(theirs)] if theirs.ndim else ours
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    for factor in (1.0, 2.0):
        scaled_T = _policy_triton.scaled_(ref_T[mask_T], torch.tensor(factor))
        torch.testing.assert_close(scaled_T, factor * ref_T[mask_T])


if __name__ == "__main__":
    main()
