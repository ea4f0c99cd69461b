"""What can be seen to be wrong in the driver, before Ray, the trainer and vLLM take minutes to find it.

Each problem is one sentence: what is wrong, where, what to do.  All of them are printed, then the run stops with exit
code 2.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from verl_ascend_rollout import compat, policy
from verl_ascend_rollout.options import AscendSafeOptions, OptionError
from verl_ascend_rollout.platforms.base import PlatformError, PlatformFacts
from verl_ascend_rollout.platforms.detect import detect

logger = logging.getLogger("verl_ascend_rollout.preflight")

MODEL = "actor_rollout_ref.model.path"
ROLLOUT = "actor_rollout_ref.rollout"


def check_driver_config(config: Any) -> None:
    """Check a job's config in the driver process; called before verl's own checks when the rollout is ours.

    Raises:
        SystemExit: with code 2, after a sentence for each problem on standard error.
    """
    for warning in find_warnings(config):
        logger.warning("%s", warning)
    problems = list(find_problems(config))
    if not problems:
        return
    for problem in problems:
        print(f"ascend_safe: {problem}", file=sys.stderr)
    raise SystemExit(2)


def find_problems(config: Any, environ: Mapping[str, str] = os.environ) -> Iterator[str]:
    """The problems of a job's config, one sentence each; first those of the installed verl itself."""
    for problem in compat.problems():
        yield f"{problem}: {compat.WHAT_TO_DO}"
    yield from _options(config)
    yield from _no_room_to_generate(config)
    try:
        facts = detect(environ)
    except PlatformError as error:
        yield str(error)
        return
    # The driver's machine says nothing about a cluster's devices and folders; verl checks a cluster's resources itself.
    if _ray_is_up():
        return
    cluster = _cluster(config, environ)
    if cluster is not None:
        yield from _cluster_settings(config, cluster)
        return
    yield from _model(config)
    yield from _resources(config, facts)
    yield from _policy(config, facts, environ)


def find_warnings(config: Any) -> Iterator[str]:
    """What runs, but perhaps not as it was meant; one sentence each."""
    prompt, response, limit, source = _lengths(config)
    if None not in (prompt, response, limit) and prompt < limit < prompt + response:  # type: ignore[operator]
        yield (
            f"data.max_prompt_length={prompt} and data.max_response_length={response} together exceed "
            f"{source}={limit}: the longest prompts will be answered in fewer tokens than you ask for"
        )


def _options(config: Any) -> Iterator[str]:
    try:
        AscendSafeOptions.from_rollout(config.actor_rollout_ref.rollout)
    except OptionError as error:
        yield str(error)


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


def _no_room_to_generate(config: Any) -> Iterator[str]:
    prompt, _, limit, source = _lengths(config)
    if prompt is not None and limit is not None and prompt >= limit:
        yield (
            f"data.max_prompt_length={prompt} leaves no room to generate below {source}={limit}: lower the one or "
            "raise the other"
        )


def _lengths(config: Any) -> tuple[int | None, int | None, int | None, str]:
    """Longest prompt and response, the engine's limit for both together in tokens, and where the limit comes from."""
    prompt = _number(config.data.get("max_prompt_length"))
    response = _number(config.data.get("max_response_length"))
    limit = _number(config.actor_rollout_ref.rollout.get("max_model_len"))
    if limit is not None:
        return prompt, response, limit, f"{ROLLOUT}.max_model_len"
    return prompt, response, _max_position_embeddings(config), f"max_position_embeddings of {MODEL}"


def _max_position_embeddings(config: Any) -> int | None:
    file = Path(str(config.actor_rollout_ref.model.path)).expanduser() / "config.json"
    try:
        return _number(json.loads(file.read_text(encoding="utf-8")).get("max_position_embeddings"))
    except (OSError, ValueError, AttributeError):
        return None


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _ray_init(config: Any) -> Mapping[str, Any]:
    found: Mapping[str, Any] = (config.get("ray_kwargs") or {}).get("ray_init") or {}
    return found


def _ray_is_up() -> bool:
    """Whether this process has joined a cluster already; verl then calls no `ray.init` (main_ppo.py:55)."""
    ray = sys.modules.get("ray")
    return bool(ray is not None and ray.is_initialized())


def _cluster(config: Any, environ: Mapping[str, str]) -> str | None:
    """The running cluster that the job will join, as words for a sentence; `None` where Ray is started for the job.

    Decided as Ray does it (ray 2.60, _private/services.py:413): the address, else RAY_ADDRESS, else the cluster that
    `ray start` has noted on this machine.
    """
    ray_init = _ray_init(config)
    address = ray_init.get("address")
    if address in (None, "auto"):
        if environ.get("RAY_ADDRESS"):
            address = environ["RAY_ADDRESS"]
        else:
            folder = ray_init.get("_temp_dir") or Path(
                environ.get("RAY_TMPDIR") or environ.get("TMPDIR") or "/tmp", "ray"
            )
            note = Path(folder, "ray_current_cluster")
            if note.is_file():
                return f"the Ray cluster of this machine ({note} names it)"
    return None if address in (None, "local") else f"the Ray cluster at {address}"


def _cluster_settings(config: Any, cluster: str) -> Iterator[str]:
    """What `ray.init` refuses where it joins a cluster (ray 2.60, _private/worker.py:1935)."""
    ray_init = _ray_init(config)
    given = [name for name in ("num_cpus", "num_gpus", "resources") if ray_init.get(name) is not None]
    if given:
        settings = ", ".join(f"ray_kwargs.ray_init.{name}" for name in given)
        yield (
            f"the job would join {cluster}, where Ray takes no {settings}: set to null what it does not take, or say "
            "+ray_kwargs.ray_init.address=local to start a Ray for this job"
        )


CPUS_FOR_A_WORKER = 3
"""verl's placement groups hold one for each role that may share a device (verl 0.9.1, RayResourcePool,
max_colocate_count=3)."""


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


def _resources(config: Any, facts: PlatformFacts) -> Iterator[str]:
    """Whether a Ray that is started here will have a device for each trainer worker."""
    trainer = config.trainer
    per_node, nodes = _number(trainer.get("n_gpus_per_node")), _number(trainer.get("nnodes"))
    if per_node is None or nodes is None:
        yield (
            f"trainer.n_gpus_per_node={trainer.get('n_gpus_per_node')} and trainer.nnodes={trainer.get('nnodes')} must "
            "be whole numbers: how many trainer workers a node has, and how many nodes there are"
        )
        return
    wanted = per_node * nodes
    ray_init = _ray_init(config)
    if facts.ray_resource == "GPU":
        offered, setting = ray_init.get("num_gpus"), "ray_kwargs.ray_init.num_gpus"
    else:
        offered = (ray_init.get("resources") or {}).get(facts.ray_resource)
        setting = f"ray_kwargs.ray_init.resources.{facts.ray_resource}"
    if offered is not None and (isinstance(offered, bool) or not isinstance(offered, int | float)):
        yield f"{setting}={offered} must be a number: how many devices Ray offers to this job"
        return
    cpus = ray_init.get("num_cpus") or os.cpu_count() or 0
    have = max(facts.device_count, _ray_would_find(facts.ray_resource)) if offered is None else offered
    if facts.name == "cpu" and offered is None:
        yield (
            f"Ray has no resource {facts.ray_resource!r} on a machine without an accelerator, and verl asks for "
            f"{wanted}: add +{setting}={wanted} (logical slots), or use --config-name=ascend_safe, which sets what a "
            "CPU needs; on a cluster, give its address"
        )
    elif have < wanted:
        yield (
            f"verl asks Ray for {wanted} {facts.ray_resource} (trainer.n_gpus_per_node={per_node} x "
            f"trainer.nnodes={nodes}) and this machine offers {have}"
            + ("" if offered is None else f" ({setting})")
            + ": lower trainer.n_gpus_per_node, or join a cluster with ray_kwargs.ray_init.address"
        )
    elif isinstance(cpus, int | float) and cpus < CPUS_FOR_A_WORKER * per_node:
        yield (
            f"verl asks Ray for {CPUS_FOR_A_WORKER} CPUs with each trainer worker, {CPUS_FOR_A_WORKER * per_node} on a "
            f"node, and this machine offers {cpus}, so that the job would wait for ever: set "
            "+ray_kwargs.ray_init.num_cpus to more (they are logical slots; 8 is enough for one worker)"
        )
    if facts.name == "cpu" and trainer.get("device") != "cpu":
        yield (
            f"trainer.device={trainer.get('device')} on a machine without an accelerator: set trainer.device=cpu, or "
            "use --config-name=ascend_safe; on a cluster, give its address"
        )


def _policy(config: Any, facts: PlatformFacts, environ: Mapping[str, str]) -> Iterator[str]:
    rollout = config.actor_rollout_ref.rollout
    try:
        policy.decide(facts, policy.Wishes.from_rollout(rollout, environ=environ))
    except OptionError:
        return  # said by _options
    except policy.PolicyError as error:
        yield str(error)
