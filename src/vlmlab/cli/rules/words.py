"""Keys that nothing would read: what other tools call ours, or the nearest key that there is."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection

RATE = "recipe.stages.<stage>.train.<part>=1e-3"
STEPS = "recipe.stages.<stage>.steps=100, or budget.max_steps=100"
SAMPLES = "recipe.stages.<stage>.batch_size=32"
PARTS = "recipe.stages.<stage>.accumulate=4"
OURS = {
    RATE: "lr learning_rate base_lr max_lr lr_rate",
    STEPS: "epochs num_epochs max_epochs num_train_epochs n_epochs epoch max_steps num_steps total_steps steps iters "
    "max_iters iterations min_epochs min_steps limit_train_batches",
    SAMPLES: "batch_size bs train_batch_size per_device_train_batch_size per_gpu_train_batch_size global_batch_size "
    "micro_batch_size batch",
    PARTS: "gradient_accumulation_steps accumulate_grad_batches grad_accum grad_accumulation accumulation_steps "
    "accumulate",
    "evaluation.batch_size=64": "per_device_eval_batch_size eval_batch_size test_batch_size val_batch_size",
    "budget.eval_limit=100": "eval_limit limit limit_test_batches limit_val_batches max_eval_samples",
    "trainer.devices=2": "gpus num_gpus n_gpus ngpu num_devices world_size nproc_per_node devices num_processes tpus",
    "trainer.nodes=2": "num_nodes nodes nnodes n_nodes",
    "trainer.accelerator=gpu": "device cuda use_gpu use_cuda accelerator no_cuda cpu gpu",
    "trainer.strategy=fsdp2": "strategy fsdp deepspeed ddp zero distributed",
    "precision=bf16": "bf16 bfloat16 bf16_full_eval",
    "precision=fp16": "fp16 half amp use_amp mixed_precision float16",
    "precision=fp32": "fp32 tf32 float32 dtype torch_dtype",
    "logger=wandb": "wandb use_wandb report_to log_with tensorboard wandb_project wandb_entity tracker",
    "name=<word>": "output_dir out_dir output save_dir run_name experiment exp_name exp experiment_name project_name "
    "default_root_dir log_dir logdir work_dir outdir",
    "seed=1": "random_seed manual_seed data_seed",
    "trainer.workers=4": "num_workers dataloader_num_workers workers n_workers",
    "trainer.threads=4": "threads num_threads",
    "trainer.gradient_clip=1.0": "max_grad_norm grad_clip clip_grad gradient_clip_val gradient_clip clip_grad_norm",
    "trainer.log_every=10": "logging_steps log_every_n_steps log_interval log_steps",
    "trainer.save_every_s=30": "save_steps save_every save_interval checkpoint_every save_strategy "
    "every_n_train_steps checkpoint enable_checkpointing",
    "evaluation.every=50": "eval_steps eval_interval eval_every val_check_interval eval_strategy evaluation_strategy",
    "evaluation.patience=3": "early_stopping early_stopping_patience patience",
    "evaluation.monitor=held_out/loss": "metric_for_best_model monitor",
    "evaluation.mode=max": "greater_is_better",
    "evaluation.load_best=true": "load_best_model_at_end load_best_model",
    "evaluation.save_best=true": "save_total_limit save_top_k",
    "trainer.compile=true": "torch_compile compile",
    "recipe.stages.<stage>.warmup=0.03": "warmup warmup_ratio warmup_steps num_warmup_steps warmup_proportion",
    "recipe.stages.<stage>.weight_decay=0.1": "weight_decay wd",
    "recipe.stages.<stage>.schedule=cosine": "scheduler lr_scheduler lr_scheduler_type schedule lr_schedule",
    "recipe.stages.<stage>.optimizer=adamw": "optimizer optim opt",
    "recipe.stages.<stage>.betas=[0.9,0.999]": "betas adam_beta1 adam_beta2 beta1 beta2",
    "lm=hf lm.path=<folder or id>": "model model_name model_name_or_path llm language_model base_model pretrained "
    "model_path model_id tokenizer",
    "encoder=hf encoder.path=<folder or id>": "vision_tower vision_model image_encoder vision_encoder mm_vision_tower",
    "connector=mlp": "projector mm_projector mm_projector_type projection",
    "data=vqa data.path=<file>": "dataset data_path train_file dataset_name train_data data_dir image_folder "
    "dataset_dir train_path",
    "collate.max_length=1024": "max_length max_seq_length max_seq_len seq_len model_max_length context_length "
    "cutoff_len",
    "adapter=lora": "lora use_lora peft use_peft lora_r lora_rank lora_enable lora_alpha",
    "lm.gradient_checkpointing=true": "gradient_checkpointing use_gradient_checkpointing activation_checkpointing",
    "fresh=true": "overwrite_output_dir overwrite force",
    "the same command again, which goes on with a stopped run": "resume resume_from_checkpoint ckpt_path auto_resume",
    "debug=overfit, or debug=step": "fast_dev_run overfit_batches overfit",
    "debug=profile": "profiler profile",
    "name=<word> logger=wandb logger.project=<project>": "project entity tags",
}
"""What to write here -> words that other tools have for it."""

MEANT = {word: ours for ours, words in OURS.items() for word in words.split()}


def unread(key: str, known: Collection[str]) -> str:
    """Why a key is refused, and what to write instead.

    Args:
        key: its dotted name.
        known: dotted keys that there are.
    """
    last = key.rpartition(".")[2]
    meant = next((MEANT[word] for word in (last, key.partition(".")[0]) if word in MEANT), None)
    roots = {other.partition(".")[0] for other in known}
    if meant is not None and "=" in meant and re.split(r"[.=]", meant)[0] not in roots:  # a key of another command
        here = next((f" (did you mean {word}?)" for word in OURS[meant].split() if word in known), closest(key, known))
        return f"no key {key!r} in the configuration{here}, and nothing would read it; --cfg job shows all there are"
    misspelt = "." in key and difflib.get_close_matches(key, [*known], n=1, cutoff=0.95)
    if meant is not None and not misspelt:
        return f"no key {key!r} in the configuration, and nothing would read it; write {meant}"
    near = closest(key, known)
    return f"no key {key!r} in the configuration{near}, and nothing would read it; --cfg job shows all there are"


def closest(key: str, known: Collection[str]) -> str:
    """`` (did you mean x?)``, or nothing where no key is near."""
    close = difflib.get_close_matches(key, [*known], n=1, cutoff=0.6)
    if not close:  # the right last part in the wrong place
        close = [other for other in known if other.rpartition(".")[2] == key.rpartition(".")[2]][:2]
    return f" (did you mean {' or '.join(close)}?)" if close else ""
