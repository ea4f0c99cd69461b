"""A rollout server of the verl and on the real vLLM that run this, in every order and under requests:

    kv_server.py CHECKPOINT FOLDER

on the platform VERL_PLATFORM (`cpu`, `npu`); writes FOLDER/found.json.  A wrong token, or a call that does not end,
fails here.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import ray
import rollout_server
from safetensors.torch import load_file

from verl_ascend_rollout import plugin
from verl_ascend_rollout.platforms.base import installed_versions

SEEDS = (1, 2)
SECONDS = 200
TOKENS = 6
RESOURCES: dict[str, dict[str, Any]] = {"cpu": {"num_gpus": 1}, "npu": {"resources": {"NPU": 1}}}
ENGINES: dict[str, dict[str, Any]] = {
    "cpu": {"kv_cache_memory_bytes": 2**28, "block_size": 32},
    "npu": {"skip_tokenizer_init": True, "gpu_memory_utilization": 0.02},
}


def main() -> None:
    checkpoint, folder = Path(sys.argv[1]), Path(sys.argv[2])
    platform = os.environ["VERL_PLATFORM"]
    plugin.require_registered()  # as the driver's hydra plug-in does, for a verl without entry points
    ray.init(num_cpus=4, include_dashboard=False, **RESOURCES[platform])
    try:
        server = rollout_server.start_server(
            checkpoint,
            folder / "events.jsonl",
            ENGINES[platform],
            max_model_len=192,
            max_num_seqs=16,
        )

        def weights() -> list[object]:
            return list(load_file(checkpoint / "model.safetensors").items())

        server.sync(weights())
        reference = rollout_server.alone(server, TOKENS, SECONDS)
        orders = []
        for method, arguments, expected in rollout_server.ORDERS:
            server.call(method, *arguments)
            orders.append((method, server.call("explain")["state"], expected))
        found = {
            "versions": dict(installed_versions()),
            "kv_release": server.call("explain")["kv_release"],
            "orders": orders,
            "same after orders": rollout_server.alone(server, TOKENS, SECONDS) == reference,
            "storms": {},
        }
        for seed in SEEDS:
            found["storms"][seed] = rollout_server.storm(
                server, weights, reference, seed=seed, in_flight=64, tokens=TOKENS, rounds=12, seconds=SECONDS
            )
        (folder / "found.json").write_text(json.dumps(found))
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
