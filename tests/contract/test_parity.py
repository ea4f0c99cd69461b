"""The policies of trainer and rollout are compared at every step of every trainer, by verl's own figure."""

from __future__ import annotations

import ast
import base64
import inspect
import logging
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh_process import FreshProcesses

from verl_ascend_rollout.integration import parity
from verl_ascend_rollout.integration.patches.metrics import PATCHES

(JUDGE,) = [patch for patch in PATCHES if patch.module == parity.MODULE]

SEQUENCES, PROMPT, RESPONSE = 8, 4, 32


def log_probs(noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the rollout and of the trainer, which differ by `noise`."""
    generator = torch.Generator().manual_seed(0)
    trainer = -4 * torch.rand(SEQUENCES, RESPONSE, generator=generator)
    rollout = (trainer + noise * torch.randn(SEQUENCES, RESPONSE, generator=generator)).clamp(max=0.0)
    return rollout, trainer


def batch(noise: float = 0.003, **changes: Any) -> Any:
    """What verl's trainers hand over: log-probs of both sides, and which tokens count."""
    from verl.protocol import DataProto

    rollout, trainer = log_probs(noise)
    tensors: dict[str, Any] = {
        "rollout_log_probs": rollout,
        "old_log_probs": trainer,
        "response_mask": torch.ones(SEQUENCES, RESPONSE, dtype=torch.long),
        "attention_mask": torch.ones(SEQUENCES, PROMPT + RESPONSE, dtype=torch.long),
        "responses": torch.zeros(SEQUENCES, RESPONSE, dtype=torch.long),
    }
    tensors |= changes
    return DataProto.from_single_dict({name: tensor for name, tensor in tensors.items() if tensor is not None})


@pytest.fixture
def metrics(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """verl's module, patched in this process, and put back after the test."""
    from verl.trainer.ppo.v1 import trainer_base
    from verl.utils.debug import metrics

    monkeypatch.setattr(parity, "_action", "off")
    monkeypatch.setattr(parity, "_blind", [])
    monkeypatch.setattr("verl_ascend_rollout.integration.tracking.follow", lambda replica: None)
    for module in (trainer_base, metrics):
        monkeypatch.setattr(module, parity.FUNCTION, inspect.unwrap(metrics.calculate_debug_metrics))
    JUDGE.apply(metrics)
    yield metrics


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[tuple[int, str]]]:
    """What was logged, as (level, sentence)."""
    caplog.set_level(logging.INFO, logger=parity.logger.name)
    return lambda: [
        (record.levelno, record.getMessage()) for record in caplog.records if record.name == parity.logger.name
    ]


# ------------------------------------------------------------------------------------------------------- what is judged


def test_one_policy_passes_and_another_is_an_error(metrics: Any) -> None:
    parity.watch("error")
    parity.watch("error")
    assert metrics.calculate_debug_metrics(batch())[parity.CORRELATION] > 0.999
    assert metrics.calculate_debug_metrics(data=batch())[parity.CORRELATION] > 0.999
    with pytest.raises(parity.ParityError, match=r"correlate to 0\.\d+, and one policy comes to 0\.9 or more"):
        metrics.calculate_debug_metrics(batch(noise=2.0))


def test_a_warning_lets_the_run_go_on(metrics: Any, said: Callable[[], list[tuple[int, str]]]) -> None:
    parity.watch("warn")
    for _ in range(2):
        assert metrics.calculate_debug_metrics(batch(noise=2.0))[parity.CORRELATION] < parity.FLOOR
    assert [level for level, _ in said()] == [logging.WARNING] * 2
    assert "does not generate with the trainer's policy" in said()[0][1]


def test_the_sentence_says_that_routing_can_be_the_cause_and_how_to_tell(
    metrics: Any, said: Callable[[], list[tuple[int, str]]]
) -> None:
    parity.watch("warn")
    metrics.calculate_debug_metrics(batch(noise=2.0))
    ((_, sentence),) = said()
    for part in ("mixture of experts", "routing", "ascend_safe.verify=always", "enable_rollout_routing_replay", "0.63"):
        assert part in sentence
    assert "\n" not in sentence


def test_off_judges_nothing(metrics: Any, said: Callable[[], list[tuple[int, str]]]) -> None:
    parity.watch("off")
    assert metrics.calculate_debug_metrics(batch(noise=2.0))[parity.CORRELATION] < parity.FLOOR
    assert said() == []


def test_the_last_call_counts(metrics: Any, said: Callable[[], list[tuple[int, str]]]) -> None:
    parity.watch("error")
    parity.watch("warn")
    metrics.calculate_debug_metrics(batch(noise=2.0))
    assert len(said()) == 1
    parity.watch("off")
    metrics.calculate_debug_metrics(batch(noise=2.0))
    assert len(said()) == 1


def at(value: float, noise: float = 0.003) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of which the rollout's first token has this value."""
    rollout, trainer = log_probs(noise)
    rollout[0, 0] = value
    return rollout, trainer


@pytest.mark.parametrize("action", ["warn", "error"])
@pytest.mark.parametrize("side", ["rollout_log_probs", "old_log_probs"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 100.0])
@pytest.mark.parametrize("tokens", [1, SEQUENCES * RESPONSE])
def test_a_log_probability_that_is_none_is_the_loudest_case(
    action: Any,
    side: str,
    value: float,
    tokens: int,
    metrics: Any,
    said: Callable[[], list[tuple[int, str]]],
) -> None:
    parity.watch(action)
    broken = log_probs(0.003)[side == "old_log_probs"].flatten()
    broken[:tokens] = value
    data = batch(**{side: broken.view(SEQUENCES, RESPONSE)})
    sentence = f"{tokens} from the {'trainer' if side == 'old_log_probs' else 'rollout engine'}."
    if action == "error":
        with pytest.raises(parity.ParityError, match=sentence):
            metrics.calculate_debug_metrics(data)
        return
    metrics.calculate_debug_metrics(data)
    ((level, logged),) = said()
    assert level == logging.ERROR and sentence in logged and "\n" not in logged


def test_both_sides_are_named_where_both_are_broken(metrics: Any) -> None:
    parity.watch("error")
    rollout, trainer = log_probs(0.003)
    rollout[0, :3], trainer[1, :2] = float("nan"), float("nan")
    with pytest.raises(parity.ParityError, match=r"Of 256 .*: 3 from the rollout engine and 2 from the trainer"):
        metrics.calculate_debug_metrics(batch(rollout_log_probs=rollout, old_log_probs=trainer))


@pytest.mark.parametrize("mask", ["response_mask", "attention_mask", None])
def test_only_generated_tokens_count(mask: str | None, metrics: Any) -> None:
    parity.watch("error")
    rollout, trainer = log_probs(0.003)
    rollout[0, 0] = trainer[1, 1] = float("nan")
    masks: dict[str, Any] = {"response_mask": None, "attention_mask": None}
    data = batch(rollout_log_probs=rollout, old_log_probs=trainer, **masks)
    if mask is not None:
        length = PROMPT + RESPONSE if mask == "attention_mask" else RESPONSE
        data.batch[mask] = torch.ones(SEQUENCES, length, dtype=torch.long)
        data.batch[mask][0, -RESPONSE] = data.batch[mask][1, 1 - RESPONSE] = 0
        assert metrics.calculate_debug_metrics(data)[parity.CORRELATION] > 0.999
        data.batch[mask][0, -RESPONSE] = 1
    with pytest.raises(parity.ParityError, match="from the rollout engine"):
        metrics.calculate_debug_metrics(data)


def nothing() -> Any:
    return batch(response_mask=torch.zeros(SEQUENCES, RESPONSE, dtype=torch.long))


def nothing_and_nan() -> Any:
    nan = torch.full((SEQUENCES, RESPONSE), float("nan"))
    return batch(
        response_mask=torch.zeros(SEQUENCES, RESPONSE, dtype=torch.long), rollout_log_probs=nan, old_log_probs=nan
    )


def one_token() -> Any:
    mask = torch.zeros(SEQUENCES, RESPONSE, dtype=torch.long)
    mask[3, 3] = 1
    return batch(response_mask=mask)


def certain_rollout() -> Any:
    return batch(rollout_log_probs=torch.zeros(SEQUENCES, RESPONSE))


def converged() -> Any:
    """Every token is certain, to float32's precision: both sides' probabilities are 1."""
    rollout, trainer = (1e-9 * side for side in log_probs(0.003))
    return batch(rollout_log_probs=rollout, old_log_probs=trainer)


@pytest.mark.parametrize("make", [nothing, nothing_and_nan, one_token, certain_rollout, converged])
def test_a_step_without_a_figure_says_nothing(
    make: Callable[[], Any], metrics: Any, said: Callable[[], list[tuple[int, str]]]
) -> None:
    parity.watch("error")
    correlation = metrics.calculate_debug_metrics(make())[parity.CORRELATION]
    assert correlation != correlation
    assert said() == []


def test_a_constant_rollout_that_verl_has_a_figure_for_is_judged_by_it(metrics: Any) -> None:
    parity.watch("error")
    with pytest.raises(parity.ParityError, match=r"correlate to -?0\.000"):
        metrics.calculate_debug_metrics(batch(rollout_log_probs=torch.full((SEQUENCES, RESPONSE), -1.0)))


# --------------------------------------------------------------------------------------------------- a verl that drifts


def test_a_verl_without_the_function_is_said_once(
    metrics: Any, monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[tuple[int, str]]]
) -> None:
    monkeypatch.delattr(metrics, parity.FUNCTION)
    parity.watch("warn")
    parity.watch("warn")
    ((level, sentence),) = said()
    assert level == logging.ERROR
    assert "ascend_safe.parity=warn cannot be kept" in sentence and "has no attribute" in sentence


def test_a_job_that_was_to_stop_at_a_difference_does_not_begin_without_the_function(
    metrics: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(metrics, parity.FUNCTION)
    with pytest.raises(parity.ParityError, match="parity=error cannot be kept"):
        parity.watch("error")


def test_a_process_in_which_the_function_is_not_patched_is_said_once(
    metrics: Any, monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[tuple[int, str]]]
) -> None:
    monkeypatch.setattr(metrics, parity.FUNCTION, inspect.unwrap(metrics.calculate_debug_metrics))
    parity.watch("warn")
    ((level, sentence),) = said()
    assert level == logging.ERROR and "it is not patched" in sentence


def test_a_verl_without_the_module_is_said_once(
    metrics: Any, monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[tuple[int, str]]]
) -> None:
    monkeypatch.setitem(sys.modules, parity.MODULE, None)
    parity.watch("warn")
    assert [level for level, _ in said()] == [logging.ERROR]


@pytest.mark.parametrize("drift", ["metric", "batch"])
def test_a_verl_that_compares_otherwise_is_said_once_or_stops_the_job(
    drift: str, metrics: Any, monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[tuple[int, str]]]
) -> None:
    figures = {parity.CORRELATION if drift == "batch" else "training/other": 0.1}
    monkeypatch.setattr(metrics, parity.FUNCTION, lambda data: figures)
    JUDGE.apply(metrics)
    parity.watch("warn")
    data = batch(old_log_probs=None) if drift == "batch" else batch()
    for _ in range(2):
        assert metrics.calculate_debug_metrics(data) is figures
    assert [level for level, _ in said()] == [logging.ERROR]
    parity.watch("error")
    with pytest.raises(parity.ParityError, match="cannot be kept"):
        metrics.calculate_debug_metrics(data)


# ------------------------------------------------------------------------------------------------------ every trainer


def test_verls_callers_are_those_that_are_run_here() -> None:
    import verl

    root = Path(verl.__file__).parent
    callers = {
        str(file.relative_to(root))
        for file in root.rglob("*.py")
        if parity.FUNCTION in (text := file.read_text(encoding="utf-8"))
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
        and parity.FUNCTION in (getattr(node.func, "id", ""), getattr(node.func, "attr", ""))
    }
    assert callers == {
        "trainer/ppo/v1/trainer_base.py",
        "trainer/ppo/ray_trainer.py",
        "experimental/separation/ray_trainer.py",
    }


def test_copies_taken_before_are_replaced_whoever_took_them(metrics: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = types.ModuleType("my_trainer")
    vars(mine)["compare"] = inspect.unwrap(metrics.calculate_debug_metrics)
    monkeypatch.setitem(sys.modules, "my_trainer", mine)
    monkeypatch.setattr(metrics, parity.FUNCTION, mine.compare)
    JUDGE.apply(metrics)
    parity.watch("error")
    with pytest.raises(parity.ParityError):
        mine.compare(batch(noise=2.0))


def make_replica(kind: str) -> Any:
    """As verl's `LLMServerManager` makes it."""
    from verl.workers.config import RolloutConfig

    from verl_ascend_rollout.integration import pd_replica

    pd = {"disaggregation": {"enabled": True}} if kind == "AscendSafePDReplica" else {}
    options = {"ascend_safe": {"parity": "error"}}
    config = RolloutConfig(name="ascend_safe", tensor_model_parallel_size=1, engine_kwargs=options, **pd)
    return getattr(pd_replica, kind)(0, config, "model config")


def pickled_replica() -> str:
    """As Ray carries it from the rollouter to the trainer."""
    import ray

    return base64.b64encode(ray.cloudpickle.dumps(make_replica("AscendSafeReplica"))).decode()


def trainer_config() -> Any:
    """verl's defaults, and a checkpoint engine and a logger that need nothing."""
    import verl
    from omegaconf import OmegaConf

    defaults = OmegaConf.load(Path(verl.__file__).parent / "trainer" / "config" / "_generated_ppo_trainer.yaml")
    rollout = {"calculate_log_probs": True, "n": 1, "checkpoint_engine": {"backend": "naive"}}
    changes = {
        "trainer": {"logger": ["console"], "val_before_train": False, "balance_batch": False, "device": "cpu"},
        "actor_rollout_ref": {"rollout": rollout},
        "async_training": {"use_trainer_do_validate": False},
    }
    return OmegaConf.merge(defaults, changes)


def without_init(trainer_class: Any, **attributes: Any) -> Any:
    """One of verl's trainers whose worker group is a stand-in: the log-probs that it would compute are there."""
    from verl.protocol import DataProto

    def compute(batch: Any) -> tuple[Any, float]:
        tensors = {"old_log_probs": log_probs(2.0)[1], "entropys": torch.ones(SEQUENCES, RESPONSE)}
        return DataProto.from_single_dict(tensors), 0.0

    trainer = object.__new__(trainer_class)
    vars(trainer).update(config=trainer_config(), metrics={}, timing_raw={}, _compute_old_log_prob=compute)
    vars(trainer).update(attributes)
    return trainer


# One step with a rollout of another policy for each of verl's callers, as far as the comparison.


def v1() -> Callable[[], Any]:
    """trainer.use_v1=true: the method that every V1 trainer inherits."""
    from tensordict import TensorDict
    from transfer_queue import KVBatchMeta
    from verl.trainer.ppo.v1 import trainer_base
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    rollout, actor = log_probs(2.0)
    # Of the whole sequence, and one token early, as the workers put them into the queue.
    whole = torch.cat([torch.zeros(SEQUENCES, PROMPT - 1), actor, torch.zeros(SEQUENCES, 1)], dim=1)
    stored = {
        "entropy": torch.ones_like(whole),
        "log_probs": whole,
        "response_mask": torch.ones(SEQUENCES, RESPONSE, dtype=torch.long),
        "responses": torch.zeros(SEQUENCES, RESPONSE, dtype=torch.long),
        "rollout_log_probs": rollout,
    }

    def kv_batch_get(**_: Any) -> Any:
        nested = {name: torch.nested.as_nested_tensor(list(rows), layout=torch.jagged) for name, rows in stored.items()}
        return TensorDict(nested, batch_size=SEQUENCES)

    batch = KVBatchMeta(keys=[], tags=[], partition_id="train", extra_info={})
    trainer_base.tq = types.SimpleNamespace(kv_batch_get=kv_batch_get, kv_batch_put=lambda **_: batch)
    trainer = object.__new__(PPOTrainerSync)
    trainer.config = trainer_config()
    trainer.actor_rollout_wg = types.SimpleNamespace(compute_log_prob=lambda batch: [])
    return lambda: trainer._compute_old_log_prob(batch, {})


def v0() -> Callable[[], Any]:
    """trainer.use_v1=false: the trainer of main_ppo_v0."""
    import numpy
    from verl.trainer import main_ppo_v0

    def generate(_: Any) -> Any:
        generated = batch(noise=2.0, old_log_probs=None, rm_scores=torch.zeros(SEQUENCES, RESPONSE))
        generated.non_tensor_batch["multi_modal_inputs"] = numpy.array([{}] * SEQUENCES, dtype=object)
        generated.meta_info["timing"] = {}
        return generated

    trainer = without_init(
        main_ppo_v0.RayPPOTrainer,
        _dump_executor=types.SimpleNamespace(_shutdown=False),
        _load_checkpoint=lambda: None,
        _start_profiling=lambda _: None,
        checkpoint_manager=types.SimpleNamespace(update_weights=lambda _: None, sleep_replicas=lambda: None),
        async_rollout_manager=types.SimpleNamespace(generate_sequences=generate),
        actor_rollout_wg=object(),
        train_dataloader=[{"index": torch.zeros(SEQUENCES, 1)}],
        total_training_steps=1,
        use_rm=False,
    )
    return trainer.fit  # type: ignore[no-any-return]


def one_step_off() -> Callable[[], Any]:
    """One step off-policy, which makes its replicas itself."""
    from verl.experimental.one_step_off_policy.ray_trainer import OneStepOffRayTrainer

    trainer = without_init(OneStepOffRayTrainer)
    return lambda: trainer._fit_compute_log_prob(batch(noise=2.0, old_log_probs=None))


def fully_async() -> Callable[[], Any]:
    """Fully asynchronous: an actor of its own, to which the replicas come."""
    from verl.experimental.fully_async_policy.fully_async_trainer import FullyAsyncTrainer

    trainer = without_init(
        FullyAsyncTrainer.__ray_metadata__.modified_class, actor_wg=object(), dynamic_schedule_enabled=False
    )
    return lambda: trainer._fit_compute_log_prob(batch(noise=2.0, old_log_probs=None))


def outcome(trainer: str, order: str, arrival: str) -> str:
    """Run such a step; how it ended.

    Args:
        trainer: a function of this module.
        order: whether the trainer's modules are imported before or after the policies are watched.
        arrival: `watch`, the class of a replica that is made, or one that was made elsewhere, pickled.
    """
    import ray
    from verl.workers.rollout.replica import RolloutReplica

    def arrive() -> None:
        if arrival == "watch":
            parity.watch("error")
        elif arrival.startswith("AscendSafe"):
            make_replica(arrival)
        else:
            assert isinstance(ray.cloudpickle.loads(base64.b64decode(arrival)), RolloutReplica)

    if order == "policies first":
        arrive()
        return how_it_ends(globals()[trainer]())
    step = globals()[trainer]()
    before = how_it_ends(step)
    assert not before.startswith("ParityError"), before
    arrive()
    return how_it_ends(step)


def how_it_ends(step: Callable[[], Any]) -> str:
    try:
        step()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "it went on"


@pytest.mark.parametrize("order", ["policies first", "trainer first"])
@pytest.mark.parametrize("trainer", [v1, v0, one_step_off])
def test_a_trainer_is_watched_whatever_is_imported_first(
    trainer: Callable[..., Any], order: str, fresh_process: FreshProcesses
) -> None:
    answer = fresh_process(outcome, trainer.__name__, order, "watch")
    assert answer.status == 0, answer.stderr
    assert answer.value.startswith("ParityError: The rollout engine does not generate"), answer.value


@pytest.fixture(scope="module")
def replica(fresh_process: FreshProcesses) -> str:
    """A replica, pickled in the process that made it."""
    answer = fresh_process(pickled_replica)
    assert answer.status == 0, answer.stderr
    assert isinstance(answer.value, str)
    return answer.value


@pytest.mark.parametrize("order", ["policies first", "trainer first"])
def test_a_trainer_to_which_the_replicas_are_sent_is_watched(
    order: str, replica: str, fresh_process: FreshProcesses
) -> None:
    answer = fresh_process(outcome, "fully_async", order, replica)
    assert answer.status == 0, answer.stderr
    assert answer.value.startswith("ParityError: The rollout engine does not generate"), answer.value


@pytest.mark.parametrize("kind", ["AscendSafeReplica", "AscendSafePDReplica"])
def test_making_a_replica_watches_the_policies(kind: str, metrics: Any) -> None:
    make_replica(kind)
    with pytest.raises(parity.ParityError):
        metrics.calculate_debug_metrics(batch(noise=2.0))


def test_a_reward_models_engine_is_not_compared(metrics: Any) -> None:
    from verl.workers.config import RolloutConfig

    from verl_ascend_rollout.integration.replica import AscendSafeReplica

    config = RolloutConfig(name="ascend_safe", engine_kwargs={"ascend_safe": {"parity": "error"}})
    for kind in ("is_reward_model", "is_teacher_model"):
        AscendSafeReplica(0, config, "model config", **{kind: True})
    metrics.calculate_debug_metrics(batch(noise=2.0))


@pytest.mark.parametrize(
    ("experts", "replayed", "says"),
    [
        (60, False, "Where none does, look at the routing of its 60 experts: each side picks the experts for itself"),
        (60, True, "Routing is replayed, so it is not the cause, unless actor/routing_replay/agreement is low"),
        (0, False, "The model has no experts, so routing is not the cause"),
        (None, False, "Where none does and the model is a mixture of experts"),
    ],
)
def test_the_sentence_is_about_the_jobs_own_routing(
    metrics: Any, said: Callable[[], list[tuple[int, str]]], experts: int | None, replayed: bool, says: str
) -> None:
    parity.watch("warn", parity.about_routing(experts, replayed))
    metrics.calculate_debug_metrics(batch(noise=2.0))
    ((_, sentence),) = said()
    assert says in sentence
    assert ("enable_rollout_routing_replay=True" in sentence) == (not replayed and experts != 0)
