"""vLLM's arguments for the engines of these tests: small, on a CPU, and the same for those that are compared."""

from __future__ import annotations

KV_BYTES = 2**30

ENGINE = {
    "dtype": "bfloat16",
    "max_model_len": 192,
    "max_num_seqs": 16,
    "enforce_eager": True,
    "enable_chunked_prefill": False,
    "max_num_batched_tokens": 192,
    "enable_prefix_caching": True,
    "logprobs_mode": "processed_logprobs",
    "kv_cache_memory_bytes": KV_BYTES,
    # vLLM's default of 128 on a CPU is longer than most prompts here: nothing would ever be cached.
    "block_size": 32,
}
