"""Ways in which new weights reach a live engine of vllm-ascend, each measured: `reload_paths.py FOLDER`.

FOLDER is what tiny_models.py made.  Real vLLM, vllm-ascend and torch-npu on the stand-in CANN, in one process.  Printed
for each case: the largest |log-probability difference| from Hugging Face on the CPU over the generated tokens, or the
error.  The cases run in that order on one engine, and what a case breaks stays broken for the next.  A case that fails
or is wrong is a finding about that release's stock code; only a fresh load that is off by more than 0.01 gives exit
code 1.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# One process, so that the model can be reached; no FRACTAL_NZ weights, which no stock reload path survives.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_ASCEND_ENABLE_NZ", "0")
os.environ.setdefault("VLLM_USE_V1", "1")

import torch
from fake_npu.stack_label import label
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams

PROMPTS = ([5, 6, 7, 8, 9], [100, 3, 44], [1] * 20)
NEW_TOKENS = 12
LARGEST_GAP = 0.01

Generated = list[tuple[list[int], list[float]]]
"""For each prompt the new token ids and their log-probabilities."""


def start(checkpoint: Path) -> LLM:
    """An eager engine in bf16 with sleep mode, on 2 % of the emulated memory."""
    return LLM(
        model=str(checkpoint),
        dtype="bfloat16",
        enforce_eager=True,
        gpu_memory_utilization=0.02,
        max_model_len=256,
        max_num_seqs=8,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        enable_sleep_mode=True,
        additional_config={"weight_nz_mode": 0},
    )


def generate(llm: LLM) -> Generated:
    """Greedy tokens for PROMPTS."""
    sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, detokenize=False, ignore_eos=True, logprobs=1)
    prompts: Any = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    results = []
    for request in llm.generate(prompts, sampling, use_tqdm=False):
        output = request.outputs[0]
        tokens = list(output.token_ids)
        assert output.logprobs is not None
        results.append((tokens, [at[token].logprob for at, token in zip(output.logprobs, tokens, strict=True)]))
    return results


def gap(reference: torch.nn.Module, generated: Generated) -> float:
    """The largest absolute log-probability difference, over all generated tokens."""
    worst = 0.0
    for prompt, (tokens, found) in zip(PROMPTS, generated, strict=True):
        with torch.no_grad():
            logits = reference(torch.tensor([prompt + tokens])).logits[0]
        wanted = logits.float().log_softmax(-1)[len(prompt) - 1 : -1]
        for row, token, value in zip(wanted, tokens, found, strict=True):
            worst = max(worst, abs(row[token].item() - value))
    return worst


def worker_of(llm: LLM) -> Any:
    """vllm-ascend's NPUWorker, which is in this process."""
    engine: Any = llm.llm_engine
    return engine.engine_core.engine_core.model_executor.driver_worker.worker


def weights(checkpoint: Path) -> Iterator[tuple[str, torch.Tensor]]:
    yield from load_file(checkpoint / "model.safetensors").items()


def untransposed_experts(model: torch.nn.Module, checkpoint: Path) -> None:
    """Give the experts the layout in which they are loaded, load, and let vllm-ascend transpose them again."""
    experts: list[Any] = [module for module in model.modules() if hasattr(module, "w13_weight")]
    for module in experts:
        for name in ("w13_weight", "w2_weight"):
            parameter = getattr(module, name)
            parameter.data = parameter.data.transpose(1, 2).contiguous()
    model.load_weights(weights(checkpoint))
    for module in experts:
        module.quant_method.process_weights_after_loading(module)


def report(case: str, action: Callable[[], None], llm: LLM, reference: torch.nn.Module) -> None:
    """Run one case and print its line."""
    try:
        action()
        print(f"{case}: {gap(reference, generate(llm)):.4f}", flush=True)
    except Exception as error:
        said = (str(error) or "no message").splitlines()[0]
        print(f"{case}: {type(error).__name__}: {said[:160]}", flush=True)


def sleep_and_wake(llm: LLM, level: int, source: Path) -> None:
    """Sleep, wake the weights (level 2: and load them again), then wake the KV cache.  Prints the freed MiB."""
    before = torch.npu.mem_get_info()[0]
    llm.sleep(level=level)
    print(f"sleep {level}: frees {(torch.npu.mem_get_info()[0] - before) >> 20} MiB", flush=True)
    llm.wake_up(tags=["weights"])
    if level == 2:
        reload(llm, source)
    llm.wake_up(tags=["kv_cache"])


def reload(llm: LLM, checkpoint: Path) -> None:
    """vLLM's own `reload_weights`: from an iterator where this release takes one, else from the model's folder."""
    import inspect

    takes = inspect.signature(worker_of(llm).reload_weights).parameters
    if takes:
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights(checkpoint)})
    else:
        llm.collective_rpc("reload_weights")


def main(folder: Path) -> int:
    print(label())
    begun = time.monotonic()
    llm = start(folder / "old")
    print(f"engine up in {time.monotonic() - begun:.0f} s")
    old, new = (AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.bfloat16) for name in ("old", "new"))
    model = worker_of(llm).model_runner.model
    print("parameters on", ", ".join(sorted({str(parameter.device) for parameter in model.parameters()})))
    fresh = gap(old, generate(llm))
    print(f"fresh load: {fresh:.4f}", flush=True)
    report("sleep 1, wake", lambda: sleep_and_wake(llm, 1, folder / "old"), llm, old)
    report("sleep 2, wake, reload_weights", lambda: sleep_and_wake(llm, 2, folder / "old"), llm, old)
    report("new weights by load_weights", lambda: model.load_weights(weights(folder / "new")), llm, new)
    report("new weights, experts by hand", lambda: untransposed_experts(model, folder / "new"), llm, new)
    report("new weights by reload_weights", lambda: reload(llm, folder / "new"), llm, new)
    return 0 if fresh <= LARGEST_GAP else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
