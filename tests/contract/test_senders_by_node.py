"""Who sends weights on which node; and verl's own transport as our adapter uses it: no name left."""

from __future__ import annotations

import asyncio
import os
import threading
import types
from pathlib import Path
from typing import Any

import pytest
import torch

WEIGHTS = [(f"weight.{number}", torch.full((100_000,), number, dtype=torch.float32)) for number in range(6)]


def sender_to(folder: Path) -> Any:
    from verl_ascend_rollout.integration.weight_sender import WatchfulWeightSender

    handle = f"ipc://{folder}/weights.sock"
    return WatchfulWeightSender(zmq_handle=handle, bucket_size_mb=1, use_shm=True, receiver=None, timeout=60)


def test_nothing_has_a_name_once_both_sides_have_it(tmp_path: Path) -> None:
    """What a kill of both sides in the middle of a sync leaves in /dev/shm and in the temporary folder: nothing."""
    from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver

    receiver = BucketedWeightReceiver(f"ipc://{tmp_path}/weights.sock", torch.device("cpu"), use_shm=True)
    came, named = [], []

    def look(weights: Any, is_last: bool) -> None:
        came.extend((name, tensor.clone()) for name, tensor in weights)
        named.append([Path("/dev/shm", receiver.shm.name).exists(), list(tmp_path.iterdir())])

    thread = threading.Thread(target=receiver.receive_weights, args=(look,), daemon=True)
    thread.start()
    asyncio.run(asyncio.wait_for(sender_to(tmp_path).async_send_weights(iter(WEIGHTS)), 60))
    thread.join(60)
    assert [name for name, _ in came] == [name for name, _ in WEIGHTS]
    assert all(torch.equal(one, other) for (_, one), (_, other) in zip(came, WEIGHTS, strict=True))
    # While the first bucket is loaded the sender may not have come to it.
    assert len(named) > 2 and named[1:] == [[False, []]] * (len(named) - 1)


def test_two_nodes_do_not_meet_at_one_socket() -> None:
    from verl_ascend_rollout.integration.weight_sender import verls_handle_on

    verls = "ipc:///tmp/rl-colocate-zmq-01000000-replica-0-rank-0.sock"
    one, other = (verls_handle_on(node * 28, verls) for node in ("ab", "cd"))
    assert one != other
    assert one == "ipc:///tmp/rl-colocate-zmq-01000000-replica-0-rank-0-abababababababababababab.sock"
    # An address has room for 107 bytes.
    assert len(one) < 100


def test_each_node_of_an_engine_is_sent_to_by_its_own_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two trainer ranks on two nodes, one engine of TP 2 over both, by our transport.  Ray and the server are faked."""
    import ray
    from verl.workers.config import RolloutConfig
    from verl.workers.rollout.base import get_rollout_class

    from verl_ascend_rollout.transport.receiver import receive_weights
    from verl_ascend_rollout.transport.rendezvous import on_node

    took: dict[str, list[str]] = {}

    class Server:
        """Its `collective_rpc` lets the worker of each node receive; whatever else is asked does nothing."""

        def __getattr__(self, name: str) -> Any:
            return types.SimpleNamespace(remote=self.receive if name == "collective_rpc" else self.nothing)

        async def nothing(self, *args: Any) -> None:
            return None

        def receive(self, method: str, timeout: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            def work(node: str) -> None:
                found = took.setdefault(node, [])
                name = on_node(kwargs["rendezvous"], node)
                receive_weights(name, lambda pairs: found.extend(name for name, _ in pairs), timeout=30)

            # In threads that start now: the sender blocks this loop until they have come.
            loop = asyncio.get_running_loop()
            return asyncio.gather(*(loop.run_in_executor(None, work, node) for node in nodes))

    nodes = [f"{letter}" * 56 for letter in "ab"]
    monkeypatch.setattr(ray, "get_actor", lambda name: Server())
    monkeypatch.setattr(ray, "wait", lambda references, timeout: ([], references))
    config = RolloutConfig(name="ascend_safe", tensor_model_parallel_size=2)

    def adapter_of(rank: int) -> Any:
        context = types.SimpleNamespace(get_job_id=lambda: f"test{os.getpid()}", get_node_id=lambda: nodes[rank])
        monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
        for name, value in {"RANK": str(rank), "WORLD_SIZE": "2", "RAY_LOCAL_WORLD_SIZE": "1"}.items():
            monkeypatch.setenv(name, value)
        return get_rollout_class("ascend_safe")(config=config, model_config="model", device_mesh=None)

    def send(adapter: Any) -> None:
        asyncio.run(asyncio.wait_for(adapter.update_weights(iter(WEIGHTS)), 60))

    adapters = [adapter_of(0), adapter_of(1)]
    assert adapters[0].zmq_handle.partition("-rank-0-")[2] != adapters[1].zmq_handle.partition("-rank-0-")[2]
    other = threading.Thread(target=send, args=(adapters[1],), daemon=True)
    other.start()
    send(adapters[0])
    other.join(30)
    assert not other.is_alive()
    names = [name for name, _ in WEIGHTS]
    assert took == dict.fromkeys(nodes, names)
