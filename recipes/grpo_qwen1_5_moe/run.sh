#!/usr/bin/env bash
# GRPO on Qwen/Qwen1.5-MoE-A2.7B-Chat with gsm8k, FSDP2 (or Megatron) and the rollout `ascend_safe`: one command line for
# NVIDIA GPUs and Ascend NPUs.  What differs between the two is the business of `--config-name=ascend_safe`.
# Not run at full size: see README.md.  Anything after the script's name goes to verl as it is, and wins.
# Except --no-import-fix: where a folder named `vllm` or `verl` hides the real one, leave it so.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/../command_line.sh"

PYTHON="${PYTHON:-python}"
MODEL="${MODEL:-Qwen/Qwen1.5-MoE-A2.7B-Chat}" # a hub name or a folder
DATA="${DATA:-$HOME/data/gsm8k}"              # has train.parquet and test.parquet
TRAIN_FILE="${TRAIN_FILE:-$DATA/train.parquet}"
VAL_FILE="${VAL_FILE:-$DATA/test.parquet}"
NAME="${NAME:-grpo_qwen1_5_moe}"
OUT="${OUT:-outputs/$NAME}" # metrics, lifecycle events, checkpoints
NODES="${NODES:-1}"
DEVICES="${DEVICES:-8}" # GPUs or NPUs a node
TP="${TP:-2}"           # tensor parallel size of each vLLM engine: it divides the attention heads (16 here)
BATCH="${BATCH:-128}"   # prompts a step
SAMPLES="${SAMPLES:-8}" # responses a prompt
MINI_BATCH="${MINI_BATCH:-64}"
MICRO_BATCH="${MICRO_BATCH:-4}" # responses a device
PROMPT_LENGTH="${PROMPT_LENGTH:-512}"
RESPONSE_LENGTH="${RESPONSE_LENGTH:-1024}"
LEARNING_RATE="${LEARNING_RATE:-1e-6}"
EPOCHS="${EPOCHS:-3}"
KV_SHARE="${KV_SHARE:-0.5}" # of a device's memory for the engine: weights and KV cache
R3="${R3:-False}"           # routing replay: the trainer routes each token as the rollout did (docs/routing_replay.md)
TRAINER="${TRAINER:-fsdp2}" # or megatron: with megatron-core and mbridge, on Ascend also MindSpeed
TRAIN_TP="${TRAIN_TP:-$TP}" # Megatron's parallel sizes
TRAIN_EP="${TRAIN_EP:-$DEVICES}"
OFFLOAD="${OFFLOAD:-True}"  # trainer weights and optimizer to host memory while the engine generates

check_numbers NODES DEVICES TP BATCH SAMPLES MINI_BATCH MICRO_BATCH PROMPT_LENGTH RESPONSE_LENGTH EPOCHS TRAIN_TP TRAIN_EP
for file in "$TRAIN_FILE" "$VAL_FILE"; do
    if [[ -z "$only_shows" && ! -f "$file" ]]; then
        echo "run.sh: no data at $file: set DATA to the folder with gsm8k's train.parquet and test.parquet (prepare_gsm8k.py makes them)" >&2
        exit 2
    fi
done
if ((NODES * DEVICES % TP != 0)); then
    echo "run.sh: TP=$TP does not divide the $((NODES * DEVICES)) devices of NODES=$NODES x DEVICES=$DEVICES" >&2
    exit 2
fi

case "$TRAINER" in
    fsdp2)
        trainer=(--config-name=ascend_safe)
        of_trainer=(
            actor_rollout_ref.actor.strategy=fsdp2
            actor_rollout_ref.actor.fsdp_config.param_offload="$OFFLOAD"
            actor_rollout_ref.actor.fsdp_config.optimizer_offload="$OFFLOAD"
            actor_rollout_ref.ref.fsdp_config.param_offload="$OFFLOAD"
        )
        ;;
    megatron) # verl's own primary config for it, which has no `platform`
        trainer=(--config-name=ppo_megatron_trainer)
        of_trainer=(
            actor_rollout_ref.actor.megatron.use_mbridge=True
            actor_rollout_ref.actor.megatron.param_offload="$OFFLOAD"
            actor_rollout_ref.actor.megatron.optimizer_offload="$OFFLOAD"
            actor_rollout_ref.ref.megatron.param_offload="$OFFLOAD"
        )
        for role in actor ref; do
            of_trainer+=(
                actor_rollout_ref."$role".megatron.tensor_model_parallel_size="$TRAIN_TP"
                actor_rollout_ref."$role".megatron.expert_model_parallel_size="$TRAIN_EP"
                actor_rollout_ref."$role".megatron.expert_tensor_parallel_size=1
            )
        done
        ;;
    *)
        echo "run.sh: TRAINER=$TRAINER is not known: say fsdp2 or megatron" >&2
        exit 2
        ;;
esac

OUT="$(make_folder "$OUT")"
# Also in the job's environment below: what writes it may run on another node, which has not this shell's.
export VERL_FILE_LOGGER_PATH="${VERL_FILE_LOGGER_PATH:-$OUT/metrics.jsonl}"
[[ -z "$only_shows" ]] || export -n VERL_FILE_LOGGER_PATH # its folder would be made

# A folder named `vllm` or `verl` here would be taken for the package: the real one goes first.
first="$("$PYTHON" -m verl_ascend_rollout.import_fix)"
eval "$first"

exec "$PYTHON" -m verl.trainer.main_ppo "${trainer[@]}" ${flags[@]+"${flags[@]}"} \
    rollout=ascend_safe \
    "hydra.run.dir='$OUT/hydra'" \
    algorithm.adv_estimator=grpo \
    "data.train_files='$TRAIN_FILE'" \
    "data.val_files='$VAL_FILE'" \
    data.train_batch_size="$BATCH" \
    data.max_prompt_length="$PROMPT_LENGTH" \
    data.max_response_length="$RESPONSE_LENGTH" \
    data.filter_overlong_prompts=True \
    "actor_rollout_ref.model.path='$MODEL'" \
    actor_rollout_ref.model.enable_gradient_checkpointing=True \
    actor_rollout_ref.actor.optim.lr="$LEARNING_RATE" \
    actor_rollout_ref.actor.ppo_mini_batch_size="$MINI_BATCH" \
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu="$MICRO_BATCH" \
    actor_rollout_ref.actor.use_kl_loss=True \
    actor_rollout_ref.actor.kl_loss_coef=0.001 \
    actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu="$MICRO_BATCH" \
    actor_rollout_ref.rollout.n="$SAMPLES" \
    actor_rollout_ref.rollout.tensor_model_parallel_size="$TP" \
    actor_rollout_ref.rollout.gpu_memory_utilization="$KV_SHARE" \
    actor_rollout_ref.rollout.max_model_len="$((PROMPT_LENGTH + RESPONSE_LENGTH))" \
    actor_rollout_ref.rollout.calculate_log_probs=True \
    actor_rollout_ref.rollout.enable_rollout_routing_replay="$R3" \
    actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu="$MICRO_BATCH" \
    "++actor_rollout_ref.rollout.engine_kwargs.ascend_safe.events='$OUT/events.jsonl'" \
    "++ray_kwargs.ray_init.runtime_env.env_vars.VERL_FILE_LOGGER_PATH='$VERL_FILE_LOGGER_PATH'" \
    trainer.nnodes="$NODES" \
    trainer.n_gpus_per_node="$DEVICES" \
    trainer.total_epochs="$EPOCHS" \
    trainer.val_before_train=False \
    trainer.test_freq=5 \
    trainer.save_freq=20 \
    "trainer.default_local_dir='$OUT/checkpoints'" \
    "trainer.logger=[console,file]" \
    trainer.project_name=verl_ascend_rollout \
    trainer.experiment_name="$NAME" \
    "${of_trainer[@]}" \
    "$@"
