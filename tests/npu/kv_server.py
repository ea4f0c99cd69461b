"""A rollout server on an emulated NPU, in every order and under requests:  kv_server.py CHECKPOINT FOLDER

writes FOLDER/found.json.  A wrong token, or a call that does not end, fails here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ray
import rollout_server
from safetensors.torch import load_file

SEEDS = (1, 2)
SECONDS = 200
TOKENS = 6


def main() -> None:
    checkpoint, folder = Path(sys.argv[1]), Path(sys.argv[2])
    ray.init(num_cpus=4, resources={"NPU": 1}, include_dashboard=False)
    try:
        server = rollout_server.start_server(
            checkpoint,
            folder / "events.jsonl",
            {"skip_tokenizer_init": True, "gpu_memory_utilization": 0.02},
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
