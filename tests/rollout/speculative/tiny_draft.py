"""A small draft without attention, and what its trainer is tried with."""

import torch
from torch import nn

from miles.rollout.speculative.trainer import DraftTrainer
from tests.models import tiny

LAYERS = (0, 1)
U = 24


class TinyDraft(nn.Module):
    """Mixes the next token's embedding, which is the policy's and not detached, with a state."""

    def __init__(self, policy, *, layers=LAYERS, reduced=True, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        D, V = policy.config.hidden_size, policy.config.vocab_size
        self.feature_layers = layers
        self._embedding = [policy.get_input_embeddings()]
        self.fc = nn.Linear((len(layers) + 1) * D, D)
        self.back = nn.Linear(2 * D, D)
        self.head = nn.Linear(D, U if reduced else V)
        ids = torch.randperm(V, generator=torch.Generator().manual_seed(4))[:U].sort().values
        self.register_buffer("target_ids", ids if reduced else None)
        self.to(policy.dtype)

    def unroll(
        self, input_ids_BL, features_BLF, *, num_steps, position_ids_BL=None, seq_ids_BL=None
    ):
        state, out = features_BLF, []
        for i in range(num_steps):
            embeds = self._embedding[0](input_ids_BL.roll(-1 - i, 1))
            state = (self.back if i else self.fc)(torch.cat([embeds, state], -1)).tanh()
            out.append(self.head(state))
        return out


def trainer_of(draft, policy, **settings):
    return DraftTrainer(draft, policy, **{"share": 1.0} | settings)


def policy_of(name="llama", **changes):
    return tiny(name, num_hidden_layers=4, **changes).train()


def mask_of(ids_BL):
    mask_BL = torch.zeros_like(ids_BL, dtype=torch.bool)
    mask_BL[:, 2:-1] = True
    return mask_BL


def observe_once(trainer, ids_BL, mask=None, **kwargs):
    with trainer.capture():
        trainer.policy(ids_BL, use_cache=False, **kwargs)
    trainer.observe(mask_of(ids_BL) if mask is None else mask)


def grads(draft):
    return {name: p.grad.clone() for name, p in draft.named_parameters()}


def weights(draft):
    return {name: p.detach().clone() for name, p in draft.named_parameters()}


def grads_after(policy, *args, draft=None, settings=None, **kwargs):
    draft = draft or TinyDraft(policy)
    observe_once(trainer_of(draft, policy, **(settings or {})), *args, **kwargs)
    return grads(draft)
