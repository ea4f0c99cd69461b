#!/usr/bin/env bash
# GRPO on Qwen/Qwen3-30B-A3B: the command line of ../grpo_qwen1_5_moe with sizes for this model.  TRAINER=megatron trains
# with Megatron.  Not run at full size: see README.md.
set -euo pipefail

export NAME="${NAME:-grpo_qwen3_30b_a3b}"
export MODEL="${MODEL:-Qwen/Qwen3-30B-A3B}"
export TP="${TP:-4}" # 32 attention heads, 4 of keys and values
export MICRO_BATCH="${MICRO_BATCH:-2}"
export PROMPT_LENGTH="${PROMPT_LENGTH:-1024}"
export RESPONSE_LENGTH="${RESPONSE_LENGTH:-4096}"
export KV_SHARE="${KV_SHARE:-0.6}"

exec "$(dirname "${BASH_SOURCE[0]}")/../grpo_qwen1_5_moe/run.sh" "$@"
