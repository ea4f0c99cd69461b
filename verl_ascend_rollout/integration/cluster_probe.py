"""What a Ray cluster has: its nodes, their devices, and what is installed on each; printed as one line of JSON.

Run as a process of its own (`python -m verl_ascend_rollout.integration.cluster_probe`), so that the driver's own
connection to Ray, which verl makes later with the job's settings, stays as it is.  What runs on the nodes is sent there
as code: a node without this package must be able to answer.
"""

from __future__ import annotations

import json
import sys
from typing import Any

NODE_SECONDS = 45.0
"""How long a node may take to answer: it starts a Python process, perhaps in a runtime environment of its own."""


def describe_node() -> dict[str, Any]:
    """Return what is installed on this node.  Imports nothing heavy, and nothing of ours at the top."""
    import importlib.metadata
    import importlib.util
    import os
    import shutil
    import sys

    plugins = [entry.value for entry in importlib.metadata.entry_points(group="verl.plugins")]
    answer: dict[str, Any] = {
        "python": sys.executable,
        "plugin": None,
        "versions": {},
        "loaded": any(value.startswith("verl_ascend_rollout") for value in plugins),
        "npu_smi": shutil.which("npu-smi") is not None,
        "environ": {
            name: os.environ[name]
            for name in ("VERL_PLATFORM", "VERL_USE_EXTERNAL_PLUGINS", "VERL_USE_EXTERNAL_MODULES")
            if name in os.environ
        },
    }
    if importlib.util.find_spec("verl_ascend_rollout") is not None:
        import verl_ascend_rollout
        from verl_ascend_rollout.platforms.base import installed_versions
        from verl_ascend_rollout.platforms.detect import detect

        answer["plugin"] = verl_ascend_rollout.__version__
        answer["versions"] = installed_versions()
        # The devices that Ray hands to a task of its own, none, must not hide those of the node.
        hidden = ("VERL_PLATFORM", "CUDA_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
        facts = detect({name: value for name, value in os.environ.items() if name not in hidden})
        answer["facts"] = {"name": facts.name, "soc": facts.soc, "versions": dict(facts.versions)}
    return answer


def look(seconds: float = NODE_SECONDS) -> list[dict[str, Any]]:
    """Ask each living node of the cluster that this process has joined.

    Returns:
        For each node its `address`, its `resources` by name, and `answer` (see `describe_node`) or, where it gave none,
        `error`.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    module = sys.modules[__name__]
    if module.__name__ != "__main__":
        ray.cloudpickle.register_pickle_by_value(module)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    asked = {}
    for node in nodes:
        place = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
        # No resources: a node that is full answers as well.
        task = ray.remote(num_cpus=0, max_retries=0)(describe_node).options(scheduling_strategy=place)
        asked[node["NodeID"]] = task.remote()
    done, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=seconds) if asked else ([], [])
    found = []
    for node in nodes:
        described: dict[str, Any] = {
            "address": node["NodeManagerAddress"],
            "resources": {name: value for name, value in node["Resources"].items() if not name.startswith("node:")},
        }
        reference = asked[node["NodeID"]]
        if reference in done:
            try:
                described["answer"] = ray.get(reference)
            except Exception as error:
                described["error"] = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        else:
            ray.cancel(reference, force=True)
            described["error"] = f"no answer within {seconds:g} s"
        found.append(described)
    return found


def main() -> None:
    """Join the cluster whose address is the first argument, and print what `look` finds."""
    import logging

    import ray

    ray.init(address=sys.argv[1], log_to_driver=False, logging_level=logging.ERROR)
    print(json.dumps(look()), flush=True)


if __name__ == "__main__":
    main()
