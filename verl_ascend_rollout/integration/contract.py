"""Every name of verl's that we override, call, read, patch or forward, once.

Registration looks them up in the source of the installed verl (`probe`), the doctor reports each of them, and
tests/contract/test_contract.py holds our code against them: an override without an entry fails, and so does an entry
without a use.  Imports nothing but the standard library.

Releases that were read: verl 0.7.1, 0.8.0, 0.9.0, 0.9.1, and main at 1dda039b9 (0.10.0.dev, 2026-08-22).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

Use = Literal["override", "call", "read", "patch", "forward"]
"""What we do with a name.  `forward`: a method of the server that verl calls, and that our actor hands through."""

Generation = Literal["gate", "no gate", "no entry points", "no hooks"]
"""Ways of being plugged in: with verl's own gate for requests (0.9.1), or without (0.9.0, main), or also without entry
points, platforms, and a receiver that says which bucket is the last (0.8.0), or also without hooks (0.7.1)."""

ENTRY_POINTS: tuple[Generation, ...] = ("gate", "no gate")
NO_ENTRY_POINTS: tuple[Generation, ...] = ("no entry points", "no hooks")
HOOKS: tuple[Generation, ...] = (*ENTRY_POINTS, "no entry points")
NO_HOOKS: tuple[Generation, ...] = ("no hooks",)


@dataclass(frozen=True)
class Symbol:
    """One name that has to be there.

    Attributes:
        key: what the doctor calls it, below `verl.`.
        module: where it is.
        name: dotted, in the module; of an `expression`, its source.
        use: what we do with it.
        used_by: our file, below the package.
        why: what we need it for.
        lost: what happens without it, as the end of a sentence.
        parameters: what the function must take.
        required: registration refuses without it.
        only: the platforms that need it; empty for all.
        generations: those that need it; empty for all.
        since: the first of the releases above that has it; empty for 0.7.1.
        last: the last of them; empty for main.
        expression: not a definition, but a piece of code that the module holds.
    """

    key: str
    module: str
    name: str
    use: Use
    used_by: str
    why: str
    lost: str
    parameters: tuple[str, ...] = ()
    required: bool = True
    only: tuple[Literal["cpu", "npu", "cuda"], ...] = ()
    generations: tuple[Generation, ...] = ()
    since: str = ""
    last: str = ""
    expression: bool = False

    @property
    def shown(self) -> str:
        """The name, as a sentence has it."""
        if self.expression:
            return f"{self.name} in {self.module}"
        return f"{self.name}({', '.join(self.parameters)})" if self.parameters else self.name

    @property
    def words(self) -> tuple[str, ...]:
        """The words by which our own source may name it."""
        if self.expression:
            return self.name.strip("'"), self.name.partition("(")[0]
        owner, _, last = self.name.rpartition(".")
        return (self.name, owner) if last.startswith("__") else (self.name, last)


WHOLE = ("0.7.1", "0.8.0", "0.9.0", "0.9.1")
"""The releases that have all that is required: what a sentence about another one names.  Decides nothing."""

ROLLOUT = "verl.workers.rollout"
BASE = f"{ROLLOUT}.base"
REPLICA = f"{ROLLOUT}.replica"
SERVER = f"{ROLLOUT}.vllm_rollout.vllm_async_server"
ADAPTER = f"{ROLLOUT}.vllm_rollout.vllm_rollout"
PD_REPLICA = f"{ROLLOUT}.vllm_rollout.vllm_pd_replica"
EXTENSION = f"{ROLLOUT}.vllm_rollout.utils"
BUCKETS = f"{ROLLOUT}.vllm_rollout.bucketed_weight_transfer"
FSDP = "verl.workers.engine.fsdp.transformer_impl"
PLATFORM = "verl.plugin.platform.platform_manager"

IN_PROCESS = "vLLMAsyncRollout"
"""The class in ADAPTER of a verl that runs vLLM's worker in the trainer's process (0.7.0): no server owns that."""

NO_START = "the rollout server does not start"
NO_SYNC = "a weight sync fails"
NO_VERL_SYNC = "a weight sync by verl's transport fails"
NO_SERVER = "the trainer looks for a server that does not exist"
NO_RESUME = "after an abort the engine stays paused for good"
NO_NAME = "verl may treat ascend_safe differently from vllm, so it refuses to start"
NO_PLATFORM = "verl does not run on a CPU, and refuses VERL_PLATFORM=npu"
HANGS = "a job whose rollout engine has died may go on for ever"
NO_CPU = "verl does not run on a CPU"

MODE = "whether the trainer shares the engine's devices"
COMPARED = "verl compares the rollout's name with `vllm` here, and is answered for ours"
REGISTERED = "the platform `cpu` is registered, and `npu` and `cuda` as names"
UNPADDED = "padding is taken off without flash_attn"
UNPADDING = "verl.utils.npu_flash_attn_utils"
ON_CPU = "verl is told of a CPU, where VERL_PLATFORM asks for it"


def _row(use: Use, name: str, why: str = "", *parameters: str, **rest: Any) -> Symbol:
    return Symbol(
        **{"key": "", "module": "", "used_by": "", "lost": "", **rest},
        name=name,
        use=use,
        why=why,
        parameters=parameters,
    )


# How an entry is used is the first word of its row; what a row leaves open, `_of` fills in.
override = partial(_row, "override")
call = partial(_row, "call")
read = partial(_row, "read")
patch = partial(_row, "patch")
forward = partial(_row, "forward", why="verl calls it on the server, or defines it")


def _of(key: str, module: str, owner: str, used_by: str, lost: str, *rows: Symbol) -> tuple[Symbol, ...]:
    """Complete entries that share a module, the class in it (or none), our file, and what is lost."""
    return tuple(
        replace(
            row,
            key=row.key or f"{key}.{row.name.strip('_').replace('_', '-')}",
            module=row.module or module,
            name=f"{owner}.{row.name}" if owner and not row.expression else row.name,
            used_by=row.used_by or used_by,
            lost=row.lost or lost,
        )
        for row in rows
    )


# One entry after the other: a table, which the formatter would give a line for each word.
# fmt: off
CONTRACT: tuple[Symbol, ...] = (
    *_of("", "", "", "integration/patches/rollouts.py", "the rollout is unknown to verl",
        call("'verl.plugins'", "verl loads our plug-in by its entry point", key="plugins", module="verl",
            used_by="plugin.py", expression=True, since="0.9.0", generations=ENTRY_POINTS,
            lost="the rollout is not registered in verl's processes"),
        call("'VERL_USE_EXTERNAL_MODULES'", "verl loads our plug-in by name, where it knows no entry points",
            key="external-modules", module="verl", used_by="integration/runtime_env.py", expression=True,
            generations=NO_ENTRY_POINTS, lost="the rollout is not registered in verl's processes"),
        read("_ROLLOUT_REGISTRY", "names the trainer worker's class", key="rollout-registry", module=BASE),
        call("RolloutReplicaRegistry.register", "names the replica that the task runner starts", "name", "loader",
            key="replica-registry", module=REPLICA),
    ),
    # The rollout server, in the order of its life.
    *_of("server", SERVER, "vLLMHttpServer", "integration/server.py", NO_START,
        override("_init_config", "our defaults are filled in", "config", since="0.8.0", generations=HOOKS),
        override("_init_model_config", "LoRA is known before the policy decides", "model_config", since="0.8.0",
            generations=HOOKS),
        read("lora_as_adapter", "LoRA is known before the policy decides"),
        read("config", "the rollout's configuration"),
        read("model_config", "the model's configuration"),
        read("node_rank", "only a replica's first node has an engine"),
        read("replica_rank", "which replica a line of the log is about"),
        read("rollout_mode", MODE),
        read("engine", "vLLM's engine, once `run_server` has made it"),
        read("nnodes", "an engine on several nodes is not made again"),
        read("_server_task", "the HTTP server of an engine that is dead ends with it"),
        override("_preprocess_engine_kwargs", "the policy's decisions become engine arguments", "engine_kwargs",
            since="0.8.0", generations=HOOKS),
        override("_get_worker_extension_cls", "our worker extension is named", since="0.8.0", generations=HOOKS),
        override("run_server", "workers are configured when the engine is up", "args"),
        override("sleep", "memory is given back for training"),
        override("wake_up", "memory is taken again, by tag", "tags", since="0.8.0", generations=HOOKS),
        override("release_kv_cache", "the KV cache alone is freed", since="0.8.0", generations=HOOKS,
            lost="a disaggregated trainer cannot free the KV cache"),
        override("resume_kv_cache", "the KV cache alone is restored", since="0.8.0", generations=HOOKS,
            lost="a disaggregated trainer cannot restore the KV cache"),
        override("collective_rpc", "a weight sync that fails is remembered", "method", "timeout", "args", "kwargs"),
        override("generate", "a sync in doubt refuses to generate"),
        override("abort_all_requests", "an abort is remembered until it is resumed"),
        # Requests that come while memory is away, or between an abort and its end, wait: at verl's gate, or at ours.
        override("_park_until_admitted", "a request waits until memory is back", "request_id", generations=("gate",),
            since="0.9.1", lost="a request reaches an engine that is asleep"),
        read("_admitting", "verl counts the requests that it lets in", generations=("gate",), since="0.9.1",
            lost="an abort waits for a request that waits for memory"),
        override("resume_engine_generation", "the scheduler goes on only over memory that is there",
            generations=("gate",), since="0.9.1", lost=NO_RESUME),
        override("resume_generation", "the scheduler goes on only over memory that is there",
            used_by="integration/own_gate.py", lost=NO_RESUME),
    ),
    # Where there are no hooks, what they would answer is given as data.
    *_of("server", SERVER, "vLLMHttpServer", "integration/no_hooks.py", NO_START,
        read("self.config.get('engine_kwargs', {}).get('vllm', {})", "the policy's decisions become engine arguments",
            key="server.engine-kwargs", expression=True, last="0.7.1", generations=NO_HOOKS),
    ),
    *_of("rollout", REPLICA, "", "integration/server.py", NO_START, read("RolloutMode", MODE, key="rollout-mode")),
    *_of("server", SERVER, "vLLMHttpServer", "integration/actor.py", "a call of verl's to the server fails",
        forward("open_submission_gate", generations=("gate",), since="0.9.1"),
        forward("abort_request"),
        forward("clear_kv_cache"),
        forward("get_master_address"),
        forward("get_rollout_config", required=False, since="0.9.1"),
        forward("get_server_address"),
        forward("launch_server"),
        forward("run_headless"),
        forward("set_global_steps"),
        forward("set_pd_peer", required=False, since="0.9.0"),
        forward("start_profile"),
        forward("stop_profile"),
        forward("wait_for_requests_to_drain"),
    ),
    # The replica, in the task runner.
    *_of("replica", REPLICA, "RolloutReplica", "integration/replica.py", NO_START,
        read("config", "our options are in it"),
        read("model_config", "whether the model has experts"),
        read("is_reward_model", "a reward model's engine is not the rollout"),
        read("is_teacher_model", "a teacher's engine is not the rollout", since="0.8.0", generations=HOOKS),
        read("servers", "the servers are asked for their numbers", used_by="integration/tracking.py", required=False,
            lost="the rollout's numbers do not reach the trackers"),
    ),
    *_of("replica", SERVER, "vLLMReplica", "integration/replica.py", NO_SERVER,
        override("_get_server_name_prefix", "the actor's name begins with the rollout's", key="replica.name-prefix",
            since="0.8.0", generations=HOOKS),
        read("server_class", "names the class of the server actor", lost="verl's own server is started"),
    ),
    *_of("pd-replica", PD_REPLICA, "", "integration/pd_replica.py", "prefill and decode cannot be apart",
        read("vLLMPDReplica", "prefill and decode apart, with our server", key="pd-replica", required=False,
            since="0.9.0"),
        override("vLLMPDReplica._spawn_pd_server", "verl writes the actors' names out here",
            key="pd-replica.spawn-pd-server", required=False, since="0.9.0", lost=NO_SERVER),
    ),
    # The adapter, in the trainer's workers.
    *_of("adapter", ADAPTER, "ServerAdapter", "integration/adapter.py", NO_SYNC,
        override("_get_server_name_prefix", "the adapter finds its server by that name", key="adapter.name-prefix",
            since="0.8.0", generations=HOOKS, lost=NO_SERVER),
        override("update_weights", "weights go out through our transport", "weights", "global_steps"),
        call("_execute_method", "starts the receiving call", "method", "non_block", "kwargs"),
        override("_ensure_server_handle", "one worker of a replica speaks with its server", since="0.8.0",
            generations=HOOKS),
        read("server_handle", "one worker of a replica speaks with its server"),
        read("replica_rank", "names the server"),
        read("node_rank", "names the server"),
        read("rollout_rank", "names the worker in an event"),
        read("use_shm", "whether verl's transport works on device memory"),
        read("zmq_handle", "where verl's own transport meets"),
    ),
    *_of("adapter", BASE, "BaseRollout", "integration/adapter.py", NO_SYNC,
        read("config", "the rollout's configuration"),
    ),
    *_of("", f"{ROLLOUT}.utils", "", "integration/weight_sender.py", NO_SYNC,
        call("get_device_name", "whether weights go by our transport", key="device-name", module="verl.utils.device"),
        call("ensure_async_iterator", "weights come as an iterator of either kind", key="async-iterator"),
    ),
    *_of("bucketed-sender", BUCKETS, "BucketedWeightSender", "integration/weight_sender.py", NO_VERL_SYNC,
        override("__init__", "our adapter makes the sender as verl's does", "zmq_handle", "bucket_size_mb", "use_shm"),
        override("async_send_weights", "sends weights by verl's own transport, watching the receiver", "weights",
            key="bucketed-sender"),
        override("_init_socket", "a send ends when the receiver has failed"),
        read("socket", "a send ends when the receiver has failed"),
        override("_init_buffer", "a killed job leaves no name of verl's transport"),
        read("shm", "a killed job leaves no name of verl's transport"),
        read("zmq_handle", "a killed job leaves no name of verl's transport"),
    ),
    # The extension, in vLLM's worker.
    *_of("extension", EXTENSION, "vLLMColocateWorkerExtension", "integration/extension.py", NO_SYNC,
        override("update_weights_from_ipc", "weights come in through our sync", "peft_config", "base_sync_done",
            "use_shm", key="extension.update-weights", lost="the second weight sync fails or is wrong"),
        override("_get_zmq_handle", "verl's own transport meets on one node", key="extension.zmq-handle",
            lost=NO_VERL_SYNC),
        call("_use_mtp_drafter_weight_sync", "a drafter's weights are refused instead of left stale",
            key="extension.mtp-drafter", since="0.8.0", generations=HOOKS),
    ),
    *_of("bucketed-receiver", BUCKETS, "BucketedWeightReceiver", "integration/extension.py", NO_VERL_SYNC,
        call("__init__", "receives weights by verl's own transport", "zmq_handle", "device", "use_shm"),
        call("receive_weights", "receives weights by verl's own transport", "on_bucket_received",
            key="bucketed-receiver"),
        call("on_bucket_received(weights, is_last)", "verl's receiver marks the last bucket",
            key="bucketed-receiver.last", expression=True, since="0.9.0", generations=ENTRY_POINTS),
        call("on_bucket_received(weights)", "verl's receiver hands each bucket over",
            key="bucketed-receiver.bucket", expression=True, last="0.8.0", generations=NO_ENTRY_POINTS),
    ),
    # The places where verl compares the rollout's name, and what runs there.
    *_of("name", "", "", "integration/patches/names.py", NO_NAME,
        patch("RolloutConfig.__post_init__", COMPARED, "self", key="name.RolloutConfig",
            module="verl.workers.config.rollout"),
        patch("validate_config", COMPARED, "config", key="name.validate_config", module="verl.utils.config"),
        patch("LLMServerClient.__init__", COMPARED, "self", "config", key="name.LLMServerClient",
            module=f"{ROLLOUT}.llm_server", since="0.8.0", generations=HOOKS),
        patch("get_rollout_replica_class", COMPARED, "rollout", "disaggregation_enabled",
            key="name.get_rollout_replica_class", module=REPLICA, since="0.8.0", generations=HOOKS),
        patch("RewardLoopWorker.__init__", COMPARED, "self", "config", key="name.RewardLoopWorker",
            module="verl.experimental.reward_loop.reward_loop"),
        patch("DistillationTeacherModelConfig._validate_topk_logprobs", COMPARED, "self",
            key="name.DistillationTeacherModelConfig", module="verl.workers.config.distillation", since="0.8.0",
            generations=HOOKS),
        patch("CheckpointEngineWorker.__init__", COMPARED, "self", "rollout_config", "model_config", "server_adapter",
            key="name.CheckpointEngineWorker", module="verl.checkpoint_engine.base"),
        call("get_rollout_class", "our adapter, where verl's code runs under the name `vllm`", key="rollout-class",
            module=BASE),
    ),
    # What we replace besides.  Without these a run is as right.
    *_of("", "", "", "", "",
        patch("unfuse_moe_params", "experts that arrive merged are sent merged", "weights", key="unfuse-moe-params",
            module="verl.workers.engine.fsdp.utils", used_by="integration/patches/experts.py", required=False,
            since="0.9.0", generations=ENTRY_POINTS, lost="they are sent and loaded one by one"),
        patch("compute_timing_metrics", "the rollout's numbers are among those that the trainer logs", "batch",
            "timing_raw", key="tracking", module="verl.trainer.ppo.metric_utils",
            used_by="integration/patches/metrics.py", required=False,
            lost="the rollout's numbers do not reach the trackers"),
        patch("PPOTrainer.fit", "a job ends when its rollout engine is dead", "self", "agent_loop_manager",
            key="death.v1", module="verl.trainer.ppo.v1.trainer_base", used_by="integration/patches/death.py",
            required=False, since="0.9.0", lost=HANGS),
        call("PPOTrainer.get_reward_handles", "a job ends when a worker of its agent loop is dead", key="death.workers",
            module="verl.trainer.ppo.v1.trainer_base", used_by="integration/patches/death.py", required=False,
            since="0.9.0", lost=HANGS),
        patch("RayPPOTrainer.fit", "a job ends when its rollout engine is dead", "self", key="death.legacy",
            module="verl.trainer.ppo.ray_trainer", used_by="integration/patches/death.py", required=False, lost=HANGS),
        patch("FullyAsyncRollouter.fit", "a job ends when its rollout engine is dead", "self", key="death.fully-async",
            module="verl.experimental.fully_async_policy.fully_async_rollouter",
            used_by="integration/patches/death.py", required=False, since="0.8.0",
            lost="a fully asynchronous job whose rollout engine has died ends as if it had finished"),
        patch("OneStepOffRayTrainer.fit", "a job ends when its rollout engine is dead", "self",
            key="death.one-step-off", module="verl.experimental.one_step_off_policy.ray_trainer",
            used_by="integration/patches/death.py", required=False, since="0.8.0", lost=HANGS),
        patch("calculate_debug_metrics", "the rollout's probabilities are compared with the trainer's", "data",
            key="parity", module="verl.utils.debug.metrics", used_by="integration/patches/metrics.py", required=False,
            lost="parity=warn is not watched, and an ERROR says so; parity=error does not start"),
    ),
    # What routing replay (R3) with FSDP takes: a job that asks for it is refused without.
    *_of("routing", FSDP, "", "integration/patches/routing.py", "routing cannot be replayed with FSDP, and is refused",
        patch("ActorRolloutRefWorker.__init__", "passes are marked in which routing is replayed", "self", "config",
            key="routing.worker", module="verl.workers.engine_workers", required=False),
        read("ActorRolloutRefWorker.enable_routing_replay", "passes are marked in which routing is replayed",
            key="routing.mark", module="verl.workers.engine_workers", required=False),
        patch("FSDPEngine.forward_backward_batch", "routing is replayed in a pass", "self", "data", "loss_function",
            "forward_only", key="routing.pass", required=False),
        patch("FSDPEngineWithLMHead.prepare_model_inputs", "the routers get the record of their tokens", "self",
            "micro_batch", key="routing.record", required=False),
        call("get_non_tensor_data", "whether a pass is marked", "data", "key", "default", key="routing.marked",
            module="verl.utils.tensordict_utils", required=False),
        call("slice_input_tensor", "the record is divided as the tokens are", "x", "dim", "padding",
            key="routing.slice", module="verl.utils.ulysses", required=False),
    ),
    # The platforms.
    *_of("platforms", PLATFORM, "", "integration/patches/platforms.py", NO_PLATFORM,
        read("PlatformRegistry._platforms", REGISTERED, key="platforms", only=("cpu", "npu"), since="0.9.0",
            generations=ENTRY_POINTS),
        call("PlatformRegistry.get", REGISTERED, "name", key="platforms.get", only=("cpu", "npu"), since="0.9.0",
            generations=ENTRY_POINTS),
        read("PlatformBase", "the base of the platform `cpu`", key="platforms.base",
            module="verl.plugin.platform.platform_base", only=("cpu",), since="0.9.0", generations=ENTRY_POINTS),
        patch("_create_platform", "a driver without an NPU says so in one sentence", "name", required=False,
            since="0.9.0", generations=ENTRY_POINTS, lost="a driver without an NPU ends in a traceback"),
        call("set_platform", "trainer.device is enough without VERL_PLATFORM", key="platforms.set-platform",
            only=("cpu", "npu"), since="0.9.0", generations=ENTRY_POINTS),
        patch("auto_set_device", "trainer.device is enough without VERL_PLATFORM", "config",
            key="platforms.auto-set-device", module="verl.utils.device", only=("cpu", "npu"),
            generations=ENTRY_POINTS),
        patch("initialize_global_process_group_ray", "one gloo group is asked for", "timeout_second", "backend",
            key="platforms.process-group", module="verl.utils.distributed", only=("cpu",)),
    ),
    # What there was before there were platforms.
    *_of("devices", "verl.utils.device", "", "integration/patches/devices.py", NO_CPU,
        patch("get_device_name", ON_CPU, only=("cpu",), generations=NO_ENTRY_POINTS),
        patch("get_torch_device", ON_CPU, only=("cpu",), generations=NO_ENTRY_POINTS),
        patch("get_resource_name", ON_CPU, only=("cpu",), generations=NO_ENTRY_POINTS),
        patch("is_support_ipc", ON_CPU, only=("cpu",), generations=NO_ENTRY_POINTS),
        patch("RayResourcePool.get_placement_groups", ON_CPU, "strategy", "name", "device_name",
            key="devices.placement-groups", module="verl.single_controller.ray.base", only=("cpu",),
            generations=NO_ENTRY_POINTS),
        patch("RayClassWithInitArgs.__call__", ON_CPU, "device_name", key="devices.worker",
            module="verl.single_controller.ray.base", only=("cpu",), generations=NO_ENTRY_POINTS),
        patch("get_device_uuid", ON_CPU, "device_id", module=EXTENSION, only=("cpu",), last="0.8.0",
            generations=NO_ENTRY_POINTS),
        read("EngineRegistry._engines", "the trainer's engine for CUDA is that for a CPU", key="devices.engines",
            module="verl.workers.engine.base", only=("cpu",), generations=NO_ENTRY_POINTS),
        patch("ActorRolloutRefWorker.__init__", ON_CPU, "self", key="devices.legacy-worker",
            module="verl.workers.fsdp_workers", only=("cpu",), last="0.7.1", generations=NO_HOOKS),
        patch("_get_attention_functions", UNPADDED, module="verl.utils.attention_utils", only=("cpu",),
            generations=NO_ENTRY_POINTS),
        call("index_first_axis", UNPADDED, module=UNPADDING, only=("cpu",), generations=NO_ENTRY_POINTS),
        call("pad_input", UNPADDED, module=UNPADDING, only=("cpu",), generations=NO_ENTRY_POINTS),
        call("unpad_input", UNPADDED, module=UNPADDING, only=("cpu",), generations=NO_ENTRY_POINTS),
    ),
)
# fmt: on
