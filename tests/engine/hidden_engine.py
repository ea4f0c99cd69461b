"""vLLM in an installation where a folder hides it; prints as its last line where each process has it from, as JSON.

python hidden_engine.py [--fix] CHECKPOINT              an engine as a script starts it
python hidden_engine.py --rollout EVENTS CHECKPOINT     the rollout server as verl starts it, with Ray
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

PROMPT = [5, 6, 7, 8, 9]


class Where:
    """The worker extension."""

    def where(self) -> str:
        import vllm

        return str(vllm.__file__)


def engine(checkpoint: str) -> dict[str, Any]:
    import vllm
    from vllm import LLM, SamplingParams

    made = LLM(
        checkpoint,
        worker_extension_cls="hidden_engine.Where",
        dtype="bfloat16",
        max_model_len=64,
        max_num_seqs=4,
        enforce_eager=True,
        kv_cache_memory_bytes=2**26,
    )
    (output,) = made.generate(
        [{"prompt_token_ids": PROMPT}],
        SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True),
        use_tqdm=False,
    )
    return {
        "tokens": list(output.outputs[0].token_ids),
        "here": vllm.__file__,
        "workers": made.collective_rpc("where"),
    }


def rollout(checkpoint: Path, events: str) -> dict[str, Any]:
    import ray
    import verl  # noqa: F401 - which loads our plug-in, as in a job's driver

    sys.path.append(str(Path(__file__).resolve().parent.parent))
    from rollout_server import start_server
    from safetensors.torch import load_file

    @ray.remote(num_cpus=0)
    def where() -> str:
        import vllm

        return str(vllm.__file__)

    ray.init(num_cpus=4, num_gpus=1, include_dashboard=False)
    try:
        # In a process of its own, before anything of a rollout is up.
        workers = [ray.get(where.remote(), timeout=300)]
        server = start_server(
            checkpoint, Path(events), {"kv_cache_memory_bytes": 2**26}, max_model_len=192, max_num_seqs=16
        )
        server.sync(load_file(checkpoint / "model.safetensors").items())
        (memory,) = server.call("memory")
        tokens = server.answers()[0][0]
        import vllm

        told = Path(f"/proc/{memory['pid']}/environ").read_text()
        return {"tokens": tokens, "here": vllm.__file__, "workers": workers, "told": "ASCEND_SAFE_IMPORT_FIRST" in told}
    finally:
        ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fix", action="store_true")
    parser.add_argument("--rollout", metavar="EVENTS")
    parser.add_argument("checkpoint", type=Path)
    arguments = parser.parse_args()
    if arguments.fix:
        from verl_ascend_rollout import import_fix

        import_fix.apply(strict=True)
    found = rollout(arguments.checkpoint, arguments.rollout) if arguments.rollout else engine(str(arguments.checkpoint))
    print(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
