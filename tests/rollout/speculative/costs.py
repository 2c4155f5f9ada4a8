"""What steps of a made-up engine cost."""

from miles.rollout.speculative import CostModel

__all__ = ["COST"]

COST = CostModel(
    floor=8e-3, per_row=2e-5, per_token=1e-4, knee=64,
    per_verify=5e-4, draft_floor=8e-4, draft_per_row=1e-5, per_verify_row=3e-6, per_draft=4e-4,
    per_draft_row=5e-6,
)  # fmt: skip
