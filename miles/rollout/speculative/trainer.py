"""A draft that learns while the policy trains.

Shapes: B x L tokens, F features of a token, V vocabulary, K unrolled steps, M micro-batches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from miles.errors import EmptyBatchError, SettingError
from miles.losses import Metrics, reduce_metrics
from miles.packed import Packed
from miles.rollout.speculative._capture import Captured, capturing
from miles.rollout.speculative._host import upload
from miles.rollout.speculative._training_batch import Given, TrainingBatch
from miles.rollout.speculative._training_checks import (
    VOCABULARY_MAPS,
    check_made_for,
    check_ranks,
    check_settings,
    check_state,
    least_of,
    load_optimizer,
    optimizer_of,
    own_parameters,
    own_tensors,
    trouble_of,
)
from miles.rollout.speculative.losses import Kind, MaskPolicy, check_loss_settings, loss_of_rows

__all__ = ["Captured", "DraftTrainer", "TrainableDraft", "TrainingAdvice"]


class TrainableDraft(Protocol):
    """What the trainer asks of a draft, which is an `nn.Module` besides.

    Where it has `unroll_states` and `logits`, as our drafts do, its head is run at judged places
    only, and it gets `seq_ids_BL` on the CPU, so that it need not wait for the GPU to look at them;
    where it has `checkpoint_tensors`, these are what `named_tensors` gives.
    """

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """See `Draft.feature_layers`."""
        ...

    @property
    def target_ids(self) -> Tensor | None:
        """int64 `[U]`, the policy's id of each of its tokens; None for one vocabulary."""
        ...

    def unroll(
        self,
        input_ids_BL: Tensor,
        features_BLF: Tensor,
        *,
        num_steps: int,
        position_ids_BL: Tensor | None = None,
        seq_ids_BL: Tensor | None = None,
    ) -> list[Tensor]:
        """`num_steps` times logits `[B, L, U]`; row t of step i predicts token t + 2 + i. Ids of -1
        are padding."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Its own, without those of the policy that it holds by reference."""
        ...


class TrainingAdvice(Protocol):
    """Says when a draft should learn; `DraftController` does."""

    def observe(self, stats: Any) -> None:
        """What was accepted since the last call."""
        ...

    def should_train(self) -> bool:
        """Whether acceptance has decayed enough."""
        ...


class DraftTrainer:
    """Trains a draft on the policy's own forward passes, with an optimizer of its own.

    Hooks read the features and logits of a pass that the policy makes anyway; everything is
    detached, and gradients are asked for the draft's parameters only, so none reaches the policy.
    One optimizer step of the draft is a `step()`, over any number of micro-batches:

        for batch in micro_batches:
            with trainer.capture(batch.packed):
                logits = policy(batch.input_ids_BL, attention_mask=batch.attention_mask_BL).logits
            policy_loss(logits, batch).backward()
            trainer.observe()
        optimizer.step()
        if trainer.pending:
            metrics = trainer.step()

    The features and distributions are those of the weights before the policy's own step, so the
    draft learns to follow a policy one step old; the policy moves little in one step. It lets go
    of logits and features in `observe`, which may come before or after the policy's backward pass;
    the memory peaks lowest after it. The host runs ahead of the GPU, up to `step()`.

    Ranks hold whole sequences: the draft's attention does not reach into another rank's shard.

    Args:
        draft: an `nn.Module` with `unroll`, such as `Eagle3Draft`. Keep it in float32 and give
            `autocast`: in bf16 an update of less than 1/256 of a weight is lost.
        policy: the model whose passes `capture` reads; None if you build every `Captured` yourself.
        lr: of AdamW (betas 0.9 and 0.95, no weight decay), fused on a GPU.
        optimizer: one over the draft's parameters, in place of AdamW; then `lr` is not read.
        kind: `draft_loss`'s: `kl`, `hard`, `tv` or `lk`.
        steps: K of the training-time test, 1 or more.
        share: of a step's sequences with places to learn from, evenly spread, at least the first;
            the cost is nearly proportional to it. A micro-batch of which none is taken costs
            nothing. Shuffle what comes sorted. Give 1 for a fresh draft.
        decay: weight of a step over that of the one before.
        temperature: what rollouts are sampled with.
        mask_policy: which places are learnt from; None for `MaskPolicy()`.
        renormalize: of `draft_loss`.
        warmup_steps: over so many steps the learning rate rises linearly to `lr` or your
            optimizer's; then it is left alone. Give 0 with a schedule that begins at once.
        max_grad_norm: above which the gradient is scaled down; None for never.
        autocast: dtype to compute in, such as `torch.bfloat16`; None for the draft's own, or the
            autocast that is on around `observe`.
        controller: what `due` asks.
        group: data-parallel ranks, each with whole sequences: gradients and readings are summed
            over them, and their drafts, which have to be equal at the first `step` and at the first
            after `load_state_dict`, stay equal. All call `step` together.

    Raises:
        SettingError: settings out of range, a draft that owns parameters of the policy or has none,
            reads layers that it lacks or cannot take so many steps, or an optimizer of other
            parameters, or float16 parameters.
        ShapeError: a draft of another vocabulary or hidden size.

    Example:
        >>> from miles.rollout.speculative import DraftTrainer
        >>> from miles.rollout.speculative.losses import TargetLogits
        >>> from miles.rollout.speculative.trainer import Captured
        >>> class Bigram(torch.nn.Module):  # predicts a token from the one before
        ...     feature_layers, target_ids = (), None
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.table = torch.nn.Embedding(4, 4)
        ...     def unroll(self, input_ids_BL, features_BLF, *, num_steps, **_):
        ...         return [self.table(input_ids_BL.roll(-1 - i, 1)) for i in range(num_steps)]
        >>> ids = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
        >>> policy = 9.0 * torch.nn.functional.one_hot((ids + 1) % 4, 4)  # sure of the next one
        >>> trainer = DraftTrainer(Bigram(), None, lr=0.1, steps=2)
        >>> seen = Captured(input_ids_BL=ids, features_BLF=torch.zeros(1, 8, 0),
        ...                 target=TargetLogits(values_BKX=policy))
        >>> for _ in range(60):
        ...     trainer.observe(torch.ones(1, 8).bool(), captured=seen)
        ...     metrics = trainer.step()
        >>> metrics["draft/acceptance/step_1"].item() > 0.9, trainer.version
        (True, 60)
    """

    def __init__(
        self,
        draft: TrainableDraft,
        policy: nn.Module | None,
        *,
        lr: float = 1e-4,
        optimizer: torch.optim.Optimizer | None = None,
        kind: Kind = "kl",
        steps: int = 3,
        share: float = 0.25,
        decay: float = 0.8,
        temperature: float = 1.0,
        mask_policy: MaskPolicy | None = None,
        renormalize: bool = True,
        warmup_steps: int = 20,
        max_grad_norm: float | None = 0.5,
        autocast: torch.dtype | None = None,
        controller: TrainingAdvice | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        check_loss_settings(kind=kind, decay=decay, temperature=temperature)
        check_settings(steps, share, warmup_steps, max_grad_norm)
        self.draft, self.policy = draft, policy
        self.version = 0
        """Grows by 1 with every step; the draft's own, whatever the policy's is."""
        self._named = own_parameters(draft, policy)
        check_made_for(draft, policy, steps)
        self._params = list(self._named.values())
        self._own_optimizer = optimizer is None
        self.optimizer = optimizer_of(self._params, optimizer, lr)
        self._base_lrs = [float(settings["lr"]) for settings in self.optimizer.param_groups]
        self._loss_settings: dict[str, Any] = {
            "kind": kind, "decay": decay, "temperature": temperature,
            "mask_policy": mask_policy, "renormalize": renormalize,
        }  # fmt: skip
        self._num_steps, self._share, self._warmup_steps = steps, share, warmup_steps
        self._max_grad_norm, self._autocast = max_grad_norm, autocast
        self._controller, self._group = controller, group
        self._captured: Captured | None = None
        self._given = Given()
        self._devices: list[torch.device] | None = None
        self._ranks_checked = False
        self._forget()

    def _forget(self) -> None:
        self._metrics: list[Metrics] = []
        self._sums: list[Tensor] = []
        self._num_sequences = 0
        for parameter in self._params:
            parameter.grad = None

    @property
    def pending(self) -> int:
        """Micro-batches learnt from since the last step."""
        return len(self._metrics)

    @contextmanager
    def capture(
        self, mask: Tensor | Packed | None = None, *, seq_ids_BL: Tensor | None = None
    ) -> Iterator[None]:
        """Read the one forward pass that the policy makes inside, for the next `observe`.

        It works with gradients or without, under autocast and gradient checkpointing, with padded
        or packed `[1, T]` batches, and for calls of the decoder alone or with `logits_to_keep`.

        Args:
            mask: what `observe` would be given. Given here, a copy of its values to the host is
                queued before the pass, as those of the pass's own inputs are, and nothing waits for
                the GPU.
            seq_ids_BL: likewise, with the mask.

        Raises:
            SettingError: not exactly one pass, one that waits for `observe`, or ids and no mask.
            UnsupportedModelError: a model that hooks cannot read.
        """
        if self.policy is None:
            raise SettingError("the trainer has no policy; give it one, or pass captured= yourself")
        if self._captured is not None:
            raise SettingError("a captured pass is waiting; call observe() or discard() first")
        given = Given.before(mask, seq_ids_BL)
        with capturing(self.policy, self.draft.feature_layers, given.copies) as recorder:
            yield
        passes = recorder.captured()
        if len(passes) != 1:
            raise SettingError(
                f"the policy made {len(passes)} forward passes inside capture(); expected one for "
                "each observe() (a compiled model skips hooks: call the uncompiled one)"
            )
        self._captured, self._given = passes[0], given

    def discard(self) -> None:
        """Forget the captured pass and everything observed since the last step."""
        self._captured, self._given = None, Given()
        self._forget()

    def observe(
        self,
        mask: Tensor | Packed | None = None,
        *,
        seq_ids_BL: Tensor | None = None,
        captured: Captured | None = None,
    ) -> None:
        """The draft's forward and backward pass over one micro-batch.

        Places and sequences are chosen on the CPU. It waits for a mask or ids that are given here
        and are on a GPU, and so for all that was queued before; for none that `capture` was given.

        Args:
            mask: bool `[B, L]` by prediction (True where the next token is trained on), or a
                `Packed` of the B * L tokens, as `collate` makes it, on any device. None: that of
                `capture`.
            seq_ids_BL: int64 `[B, L]`, -1 at padding. None: those of the `Packed`, or else a new
                sequence wherever the policy's `position_ids` are 0. Padding is where its
                `attention_mask` is 0.
            captured: a pass of your own in place of the one that `capture` read.

        Raises:
            SettingError: no captured pass, no mask or two, logits that were changed in place since,
                a trainer that is offloaded, or a batch whose sequences are spread over ranks.
            ShapeError: a mask or ids of another shape, or features of another width.
        """
        self._check_here()
        seen, given = (self._captured, self._given) if captured is None else (captured, Given())
        if seen is None:
            raise SettingError("there is no captured pass; call the policy inside capture() first")
        whole = TrainingBatch.of(seen, given.and_after(mask, seq_ids_BL))
        if captured is None:
            self._captured, self._given = None, Given()
        which = self._loss_settings["kind"], self._loss_settings["mask_policy"]
        batch, found = whole.taken(self._share, self._num_sequences, *which)
        self._num_sequences += found
        if batch is None:
            return
        dtype, device = self._autocast, self._params[0].device.type
        autocast = nullcontext() if dtype is None else torch.autocast(device, dtype)
        with torch.enable_grad(), autocast:
            unrolled, head = self._unrolled(batch)
            loss, metrics = loss_of_rows(
                [rows_BLX.flatten(0, 1) for rows_BLX in unrolled],
                head,
                seen.target,
                batch.target_rows_BL,
                batch.input_ids_BL,
                batch.mask_BL,
                denominator=1.0,
                target_ids=self.draft.target_ids,
                seq_ids_BL=batch.seq_ids_BL,
                **self._loss_settings,
            )
        # Only these get a gradient, whatever of the policy the draft computes with.
        torch.autograd.backward(loss, inputs=self._params)
        self._metrics.append(metrics)
        totals = [metrics[f"draft/loss/step_{i}"].numbers()[0] for i in range(self._num_steps)]
        wrong = (~batch.features_BLF.isfinite()).sum(dtype=torch.float64)
        self._sums.append(torch.stack([metrics["draft/loss"].numbers()[1], wrong, *totals]))

    def _unrolled(
        self, batch: TrainingBatch
    ) -> tuple[list[Tensor], Callable[[Tensor], Tensor] | None]:
        """Logits of each step, or what the draft's head makes them of, where it says."""
        draft: Any = self.draft
        in_parts = hasattr(draft, "unroll_states")
        unroll = draft.unroll_states if in_parts else draft.unroll
        seq_ids_BL, device = batch.seq_ids_BL, batch.input_ids_BL.device
        unrolled: list[Tensor] = unroll(
            batch.input_ids_BL,
            batch.features_BLF.to(self._params[0].dtype),
            num_steps=self._num_steps,
            position_ids_BL=batch.position_ids_BL,
            seq_ids_BL=seq_ids_BL if in_parts else upload(seq_ids_BL, device),
        )
        return unrolled, draft.logits if in_parts else None

    def step(self) -> dict[str, Tensor]:
        """One optimizer step over everything observed since the last.

        The gradient is that of the sum over all micro-batches and ranks, divided by the number of
        places of step 0 on all of them.

        Returns:
            The metrics of `draft_loss`, put together, and `draft/grad_norm` (before clipping) and
            `draft/lr`; 0-d tensors.

        Raises:
            SettingError: ranks with different drafts (on all of them); nothing has changed.
            EmptyBatchError: nothing observed, or no place to learn from on any rank.
            NonFiniteError: NaN or infinity in features, loss or gradient, which the text names. The
                draft stays as it was and what was observed is dropped.
        """
        self._check_here()
        seen, device = len(self._metrics), self._params[0].device
        if self._group is not None:  # one that has nothing would leave the others waiting
            seen, checked = least_of([seen, self._ranks_checked], device, self._group)
            if not checked:  # all look, also where one rank alone loaded a state
                check_ranks(self.draft, self.policy, device, self._group)
            self._ranks_checked = True
        if not seen:
            where = "here" if not self._metrics else "on another rank"
            raise EmptyBatchError(
                f"nothing was observed {where} since the last step; call observe() on every rank, "
                "with a mask of False where there is nothing to learn"
            )
        metrics = reduce_metrics(self._metrics, group=self._group)
        sums = self._summed(torch.stack(self._sums).sum(0))
        divisor = sums[0].clamp(min=1).to(self._params[0].dtype)
        for parameter in self._params:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self._summed(parameter.grad).div_(divisor)
        limit = torch.inf if self._max_grad_norm is None else self._max_grad_norm
        norm = nn.utils.clip_grad_norm_(self._params, limit).to(torch.float64)
        trouble = trouble_of(*torch.cat([sums, norm[None]]).tolist(), version=self.version)
        if trouble is not None:
            self._forget()
            raise trouble
        if self.version < self._warmup_steps:
            factor = (self.version + 1) / self._warmup_steps
            for settings, base in zip(self.optimizer.param_groups, self._base_lrs, strict=True):
                settings["lr"] = base * factor
        lr = torch.tensor(float(self.optimizer.param_groups[0]["lr"]), dtype=torch.float64)
        self.optimizer.step()
        self.version += 1
        self._forget()
        return metrics | {"draft/grad_norm": norm, "draft/lr": lr}

    def due(self, stats: Any | None = None) -> bool:
        """Whether the draft should learn now, by the controller; always without one.

        Args:
            stats: `AcceptanceStats` since the last call, for the controller to observe first. None
                where an engine that has the same controller shows it each step.
        """
        if self._controller is None:
            return True
        if stats is not None:
            self._controller.observe(stats)
        return self._controller.should_train()

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The draft's weights under their checkpoint's names, to push as `version`.

        Never `d2t` or `t2d`: engines build them into buffers and CUDA graphs when they load a
        draft. While offloaded these are the copies on the CPU, so that an engine that gave its
        memory away gets its draft back.
        """
        draft: Any = self.draft
        tensors: Mapping[str, Tensor] = self._named
        if hasattr(draft, "checkpoint_tensors"):
            tensors = draft.checkpoint_tensors()
        for name, tensor in tensors.items():
            if name not in VOCABULARY_MAPS:
                yield name, tensor.detach()

    def offload_(self, device: torch.device | str = "cpu") -> None:
        """Move the draft's weights and the optimizer's state off the accelerator.

        Raises:
            SettingError: micro-batches that were observed and not stepped.
        """
        self._check_idle("offload_()")
        if self._devices is None:
            self._devices = [parameter.device for parameter in self._params]
            self._move([torch.device(device)] * len(self._params))

    def onload_(self) -> None:
        """Move them back to where they were."""
        if self._devices is not None:
            self._move(self._devices)
            self._devices = None

    def state_dict(self) -> dict[str, Any]:
        """Draft, optimizer and version, between two steps; goes on with the same numbers.

        Of the draft all parameters, frozen ones too, and the buffers that modules save; not what it
        shares with the policy, if the trainer was given that.

        Raises:
            SettingError: micro-batches that were observed and not stepped.
        """
        self._check_idle("state_dict()")
        ids, own = self.draft.target_ids, own_tensors(self.draft, self.policy)
        return {
            "draft": {name: tensor.detach().clone() for name, tensor in own.items()},
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "optimizer_class": type(self.optimizer).__name__,
            "version": self.version,
            "target_ids": None if ids is None else ids.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`; settings of an optimizer of your own are those of the state.

        Raises:
            CheckpointError: of another draft, vocabulary or class of optimizer, incomplete, or of
                other frozen parameters if the trainer has no policy; nothing has changed.
        """
        own = own_tensors(self.draft, self.policy)
        check_state(state, own, self.draft.target_ids, self.policy)
        load_optimizer(self.optimizer, state["optimizer"], state["optimizer_class"])
        if self._own_optimizer:  # this trainer's rate rules, not that of the run before
            for settings, base in zip(self.optimizer.param_groups, self._base_lrs, strict=True):
                settings["lr"] = base
        self.discard()
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state["draft"][name])
        self.version, self._ranks_checked = int(state["version"]), False

    def _summed(self, tensor: Tensor) -> Tensor:
        if self._group is not None:
            dist.all_reduce(tensor, group=self._group)
        return tensor

    def _check_here(self) -> None:
        if self._devices is not None:
            raise SettingError("the trainer is offloaded; call onload_() first")

    def _check_idle(self, method: str) -> None:
        if self._metrics:
            raise SettingError(
                f"{method} came after {self.pending} observed micro-batches without a step; call "
                "step() or discard() first"
            )

    def _move(self, devices: Sequence[torch.device]) -> None:
        fused = any(settings.get("fused") for settings in self.optimizer.param_groups)
        for parameter, device in zip(self._params, devices, strict=True):
            parameter.data = parameter.data.to(device)
            state = self.optimizer.state.get(parameter, {})
            for key, value in state.items():
                # The step's number stays where it is, unless a fused kernel reads it.
                if isinstance(value, Tensor) and (value.ndim or fused):
                    state[key] = value.to(device)
