"""The machine and its environment variables: what a job would trip over before, or after, its engine is up."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from verl_ascend_rollout import ROLLOUT_NAME
from verl_ascend_rollout.platforms import npu
from verl_ascend_rollout.platforms.base import PlatformFacts
from verl_ascend_rollout.platforms.detect import OVERRIDE
from verl_ascend_rollout.platforms.installed import OURS
from verl_ascend_rollout.plugin import PLUGINS_VARIABLE
from verl_ascend_rollout.policy import engine_args, releases
from verl_ascend_rollout.policy import npu as npu_policy
from verl_ascend_rollout.policy.decision import shown
from verl_ascend_rollout.tools.doctor.checks import failed, passed, tried, unknown, warned
from verl_ascend_rollout.tools.doctor.source import Sources
from verl_ascend_rollout.tools.report import Check, Evidence

MIB = 2**20

SHM_LEAST = 512 * MIB
"""One message queue of vLLM's is 10 chunks of 16 MiB (vllm 0.28, envs.py, VLLM_MQ_MAX_CHUNK_BYTES_MB, and
distributed/device_communicators/shm_broadcast.py), and an engine has two; docker gives 64 MiB unless told otherwise."""

SHM_ENOUGH = 4096 * MIB
"""Two buckets of verl's own weight transport, of 2048 MB each (verl 0.9.1, workers/config/rollout.py:135)."""

FILES_LEAST = 4096
"""Below it Ray warns of connection errors (ray 2.60, _private/worker.py:1775)."""

FILES_ENOUGH = 8192
"""What Ray recommends there."""

RAY_RAISES_TO = 65536
"""Ray raises the soft limit by itself, up to this or the hard limit (ray 2.60, _private/worker.py:1766)."""

SOCKET_PATH = 107
"""Bytes of a path that a socket's address has room for (unix(7))."""

RAY_SOCKET = "ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store"
VLLM_SOCKET = "01234567-89ab-cdef-0123-456789abcdef"

VLLM_PLUGINS = "VLLM_PLUGINS"


@dataclass(frozen=True)
class Machine:
    """What was measured of the machine."""

    shm_total: int | None  # bytes of /dev/shm; `None` where there is none
    shm_free: int | None
    files_soft: int  # limits on open files
    files_hard: int
    temporary: Path  # the folder for temporary files

    @classmethod
    def measure(cls) -> Machine:
        """Look at this machine."""
        import resource

        total = free = None
        with contextlib.suppress(OSError):
            status = os.statvfs("/dev/shm")
            total, free = status.f_frsize * status.f_blocks, status.f_frsize * status.f_bavail
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        soft, hard = (2**31 if limit == resource.RLIM_INFINITY else limit for limit in limits)
        return cls(total, free, soft, hard, Path(tempfile.gettempdir()))


def check_environment(facts: PlatformFacts, environ: Mapping[str, str], sources: Sources) -> Iterator[Check]:
    """Yield the variables, then the machine."""
    yield platform_name(facts, environ)
    yield devices(facts, environ)
    yield ray_variables(facts, environ, sources)
    yield nz_layout(facts, environ)
    yield expandable_segments(facts, environ)
    yield policy_conflicts(facts, environ)
    machine = Machine.measure()
    yield shared_memory(machine)
    yield open_files(machine)
    yield sockets(machine, environ)


def _variable(environ: Mapping[str, str], name: str) -> Evidence:
    return tried(f"{name}={environ[name]}" if name in environ else f"{name} is not set")


def platform_name(facts: PlatformFacts, environ: Mapping[str, str]) -> Check:
    """VERL_PLATFORM: a name that exists, and one that this installation can serve."""
    name, wanted = "env.verl-platform", environ.get(OVERRIDE, "").strip()
    evidence = (_variable(environ, OVERRIDE), *map(tried, facts.evidence))
    if wanted and facts.name == "npu" and "torch-npu" not in facts.versions:
        summary = f"{OVERRIDE}={wanted} asks for Ascend NPUs, and torch-npu is not installed"
        return failed(name, summary, f"install torch-npu, or unset {OVERRIDE} to have the platform found", *evidence)
    if wanted and wanted.lower() != facts.verl_name:
        summary = f"{OVERRIDE}={wanted} is {facts.verl_name} to verl, which this plug-in registers under both names"
        registers = Evidence("verl/plugin/platform/platform_npu.py", "verl 0.9.1 registers huawei, nvidia and amd")
        return passed(name, summary, *evidence, registers, risk="medium")
    return passed(name, f"the platform is {facts.name} ({facts.verl_name} to verl)", *evidence, risk="medium")


def devices(facts: PlatformFacts, environ: Mapping[str, str]) -> Check:
    """Whether the devices are visible to this process."""
    name = facts.visible_devices_variable
    evidence = _variable(environ, name)
    if facts.name == "cpu" or facts.device_count:
        summary = "a CPU needs no devices" if facts.name == "cpu" else f"{facts.device_count} devices are visible"
        return passed("env.devices", summary, evidence, risk="none")
    hidden = f", {name} hides them" if name in environ else ""
    summary = f"no device is visible here{hidden}: right on a head node, wrong where the engine is to run"
    advice = "run doctor where the devices are; a container has those that it was given (docker/README.md)"
    return warned("env.devices", summary, f"unset {name}, or {advice}" if name in environ else advice, evidence)


def ray_variables(facts: PlatformFacts, environ: Mapping[str, str], sources: Sources) -> Check:
    """RAY_EXPERIMENTAL_NOSET_*: names that Ray reads, all or none of them set to a true value."""
    prefix = "RAY_EXPERIMENTAL_NOSET_"
    folder = "ray/_private/accelerators"
    known: dict[str, str] = {}
    for module in ("nvidia_gpu", "npu", "amd_gpu", "hpu", "neuron", "tpu", "intel_gpu", "rbln", "metax_gpu", "furiosa"):
        file = f"{folder}/{module}.py"
        for number, line in enumerate((sources.read(file) or "").splitlines(), 1):
            for name in re.findall(rf"{prefix}\w+", line):
                known.setdefault(name, f"{file}:{number}")
    setting = sorted(name for name in environ if name.startswith(prefix))
    strange = [name for name in setting if known and name not in known]
    right = f"{prefix}{facts.visible_devices_variable}"
    evidence = [_variable(environ, name) for name in setting or [right]]
    if right in known:
        evidence.append(Evidence(known[right], f"Ray reads {right}"))
    if strange:
        summary = f"Ray reads no variable {' and no '.join(strange)}: it has no effect"
        advice = f"set {right}=1 instead, if Ray is to leave {facts.visible_devices_variable} alone"
        return failed("env.ray", summary, advice, *evidence)
    return passed("env.ray", "Ray's device variables have names that Ray reads", *evidence, risk="medium")


def nz_layout(facts: PlatformFacts, environ: Mapping[str, str]) -> Check:
    """VLLM_ASCEND_ENABLE_NZ: weights in NZ layout cannot be written by a weight sync."""
    name = npu_policy.NZ_VARIABLE
    setting, default = _variable(environ, name), Evidence("vllm_ascend/envs.py", "the default is 1 (0.11 to 0.23)")
    if facts.name != "npu":
        return Check("env.nz", "skip", "weights have an NZ layout on Ascend only", (setting,))
    if not releases.ENVIRONMENT.may_be_in(releases.vllm_ascend_release(facts)):
        return passed("env.nz", f"this vllm-ascend does not read {name}: its setting weight_nz_mode decides", setting)
    if npu_policy.nz_is_on(environ):
        summary = f"{name}={environ[name]} puts weights into NZ layout, which no weight sync can write: the engine "
        advice = f"set {name}=0, or unset it: {ROLLOUT_NAME} sets it before the worker starts"
        return failed("env.nz", f"{summary}refuses to wake up", advice, setting, default)
    summary = f"{ROLLOUT_NAME} sets {name}=0 before the worker starts" if name not in environ else "NZ layout is off"
    return passed("env.nz", summary, setting, default)


def expandable_segments(facts: PlatformFacts, environ: Mapping[str, str]) -> Check:
    """PYTORCH_NPU_ALLOC_CONF: the allocator of sleep mode refuses expandable segments."""
    name, variable = "env.expandable-segments", npu_policy.ALLOCATOR_VARIABLE
    if facts.name != "npu":
        return Check(name, "skip", "the allocator that refuses them is Ascend's")
    camem = Evidence("vllm_ascend/device_allocator/camem.py", "asserts that they are off")
    evidence = (_variable(environ, variable), camem)
    if npu_policy.expandable_segments(environ):
        summary = f"{variable} turns expandable_segments on, which sleep mode's allocator refuses"
        return failed(name, summary, f"take expandable_segments:True out of {variable}", *evidence)
    return passed(name, "expandable_segments is not turned on", *evidence)


def policy_conflicts(facts: PlatformFacts, environ: Mapping[str, str]) -> Check:
    """Whether the policy can decide here at all, with this environment and verl's default settings."""
    try:
        decided = engine_args.decide(facts, engine_args.EngineRequest(environ=environ))
    except engine_args.PolicyError as error:
        return failed("env.policy", str(error), "`ascend-safe explain` prints every decision")
    values = ", ".join(f"{name} {shown(decided[name].value)}" for name in ("enforce_eager", "kv_release"))
    return passed("env.policy", f"the policy decides: {values}", confidence="inferred", risk="medium")


def shared_memory(machine: Machine) -> Check:
    """/dev/shm: its size."""
    if machine.shm_total is None or machine.shm_free is None:
        summary = "there is no /dev/shm: vLLM's processes and Ray's object store share memory there"
        return failed("env.shm", summary, "mount a tmpfs on /dev/shm", tried("/dev/shm cannot be looked at"))
    sizes = f"/dev/shm has {machine.shm_total / MIB:.0f} MiB, of which {machine.shm_free / MIB:.0f} MiB are free"
    advice = "start the container with --shm-size=16g or more, or with --ipc=host; and remove what old jobs left there"
    if machine.shm_total < SHM_LEAST:
        summary = f"{sizes}: less than the {SHM_LEAST // MIB} MiB that an engine's message queues want"
        return failed("env.shm", summary, advice, tried(sizes))
    if machine.shm_free < SHM_ENOUGH:
        summary = (
            f"{sizes}: verl's own weight transport takes up to {SHM_ENOUGH // MIB} MiB of it where device memory "
            "cannot be shared, and Ray puts its object store on disk"
        )
        return warned("env.shm", summary, advice, tried(sizes))
    return passed("env.shm", sizes, tried(sizes), risk="medium")


def open_files(machine: Machine) -> Check:
    """Check the limit on open files, as it will be once Ray has raised it."""
    limit = max(machine.files_soft, min(machine.files_hard, RAY_RAISES_TO))
    evidence = tried(f"soft limit {machine.files_soft}, hard limit {machine.files_hard}")
    advice = f"ulimit -Hn {FILES_ENOUGH} or more, or --ulimit nofile={RAY_RAISES_TO} for a container"
    summary = f"a process may open {limit} files"
    if limit < FILES_LEAST:
        return failed("env.open-files", f"{summary}: below {FILES_LEAST} Ray's connections fail", advice, evidence)
    if limit < FILES_ENOUGH:
        return warned("env.open-files", f"{summary}; Ray recommends {FILES_ENOUGH}", advice, evidence)
    return passed("env.open-files", summary, evidence, risk="medium")


def sockets(machine: Machine, environ: Mapping[str, str]) -> Check:
    """Check the folders in which sockets are made: writable, and short enough for a socket's address."""
    ray = Path(environ.get("RAY_TMPDIR") or environ.get("TMPDIR") or "/tmp")
    vllm = Path(environ.get("VLLM_RPC_BASE_PATH") or machine.temporary)
    places = [
        ("Ray", "RAY_TMPDIR", ray, RAY_SOCKET),
        ("vLLM", "VLLM_RPC_BASE_PATH", vllm, VLLM_SOCKET),
        ("verl", "/tmp, which verl has written out", Path("/tmp"), "rl-colocate-zmq-0123456789-replica-0-rank-00.sock"),
    ]
    problems, evidence = [], []
    for who, setting, folder, socket in places:
        length = len(os.fsencode(folder / socket))
        evidence.append(tried(f"{who}'s sockets are in {folder} ({length} bytes for a path)"))
        problem = ""
        if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
            problem = f"{who} cannot make its sockets in {folder}, which is not a folder that can be written to"
        elif length > SOCKET_PATH:
            room = f"a path would have {length} bytes, and an address has room for {SOCKET_PATH}"
            problem = f"{folder} is too long for {who}'s sockets: {room}"
        problems += [f"{problem} ({setting})"] if problem else []
    if problems:
        advice = "set TMPDIR, RAY_TMPDIR and VLLM_RPC_BASE_PATH to a short folder on a local disk, such as /tmp"
        return failed("env.sockets", "; ".join(problems), advice, *evidence)
    return passed("env.sockets", "sockets can be made where Ray, vLLM and verl make them", *evidence, risk="none")


def plug_in(entry_points: Mapping[str, tuple[str, ...]], environ: Mapping[str, str]) -> Iterator[Check]:
    """Whether verl and vLLM will load us in each of their processes."""
    for who, group, variable in (
        ("verl", "verl.plugins", PLUGINS_VARIABLE),
        ("vLLM", "vllm.general_plugins", VLLM_PLUGINS),
    ):
        name, value = f"plug-in.{who.lower()}", environ.get(variable)
        points = entry_points.get(group, ())
        evidence = (
            _variable(environ, variable),
            Evidence(f"{OURS}, entry_points.txt", f"{group}: {', '.join(points) or 'nothing'}"),
        )
        # verl reads its variable without case, and has two words of its own (0.9.1, verl/__init__.py:57-66).
        said = value.lower() if value is not None and who == "verl" else value
        named = {part.strip() for part in (said or "").split(",")}
        every = said is None or (who == "verl" and said.strip() == "auto")
        if ROLLOUT_NAME not in points:
            summary = (
                f"{who} finds no entry point {ROLLOUT_NAME} in {group}: {OURS} is not installed in this environment, "
                "only its source can be imported"
            )
            yield failed(name, summary, f"pip install {OURS}, from its checkout: pip install .", *evidence)
        elif not (every or ROLLOUT_NAME in named):
            others = f"{value}," if named - {"", "none"} else ""
            summary = f"{variable}={value} keeps {who} from loading {ROLLOUT_NAME}"
            yield failed(name, summary, f"unset {variable}, or set it to {others}{ROLLOUT_NAME}", *evidence)
        else:
            yield passed(name, f"{who} loads {ROLLOUT_NAME} in each of its processes", *evidence, confidence="read")


def built_for(facts: PlatformFacts, sources: Sources, chip: str | None = None, planned: bool = False) -> Check:
    """For which SoC the vllm-ascend wheel was built, and whether that is the one here.

    Args:
        chip: its name by npu-smi, where it was asked; else the chip is not known.
        planned: the facts are of a machine that is only planned, whose chip is the one in them.
    """
    name, file = "soc.built-for", "vllm_ascend/_build_info.py"
    if not sources.has("vllm_ascend"):
        return Check(name, "skip", "vllm-ascend is not installed")
    form = re.compile(r"__(?:device_type|soc_version)__\s*=\s*\W*(?:AscendDeviceType\.)?_?(\w+)")
    lines = enumerate((sources.read(file) or "").splitlines(), 1)
    number, line, word = next(((at, line, found[1]) for at, line in lines if (found := form.match(line))), (0, "", ""))
    if not word:
        summary = "vllm-ascend does not say for which SoC it was built"
        return unknown(name, summary, "", Evidence(file, "is missing, or has no device type"), confidence="read")
    built = npu.soc_named(word) or word.upper()
    evidence = [Evidence(f"{file}:{number}", line)]
    here = facts.soc if planned else npu.soc_of(chip) if chip else None
    if chip:
        evidence.append(Evidence("npu-smi", f"the chip is {chip}"))
    if here is None:
        which = "it is for" if planned else "is here"
        advice = "say --soc A2, A3, ... with --for" if planned else "see whether `npu-smi info` names the chip"
        summary = f"vllm-ascend is built for {built}, and which chip {which} is not known"
        return unknown(name, summary, advice, *evidence, confidence="read")
    where = "planned" if planned else "here"
    if built != here:
        summary = f"vllm-ascend is built for {built}, and the chip {where} is {here}{f' ({chip})' if chip else ''}"
        advice = f"take vllm-ascend's image for {here}, or build it here: wheels on package indexes are for A2"
        return failed(name, summary, advice, *evidence, confidence="read" if planned else "measured")
    return passed(name, f"vllm-ascend is built for {here}, the chip {where}", *evidence)
