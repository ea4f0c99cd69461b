"""A real vLLM engine with the real vllm-ascend on `npu:0`, as the tests use it, and toy checkpoints to load into it.

The engine runs in this process, so that a test can look at the tensors.  References come from Hugging Face's own model
on the CPU, in bf16.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_ASCEND_ENABLE_NZ", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

# Under verl where the stack has it; the same without verl's transport elsewhere.
EXTENSION = (
    "verl_ascend_rollout.integration.extension.AscendSafeWorkerExtension"
    if importlib.util.find_spec("verl")
    else "verl_ascend_rollout.worker.lifecycle.AscendSafeLifecycle"
)
PROMPTS = [[5, 6, 7, 8, 9], [100, 3, 44], [1] * 20, [11 + 7 * i % 480 for i in range(70)]]
MAX_TOKENS = 8
TOLERANCE = 0.01
"""Largest difference of log-probs from Hugging Face on a CPU, both in bf16.  Two correct implementations differ by the
order of their sums."""

KV_BYTES = 64 << 20

Answer = tuple[list[int], list[float]]


@dataclass(frozen=True)
class Checkpoint:
    """A toy checkpoint on disk, and Hugging Face's model of it."""

    path: Path
    reference: Any

    def tensors(self) -> list[tuple[str, Any]]:
        """Names and tensors, as a trainer would send them."""
        from safetensors.torch import load_file

        return list(load_file(self.path / "model.safetensors").items())

    def gap(self, answers: Sequence[Answer]) -> float:
        """The largest difference of the answers' log-probs from the reference's, given the same tokens."""
        import torch

        worst = 0.0
        for prompt, (tokens, log_probs) in zip(PROMPTS, answers, strict=True):
            with torch.no_grad():
                logits = self.reference(torch.tensor([prompt + tokens])).logits[0].float()
            expected = logits.log_softmax(-1)
            for place, (token, log_prob) in enumerate(zip(tokens, log_probs, strict=True), start=len(prompt) - 1):
                worst = max(worst, abs(expected[place, token].item() - log_prob))
        return worst


@dataclass
class Engine:
    """vLLM's LLM, with our worker extension, as a test uses it."""

    llm: Any

    @property
    def worker(self) -> Any:
        """vllm-ascend's NPUWorker, in this process."""
        core: Any = self.llm.llm_engine.engine_core.engine_core
        return core.model_executor.driver_worker.worker

    @property
    def model(self) -> Any:
        model = self.worker.model_runner.model
        return model.unwrap() if hasattr(model, "unwrap") else model

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """A method of our worker extension on the one worker."""
        return self.llm.collective_rpc(method, args=args, kwargs=kwargs)[0]

    def answers(self) -> list[Answer]:
        """Greedy tokens for each prompt, and their log-probs."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, detokenize=False, ignore_eos=True, logprobs=1)
        outputs = self.llm.generate([{"prompt_token_ids": p} for p in PROMPTS], sampling, use_tqdm=False)
        found = []
        for output in outputs:
            completion = output.outputs[0]
            tokens = list(completion.token_ids)
            steps = zip(completion.logprobs, tokens, strict=True)
            found.append((tokens, [step[token].logprob for step, token in steps]))
        return found


def make_checkpoint(folder: Path, seed: int, **changes: Any) -> Checkpoint:
    """A Qwen1.5-MoE-shaped toy with 60 experts; every tensor random, biases and norms as well."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

    shape: Mapping[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 96,
        "shared_expert_intermediate_size": 128,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        **changes,
    }
    torch.manual_seed(seed)
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**shape))
    randomise(model)
    model.to(torch.bfloat16).save_pretrained(folder)
    return Checkpoint(folder, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval())


def make_qwen3_checkpoint(folder: Path, seed: int) -> Checkpoint:
    """A Qwen3-MoE-shaped toy, whose router vllm-ascend runs inside the experts' layer."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=512,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
            max_position_embeddings=512,
            norm_topk_prob=True,
            tie_word_embeddings=False,
        )
    )
    randomise(model)
    model.to(torch.bfloat16).save_pretrained(folder)
    return Checkpoint(folder, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval())


def randomise(model: Any) -> None:
    """Make every tensor random: a bias of zero or a norm of one would hide that it was not loaded."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)


SETTINGS: Mapping[str, Any] = {
    "dtype": "bfloat16",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 8,
    "skip_tokenizer_init": True,
    "enable_prefix_caching": False,
    "enable_sleep_mode": True,
    "gpu_memory_utilization": 0.02,
    "additional_config": {"weight_nz_mode": 0},
}


def make_llm(path: Path, **changes: Any) -> Any:
    """A vLLM engine on the first NPU."""
    from vllm import LLM

    return LLM(model=str(path), **{**SETTINGS, **changes})
