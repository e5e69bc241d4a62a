"""What of sd-scripts' arguments is not carried over: what is about the program, and what is not here."""

from __future__ import annotations

from typing import Any

# about how that program runs, or what ours takes from the base itself
_IDLE = """
    xformers sdpa mem_eff_attn cache_latents cache_latents_to_disk vae_batch_size lowram highvram lowvram
    cache_text_encoder_outputs cache_text_encoder_outputs_to_disk no_half_vae max_data_loader_n_workers
    persistent_data_loader_workers num_cpu_threads_per_process num_processes num_machines gpu_ids multi_gpu
    main_process_port dynamo_backend dynamo_mode dynamo_use_dynamic dynamo_use_fullgraph
    extra_accelerate_launch_args skip_cache_check torch_compile ddp_gradient_as_bucket_view ddp_static_graph
    ddp_timeout logging_dir log_prefix log_with log_tracker_name log_tracker_config log_config wandb_api_key
    wandb_run_name use_wandb console_log_level console_log_file console_log_simple v2 v_parameterization sdxl
    save_model_as network_train_unet_only dim_from_weights save_state save_state_on_train_end
    save_last_n_epochs_state save_last_n_steps_state enable_preview sample_at_first tokenizer_cache_dir
    model_list epoch disable_mmap_load_safetensors no_metadata save_last_n_epochs save_last_n_steps
    training_comment debug_dataset output_config huggingface_path_in_repo huggingface_repo_id
    huggingface_repo_type huggingface_repo_visibility huggingface_token async_upload save_state_to_huggingface
    resume_from_huggingface train_batch_size_auto manual_seed cache_info dataset_repeats
    fused_backward_pass fused_optimizer_groups blockwise_fused_optimizers cpu_offload_checkpointing deepspeed
    zero_stage offload_optimizer_device offload_optimizer_nvme_path offload_param_device offload_param_nvme_path
    zero3_init_flag zero3_save_16bit_model fp16_master_weights_and_gradients metadata_title metadata_license
    metadata_tags metadata_usage_hint metadata_thumbnail metadata_merged_from metadata_trigger_phrase
    metadata_preprocessor metadata_is_negative_embedding validation_seed max_validation_steps initial_epoch
    initial_step skip_until_initial_step save_as_bool mem_eff_save
"""
IDLE = frozenset(_IDLE.split())
SQUARE = "the loss is the mean square"
# what changes the training and is not here, with what to do instead; a value in brackets says nothing
REASONS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "clip_skip": (
        "prompts are read from the text encoder's last layer, as the base was trained: make pictures without clip "
        "skip too",
        (1,),
    ),
    "max_token_length": ("prompts are cut at 77 tokens; --look shows which", (75,)),
    "scale_weight_norms": (
        "nothing limits the norms: raise train.weight_decay or lower the rate, and save often",
        (),
    ),
    "min_timestep": ("all noise levels are trained", (0,)),
    "max_timestep": ("all noise levels are trained", (1000,)),
    "full_fp16": ("the LoRA itself is always trained in fp32", ()),
    "full_bf16": ("the LoRA itself is always trained in fp32", ()),
    "loss_type": (f"{SQUARE}; pictures that mislead are better taken out: see --look", ("l2",)),
    "huber_schedule": (SQUARE, ("snr",)),
    "huber_c": (SQUARE, (0.1,)),
    "huber_scale": (SQUARE, (1.0,)),
    "v_pred_like_loss": (SQUARE, ()),
    "debiased_estimation_loss": ('set train.loss_weighting = "min_snr", which weighs down low noise too', ()),
    "scale_v_pred_loss_like_noise_pred": ('set train.loss_weighting = "min_snr"', ()),
    "noise_offset_type": ("", ("Original", "Multires")),
    "adaptive_noise_scale": ("train.noise_offset is the same for all pictures", ()),
    "noise_offset_random_strength": ("the offset is as strong at every step: set half of it", ()),
    "ip_noise_gamma_random_strength": ("it is as strong at every step: set half of it", ()),
    "resume": ("its states hold what only it can read; lora.start_from goes on from its LoRA file", ()),
    "zero_terminal_snr": ("the base's own noise schedule is trained on", ()),
    "vae": ("pictures are encoded by the base's own VAE", ()),
    "network_train_text_encoder_only": ("the UNet is always trained: set a small train.learning_rate", ()),
    "base_weights": ("bake it into a base first: launch.py --bake", ()),
    "base_weights_multiplier": ("bake it into a base first: launch.py --bake", ()),
    "no_token_padding": ("prompts are padded to 77 tokens, as the base was trained", ()),
    "save_n_epoch_ratio": ("set save.every", ()),
    "dataset_class": ("pictures are read from folders", ()),
    "config_file": ("it is not there to read: put it beside this file, or import it by itself", ()),
}
