"""Ten weight syncs of one engine by one weight path, in the order of a training step, and streams that are no model.

    weight_paths.py WEIGHT_PATH FOLDER

`WEIGHT_PATH` is a value of the option `weight_path`.  Writes FOLDER/found.json after each phase, so that an engine that
hangs leaves what was found before it.  The references are two fresh engines on the two checkpoints: the second of them
is the one that is then synced.  On a GPU the engine has sleep mode and captured graphs, which hold addresses.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from verl_ascend_rollout.platforms.detect import detect
from verl_ascend_rollout.tools import toy_checkpoint
from verl_ascend_rollout.tools.smoke.engine import Engine
from verl_ascend_rollout.tools.toy_model import Geometry
from verl_ascend_rollout.worker.worker_rpc import WorkerError

GEOMETRY = Geometry(
    layers=2,
    hidden=256,
    head_size=64,
    moe_intermediate=128,
    shared_intermediate=256,
    vocabulary=toy_checkpoint.VOCABULARY,
    positions=256,
)
ORDER = (1, 0, 1, 0, 0, 1, 0, 1, 1, 0)
"""Which checkpoint each sync brings; the engine is started with number 0, and ends with it."""

LEVELS = (1, 2)
"""Of sleep, in turn: 1 keeps the weights in host memory, 2 discards them, as verl does before a full sync."""

# Shorter and longer than a block of the KV cache.
PROMPTS = [[5 + (31 * start + 7 * index) % 80 for index in range(size)] for start, size in enumerate((5, 17, 64, 120))]

Tensors = dict[str, torch.Tensor]


def make_checkpoint(folder: Path, seed: int) -> Path:
    """A toy Qwen1.5-MoE in which every tensor is random: a bias of zero would hide that it was not loaded."""
    toy_checkpoint.write(folder, GEOMETRY, seed, 0.05)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: (tensor.float() + 0.2 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
        for name, tensor in sorted(load_file(folder / "model.safetensors").items())
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def malformed(whole: Tensors) -> dict[str, tuple[list[Tensors], str]]:
    """Streams that are not the model: the tensors of each, file by file, and the name that the refusal has to give."""

    def without(name: str) -> list[Tensors]:
        return [{key: tensor for key, tensor in whole.items() if key != name}]

    def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> list[Tensors]:
        return [{**whole, name: change(whole[name].clone()).contiguous()}]

    def spoiled(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda tensor: tensor.view(-1).index_fill(0, torch.tensor([3]), value).view(tensor.shape)

    expert, norm, bias = (
        "model.layers.1.mlp.experts.37.down_proj.weight",
        "model.norm.weight",
        "model.layers.0.self_attn.k_proj.bias",
    )
    gate, unknown = "model.layers.0.mlp.experts.3.gate_proj.weight", "model.layers.0.not_a_parameter.weight"
    return {
        "an expert left out": (without(expert), expert),
        "a bias left out": (without(bias), bias),
        "the head left out": (without("lm_head.weight"), "lm_head.weight"),
        "a name that the model does not have": ([{**whole, unknown: torch.ones(4)}], unknown),
        "a norm too short": (changed(norm, lambda tensor: tensor[:-1]), norm),
        "NaN in an expert": (changed(gate, spoiled(float("nan"))), gate),
        "Inf in a norm": (changed(norm, spoiled(float("inf"))), norm),
        "a norm twice": ([whole, {norm: whole[norm]}], norm),
    }


def arguments(on_gpu: bool) -> dict[str, Any]:
    """vLLM's, for all engines here alike."""
    common: dict[str, Any] = {
        "dtype": "bfloat16",
        "max_model_len": 192,
        "max_num_seqs": 8,
        "seed": 0,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": True,
        "kv_cache_memory_bytes": 256 * 2**20,
        "worker_extension_cls": "kit_worker.KitWorker",
    }
    if not on_gpu:
        return {**common, "enforce_eager": True, "block_size": 32}
    # Graphs of whole decode steps without torch.compile (vLLM 0.24.0, config/vllm.py:1172: such graphs need no
    # compilation), which takes a minute; smoke --graph has both.
    graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4]}
    return {**common, "gpu_memory_utilization": 0.3, "enable_sleep_mode": True, "compilation_config": graphs}


def answers(engine: Engine) -> list[Any]:
    """Greedy tokens with their log-probabilities and the prompt's, one prompt after the other, nothing cached."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0.0, max_tokens=12, ignore_eos=True, detokenize=False, logprobs=0, prompt_logprobs=0
    )
    found = []
    for prompt in PROMPTS:
        engine.forget()
        (output,) = engine.llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        completion = output.outputs[0]
        tokens = list(completion.token_ids)
        log_probs = [step[token].logprob for token, step in zip(tokens, completion.logprobs, strict=True)]
        before = [next(iter(step.values())).logprob for step in output.prompt_logprobs[1:]]
        found.append([tokens, log_probs, before])
    return found


def state(engine: Engine) -> dict[str, tuple[str, int]]:
    (found,) = engine.ask("kit_state")
    return {name: tuple(entry) for name, entry in found.items()}


class Found:
    """What was found so far, on disk after each addition."""

    def __init__(self, file: Path, **first: Any) -> None:
        self.file, self.facts, self.started = file, dict(first), time.monotonic()

    def note(self, **facts: Any) -> None:
        self.facts.update(facts, seconds=round(time.monotonic() - self.started, 1))
        self.file.write_text(json.dumps(self.facts, indent=1), encoding="utf-8")
        print(f"[{self.facts['seconds']:6.1f} s] {', '.join(facts)}", flush=True)


def run(path: str, folder: Path) -> None:
    on_gpu = detect().name == "cuda"
    found = Found(folder / "found.json", path=path, platform=detect().name, sleep_levels=LEVELS if on_gpu else ())
    checkpoints = [make_checkpoint(folder / f"checkpoint{number}", number) for number in (0, 1)]
    engine = Engine(str(checkpoints[1]), arguments(on_gpu))
    fresh = {1: {"answers": answers(engine), "state": state(engine)}}
    found.note(second_engine="answered")
    shut_down(engine)
    del engine
    gc.collect()

    engine = Engine(str(checkpoints[0]), arguments(on_gpu))
    fresh[0] = {"answers": answers(engine), "state": state(engine)}
    again = answers(engine)
    (facts,) = engine.ask("ascend_safe_smoke_facts")
    (configured,) = engine.ask("ascend_safe_configure", kv_release="auto", weight_path=path, verify="always")
    names = ("device", "attention_backend", "moe_backend", "graph_mode", "graphs_captured", "weight_bytes", "kv_bytes")
    found.note(
        engine={
            **{name: facts[name] for name in names},
            "kv_release": configured["kv_release"],
            "runner": configured["model_runner"],
            "weight_path": configured.get("weight_path", path),
        },
        two_calls_alike=again == fresh[0]["answers"],
        checkpoints_differ=fresh[0]["answers"] != fresh[1]["answers"],
        syncs=[],
    )
    addresses = {name: entry[1] for name, entry in fresh[0]["state"].items()}

    def sync(checkpoint: Path) -> None:
        engine.ask("kit_verl_sync" if path == "verl" else "ascend_safe_reload_from_disk", path=str(checkpoint))

    for index, number in enumerate(ORDER):
        step = sleep_and_sync(engine, on_gpu, LEVELS[index % len(LEVELS)], lambda n=number: sync(checkpoints[n]))
        if "error" not in step:
            now = state(engine)
            step["different"] = differing(now, fresh[number]["state"])
            step["moved"] = [name for name, at in addresses.items() if now.get(name, ("", 0))[1] != at]
            step["same_answers"] = answers(engine) == fresh[number]["answers"]
        found.note(syncs=[*found.facts["syncs"], {"checkpoint": number, **step}])
        if "error" in step:
            break

    whole = load_file(checkpoints[0] / "model.safetensors")
    refused: dict[str, dict[str, Any]] = {}
    for case, (files, name) in malformed(whole).items():
        # Each after a whole one: which names a refusal can give after another is the business of other tests.
        sync(checkpoints[0])
        place = folder / "malformed" / case.replace(" ", "-")
        place.mkdir(parents=True)
        for number, tensors in enumerate(files):
            save_file(tensors, place / f"{number}.safetensors", metadata={"format": "pt"})
        try:
            sync(place)
            refused[case] = {"error": None, "named": False}
        except WorkerError as error:
            refused[case] = {"error": str(error)[:600], "named": name in str(error)}
    found.note(malformed=refused)
    step = sleep_and_sync(engine, on_gpu, 1, lambda: sync(checkpoints[0]))
    if "error" not in step:
        step["different"] = differing(state(engine), fresh[0]["state"])
        step["same_answers"] = answers(engine) == fresh[0]["answers"]
    found.note(afterwards=step)
    shut_down(engine)


def sleep_and_sync(engine: Engine, on_gpu: bool, level: int, sync: Callable[[], None]) -> dict[str, Any]:
    """One training step's worth: asleep, weights awake, sync, KV cache awake.

    Returns:
        `freed` bytes (of the device by the driver's count; on a CPU of the KV cache), `seconds` of the sync, or the
        `error` that it raised.
    """
    step: dict[str, Any] = {}
    if on_gpu:
        (awake,) = engine.ask("ascend_safe_memory")
        engine.llm.sleep(level=level)
        (asleep,) = engine.ask("ascend_safe_memory")
        step.update(level=level, freed=awake["device_used"] - asleep["device_used"])
        engine.llm.wake_up(tags=["weights"])
    else:
        (change,) = engine.ask("free_cache_engine")
        step.update(freed=change["bytes_before"] - change["bytes_after"])
    started = time.perf_counter()
    try:
        sync()
    except WorkerError as error:
        step["error"] = str(error)[:600]
    step["seconds"] = round(time.perf_counter() - started, 4)
    if on_gpu:
        engine.llm.wake_up(tags=["kv_cache"])
        engine.ask("ascend_safe_restore_kernel_format")
    else:
        engine.ask("init_cache_engine")
    return step


def differing(now: Mapping[str, tuple[str, int]], fresh: Mapping[str, tuple[str, int]]) -> list[str]:
    """Names of tensors that are not, byte for byte and laid out alike, those of a fresh load."""
    return sorted(name for name in {*now, *fresh} if now.get(name, ("",))[0] != fresh.get(name, ("",))[0])


def shut_down(engine: Engine) -> None:
    """End the engine's process, so that the next one finds the device as the first one did."""
    core = getattr(getattr(engine.llm, "llm_engine", None), "engine_core", None)
    if core is not None:
        core.shutdown()


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]))
