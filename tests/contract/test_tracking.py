"""The rollout's numbers in what verl's own trainer logs, through verl's own file logger."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import pytest

from verl_ascend_rollout.server import tracking


class Server:
    """A handle on a server actor that answers at once; `ray.get` is replaced to match."""

    def __init__(self, answers: list[dict[str, Any]]) -> None:
        self.step_metrics = types.SimpleNamespace(remote=lambda: answers.pop(0))


def answer(sleep: float, sync: float) -> dict[str, Any]:
    worker = {"kv_bytes": 1 << 30, "device_used": 3 << 30, "rss": 1, "pid": 7}
    return {"seconds": {"sleep": sleep, "sync": sync}, "memory": [worker]}


def test_the_rollouts_numbers_are_in_what_verls_trainer_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from omegaconf import OmegaConf
    from verl.trainer.ppo.v1 import trainer_base
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    monkeypatch.setattr(tracking, "_replicas", set())
    original = vars(trainer_base.PPOTrainer)["_consume_sync_metrics"]
    monkeypatch.setattr(trainer_base.PPOTrainer, "_consume_sync_metrics", original)  # put back after the test
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

        def step(self, metrics: dict[str, Any], timing_raw: dict[str, float]) -> Any:
            metrics["actor/loss"] = 1.0
            return types.SimpleNamespace(keys=[], partition_id="train")

        def _compute_metrics(self, *args: Any, **kwargs: Any) -> None: ...
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


def test_verls_own_numbers_are_kept_and_win(monkeypatch: pytest.MonkeyPatch) -> None:
    from verl.trainer.ppo.v1 import trainer_base

    monkeypatch.setattr(tracking, "_replicas", set())
    original = vars(trainer_base.PPOTrainer)["_consume_sync_metrics"]
    monkeypatch.setattr(trainer_base.PPOTrainer, "_consume_sync_metrics", original)
    monkeypatch.setattr("ray.get", lambda calls, timeout: calls)
    replica = Hashable(types.SimpleNamespace(servers=[Server([answer(0.5, 0.25)] * 2)]))
    tracking.follow(replica)
    tracking.follow(replica)  # a second time wraps nothing
    trainer = types.SimpleNamespace(_pending_sync_metrics={"timing_s/rollout_sync": 9.0, "sync/changed_ratio": 0.1})
    logged = trainer_base.PPOTrainer._consume_sync_metrics(trainer)
    assert logged["timing_s/rollout_sync"] == 9.0
    assert logged["sync/changed_ratio"] == 0.1
    assert logged["timing_s/rollout_sleep"] == 0.5
    assert trainer._pending_sync_metrics == {}


class Hashable:
    """A replica as far as `tracking` looks at it."""

    def __init__(self, replica: Any) -> None:
        self.servers = replica.servers
