"""The public surface, written out: whoever changes it changes this file on purpose."""

import importlib
import inspect

import pytest

ALL = {
    "miles": [
        "Denominators",
        "MilesError",
        "Packed",
        "Sample",
        "__version__",
        "count",
        "errors",
        "losses",
        "moe",
        "pack",
        "rollout",
        "sync",
        "unpack",
    ],
    "miles.losses": [
        "Correction",
        "Max",
        "Mean",
        "Metrics",
        "Reject",
        "Surrogate",
        "Weight",
        "aggregate",
        "group_advantages",
        "importance_weights",
        "kl_penalty",
        "log_ratio",
        "mean_over",
        "mismatch_metrics",
        "ppo_clip",
        "presets",
        "reduce_metrics",
        "token_logprobs",
        "token_weights",
        "truncated_is",
    ],
    "miles.moe": [
        "ROUTER_FAMILIES",
        "RouterFamily",
        "RoutingReplay",
        "RoutingTape",
        "routing_agreement",
    ],
    "miles.rollout": [
        "EngineProcess",
        "HFEngine",
        "RolloutEngine",
        "Sample",
        "SamplingParams",
        "Span",
        "Status",
        "TrainBatch",
        "collate",
    ],
    "miles.sync": [
        "InProcessSyncer",
        "SharedMemoryReceiver",
        "SharedMemorySyncer",
        "SyncReport",
        "WeightSyncer",
        "WeightTarget",
    ],
    "miles.errors": [
        "CheckpointError",
        "DenominatorError",
        "DtypeError",
        "EmptyBatchError",
        "EngineDiedError",
        "EngineError",
        "MilesError",
        "MissingExtraError",
        "MissingLogprobError",
        "NonFiniteError",
        "PromptTooLongError",
        "RewardError",
        "RoutingError",
        "SettingError",
        "ShapeError",
        "StopTokenError",
        "SyncError",
        "UnsupportedModelError",
    ],
}

# Positional parameters, then "*", then those that are keyword-only.
PARAMETERS = {
    "miles.Packed": "* seq_ids_T mask_T num_seqs group_ids_S positions_T seq_group",
    "miles.Packed.from_padded": "mask_BL group_ids_B * seq_group",
    "miles.Packed.from_cu_seqlens": "cu_seqlens_S1 mask_T group_ids_S * seq_group",
    "miles.Packed.to": "self device",
    "miles.Denominators": "* num_tokens num_seqs num_groups group_tokens_G counted_keep",
    "miles.count": "packed * keep_T group",
    "miles.losses.group_advantages": "rewards_S group_ids_S * baseline scale ddof eps singleton",
    "miles.losses.token_logprobs": "logits_TV targets_T * temperature",
    "miles.losses.log_ratio": "new_T old_T packed * level",
    "miles.losses.Weight": "* level mode low high",
    "miles.losses.Reject": "* level statistic low high",
    "miles.losses.Correction": "weights_T keep_T metrics",
    "miles.losses.importance_weights": (
        "old_logprobs_T rollout_logprobs_T packed * weight reject normalize group"
    ),
    "miles.losses.truncated_is": "old_logprobs_T rollout_logprobs_T packed * high",
    "miles.losses.ppo_clip": "log_ratio_T advantages_T * ratio_min ratio_max dual_clip",
    "miles.losses.Surrogate": "loss_T clipped_low_T clipped_high_T",
    "miles.losses.aggregate": (
        "loss_T packed denominators * mode weights_T keep_T count_rejected constant averaged_over"
    ),
    "miles.losses.token_weights": (
        "packed denominators * mode weights_T keep_T count_rejected constant averaged_over"
    ),
    "miles.losses.kl_penalty": "logprobs_T ref_logprobs_T packed * value grad",
    "miles.losses.mismatch_metrics": "train_logprobs_T rollout_logprobs_T packed",
    "miles.losses.presets.grpo": (
        "logprobs_T old_logprobs_T advantages_T packed denominators * ratio_min ratio_max "
        "correction ref_logprobs_T kl_coef averaged_over"
    ),
    "miles.moe.RoutingTape": "expert_ids * num_experts",
    "miles.moe.RoutingTape.cat": "tapes",
    "miles.moe.RoutingReplay": "model",
    "miles.moe.RoutingReplay.record": "self",
    "miles.moe.RoutingReplay.replay": "self tape invalid * required_N",
    "miles.moe.RouterFamily": "* router num_experts topk",
    "miles.moe.routing_agreement": "a b",
    "miles.rollout.Sample": (
        "tokens loss_mask rollout_logprobs reward status spans routing metadata"
    ),
    "miles.rollout.Sample.append": "self tokens * logprobs loss_mask weight_version",
    "miles.rollout.Span": "start end weight_version",
    "miles.rollout.SamplingParams": "* max_new_tokens temperature stop_token_ids ignore_eos seed",
    "miles.rollout.collate": "samples * group_ids pad_token_id pad_to_multiple_of",
    "miles.rollout.HFEngine": (
        "model * max_batch max_context eos_token_ids record_routing weight_version row_tile "
        "cuda_graphs"
    ),
    "miles.rollout.EngineProcess": "factory args * start_timeout",
    "miles.rollout.RolloutEngine.generate": "self prompt params * request_id",
    "miles.rollout.RolloutEngine.abort": "self request_ids",
    "miles.rollout.RolloutEngine.pause": "self",
    "miles.rollout.RolloutEngine.resume": "self",
    "miles.sync.InProcessSyncer": "target",
    "miles.sync.SharedMemorySyncer": "address * timeout",
    "miles.sync.SharedMemoryReceiver": "target address",
    "miles.sync.SyncReport": "* version num_tensors num_bytes copied_bytes seconds",
    "miles.sync.WeightSyncer.push": "self weights * version",
    "miles.sync.WeightTarget.commit_weights": "self tensors * version alias",
}
ENGINES = ["miles.rollout.HFEngine", "miles.rollout.EngineProcess"]


def find(path: str):
    """The object of a dotted path, whose modules are imported on the way."""
    found = importlib.import_module("miles")
    for name in path.split(".")[1:]:
        found = getattr(found, name)
    return found


def parameters(path: str) -> str:
    names, starred = [], False
    for name, parameter in inspect.signature(find(path)).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not starred:
            names, starred = [*names, "*"], True
        names.append(name)
    bound = inspect.ismethod(find(path)) or not inspect.isfunction(find(path))
    assert not bound or "self" not in names
    return " ".join(names)


@pytest.mark.parametrize("module", ALL)
def test_public_names_are_these(module):
    assert sorted(importlib.import_module(module).__all__) == sorted(ALL[module])
    assert all(hasattr(importlib.import_module(module), name) for name in ALL[module])


@pytest.mark.parametrize("path", PARAMETERS)
def test_parameters_are_these(path):
    assert parameters(path) == PARAMETERS[path]


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_take_what_the_protocol_says(engine):
    for method in ("generate", "abort", "pause", "resume"):
        expected = PARAMETERS[f"miles.rollout.RolloutEngine.{method}"]
        assert parameters(f"{engine}.{method}") == expected
        assert inspect.iscoroutinefunction(find(f"{engine}.{method}"))
    assert isinstance(find(engine).weight_version, property)


@pytest.mark.parametrize("syncer", ["InProcessSyncer", "SharedMemorySyncer"])
def test_syncers_take_what_the_protocol_says(syncer):
    expected = PARAMETERS["miles.sync.WeightSyncer.push"]
    assert parameters(f"miles.sync.{syncer}.push") == expected


def test_every_error_is_a_miles_error_and_the_standard_one_it_refines():
    errors = importlib.import_module("miles.errors")
    for name in errors.__all__:
        kind = getattr(errors, name)
        assert issubclass(kind, errors.MilesError) and kind.__doc__
        standard = (ValueError, RuntimeError, TypeError, ImportError)
        assert kind is errors.MilesError or issubclass(kind, standard), name


def documented(module: str):
    for name in ALL[module]:
        thing = getattr(importlib.import_module(module), name)
        if inspect.isfunction(thing) or inspect.isclass(thing) or inspect.ismodule(thing):
            yield name, thing
        for member, value in vars(thing).items() if inspect.isclass(thing) else ():
            function = getattr(value, "__func__", value)
            public = inspect.isfunction(function) or isinstance(value, property)
            if public and not member.startswith("_"):
                yield f"{name}.{member}", function


@pytest.mark.parametrize("module", ALL)
def test_every_public_name_has_a_docstring(module):
    things = dict(documented(module))
    assert things
    for name, thing in things.items():
        text = thing.__doc__ or ""
        assert len(text) > 10 and not text.startswith(f"{name}("), name
