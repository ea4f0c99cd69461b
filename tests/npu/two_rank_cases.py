"""Engines on two emulated NPUs, each with worker processes of its own:  two_rank_cases.py CASE FOLDER OUT.json

FOLDER holds the checkpoints model0 and model1.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("FAKE_CANN_DEVICES", "2")
# A function of ours is sent to the workers, to look at what no method shows.
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"

from toy_engine import EXTENSION, MAX_TOKENS, PROMPTS, SETTINGS, Checkpoint, Engine, make_llm


def tensor_parallel(folder: Path, expert_parallel: bool = False) -> dict[str, Any]:
    """Answers after a fresh load, after a free and init, and after three syncs with a sleep before each."""
    old, new = (Checkpoint(folder / f"model{number}", None) for number in (0, 1))
    engine = start(old, expert_parallel)
    found: dict[str, Any] = {"fresh": engine.answers()}
    found["free"] = engine.llm.collective_rpc("free_cache_engine")
    found["init"] = engine.llm.collective_rpc("init_cache_engine")
    found["after init"] = engine.answers()
    for number, checkpoint in enumerate((new, old, new), start=1):
        engine.llm.sleep(level=1)
        engine.llm.wake_up(tags=["weights"])
        engine.llm.collective_rpc("ascend_safe_reload_from_disk", args=(str(checkpoint.path),))
        engine.llm.wake_up(tags=["kv_cache"])
        engine.llm.collective_rpc("ascend_safe_restore_kernel_format")
        found[f"sync {number}"] = engine.answers()
    return found


def expert_parallel(folder: Path) -> dict[str, Any]:
    """The same with the experts spread over both ranks."""
    return tensor_parallel(folder, expert_parallel=True)


def tensor_parallel_fresh(folder: Path, expert_parallel: bool = False) -> dict[str, Any]:
    """What an engine of the same kind answers that was started with the other checkpoint."""
    return {"fresh": start(Checkpoint(folder / "model1", None), expert_parallel).answers()}


def expert_parallel_fresh(folder: Path) -> dict[str, Any]:
    """The same with the experts spread over both ranks."""
    return tensor_parallel_fresh(folder, expert_parallel=True)


def tensor_parallel_records(folder: Path, expert_parallel: bool = False) -> dict[str, Any]:
    """Each answer's tokens and their recorded experts: after a fresh load of model0, and after a sleep and a sync of
    model1."""
    engine = start(Checkpoint(folder / "model0", None), expert_parallel, enable_return_routed_experts=True)
    found = {"fresh": records(engine)}
    engine.llm.sleep(level=1)
    engine.llm.wake_up(tags=["weights"])
    engine.llm.collective_rpc("ascend_safe_reload_from_disk", args=(str(folder / "model1"),))
    engine.llm.wake_up(tags=["kv_cache"])
    engine.llm.collective_rpc("ascend_safe_restore_kernel_format")
    return {**found, "synced": records(engine)}


def expert_parallel_records(folder: Path) -> dict[str, Any]:
    """The same with the experts spread over both ranks."""
    return tensor_parallel_records(folder, expert_parallel=True)


def records(engine: Engine) -> list[tuple[list[int], Any]]:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, detokenize=False, ignore_eos=True)
    outputs = engine.llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], sampling, use_tqdm=False)
    return [
        ([*prompt, *output.outputs[0].token_ids], output.outputs[0].routed_experts.tolist())
        for prompt, output in zip(PROMPTS, outputs, strict=True)
    ]


def data_parallel(folder: Path) -> dict[str, Any]:
    """Answers of both ranks of an engine of DP 2 with the experts spread over them: after a fresh load, and after three
    syncs."""
    return asyncio.run(_data_parallel(folder / "model0", [folder / f"model{number}" for number in (1, 0, 1)]))


def data_parallel_fresh(folder: Path) -> dict[str, Any]:
    """What an engine of the same kind answers that was started with the other checkpoint."""
    return asyncio.run(_data_parallel(folder / "model1", []))


async def _data_parallel(fresh: Path, syncs: Sequence[Path]) -> dict[str, Any]:
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = {**SETTINGS, "worker_extension_cls": EXTENSION, "data_parallel_size": 2, "enable_expert_parallel": True}
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=str(fresh), **arguments))
    sampling = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, detokenize=False, ignore_eos=True, logprobs=1)

    async def answers() -> list[Any]:
        found = []
        for rank in (0, 1):
            for prompt in PROMPTS:
                # One at a time: the shape of a batch decides in which order a kernel adds.
                async for output in engine.generate(
                    {"prompt_token_ids": prompt}, sampling, uuid.uuid4().hex, data_parallel_rank=rank
                ):
                    completion = output.outputs[0]
                tokens = list(completion.token_ids)
                steps = zip(completion.logprobs, tokens, strict=True)
                found.append((tokens, [step[token].logprob for step, token in steps]))
        return found

    kwargs = {"kv_release": "auto", "weight_path": "by_layout", "verify": "always"}
    await engine.collective_rpc("ascend_safe_configure", kwargs=kwargs)
    found = {"fresh": await answers()}
    for number, checkpoint in enumerate(syncs, start=1):
        await engine.collective_rpc("ascend_safe_reload_from_disk", args=(str(checkpoint),))
        found[f"sync {number}"] = await answers()
    engine.shutdown()
    return found


def sleep_level_2(folder: Path) -> dict[str, Any]:
    """What each sleep level makes of the expert ids that vllm-ascend's all-to-all dispatcher keeps (verl#7086)."""
    engine = start(Checkpoint(folder / "model0", None), expert_parallel=True)
    found: dict[str, Any] = {"before": engine.llm.collective_rpc(dispatcher_expert_ids)}
    for level in (1, 2):
        engine.llm.sleep(level=level)
        engine.llm.wake_up(tags=["weights"])
        engine.llm.collective_rpc("ascend_safe_reload_from_disk", args=(str(folder / "model0"),))
        engine.llm.wake_up(tags=["kv_cache"])
        engine.llm.collective_rpc("ascend_safe_restore_kernel_format")
        found[f"level {level}"] = engine.llm.collective_rpc(dispatcher_expert_ids)
    return found


def dispatcher_expert_ids(worker: Any) -> list[int] | None:
    """`expert_ids_per_ep_rank` of the all-to-all dispatcher on this rank; None where there is no such dispatcher."""
    import importlib

    for package in ("fused_moe", "moe"):  # 0.13 and later; 0.11
        try:
            methods = importlib.import_module(f"vllm_ascend.ops.{package}.moe_comm_method")._MoECommMethods
        except ImportError:
            continue
        for method in methods.values():
            ids = getattr(method.token_dispatcher, "expert_ids_per_ep_rank", None)
            if ids is not None:
                return [int(number) for number in ids.cpu()]
    return None


def start(checkpoint: Checkpoint, expert_parallel: bool, **changes: Any) -> Engine:
    engine = Engine(
        make_llm(
            checkpoint.path,
            worker_extension_cls=EXTENSION,
            tensor_parallel_size=2,
            enable_expert_parallel=expert_parallel,
            **changes,
        )
    )
    engine.llm.collective_rpc(
        "ascend_safe_configure", kwargs={"kv_release": "auto", "weight_path": "by_layout", "verify": "always"}
    )
    return engine


CASES = {
    case.__name__: case
    for case in (
        *(tensor_parallel, tensor_parallel_fresh, expert_parallel, expert_parallel_fresh),
        *(tensor_parallel_records, expert_parallel_records),
        *(data_parallel, data_parallel_fresh, sleep_level_2),
    )
}


if __name__ == "__main__":
    case, folder, out = sys.argv[1:]
    Path(out).write_text(json.dumps(CASES[case](Path(folder))))
