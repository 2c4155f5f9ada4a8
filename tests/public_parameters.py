"""What the public functions and classes take, written out: see `public_api.py`."""

PARAMETERS = {
    "miles.precision.check_compatible": "trainer engine_config * modules",
    "miles.precision.convert_": "model rules * dtype ragged",
    "miles.precision.drop_cache": "model",
    "miles.precision.export": "model",
    "miles.precision.fake_quantize": "tensor recipe * role name",
    "miles.precision.grouped_linear": (
        "x weight ends recipe * backend quantized_weight transposed_weight"
    ),
    "miles.precision.high_precision": "model",
    "miles.precision.linear": "x weight recipe * bias backend quantized_weight transposed_weight",
    "miles.precision.load": "model path",
    "miles.precision.quantization_config": "model",
    "miles.precision.quantization_report": "model batch * targets match",
    "miles.precision.quantize": "tensor recipe * role name backend",
    "miles.precision.quantize_pair": "tensor recipe * role name backend",
    "miles.precision.quantized_parameters": "model",
    "miles.precision.recipe_from_dict": "values",
    "miles.precision.save": "model path * max_shard_bytes write",
    "miles.precision.verify_parity": "model path",
    "miles.precision.BlockFP8": "* scale store profile fprop dgrad wgrad",
    "miles.precision.Int4": "* group_size scale_dtype divisor lowest",
    "miles.Packed": "* seq_ids_T mask_T num_seqs group_ids_S positions_T seq_group",
    "miles.Packed.from_padded": "mask_BL group_ids_B * seq_group",
    "miles.Packed.from_cu_seqlens": "cu_seqlens_S1 mask_T group_ids_S * seq_group",
    "miles.Packed.to": "self device",
    "miles.Denominators": "* num_tokens num_seqs num_groups group_tokens_G counted_keep",
    "miles.Denominators.to": "self device",
    "miles.count": "packed * keep_T group",
    "miles.losses.ArgMax": "largest sequence position",
    "miles.losses.Correction": "weights_T keep_T metrics",
    "miles.losses.Correction.only": "keep_T",
    "miles.losses.Correction.split": "self lengths",
    "miles.losses.Correction.to": "self device",
    "miles.losses.CovarianceStatistics": (
        "* mean_advantage mean_logprob threshold tie_limit draw_limit cov_min cov_max seed"
    ),
    "miles.losses.Ess": "total squares count",
    "miles.losses.ExpMean": "total count",
    "miles.losses.LogMeanExp": "largest scaled count",
    "miles.losses.LogprobOutput": "logprobs entropy",
    "miles.losses.Max": "largest",
    "miles.losses.MaxStaleness": "limit",
    "miles.losses.Mean": "total count",
    "miles.losses.Nucleus": "ids_K offsets_T1",
    "miles.losses.OffPolicyNegative": "* delta",
    "miles.losses.Preference": "loss_P margin_P",
    "miles.losses.Reject": "* level statistic low high",
    "miles.losses.Surrogate": "loss_T clipped_low_T clipped_high_T",
    "miles.losses.Weight": "* level mode low high",
    "miles.losses.aggregate": (
        "loss_T packed denominators * mode weights_T keep_T count_rejected constant averaged_over"
    ),
    "miles.losses.cispo": "logprobs_T log_ratio_T advantages_T packed * ratio_min ratio_max",
    "miles.losses.clip_cov": (
        "logprobs_T log_ratio_T advantages_T packed * statistics token_ids_T ratio_min ratio_max"
    ),
    "miles.losses.covariance_statistics": (
        "logprobs_T advantages_T packed * token_ids_T share cov_min cov_max seed group"
    ),
    "miles.losses.discounted_returns": "rewards_T packed * gamma",
    "miles.losses.distill_advantages": (
        "student_logprobs_T teacher_logprobs_T packed * coef base_advantages_T center group"
    ),
    "miles.losses.dpo": (
        "chosen_logprobs_P rejected_logprobs_P ref_chosen_P ref_rejected_P * beta label_smoothing"
    ),
    "miles.losses.dppo": (
        "logprobs_T log_ratio_T advantages_T packed * rollout_logprobs_T kind delta ratio_cap"
    ),
    "miles.losses.dro": "logprobs_T log_ratio_T advantages_T packed * beta",
    "miles.losses.entropy_quantile_mask": "entropy_T packed * share group",
    "miles.losses.gae": "rewards_T values_T packed * gamma lam lam_value",
    "miles.losses.generalized_jsd": "student_logits_TV teacher_logits_TV packed * beta temperature",
    "miles.losses.gmpo": "log_ratio_T advantages_T packed * log_min log_max",
    "miles.losses.group_advantages": (
        "rewards_S group_ids_S * baseline scale ddof eps singleton lengths_S group"
    ),
    "miles.losses.icepop": "old_logprobs_T rollout_logprobs_T packed * low high",
    "miles.losses.importance_weights": (
        "old_logprobs_T rollout_logprobs_T packed * weight reject normalize group advantages_T "
        "versions_T current_version"
    ),
    "miles.losses.interpolate_proximal": (
        "behave_logprobs_T current_logprobs_T packed * versions_T proximal_version current_version"
    ),
    "miles.losses.ipo": "chosen_logprobs_P rejected_logprobs_P ref_chosen_P ref_rejected_P * beta",
    "miles.losses.keep_untruncated": "truncated_S packed",
    "miles.losses.kl_cov": (
        "logprobs_T log_ratio_T advantages_T packed * statistics token_ids_T kl_coef"
    ),
    "miles.losses.kl_penalty": "logprobs_T ref_logprobs_T packed * value grad",
    "miles.losses.length_adaptive_lambda": "packed_or_lengths * alpha",
    "miles.losses.linear_logprobs": (
        "hidden_TD weight_VD targets_T * temperature bias softcap entropy keep vocab_group backend"
    ),
    "miles.losses.log_ratio": "new_T old_T packed * level",
    "miles.losses.masked_is": "old_logprobs_T rollout_logprobs_T packed * low high level",
    "miles.losses.mean_over": "values_T mask_T",
    "miles.losses.mismatch_metrics": (
        "train_logprobs_T rollout_logprobs_T packed * versions_T position_buckets current_version "
        "age_buckets sample_ids_S"
    ),
    "miles.losses.multi_reward_advantages": (
        "rewards_SR group_ids_S * weights_R how final ddof eps group"
    ),
    "miles.losses.nll": "logprobs_T packed",
    "miles.losses.orpo": "chosen_mean_P rejected_mean_P * lam",
    "miles.losses.passk_advantages": "rewards_S group_ids_S * k threshold",
    "miles.losses.policy_loss": (
        "logprobs_T old_logprobs_T advantages_T packed denominators * mode constant ratio_min "
        "ratio_max dual_clip correction count_rejected ref_logprobs_T kl_coef averaged_over "
        "backend"
    ),
    "miles.losses.policy_loss_backend": "logprobs_T * backend",
    "miles.losses.ppo_clip": "log_ratio_T advantages_T * ratio_min ratio_max dual_clip",
    "miles.losses.reduce_metrics": "parts * group",
    "miles.losses.reinforce": "logprobs_T advantages_T packed",
    "miles.losses.sapo": "log_ratio_T advantages_T * tau_pos tau_neg",
    "miles.losses.sequence_logprobs": "logprobs_T packed * mean",
    "miles.losses.simpo": "chosen_mean_P rejected_mean_P * beta gamma",
    "miles.losses.soft_overlong_penalty": "lengths_S * max_length buffer factor",
    "miles.losses.terminal_rewards": "rewards_S packed",
    "miles.losses.token_ids": "packed sequence_ids_S",
    "miles.losses.token_logprobs": "logits_TV targets_T * temperature vocab_group",
    "miles.losses.token_weights": (
        "packed denominators * mode weights_T keep_T count_rejected constant averaged_over"
    ),
    "miles.losses.topk_distillation": (
        "student_logits_TV teacher_logprobs_TK teacher_ids_TK packed * kind tail"
    ),
    "miles.losses.truncated_is": "old_logprobs_T rollout_logprobs_T packed * high",
    "miles.losses.value_loss": "values_T old_values_T returns_T packed * clip",
    "miles.losses.vespo": (
        "logprobs_T log_ratio_T advantages_T packed * k_pos lam_pos k_neg lam_neg log_weights_T"
    ),
    "miles.losses.veto": "threshold",
    "miles.losses.whiten": "values_T mask_T * group ddof eps mean",
    "miles.losses.presets.cispo": (
        "logprobs_T old_logprobs_T advantages_T packed denominators * ratio_min ratio_max "
        "correction count_rejected averaged_over"
    ),
    "miles.losses.presets.dapo": (
        "logprobs_T old_logprobs_T advantages_T packed denominators * ratio_min ratio_max "
        "correction count_rejected averaged_over"
    ),
    "miles.losses.presets.decoupled_ppo": (
        "logprobs_T proximal_logprobs_T advantages_T packed denominators * correction "
        "count_rejected ratio_min ratio_max averaged_over"
    ),
    "miles.losses.presets.dr_grpo": (
        "logprobs_T old_logprobs_T advantages_T packed denominators * max_tokens ratio_min "
        "ratio_max correction count_rejected averaged_over"
    ),
    "miles.losses.presets.gmpo": (
        "logprobs_T old_logprobs_T advantages_T packed denominators * log_min log_max correction "
        "count_rejected averaged_over"
    ),
    "miles.losses.presets.grpo": (
        "logprobs_T old_logprobs_T advantages_T packed denominators * ratio_min ratio_max "
        "correction count_rejected ref_logprobs_T kl_coef averaged_over"
    ),
    "miles.losses.presets.gspo": (
        "logprobs_T old_logprobs_T advantages_T packed denominators * ratio_min ratio_max "
        "correction count_rejected averaged_over"
    ),
    "miles.losses.presets.gspo_token": (
        "logprobs_T old_logprobs_T advantages_T packed denominators * ratio_min ratio_max "
        "correction count_rejected averaged_over"
    ),
    "miles.losses.presets.on_policy_distillation": (
        "logprobs_T teacher_logprobs_T packed denominators * coef correction count_rejected "
        "averaged_over"
    ),
    "miles.losses.presets.ppo": (
        "logprobs_T old_logprobs_T advantages_T packed denominators * values_T old_values_T "
        "returns_T value_coef value_clip ratio_min ratio_max dual_clip correction count_rejected "
        "averaged_over"
    ),
    "miles.losses.presets.reinforce_plus_plus": (
        "logprobs_T old_logprobs_T advantages_T packed denominators * ratio_min ratio_max "
        "correction count_rejected averaged_over"
    ),
    "miles.losses.presets.reinforce_plus_plus_baseline": (
        "logprobs_T old_logprobs_T advantages_T packed denominators * ratio_min ratio_max "
        "correction count_rejected ref_logprobs_T kl_coef averaged_over"
    ),
    "miles.losses.presets.rloo": (
        "logprobs_T advantages_T packed denominators * correction count_rejected averaged_over"
    ),
    "miles.losses.presets.sapo": (
        "logprobs_T old_logprobs_T advantages_T packed denominators * tau_pos tau_neg correction "
        "count_rejected averaged_over"
    ),
    "miles.losses.presets.vapo": (
        "logprobs_T old_logprobs_T advantages_T packed denominators * right_S right_denominators "
        "nll_coef ratio_min ratio_max correction count_rejected averaged_over"
    ),
    "miles.moe.RoutingTape": "expert_ids * num_experts spans",
    "miles.moe.RoutingTape.cat": "tapes * copy",
    "miles.moe.RoutingReplay": "model * discover",
    "miles.moe.RoutingReplay.record": "self",
    "miles.moe.MegatronReplay": "model * discover",
    "miles.moe.batch_first": "tape batch_size",
    "miles.moe.sequence_first": "tape batch_size",
    "miles.moe.RoutingReplay.prefetch": "self tape",
    "miles.moe.RoutingReplay.replay": "self tape invalid * required_N record_natural",
    "miles.moe.RouterFamily": "* router num_experts topk group_limited score_ndim",
    "miles.moe.equal_sets": "a b",
    "miles.moe.routing_agreement": "a b",
    "miles.moe.share_prefix": "tapes num_rows",
    "miles.moe.storage_bytes": "tapes",
    "miles.moe.RoutingTape.from_sglang": (
        "data * num_layers topk moe_layers num_tokens num_experts"
    ),
    "miles.moe.RoutingTape.save": "self path",
    "miles.moe.RoutingTape.load": "path",
    "miles.moe.RoutingTape.validate": "self * num_tokens request_id",
    "miles.moe.for_sequence_parallel": "tape rank world_size",
    "miles.moe.for_context_parallel": "tape cu_seqlens rank world_size",
    "miles.moe.for_pipeline": "tape layers",
    "miles.rollout.Sample": (
        "tokens loss_mask rollout_logprobs reward status spans routing metadata"
    ),
    "miles.rollout.Sample.append": "self tokens * logprobs loss_mask weight_version",
    "miles.rollout.Span": "start end weight_version",
    "miles.rollout.SamplingParams": "* max_new_tokens temperature stop_token_ids ignore_eos seed",
    "miles.rollout.collate": "samples * group_ids pad_token_id pad_to_multiple_of",
    "miles.rollout.HFEngine": (
        "model * max_batch max_context eos_token_ids record_routing weight_version row_tile "
        "cuda_graphs draft draft_steps controller"
    ),
    "miles.rollout.EngineProcess": "factory args * start_timeout",
    "miles.rollout.RoutingLayout": "* num_layers topk num_experts moe_layers",
    "miles.rollout.RoutingLayout.from_config": "config",
    "miles.rollout.SGLangEngine": (
        "urls * routing sampling return_sampling_mask vocab_size pause_mode api_key admin_api_key "
        "max_in_flight retries backoff timeout request_timeout abort_timeout recheck_seconds "
        "assume_version"
    ),
    "miles.rollout.SGLangEngine.readmit": "self url",
    "miles.rollout.SGLangEngine.refresh": "self",
    "miles.rollout.SGLangServer": (
        "model_path * args host port env cwd python module log on_line start_timeout stop_timeout "
        "api_key"
    ),
    "miles.rollout.RolloutEngine.generate": "self prompt params * request_id",
    "miles.rollout.RolloutEngine.abort": "self request_ids",
    "miles.rollout.RolloutEngine.pause": "self",
    "miles.rollout.RolloutEngine.resume": "self",
    "miles.sync.InProcessSyncer": "target",
    "miles.sync.SharedMemorySyncer": "address * timeout progress",
    "miles.sync.SharedMemoryReceiver": "target address",
    "miles.sync.CollectiveSyncer": ("group * trainers bucket_bytes timeout device progress"),
    "miles.sync.CollectiveReceiver": "target group * timeout device alias",
    "miles.sync.CudaIpcSyncer": "address * bucket_bytes timeout progress",
    "miles.sync.CudaIpcReceiver": "target address * direct alias",
    "miles.sync.SGLangSyncer": (
        "urls * via bucket_bytes in_place api_key admin_key pause selector verify folder master "
        "backend timeout assume_version trainers progress"
    ),
    "miles.sync.pack_parameters_": "module",
    "miles.sync.DiskSyncer": ("folder * delta full_every keep shard_bytes level trainers progress"),
    "miles.sync.DiskReceiver": "target folder * poll_seconds",
    "miles.sync.encode_delta": "old new * level",
    "miles.sync.apply_delta": "old delta",
    "miles.sync.measure_delta": "old new * level",
    "miles.sync.DeltaReport": "* num_elements num_changed full_bytes delta_bytes",
    "miles.sync.probe": "engine trainer prompts * params version max_mean max_abs max_k3",
    "miles.sync.model_logprobs": "model * temperature",
    "miles.sync.ProbeReport": "* num_tokens mean_abs max_abs k3 worst worst_mean_abs",
    "miles.sync.name_map": "config * source target layers experts megatron sglang",
    "miles.sync.families": "",
    "miles.sync.NameMap": "rules * namings",
    "miles.sync.NameMap.forward": "self tensors * strict",
    "miles.sync.NameMap.backward": "self tensors * strict",
    "miles.sync.NameMap.inverse": "self",
    "miles.sync.NameMap.then": "self other",
    "miles.sync.NameRule": "source target transform",
    "miles.sync.MegatronNames": "* fused_layernorm experts padded_vocab_size",
    "miles.sync.SGLangNames": "* padded_vocab_size fused_shared_experts",
    "miles.sync.SyncReport": (
        "* version num_tensors num_bytes copied_bytes seconds num_buckets phases"
    ),
    "miles.sync.WeightSyncer.push": "self weights * version",
    "miles.sync.WeightTarget.commit_weights": "self tensors * version alias",
    "miles.rollout.speculative.DraftTrainer": (
        "draft policy * lr optimizer kind steps share decay temperature mask_policy "
        "renormalize warmup_steps max_grad_norm autocast controller group"
    ),
    "miles.rollout.speculative.DraftTrainer.capture": "self mask * seq_ids_BL",
    "miles.rollout.speculative.DraftTrainer.observe": "self mask * seq_ids_BL captured",
    "miles.rollout.speculative.DraftController": (
        "cost * max_steps margin exploration halflife initial_acceptance train_share "
        "train_halflife min_rows"
    ),
    "miles.rollout.speculative.CostModel": (
        "* floor per_row per_token knee per_verify draft_floor draft_per_row per_verify_row"
        " per_draft per_draft_row"
    ),
    "miles.rollout.speculative.NgramDraft": "* max_ngram min_ngram answers_per_prompt max_prompts",
    "miles.rollout.speculative.draft_loss": (
        "logits_list target_logits_BLV input_ids_BL mask_BL * denominator kind decay "
        "target_ids temperature seq_ids_BL mask_policy renormalize"
    ),
    "miles.rollout.speculative.mtp_loss": (
        "outputs input_ids_T packed * denominator head_VD scaling temperature"
    ),
    "miles.rollout.speculative.export_draft": "draft folder * dtype",
    "miles.rollout.speculative.load_draft": "folder model",
    "miles.rollout.speculative.simulate": "cost * batches acceptances max_steps margin",
    "miles.rollout.speculative.tempered": "logits_RPV temperatures_R top_k top_p",
    "miles.rollout.speculative.verify_chain": (
        "logits_RKV tokens_RK probs_RKV * temperatures_R uniforms_RU lengths_R top_k top_p check"
    ),
    "miles.rollout.speculative.verify_tree": (
        "logits_RNV tokens_RN parents_RN probs_RNV * temperatures_R uniforms_RU replacement "
        "lengths_R top_k top_p check"
    ),
    "miles.rollout.speculative.EagleDraft.from_target": "model * bias dtype",
    "miles.rollout.speculative.Eagle3Draft.from_target": (
        "model * feature_layers own_head target_ids dtype"
    ),
    "miles.rollout.speculative.MTPDraft.from_target": "model * num_modules dtype",
    "miles.rollout.speculative.StandaloneDraft.from_target": "model draft_model",
    "miles.sync.SGLangWeightCacheSyncer": (
        "url config * socket device api_key admin_key pause prove timeout assume_version"
    ),
}
