#!/usr/bin/env bash
# GRPO on a toy Qwen1.5-MoE: verl's own trainer, Ray, a real vLLM engine and the rollout `ascend_safe`, on two CPU cores.
# What differs between platforms is the business of `--config-name=ascend_safe`; here are the sizes of the job only.
# Anything after the script's name goes to verl as it is, and wins:  run.sh trainer.total_training_steps=3
# Except --no-import-fix: where a folder named `vllm` or `verl` hides the real one, leave it so.
set -euo pipefail

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$HERE/../command_line.sh"

PYTHON="${PYTHON:-python}"
OUT="${OUT:-outputs/grpo_tiny_cpu}" # what the run writes
TOY="${TOY:-$OUT/toy}"              # where the model and the data are; made when missing
SEED="${SEED:-0}"
STEPS="${STEPS:-12}"
DEVICES="${DEVICES:-1}" # of the trainer; the engine is tensor parallel over all of them

# verl takes a machine without an accelerator for a GPU cluster's head node unless it is told.
# The same toy runs on `cuda` or `npu`.
export VERL_PLATFORM="${VERL_PLATFORM:-cpu}"
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" # the model lies on disk: nothing may wait for a hub
export RAY_USAGE_STATS_ENABLED="${RAY_USAGE_STATS_ENABLED:-0}"
export VLLM_NO_USAGE_STATS="${VLLM_NO_USAGE_STATS:-1}"
# Idle workers that Ray starts in advance compete for two cores with those that are needed.
export RAY_enable_worker_prestart="${RAY_enable_worker_prestart:-false}"
export RAY_prestart_worker_first_driver="${RAY_prestart_worker_first_driver:-false}"

check_numbers DEVICES STEPS
OUT="$(make_folder "$OUT")"
# A folder named `vllm` or `verl` here would be taken for the package: the real one goes first.
first="$("$PYTHON" -m verl_ascend_rollout.import_fix)"
eval "$first"
[[ -n "$only_shows" || -f "$TOY/model/config.json" ]] || "$PYTHON" "$HERE/make_tiny.py" "$TOY" --seed "$SEED"
TOY="$(make_folder "$TOY")"
# Also in the job's environment below: what writes it may run on another node, which has not this shell's.
export VERL_FILE_LOGGER_PATH="${VERL_FILE_LOGGER_PATH:-$OUT/metrics.jsonl}"
[[ -z "$only_shows" ]] || export -n VERL_FILE_LOGGER_PATH # its folder would be made

# What is not in every release: hydra refuses a key that verl's configuration does not have.
folder_of() {
    "$PYTHON" -c "from importlib.util import find_spec; print(*find_spec('$1').submodule_search_locations)"
}
CONFIG="$(folder_of verl)/trainer/config"
known=()
if grep -qs '^seed:' "$CONFIG/rollout/rollout.yaml"; then
    known+=(actor_rollout_ref.rollout.seed="$SEED")
fi
if grep -qs '^  v1:' "$CONFIG/ppo_trainer.yaml"; then
    known+=("trainer.v1.sampler.custom_sampler.path='$HERE/sampler.py'"
        trainer.v1.sampler.custom_sampler.name=QuickReplayBuffer)
fi
# On a CPU a device is a slot that Ray is told of.
if [[ "$VERL_PLATFORM" == cpu ]]; then
    known+=(++ray_kwargs.ray_init.num_gpus="$DEVICES")
fi
# A CPU engine that does not look at kv_cache_memory_bytes takes half of the machine, unless this says how many GiB.
if ! grep -qs kv_cache_memory_bytes "$(folder_of vllm)/v1/worker/cpu_worker.py"; then
    known+=("++ray_kwargs.ray_init.runtime_env.env_vars.VLLM_CPU_KVCACHE_SPACE='1'")
fi
# vllm-ascend before 0.23 does not look at it either, and takes its share of the whole device.  In blocks it is heard: of
# 128 tokens on an NPU, which are 64 KiB of this model.
if [[ "$VERL_PLATFORM" == npu ]] &&
    ! grep -qs cache_config.kv_cache_memory_bytes "$(folder_of vllm_ascend)"/worker/worker*.py; then
    known+=(++actor_rollout_ref.rollout.engine_kwargs.vllm.num_gpu_blocks_override=4096)
fi

# 8 prompts x 8 samples a step, two optimizer updates.  The toy learns at a rate that a real model would not survive.
exec "$PYTHON" -m verl.trainer.main_ppo --config-name=ascend_safe ${flags[@]+"${flags[@]}"} \
    rollout=ascend_safe \
    "hydra.run.dir='$OUT/hydra'" \
    algorithm.adv_estimator=grpo \
    "data.train_files='$TOY/train.parquet'" \
    "data.val_files='$TOY/val.parquet'" \
    data.train_batch_size=8 \
    data.max_prompt_length=64 \
    data.max_response_length=16 \
    data.seed="$SEED" \
    data.dataloader_num_workers=0 \
    "actor_rollout_ref.model.path='$TOY/model'" \
    actor_rollout_ref.model.enable_gradient_checkpointing=False \
    actor_rollout_ref.actor.strategy=fsdp2 \
    actor_rollout_ref.actor.optim.lr=3e-3 \
    actor_rollout_ref.actor.ppo_mini_batch_size=4 \
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=$((32 / DEVICES)) \
    actor_rollout_ref.actor.use_kl_loss=False \
    actor_rollout_ref.rollout.n=8 \
    actor_rollout_ref.rollout.tensor_model_parallel_size="$DEVICES" \
    actor_rollout_ref.rollout.max_model_len=128 \
    actor_rollout_ref.rollout.max_num_seqs=64 \
    actor_rollout_ref.rollout.max_num_batched_tokens=1024 \
    actor_rollout_ref.rollout.calculate_log_probs=True \
    actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=$((64 / DEVICES)) \
    actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes=16 \
    actor_rollout_ref.rollout.agent.num_workers=1 \
    ++actor_rollout_ref.rollout.engine_kwargs.vllm.kv_cache_memory_bytes=268435456 \
    "++actor_rollout_ref.rollout.engine_kwargs.ascend_safe.events='$OUT/events.jsonl'" \
    "++ray_kwargs.ray_init.runtime_env.env_vars.VERL_FILE_LOGGER_PATH='$VERL_FILE_LOGGER_PATH'" \
    reward.num_workers=1 \
    "reward.custom_reward_function.path='$HERE/reward.py'" \
    reward.custom_reward_function.name=compute_score \
    ++transfer_queue.backend.SimpleStorage.num_data_storage_units=1 \
    ++ray_kwargs.ray_init.num_cpus=$((8 * DEVICES)) \
    ++ray_kwargs.ray_init.include_dashboard=False \
    trainer.nnodes=1 \
    trainer.n_gpus_per_node="$DEVICES" \
    trainer.total_epochs=1 \
    trainer.total_training_steps="$STEPS" \
    trainer.val_before_train=False \
    trainer.test_freq=-1 \
    trainer.save_freq=-1 \
    trainer.resume_mode=disable \
    "trainer.logger=[console,file]" \
    trainer.project_name=verl_ascend_rollout \
    trainer.experiment_name=grpo_tiny_cpu \
    ${known[@]+"${known[@]}"} \
    "$@"
