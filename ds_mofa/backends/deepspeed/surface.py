"""The parts of DeepSpeed that this package relies on and that no documentation promises, in one table.

They are DeepSpeed's private names, the methods that are wrapped or overridden here, and what the overriding methods
read of DeepSpeed's optimizers. tests/unit/backends/test_deepspeed_surface.py compares the table with the source of the
DeepSpeed that is installed: after an upgrade it says what has changed, and what that was needed for. It also finds
names that the package uses and the table has not. A row says in which versions DeepSpeed has it, where that is not in all
from versions.OLDEST on.
"""

from typing import Literal, NamedTuple

from ds_mofa.backends.deepspeed.versions import WHOLE, is_older

__all__ = ["ROWS", "Row", "rows_of"]

Use = Literal["wraps", "overrides", "calls", "replaces", "reads", "sets"]

ENGINE = "deepspeed.runtime.engine.DeepSpeedEngine"
CONFIG = "deepspeed.runtime.config.DeepSpeedConfig"
STAGE_1_2 = "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer"
STAGE_3 = "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3"
BF16 = "deepspeed.runtime.bf16_optimizer.BF16_Optimizer"
FUSED = "deepspeed.runtime.fp16.fused_optimizer.FP16_Optimizer"
UNFUSED = "deepspeed.runtime.fp16.unfused_optimizer.FP16_UnfusedOptimizer"
PARTITION = "deepspeed.runtime.zero.partition_parameters"


class Row(NamedTuple):
    """One name.

    Attributes:
        owner: dotted name of the module or class that has it.
        name: what it is called there.
        use: what this package does with it.
        form: of a function its parameters, without annotations; "property"; "attribute", which the owner's methods set
            on themselves or, where the owner is a module, its code asks of any object; or "name", which the module's
            functions look up in it.
        why: what it is needed for.
        since: the first version in which this package counts on it; before, older.py does without.
        until: the first in which it does not any more.
    """

    owner: str
    name: str
    use: Use
    form: str
    why: str
    since: str = ""
    until: str = ""

    def is_expected(self, version: str) -> bool:
        """Whether DeepSpeed of this version must have it."""
        return not (self.since and is_older(self.since, version)) and (not self.until or is_older(self.until, version))


def _rows(owner: str, use: Use, *rows: tuple[str, str, str], since: str = "", until: str = "") -> list[Row]:
    return [Row(owner, name, use, form, why, since, until) for name, form, why in rows]


def _attributes(owner: str, why: str, *names: str, use: Use = "reads", since: str = "", until: str = "") -> list[Row]:
    return [Row(owner, name, use, "attribute", why, since, until) for name in names]


def _replicated(owner: str) -> list[Row]:
    """Both of DeepSpeed's 16-bit wrappers of stage 0."""
    return [
        *_rows(
            owner,
            "overrides",
            ("param_groups", "property", "the matrices' groups come before AdamW's"),
            ("set_lr", "(self, lr)", "likewise"),
            ("get_lr", "(self)", "likewise"),
            ("step", "(self, closure=None)", "sketches are reduced before it, matrices updated after it"),
            ("zero_grad", "(self, set_to_none=True)", "sketches follow what becomes of AdamW's gradients"),
            ("state_dict", "(self)", "the matrices' state is saved with it"),
            ("load_state_dict", "(self, state_dict, load_optimizer_states=True)", "and loaded"),
        ),
        *_rows(owner, "reads", ("loss_scale", "property", "sketches are divided by it")),
        *_rows(
            owner,
            "calls",
            ("_skip_invalid_grad_norm", "(self)", "to skip a step whose sketches hold a NaN or Inf"),
            since=WHOLE,
        ),
        *_rows(
            owner,
            "calls",
            ("refresh_fp32_params", "(self)", "after the step on zero gradients with which it makes its state"),
        ),
        *_attributes(owner, "its parameters, clipping, and a step's outcome", "fp16_groups", "clip_grad", "overflow"),
        *_attributes(owner, "the norm of both parts", "_global_grad_norm", use="sets"),
    ]


ROWS: tuple[Row, ...] = (
    # ---------------------------------------------------------------- the engine
    *_rows(
        ENGINE,
        "wraps",
        ("_do_sanity_check", "(self)", "refuses a client optimizer before the model is touched"),
        (
            "_configure_optimizer",
            "(self, client_optimizer, model_parameters)",
            "an earlier engine or optimizer gives way; a failed engine leaves no hook",
        ),
        ("_configure_basic_optimizer", "(self, model_parameters)", "builds the optimizer that the JSON names"),
        ("_configure_zero_optimizer", "(self, optimizer)", "gives ZeRO AdamW alone, and its class a mixin"),
        ("_configure_bf16_optimizer", "(self, optimizer)", "likewise in bf16 with fp32 accumulation"),
        ("_configure_fp16_optimizer", "(self, optimizer, low_precision_dtype)", "likewise at stage 0"),
        ("_configure_lr_scheduler", "(self)", "refuses a schedule that goes beyond AdamW's rates"),
        ("_scheduler_from_config", "(self, optimizer)", "gives a scheduler the groups of both parts"),
        ("clip_fp32_gradients", "(self)", "clips both parts by one norm in fp32 at stage 0"),
        ("_backward_prologue", "(self)", "sketches are dropped where a script has dropped AdamW's gradients"),
        ("_backward_epilogue", "(self)", "remembers whether there are any"),
        ("zero_grad", "(self)", "likewise"),
        ("step", "(self, lr_kwargs=None)", "likewise; refuses to step an engine that another has followed"),
        ("destroy", "(self)", "happens once, and takes the hooks on the model away"),
        (
            "save_checkpoint",
            "(self, save_dir, tag=None, client_state={}, save_latest=True, exclude_frozen_parameters=False)",
            "gathers the matrices' state before, writes the manifest after",
        ),
        ("_commit_decoupled_checkpoint", "(self)", "writes the manifest of a save in the background"),
        (
            "load_checkpoint",
            "(self, load_dir, tag=None, load_module_strict=True, load_optimizer_states=True, "
            "load_lr_scheduler_states=True, load_module_only=False, custom_load_fn=None)",
            "verifies the checkpoint before anything of the engine is changed",
        ),
        ("_load_zero_checkpoint", "(self, load_dir, tag, load_optimizer_states=True)", "loads universal checkpoints"),
    ),
    *_rows(
        ENGINE,
        "wraps",
        ("coalesce_grad_reduction", "(self)", "gradients that were reduced at its end are not dropped ones"),
        since="0.19.1",
    ),
    *_rows(
        ENGINE,
        "wraps",
        (
            "load_module_state_dict",
            "(self, checkpoint, strict=True, custom_load_fn=None, fetch_z3_params=False, z3_params_to_fetch=None, "
            "allowed_missing_keys=None)",
            "takes weights that another optimizer has trained, from where it has saved them",
        ),
        (
            "_common_checkpoint_state",
            "(self, module_state_dict, zero_optimizer_state, save_frozen_param)",
            "saves matrices as frozen parameters at stage 1 too",
        ),
        since="0.19.3",
    ),
    *_rows(
        ENGINE,
        "wraps",
        (
            "load_module_state_dict",
            "(self, checkpoint, strict=True, custom_load_fn=None, fetch_z3_params=False)",
            "likewise, and loads matrices as the frozen parameters that they were saved as",
        ),
        until="0.19.3",
    ),
    *_rows(
        ENGINE,
        "wraps",
        ("_get_zero_frozen_param_attributes", "(self, attr_func)", "saves matrices as frozen parameters"),
        until=WHOLE,
    ),
    *_rows(
        ENGINE,
        "wraps",
        (
            "_configure_distributed_model",
            "(self, model)",
            "leaves weights of eight bits alone while it casts and moves the rest",
        ),
        ("_get_param_fragment_func", "(self, param)", "saves weights of eight bits as ordinary ones"),
        since=WHOLE,
    ),
    *_rows(
        ENGINE,
        "calls",
        (
            "_get_ckpt_name",
            "(self, checkpoints_path, tag, mp_placeholder=None, pp_placeholder=None)",
            "the files of a checkpoint, for the manifest",
        ),
        (
            "_get_mp_rank_zero_checkpoint_names",
            "(self, load_dir, tag, mp_rank, dp_world_size, bf16_mode)",
            "likewise, of ZeRO's",
        ),
    ),
    *_rows(
        ENGINE,
        "calls",
        (
            "get_optimizer_configuration",
            "(self, optimizer_parameters, adam_w_mode, allow_legacy_fallback=False)",
            "which of DeepSpeed's and torch's AdamWs the JSON asks for",
        ),
        since="0.19.6",
    ),
    *_attributes(ENGINE, "the JSON as it was read, and what DeepSpeed has made of it", "_config"),
    *_attributes(CONFIG, "the JSON as it was read", "_param_dict"),
    *_rows(
        "deepspeed.runtime.engine",
        "replaces",
        (
            "get_fp32_state_dict_from_zero_checkpoint",
            "name",
            "weights alone are loaded from the tag that was asked for",
        ),
    ),
    *_rows(
        "deepspeed.runtime.engine",
        "replaces",
        ("is_optimized_parameter", "name", "the engine asks it which parameters to save as frozen: matrices too"),
        since=WHOLE,
    ),
    *_rows(
        "deepspeed.runtime.utils",
        "calls",
        ("is_optimized_parameter", "(param)", "all but the matrices"),
        since=WHOLE,
    ),
    *_rows(
        "deepspeed.utils.zero_to_fp32",
        "calls",
        (
            "get_fp32_state_dict_from_zero_checkpoint",
            "(checkpoint_dir, tag=None, exclude_frozen_parameters=False, lazy_mode=False)",
            "with another tag",
        ),
    ),
    *_attributes("deepspeed.runtime.engine", "called on this package's stage 0 in fp32", "get_grads_for_reduction"),
    *_rows("deepspeed.checkpoint.ds_to_universal", "calls", ("_get_optim_files", "(checkpoint_dir)", "reads them too")),
    # ---------------------------------------------------------------- ZeRO stages 1 and 2
    *_rows(
        STAGE_1_2,
        "overrides",
        ("param_groups", "property", "the matrices' groups come before AdamW's"),
        ("set_lr", "(self, lr)", "likewise"),
        ("get_lr", "(self)", "likewise"),
        ("step", "(self, closure=None)", "sketches are reduced before it, matrices updated after it"),
        ("zero_grad", "(self, set_to_none=True)", "sketches follow what becomes of AdamW's gradients"),
        ("has_overflow", "(self, partition_gradients=True)", "sketches with a NaN or Inf are one too"),
        ("scaled_global_norm", "(self, norm_type=2)", "one norm of both parts, by which both are clipped"),
        ("state_dict", "(self)", "the matrices' state is saved with it"),
        (
            "load_state_dict",
            "(self, state_dict_list, load_optimizer_states=True, load_from_fp32_weights=False, checkpoint_folder=None, "
            "load_serial=None, param_shapes=None)",
            "and loaded",
        ),
        ("destroy", "(self)", "gives the model back as it was"),
        ("reduce_ipg_grads", "(self, comm_dtype=None)", "a backward may reach matrices alone"),
    ),
    *_rows(
        STAGE_1_2,
        "overrides",
        ("process_gradients", "(self, param, i)", "gradients add up until the last micro-batch"),
        ("overlapping_partition_gradients_reduce_epilogue", "(self)", "likewise"),
        ("reduce_ready_partitions_and_remove_grads", "(self, param, i)", "large gradients are reduce-scattered"),
        ("clear_backward_seen_flag", "(self)", "every forward calls it: the next backward begins"),
        ("_use_compact_grad_partition_buffer", "(self, group_idx)", "so the step takes a group's flat partition"),
        ("copy_grads_in_partition", "(self, param, group_idx=None)", "its buffer has room for the other groups alone"),
        ("get_grad_norm_direct", "(self, gradients, params, norm_type=2)", "norms without float64 copies"),
        ("set_norm_for_param_grad_in_gpu", "(self, param)", "likewise with offload_optimizer"),
        (
            "reduce_independent_p_g_buckets_and_remove_grads",
            "(self, param, i)",
            "a large gradient goes to the host without a copy where one rank has nothing to reduce",
        ),
        ("async_inplace_copy_grad_to_fp32_buffer_from_gpu", "(self, param)", "gradients go to the host by pieces"),
        ("async_accumulate_grad_in_cpu_via_gpu", "(self, param)", "likewise, and add up there"),
        ("_restore_cpu_offload_grad_to_gpu", "(self, param)", "and come back"),
        since=WHOLE,
    ),
    *_rows(
        STAGE_1_2,
        "calls",
        ("_link_all_hp_params", "(self)", "accessors' views follow masters that are the weights"),
    ),
    *_rows(
        STAGE_1_2,
        "calls",
        ("get_param_id", "(self, param)", "the key of a parameter in the attributes below"),
        ("get_param_comm_dtype", "(self, param)", "whether a gradient is reduced in its own dtype"),
        ("get_param_gradient_attribute", "(self, param)", "where the gradient is"),
        ("clear_grad_attribute", "(self, param)", "a gradient that has been taken is gone"),
        ("is_gradient_accumulation_boundary", "(self)", "whether this micro-batch is the step's last"),
        ("_record_gradient_stream", "(self, tensor, stream)", "its memory is in use there"),
        ("_record_offload_copy", "(self)", "a copy to the host has begun"),
        ("_wait_for_offload_copies", "(self)", "it has ended"),
        since=WHOLE,
    ),
    *_rows(STAGE_1_2, "reads", ("loss_scale", "property", "sketches are divided by it")),
    *_attributes(
        STAGE_1_2,
        "how it was configured, its buckets, groups, partitions and masters, and the outcome of a step",
        "check_grad_overflow",
        "clip_grad",
        "cpu_offload",
        "dp_process_group",
        "ipg_buckets",
        "overflow",
        "parallel_partitioned_bit16_groups",
        "real_dp_process_group",
        "single_partition_of_fp32_groups",
    ),
    *_attributes(
        STAGE_1_2,
        "how it was configured",
        "compute_grad_norm",
        "contiguous_gradients",
        "cpu_offload_pin_memory",
        "device",
        "dtype",
        "gradient_average",
        "low_precision_master_weights_and_grads",
        "master_weights_and_grads_dtype",
        "overlap_comm",
        "partition_gradients",
        "reduce_bucket_size",
        "reduce_scatter",
        "sequence_parallel_size",
        "use_grad_accum_attribute",
        "use_separate_grad_accum",
        "_offload_gradient_safety_enabled",
        since=WHOLE,
    ),
    *_attributes(
        STAGE_1_2,
        "the groups and their partitions",
        "bit16_groups",
        "params_in_partition",
        "partition_size",
        since=WHOLE,
    ),
    *_attributes(
        STAGE_1_2,
        "where gradients are on their way",
        "accumulated_grads_in_cpu",
        "averaged_gradients",
        "grad_position",
        "micro_step_id",
        "norm_for_param_grads",
        "params_already_reduced",
        "reduction_stream",
        "_pending_offload_events",
        since=WHOLE,
    ),
    *_attributes(
        STAGE_1_2,
        "smaller buffers than DeepSpeed's",
        "grads_in_partition",
        "grads_in_partition_offset",
        "temp_grad_buffer_for_gpu_offload",
        use="sets",
        since=WHOLE,
    ),
    *_attributes(
        "deepspeed.runtime.zero.stage_1_and_2",
        "marks zeros that stand for no gradient: no part of a norm",
        "_zero_padding",
        since=WHOLE,
    ),
    *_attributes("deepspeed.runtime.zero.stage_1_and_2", "a gradient that adds up in another dtype", "grad_accum"),
    *_attributes("deepspeed.runtime.zero.stage_1_and_2", "a gradient that waits for others", "ds_grad_is_ready"),
    # ---------------------------------------------------------------- ZeRO stage 3
    *_rows(
        STAGE_3,
        "overrides",
        ("param_groups", "property", "the matrices' groups come before AdamW's"),
        ("set_lr", "(self, lr)", "likewise"),
        ("get_lr", "(self)", "likewise"),
        ("step", "(self, closure=None)", "sketches are reduced before it"),
        ("_post_step", "(self, timer_names)", "matrices are updated where every parameter is partitioned"),
        ("zero_grad", "(self, set_to_none=True)", "sketches follow what becomes of AdamW's gradients"),
        ("has_overflow", "(self, partition_gradients=True)", "sketches with a NaN or Inf are one too"),
        ("_get_norm_groups", "(self)", "one norm of both parts, by which both are clipped"),
        ("invalidate_secondary_tensor", "(self)", "hpZ's copies of the matrices are old as well"),
        ("state_dict", "(self)", "the matrices' state is saved with it"),
        (
            "load_state_dict",
            "(self, state_dict_list, load_optimizer_states=True, load_from_fp32_weights=False, checkpoint_folder=None, "
            "load_serial=None, param_shapes=None)",
            "and loaded",
        ),
        ("destroy", "(self)", "gives the model back as it was"),
        ("get_full_hp_param", "(self, param, optim_state_key=None)", "deepspeed.utils.safe_get_... of a matrix"),
        ("set_full_hp_param", "(self, value, param, optim_state_key=None)", "and safe_set_..."),
        ("get_local_fp32_param", "(self, param, optim_state_key=None)", "likewise, of this rank's part"),
        ("set_local_hp_param", "(self, value, param, optim_state_key=None)", "likewise"),
        ("get_fp32_grad_for_param", "(self, param)", "a matrix has no gradient"),
        ("set_fp32_grad_for_param", "(self, value, param)", "likewise"),
        ("get_local_fp32_grad_for_param", "(self, param)", "likewise"),
        ("set_local_grad_for_param", "(self, value, param)", "likewise"),
    ),
    *_attributes(STAGE_1_2, "the flat weights lose their graph", "bit16_groups_flat", use="sets", until=WHOLE),
    *_rows(
        STAGE_3,
        "overrides",
        ("_overflow_check_and_loss_scale_update", "(self)", "a NaN is looked for in every dtype"),
        until=WHOLE,
    ),
    *_rows(
        STAGE_3,
        "calls",
        ("check_overflow", "(self, partition_gradients=True)", "likewise"),
        until=WHOLE,
    ),
    *_rows(STAGE_3, "reads", ("loss_scale", "property", "sketches are divided by it")),
    *_attributes(STAGE_3, "how it was configured", "clip_grad", "dtype", "offload_param", "offload_param_pin_memory"),
    *_attributes(STAGE_3, "who shares the parameters, and the outcome of a step", "dp_process_group", "overflow"),
    *_attributes("deepspeed.runtime.zero.stage3", "whom the accessors ask", "_z3_optimizer", use="sets"),
    *_attributes(PARTITION, "a weight is whole while a hook looks at it", "all_gather", "partition", use="calls"),
    *_attributes(
        PARTITION,
        "a parameter in partitions: its shape, its shard, and whose",
        "ds_id",
        "ds_numel",
        "ds_persist",
        "ds_process_group",
        "ds_secondary_tensor",
        "ds_shape",
        "ds_status",
        "ds_tensor",
    ),
    *_attributes(
        "deepspeed.runtime.zero.parameter_offload",
        "it gathers a module's weights before its backward, which an embedding's has no use for",
        "pre_bwd_fn",
        use="replaces",
    ),
    # ---------------------------------------------------------------- bf16 with fp32 accumulation, and stage 0
    *_rows(
        BF16,
        "overrides",
        ("param_groups", "property", "the matrices' groups come before AdamW's"),
        ("step", "(self, closure=None)", "sketches are reduced before it, matrices updated after it"),
        ("zero_grad", "(self, set_to_none=True)", "drops sketches with what it has accumulated"),
        ("get_grads_for_norm", "(self, for_clipping=False)", "one norm of both parts, by which both are clipped"),
        ("state_dict", "(self)", "the matrices' state is saved with it"),
        (
            "load_state_dict",
            "(self, state_dict_list, checkpoint_folder=None, load_optimizer_states=True, load_from_fp32_weights=False, "
            "load_serial=None, param_shapes=None)",
            "and loaded",
        ),
        ("destroy", "(self)", "gives the model back as it was"),
    ),
    *_attributes(
        BF16,
        "who shares the parameters, clipping, its norm, and the outcome of a step",
        "dp_process_group",
        "clip_grad",
        "_global_grad_norm",
        "overflow",
        since=WHOLE,  # with stages 0 and 1
    ),
    *_replicated(FUSED),
    *_replicated(UNFUSED),
    *_rows(
        FUSED,
        "overrides",
        ("unscale_and_clip_grads", "(self, grad_groups_flat, total_norm, apply_scale=True)", "one norm of both parts"),
    ),
    *_rows(
        UNFUSED,
        "overrides",
        ("unscale_and_clip_grads", "(self, total_norm, apply_scale=True)", "one norm of both parts"),
    ),
    *_attributes(
        "deepspeed.utils.tensor_fragment",
        "accessors ask a parameter of stages 0 to 2 by these",
        "_hp_mapping",
        "get_full_hp_param",
        "set_full_hp_param",
        "get_full_hp_grad",
        "set_full_hp_grad",
        use="sets",
    ),
)


def rows_of(owner: str, name: str) -> list[Row]:
    """The rows of a name, one for each form that it has had.

    Raises:
        KeyError: it is not in the table.
    """
    found = [row for row in ROWS if (row.owner, row.name) == (owner, name)]
    if not found:
        raise KeyError(f"{owner}.{name}")
    return found
