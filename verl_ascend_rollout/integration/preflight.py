"""What can be seen to be wrong in the driver, before Ray, the trainer and vLLM take minutes to find it.

Each problem is one sentence: what is wrong, where, what to do.  All of them are printed, then the run stops with exit
code 2.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobStatus
from hydra.experimental.callback import Callback

from verl_ascend_rollout import ROLLOUT_NAME
from verl_ascend_rollout.integration import cluster, contract, patch, probe, registration, runtime_env
from verl_ascend_rollout.integration.cluster import Joined, Node
from verl_ascend_rollout.integration.cpu_platform import missing_npu
from verl_ascend_rollout.options import KEY, ROLLOUT, AscendSafeOptions, OptionError
from verl_ascend_rollout.platforms import cpu
from verl_ascend_rollout.platforms.base import PlatformError, PlatformFacts, installed_versions
from verl_ascend_rollout.platforms.detect import OVERRIDE, detect
from verl_ascend_rollout.policy import conflicts, engine_args
from verl_ascend_rollout.policy.job_config import ConfigError, number, read_model, setting, trains_adapters
from verl_ascend_rollout.policy.request import EngineRequest, ModelFacts

logger = logging.getLogger("verl_ascend_rollout.preflight")

MODEL = "actor_rollout_ref.model.path"


class PreflightError(ValueError):
    """A job cannot work, found in a Ray actor.  The message has every problem."""


class DriverCheck(Callback):
    """Stops a job of ours that cannot work, before its entry point is called: hydra's callback for that.

    verl checks its config in the driver (`main_ppo` from 0.9 on), in a Ray actor (`one_step_off_policy`, and `main_ppo`
    before 0.9) or nowhere (`fully_async_policy`), so this is not left to verl.
    """

    def on_run_start(self, config: Any, **_: Any) -> None:
        """Complete the job's environment, of which hydra makes a copy before the job starts."""
        runtime_env.tell_platform(config, os.environ)
        runtime_env.tell_module(config, os.environ)

    def on_job_start(self, config: Any, **_: Any) -> None:
        """Check the job that is about to run, if its rollout is ours.

        Raises:
            SystemExit: with code 2, after a sentence for each problem on standard error.
        """
        if setting(config, f"{ROLLOUT}.name") == ROLLOUT_NAME:
            registration.stop_if_refused()
            check_driver_config(config)

    def on_job_end(self, config: Any, job_return: Any, **_: Any) -> None:
        """Let a refusal of ours that came out of an actor be the last line of the driver, below Ray's traceback."""
        sentence = None if job_return.status != JobStatus.FAILED else refusal_in(job_return._return_value)
        if sentence is not None:
            atexit.register(_say_last, sentence)


REFUSAL = re.compile(r"\bverl_ascend_rollout(?:\.\w+)+(?:Error|Refusal): (.+)")
"""One of our exceptions in a traceback, which is all that Ray keeps of an actor that died of it."""


def refusal_in(error: BaseException) -> str | None:
    """Return the sentence of an exception of ours that an error was caused by; `None` where it was not."""
    found = REFUSAL.findall(str(error))
    return found[-1].strip() if found else None


def _say_last(sentence: str) -> None:
    ray = sys.modules.get("ray")
    if ray is not None:
        ray.shutdown()  # what the actors have printed comes before
    print(f"ascend_safe: {sentence}", file=sys.stderr, flush=True)


def check_driver_config(config: Any) -> None:
    """Check a job's config in the driver process; called before verl's own checks when the rollout is ours.

    Raises:
        SystemExit: with code 2, after a sentence for each problem on standard error.
        PreflightError: the same in a Ray actor, which would take its reason with it if it exited.
    """
    for warning in find_warnings(config):
        _warn(warning)
    problems = list(find_problems(config))
    if not problems:
        return
    if "RAY_RAYLET_PID" in os.environ:
        raise PreflightError("; ".join(problems))
    for problem in problems:
        print(f"ascend_safe: {problem}", file=sys.stderr)
    raise SystemExit(2)


@functools.cache  # hydra's callback and verl's own check both come here
def _warn(sentence: str) -> None:
    logger.warning("%s", sentence)


def find_problems(config: Any, environ: Mapping[str, str] = os.environ) -> Iterator[str]:
    """Yield the problems of a job's config, one sentence each; first those of the installed verl itself."""
    for problem in patch.problems():
        yield f"{problem}: {patch.WHAT_TO_DO}"
    yield from _options(config)
    yield from _no_room_to_generate(config)
    yield from _short_attention_mask(config)
    try:
        facts = detect(environ)
    except PlatformError as error:
        yield str(error)
        return
    # An actor of the job asks nothing of the cluster: the driver has.
    joined = None if "RAY_RAYLET_PID" in environ else cluster.joined(config, environ)
    if joined is not None:
        try:
            nodes = cluster.ask(joined)
        except cluster.ClusterError as error:
            yield str(error)
            nodes = ()
        for node in nodes:
            if node.error is not None:
                _warn(f"the node {node.address} of {joined.words} did not say what is installed there: {node.error}")
        facts = _facts_of_the_job(facts, nodes, environ)
        wrong_device = list(_strategy(config, facts, joined)) or list(_device(config, facts, environ, joined))
        # The settings of the wrong platform are not to be mended one by one.
        yield from wrong_device or _cluster_settings(config, joined)
        if nodes:
            yield from cluster.placement(
                joined, nodes, conflicts.pools(config), facts.ray_resource, conflicts.actor_cpus(config)
            )
            yield from cluster.installations(nodes, installed_versions(), facts.ray_resource)
    elif "RAY_RAYLET_PID" not in environ:
        no_npu = missing_npu(environ.get(OVERRIDE, "npu")) if facts.name == "npu" else None
        if no_npu is not None:
            yield no_npu
            return
        yield from _model(config)
        needs_devices = list(_strategy(config, facts, None))
        yield from needs_devices
        if not needs_devices:
            yield from _resources(config, facts)
            # A job that is set up for other devices will not run here.
            yield from list(_device(config, facts, environ, None)) or _machine(config, facts, environ)
    yield from _policy(config, facts, environ)


def find_warnings(config: Any, environ: Mapping[str, str] = os.environ) -> Iterator[str]:
    """Yield what runs, but perhaps not as it was meant; one sentence each."""
    prompt, response, limit, source = _lengths(config)
    if None not in (prompt, response, limit) and prompt < limit < prompt + response:  # type: ignore[operator]
        yield (
            f"data.max_prompt_length={prompt} and data.max_response_length={response} together exceed "
            f"{source}={limit}: the longest prompts will be answered in fewer tokens than you ask for"
        )
    try:
        options = AscendSafeOptions.from_rollout(config.actor_rollout_ref.rollout)
        yield from conflicts.find_warnings(config, detect(environ), _engine_request(config, environ))
    except (OptionError, PlatformError, ConfigError):
        return  # said by find_problems
    if options.parity == "warn":
        yield from _nothing_to_compare(config, options)


def _options(config: Any) -> Iterator[str]:
    rollout = config.actor_rollout_ref.rollout
    try:
        options = AscendSafeOptions.from_rollout(rollout)
        EngineRequest.from_rollout(rollout)
    except OptionError as error:
        yield str(error)
    else:
        if options.parity == "error":
            yield from _nothing_to_compare(config, options)


BYPASS = "algorithm.rollout_correction.bypass_mode"


def _nothing_to_compare(config: Any, options: AscendSafeOptions) -> Iterator[str]:
    """Yield why no step of this job has two sides: verl compares them where both log-probabilities are computed."""
    if setting(config, f"{ROLLOUT}.calculate_log_probs") is False:
        why, do = f"{ROLLOUT}.calculate_log_probs is off", "set that to True"
    elif setting(config, BYPASS):
        # verl 0.9.1, trainer/ppo/v1/trainer_base.py:1641, trainer/ppo/ray_trainer.py:1575: the rollout's are the old.
        why, do = f"with {BYPASS} the trainer computes no log-probabilities of its own", "set that to False"
    else:
        return
    yield f"{KEY}.parity={options.parity} compares nothing, since {why}: {do}, or parity to off"


def _model(config: Any) -> Iterator[str]:
    path = str(config.actor_rollout_ref.model.path or "")
    if not path:
        yield f"{MODEL} is empty: give the folder of a Hugging Face checkpoint, or a name on the hub"
    elif path.startswith(("/", ".", "~")) or (path.count("/") > 1 and "://" not in path):
        # A name on the hub has one slash at most; hdfs:// and the like are verl's to fetch.
        folder = Path(path).expanduser()
        if not folder.is_dir():
            yield f"{MODEL}={path} is not there: give the folder of a Hugging Face checkpoint, or a name on the hub"
        elif not (folder / "config.json").is_file():
            yield f"{MODEL}={path} has no config.json: it is not the folder of a Hugging Face checkpoint"


PADDED_ENGINE = "verl/workers/engine/fsdp/transformer_impl.py"
SHORT_MASK = "[torch.ones_like(t, dtype=torch.int32) for t in loss_mask]"


def _short_attention_mask(config: Any, trees: probe.Trees | None = None) -> Iterator[str]:
    """Yield where verl's FSDP engine would compute with a part of each sequence hidden, without a word.

    verl 0.7.1 makes the attention mask of a padded batch from the loss mask (workers/engine/fsdp/
    transformer_impl.py:967), which is as long as the answer (workers/utils/padding.py:71), so that as many tokens as
    the prompt has are left out.  Both sides' probabilities correlated to 0.90 at the first step of the toy, where
    0.9996 is right.
    """
    if setting(config, "trainer.use_legacy_worker_impl") != "disable":
        return
    if setting(config, "actor_rollout_ref.model.use_remove_padding"):
        return
    trees = trees or probe.installed()
    tree = trees(PADDED_ENGINE) if trees is not None else None
    if tree is not None and probe.locate(tree, SHORT_MASK, expression=True) is not None:
        yield (
            "trainer.use_legacy_worker_impl=disable with actor_rollout_ref.model.use_remove_padding=False computes "
            "wrong log-probabilities in this verl, whose FSDP engine hides a part of each padded sequence from "
            "attention: set use_remove_padding=True, or use_legacy_worker_impl=auto"
        )


def _no_room_to_generate(config: Any) -> Iterator[str]:
    prompt, _, limit, source = _lengths(config)
    if prompt is not None and limit is not None and prompt >= limit:
        yield (
            f"data.max_prompt_length={prompt} leaves no room to generate below {source}={limit}: lower the one or "
            "raise the other"
        )


def _lengths(config: Any) -> tuple[int | None, int | None, int | None, str]:
    """Longest prompt and response, the engine's limit for both together in tokens, and where the limit comes from."""
    prompt, response = number(config, "data.max_prompt_length"), number(config, "data.max_response_length")
    limit = number(config, f"{ROLLOUT}.max_model_len")
    if limit is not None:
        return prompt, response, limit, f"{ROLLOUT}.max_model_len"
    return prompt, response, _model_facts(config).positions, f"max_position_embeddings of {MODEL}"


def _model_facts(config: Any) -> ModelFacts:
    """Return what the model's config.json says, where it is on this machine and can be read."""
    with contextlib.suppress(ConfigError):
        return read_model(str(Path(str(config.actor_rollout_ref.model.path)).expanduser()))
    return ModelFacts()


def _ray_init(config: Any) -> Mapping[str, Any]:
    found: Mapping[str, Any] = setting(config, "ray_kwargs.ray_init") or {}
    return found


def _cluster_settings(config: Any, joined: Joined) -> Iterator[str]:
    """Yield what `ray.init` refuses where it joins a cluster (ray 2.60, _private/worker.py:1935)."""
    if joined.address is None:
        return  # no `ray.init` any more
    ray_init = _ray_init(config)
    given = [name for name in ("num_cpus", "num_gpus", "resources") if ray_init.get(name) is not None]
    if given:
        settings = ", ".join(f"ray_kwargs.ray_init.{name}" for name in given)
        yield (
            f"the job would join {joined.words}, where Ray takes no {settings}: set to null what it does not take, or "
            "say +ray_kwargs.ray_init.address=local to start a Ray for this job"
        )


def _ray_would_find(resource: str) -> int:
    """How many devices of a kind a Ray that is started here finds by itself; 0 where Ray cannot be asked.

    For NPUs Ray asks pyACL first, which knows devices that have no file in /dev (ray 2.60,
    _private/accelerators/npu.py:52).
    """
    try:
        from ray._private.accelerators import get_accelerator_manager_for_resource

        return int(get_accelerator_manager_for_resource(resource).get_current_node_num_accelerators())
    except Exception:
        # A private name of Ray's, which then asks the vendor's library: the files in /dev are enough without.
        return 0


def _strategy(config: Any, facts: PlatformFacts, joined: Joined | None) -> Iterator[str]:
    """Whether what trains can do so here: then no setting of ours makes it a job for a CPU."""
    strategy = setting(config, f"{conflicts.ACTOR}.strategy")
    if facts.name == "cpu" and strategy not in (None, "fsdp", "fsdp2"):
        yield (
            f"{conflicts.ACTOR}.strategy={strategy} on {'nodes' if joined else 'a machine'} without an accelerator: "
            "only FSDP trains on a CPU; start the job where the devices are, or give their cluster's "
            "ray_kwargs.ray_init.address"
        )


def _resources(config: Any, facts: PlatformFacts) -> Iterator[str]:
    """Whether a Ray that is started here will have a device for each worker."""
    trainer = config.trainer
    if None in (number(trainer, "n_gpus_per_node"), number(trainer, "nnodes")):
        yield (
            f"trainer.n_gpus_per_node={trainer.get('n_gpus_per_node')} and trainer.nnodes={trainer.get('nnodes')} must "
            "be whole numbers: how many trainer workers a node has, and how many nodes there are"
        )
        return
    pools = conflicts.pools(config)
    wanted = sum(pool.size * pool.count for pool in pools)
    ray_init = _ray_init(config)
    if facts.ray_resource == "GPU":
        offered, name = ray_init.get("num_gpus"), "ray_kwargs.ray_init.num_gpus"
    else:
        offered = (ray_init.get("resources") or {}).get(facts.ray_resource)
        name = f"ray_kwargs.ray_init.resources.{facts.ray_resource}"
    if offered is not None and (isinstance(offered, bool) or not isinstance(offered, int | float)):
        yield f"{name}={offered} must be a number: how many devices Ray offers to this job"
        return
    cpus = ray_init.get("num_cpus") or os.cpu_count() or 0
    actors = conflicts.actor_cpus(config)
    needed = sum(pool.size * pool.count * pool.cpus for pool in pools) + sum(actors)
    have = max(facts.device_count, _ray_would_find(facts.ray_resource)) if offered is None else offered
    if facts.name == "cpu" and offered is None:
        yield (
            f"Ray has no resource {facts.ray_resource!r} on a machine without an accelerator, and verl asks for "
            f"{wanted}: add +{name}={wanted} (logical slots), or use --config-name=ascend_safe, which sets what a "
            "CPU needs; on a cluster, give its address"
        )
    elif have < wanted:
        yield (
            f"verl asks Ray for {wanted} {facts.ray_resource} ({'; '.join(pool.what for pool in pools)}) and this "
            f"machine offers {have}" + ("" if offered is None else f" ({name})") + ": ask for fewer"
            f"{'' if len(pools) > 1 else ' (trainer.n_gpus_per_node)'}, or join a cluster with "
            "ray_kwargs.ray_init.address"
        )
    elif isinstance(cpus, int | float) and cpus < needed:
        yield (
            f"verl asks Ray for {conflicts.CPUS_A_DEVICE} CPUs with each trainer worker, {needed} in all"
            f"{f' ({sum(actors)} for actors of the trainer)' if actors else ''}, and this machine offers {cpus}, so "
            f"that the job would wait for ever: set +ray_kwargs.ray_init.num_cpus to {needed + 5}, say (logical slots)"
        )


def _device(config: Any, facts: PlatformFacts, environ: Mapping[str, str], joined: Joined | None) -> Iterator[str]:
    """Whether the job is set up for the devices that it will run on.

    `cuda` is verl's default, which verl itself replaces where it finds another (utils/device.py, auto_set_device).
    """
    device = config.trainer.get("device")
    if device == facts.name:
        return
    variable = environ.get(OVERRIDE)
    if variable and device != "cuda":
        yield (
            f"{OVERRIDE}={variable} and trainer.device={device} contradict each other: unset the one, or set the other "
            f"to {facts.name} (platform={facts.name} with --config-name=ascend_safe)"
        )
    elif joined is not None and device != "cuda":
        yield (
            f"this job is set up for trainer.device={device}, and {joined.words} has {facts.ray_resource} devices of "
            f"the platform {facts.name}: say platform={facts.name} with --config-name=ascend_safe, or set "
            f"trainer.device={facts.name}"
        )
    elif facts.name == "cpu":
        yield (
            f"trainer.device={device} on {'nodes' if joined else 'a machine'} without an accelerator: set "
            "trainer.device=cpu, or use --config-name=ascend_safe"
            + ("" if joined else "; on a cluster, give its address")
        )
    elif facts.name == "npu" and not variable and not _has_torch_npu():
        yield (
            f"trainer.device={device}, and the devices are NPUs, which verl cannot see from this driver, since it has "
            "no torch-npu: set trainer.device=npu"
        )
    elif device != "cuda":
        yield f"trainer.device={device} on the platform {facts.name}: set trainer.device={facts.name}"


def _has_torch_npu() -> bool:
    return importlib.util.find_spec("torch_npu") is not None


def _facts_of_the_job(facts: PlatformFacts, nodes: Sequence[Node], environ: Mapping[str, str]) -> PlatformFacts:
    """Return the platform of the cluster's nodes, where they tell it; else what VERL_PLATFORM or this machine says."""
    there = cluster.platform(nodes)
    if there is None or (environ.get(OVERRIDE) and there.name != facts.name):
        return facts
    return there


def _machine(config: Any, facts: PlatformFacts, environ: Mapping[str, str]) -> Iterator[str]:
    """Yield what the job needs of the machine itself, where it runs on this one."""
    if facts.name == "npu" and shutil.which("npu-smi") is None:
        yield f"npu-smi is not on PATH here: {cluster.NPU_SMI}"
    if facts.name == "cpu":
        size, nodes = conflicts.engine_size(config) or 1, cpu.most_workers(environ)
        if nodes is not None and size > nodes:
            yield (
                f"an engine of {size} workers ({ROLLOUT}.tensor_model_parallel_size) takes {size} memory nodes on a "
                f"CPU, and this machine has {nodes}: set it to {nodes}, or bind cores to workers with "
                "VLLM_CPU_OMP_THREADS_BIND=0|1"
            )


def _engine_request(config: Any, environ: Mapping[str, str]) -> EngineRequest:
    """Return the user's settings, with what the model's config.json says where it is on this machine."""
    rollout, model = config.actor_rollout_ref.rollout, _model_facts(config)
    return EngineRequest.from_rollout(rollout, lora=trains_adapters(config), model=model, environ=environ)


def _policy(config: Any, facts: PlatformFacts, environ: Mapping[str, str]) -> Iterator[str]:
    try:
        request = _engine_request(config, environ)
    except OptionError:
        return  # said by _options
    decisions = None
    try:
        decisions = engine_args.decide(facts, request)
    except engine_args.PolicyError as error:
        yield str(error)
    yield from conflicts.find(config, facts, request, decisions)
    if request.routing_replay and setting(config, f"{conflicts.ACTOR}.strategy") in ("fsdp", "fsdp2"):
        yield from _routing_replay()


def _routing_replay() -> Iterator[str]:
    """Whether the installed verl has what routing replay with FSDP takes."""
    trees = probe.installed()
    rows = [symbol for symbol in contract.CONTRACT if symbol.key.startswith("routing.")]
    missing = [symbol.shown for symbol in rows if trees is not None and probe.find(symbol, trees) is None]
    if missing:
        yield (
            f"{ROLLOUT}.enable_rollout_routing_replay=True cannot work with this verl and FSDP, since it lacks "
            f"{' and '.join(missing)}: set it to False, or install verl {contract.WHOLE[-1]}"
        )
