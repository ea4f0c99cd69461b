"""The rollout's numbers in what verl's own trainer logs, through verl's own file logger."""

from __future__ import annotations

import inspect
import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from verl_ascend_rollout.integration import tracking
from verl_ascend_rollout.integration.patches.metrics import PATCHES


class Server:
    """A handle on a server actor that answers at once; `ray.get` is replaced to match."""

    def __init__(self, answers: list[dict[str, Any]]) -> None:
        self.step_metrics = types.SimpleNamespace(remote=lambda: answers.pop(0))


def answer(sleep: float, sync: float) -> dict[str, Any]:
    worker = {"kv_bytes": 1 << 30, "device_used": 3 << 30, "rss": 1, "pid": 7}
    return {"seconds": {"sleep": sleep, "sync": sync}, "memory": [worker], "restarts": 0, "routing": {}}


def patch_trainers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patch what verl's trainers call, and the copies that they have of it, until the end of the test."""
    from verl.trainer.ppo import metric_utils, ray_trainer
    from verl.trainer.ppo.v1 import trainer_base

    original = inspect.unwrap(metric_utils.compute_timing_metrics)
    for module in (metric_utils, ray_trainer, trainer_base):
        monkeypatch.setattr(module, "compute_timing_metrics", original)
    (patch,) = [patch for patch in PATCHES if patch.module == metric_utils.__name__]
    patch.apply(metric_utils)


BATCH = types.SimpleNamespace(batch={"responses": torch.zeros(1, 1), "attention_mask": torch.ones(1, 2)})


def test_the_rollouts_numbers_are_in_what_verls_trainer_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from omegaconf import OmegaConf
    from verl.trainer.ppo.v1 import trainer_base
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    monkeypatch.setattr(tracking, "_replicas", set())
    patch_trainers(monkeypatch)
    first = types.SimpleNamespace(servers=[Server([answer(0.5, 0.25), answer(0.75, 0.25)])])
    second = types.SimpleNamespace(servers=[Server([answer(1.5, 0.125), answer(0.5, 0.5)])])
    replicas = [Hashable(first), Hashable(second)]
    for replica in replicas:
        tracking.follow(replica)
    monkeypatch.setattr("ray.get", lambda calls, timeout: calls)
    monkeypatch.setattr(trainer_base.tq, "kv_clear", lambda keys, partition_id: None)
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", str(tmp_path / "metrics.jsonl"))

    class Trainer(PPOTrainerSync):
        """verl's synchronous trainer with nothing to train: `fit`, `on_step_end` and the logger are verl's own."""

        def __init__(self, config: Any) -> None:
            self.config = config
            self.global_steps, self.steps_per_epoch, self.total_training_steps = 0, 2, 2
            self.checkpoint_manager = types.SimpleNamespace(
                update_weights=lambda steps: {}, sleep_replicas=lambda: None
            )
            self.reward_loop_manager = types.SimpleNamespace(reward_loop_worker_handles=None)

        def step(self, metrics: dict[str, Any], timing_raw: dict[str, float]) -> Any:
            metrics["actor/loss"] = 1.0
            return types.SimpleNamespace(keys=[], partition_id="train")

        def _compute_metrics(self, batch: Any, metrics: dict[str, Any], timing_raw: Any, **kwargs: Any) -> None:
            metrics.update(trainer_base.compute_timing_metrics(batch=BATCH, timing_raw={}))

        def _reissue_inflight_prompts(self) -> None: ...
        def _start_profiling(self) -> None: ...
        def _stop_profiling(self) -> None: ...
        def _shutdown_dump_executor(self) -> None: ...
        def on_train_begin(self) -> None: ...
        def on_step_begin(self) -> None: ...

    config = OmegaConf.create(
        {
            "trainer": {
                "project_name": "p",
                "experiment_name": "e",
                "logger": ["file"],
                "val_before_train": False,
                "total_epochs": 1,
                "save_freq": -1,
                "test_freq": -1,
                "v1": {"trainer_mode": "sync", "sampler": {}},
            },
            "global_profiler": {"steps": None},
            "skip": {},
        }
    )
    Trainer(config).fit(agent_loop_manager=None)

    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == [1, 2]
    assert logged[0]["data"] == {
        "actor/loss": 1.0,
        "timing_s/rollout_sleep": 1.5,  # of the slower replica
        "timing_s/rollout_sync": 0.25,
        "perf/rollout_kv_cache_gb": 2.0,  # of both
        "perf/rollout_device_memory_used_gb": 6.0,
    }
    assert logged[1]["data"]["timing_s/rollout_sleep"] == 0.75
    assert logged[1]["data"]["timing_s/rollout_sync"] == 0.5


def test_the_trainers_of_before_log_them_too_and_verls_own_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """`RayPPOTrainer`: the only one of 0.7.1 and 0.8.0, and there with `trainer.use_v1=false` since."""
    from verl.trainer.ppo import ray_trainer

    monkeypatch.setattr(tracking, "_replicas", set())
    patch_trainers(monkeypatch)
    monkeypatch.setattr("ray.get", lambda calls, timeout: calls)
    replica = Hashable(types.SimpleNamespace(servers=[Server([answer(0.5, 0.25)] * 2)]))
    tracking.follow(replica)
    tracking.follow(replica)
    logged = ray_trainer.compute_timing_metrics(batch=BATCH, timing_raw={"rollout_sync": 9.0})
    assert logged["timing_s/rollout_sync"] == 9.0
    assert logged["timing_s/rollout_sleep"] == 0.5


class Hashable:
    """A replica as far as `tracking` looks at it."""

    def __init__(self, replica: Any) -> None:
        self.servers = replica.servers
