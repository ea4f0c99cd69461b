"""The stack that the other tests run on: what is installed, what is loaded, what is fake and says so.

And build.py's own command line, as far as it goes without building.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from importlib.metadata import entry_points, version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

EMULATOR = Path(__file__).resolve().parents[1]


def load_build() -> ModuleType:
    """build.py, which is a script."""
    spec = importlib.util.spec_from_file_location("emulator_build", EMULATOR / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


BUILD = load_build()
STACK = BUILD.choose(os.environ.get("FAKE_NPU_STACK"))
STACKS = BUILD.read_stacks()[1]


def run(*command: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """A new process, which has what this one has but for LD_LIBRARY_PATH."""
    kept = {name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"}
    # Device memory of its own: an engine of another test may hold all that is asked for here.
    environment = {**kept, "FAKE_CANN_RUN": "test_stack", **variables}
    arguments = [str(part) for part in command]
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300)


FACTS = """
import json, os, torch
x = torch.arange(6, dtype=torch.bfloat16, device="npu:0").view(2, 3)
import acl
maps = {line.split()[-1] for line in open("/proc/self/maps") if line.rstrip().endswith(".so")}
print("FACTS " + json.dumps({
    "available": torch.npu.is_available(),
    "count": torch.npu.device_count(),
    "soc": torch.npu.get_device_name(0),
    "product": (x @ x.t()).float().cpu().tolist(),
    "device": str((x + 1).device),
    "cann": sorted(path for path in maps if os.path.basename(path) in ("libascendcl.so", "libhccl.so")),
    "torch_npu": os.path.dirname(__import__("torch_npu").__file__),
    "acl_count": acl.rt.get_device_count(),
    "acl_soc": acl.get_soc_name(),
    "acl_memory": acl.rt.get_mem_info(1),
    "memory": torch.npu.mem_get_info(0),
}))
"""


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    """What a new process finds with nothing but `import torch`, two devices of one GiB and a named SoC."""
    asked = {"FAKE_CANN_DEVICES": "2", "FAKE_CANN_HBM_MB": "1024", "FAKE_CANN_SOC": "Ascend910B3"}
    done = run(sys.executable, "-c", FACTS, **asked)
    assert done.returncode == 0, done.stdout + done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("FACTS "))
    found: dict[str, Any] = json.loads(line.removeprefix("FACTS "))
    return found


# --- what is installed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("torch", STACK.torch),
        ("torch-npu", STACK.torch_npu),
        ("vllm", STACK.vllm_version),
        ("vllm-ascend", STACK.vllm_ascend),
    ],
)
def test_the_matrix_is_installed(name: str, wanted: str) -> None:
    # A local part (+cpu, +cu130) says how torch was built, which an index decides.
    assert Version(version(name)).public == wanted


def test_the_lock_is_installed() -> None:
    lines = [line for line in STACK.lock.read_text().splitlines() if line and not line.startswith("#")]
    wanted = [Requirement(line) for line in lines]
    wanted = [requirement for requirement in wanted if requirement.marker is None or requirement.marker.evaluate()]
    assert len(wanted) > 100
    found = {requirement.name: version(requirement.name) for requirement in wanted}
    assert [str(requirement) for requirement in wanted if found[requirement.name] not in requirement.specifier] == []


def test_the_label_names_what_is_real_and_what_is_not() -> None:
    from fake_npu.stack_label import label

    assert label() == (
        f"real torch-npu {version('torch-npu')}, vllm-ascend {version('vllm-ascend')}, vLLM {version('vllm')}"
        " on a stand-in CANN"
    )


def test_every_process_is_told_that_this_is_no_npu() -> None:
    code = "import os, sys; print('torch' in sys.modules, os.environ['ASCEND_STAND_IN'])"
    done = run(sys.executable, "-I", "-c", code)
    assert done.stdout == "False a stand-in CANN (fake_cann, on host memory)\n", done.stderr


@pytest.mark.parametrize(
    ("group", "name"),
    [
        ("torch.backends", "torch_npu"),
        ("torch.backends", "zz_fake_npu"),
        ("vllm.platform_plugins", "ascend"),
        ("vllm.platform_plugins", "fake_npu_torchair"),
        ("vllm.general_plugins", "fake_npu"),
        ("vllm.general_plugins", "fake_npu_device_print"),
        ("vllm.general_plugins", "ascend_safe"),
    ],
)
def test_entry_points_are_found_and_load(group: str, name: str) -> None:
    (found,) = [point for point in entry_points(group=group) if point.name == name]
    assert callable(found.load())


# --- what runs --------------------------------------------------------------------------------------------------------


def test_import_torch_is_enough(facts: dict[str, Any]) -> None:
    assert facts["available"] is True
    assert facts["count"] == 2
    assert facts["soc"] == "Ascend910B3"
    assert facts["device"] == "npu:0"
    assert facts["product"] == [[5.0, 14.0], [14.0, 50.0]]


def test_the_only_cann_is_ours(facts: dict[str, Any]) -> None:
    folder = os.path.realpath(os.path.join(facts["torch_npu"], "lib"))
    assert [os.path.realpath(path) for path in facts["cann"]] == [
        os.path.join(folder, "libascendcl.so"),
        os.path.join(folder, "libhccl.so"),
    ]


def test_pyacl_says_what_torch_says(facts: dict[str, Any]) -> None:
    assert facts["acl_count"] == [facts["count"], 0]
    assert facts["acl_soc"] == facts["soc"]
    free, total, code = facts["acl_memory"]
    assert (total, code) == (1024 << 20, 0)
    assert facts["memory"][1] == total
    assert 0 < free <= total


def test_pyacl_copies_and_refuses_what_it_has_not() -> None:
    import ctypes

    import acl

    source, target = ctypes.create_string_buffer(b"abcd", 4), ctypes.create_string_buffer(4)
    host_to_host = 0
    assert acl.rt.memcpy(ctypes.addressof(target), 4, ctypes.addressof(source), 4, host_to_host) == 0
    assert target.raw == b"abcd"
    with pytest.raises(AttributeError, match=r"acl\.rt\.launch_kernel.*fake_acl/acl/rt\.py"):
        acl.rt.launch_kernel()
    with pytest.raises(AttributeError, match=r"acl\.op.*fake_acl/acl/__init__\.py"):
        _ = acl.op


def test_vllm_ascends_compiled_library_loads() -> None:
    """Without LD_LIBRARY_PATH: the libraries of CANN that it names are there once torch_npu is."""
    code = "import torch, vllm_ascend.vllm_ascend_C as c; print(c.__file__, c.init_module, c.python_create_and_map)"
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "vllm_ascend_C" in done.stdout


def test_vllm_takes_the_ascend_platform() -> None:
    done = run(sys.executable, "-c", "from vllm.platforms import current_platform as p; print(type(p).__module__)")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "vllm_ascend.platform"


def test_a_missing_entry_point_of_cann_says_its_name() -> None:
    import torch_npu

    library = Path(torch_npu.__file__).parent / "lib" / BUILD.GAPS
    names = sorted(BUILD.dynamic_symbols(library, "defined"))
    # Not what the linker adds, such as _init.
    name = next(name for name in names if re.match(r"_ZN|[a-z]", name) and not name.startswith(BUILD.LOADED_SILENTLY))
    code = f"import sys, torch, ctypes; print('CODE', ctypes.CDLL(sys.argv[1])[{name!r}]())"
    done = run(sys.executable, "-c", code, library)
    assert f"CODE {BUILD.MISSING_RESULT}" in done.stdout
    assert re.search(rf"^fake CANN: {name} is missing: add it to emulator/fake_\w+", done.stderr, re.M)


def test_npu_smi_is_a_fake_that_answers_one_question() -> None:
    program = Path(sys.prefix) / "bin" / "npu-smi"
    assert program.read_text().splitlines()[1].startswith("# FAKE npu-smi")
    done = run(program, "info", "-t", "board", "-i", "1")
    assert done.returncode == 0
    assert re.search(r"Product Name +: FAKE", done.stdout)
    assert re.search(r"Software Version +: 25\.2\.0$", done.stdout, re.M)
    other = run(program, "info")
    assert other.returncode == 1
    assert "fake npu-smi: 'info' is not there" in other.stderr


@pytest.mark.skipif(
    not any(line.startswith("verl==") for line in STACK.lock.read_text().splitlines()),
    reason="accelerator stack without verl: its table in stacks.toml does not ask for it",
)
def test_verl_finds_the_fake_toolkit() -> None:
    from fake_npu.toolkit import environment

    code = "from verl.utils.device import get_npu_versions as v; print('FOUND', *v()[1:])"
    # verl's own name for the platform.
    done = run(sys.executable, "-c", code, **environment(), VERL_PLATFORM="huawei")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"FOUND 25.2.0 {BUILD.CANN}" in done.stdout


# --- the matrix and build.py ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(STACKS))
def test_each_stack_has_a_lock_without_torch_and_without_an_address(name: str) -> None:
    text = STACKS[name].lock.read_text()
    names = [re.split(r"[=< ]", line)[0] for line in text.splitlines() if line and not line.startswith("#")]
    assert not {"torch", "torch-npu", "triton", "vllm-ascend"} & set(names)
    assert not [name for name in names if name.startswith("nvidia-")]
    assert "pytest" in names
    assert "://" not in text
    # All pinned, so that a build is the same next year.
    assert len(re.findall(r"^[^#\s][^=\n]*==", text, re.M)) == len(names)


@pytest.mark.parametrize("name", sorted(STACKS))
def test_each_stack_says_what_its_release_pins_and_where_it_departs(name: str) -> None:
    stack = STACKS[name]
    pinned = dict(entry.split(" ", 1) for entry in stack.pins)
    departed = " ".join(stack.departs)
    assert stack.vllm_version == pinned["vLLM"]
    for package, here in (("torch", stack.torch), ("torch-npu", stack.torch_npu)):
        assert here == pinned[package] or f"{package} {here}" in departed, package
    assert "triton-ascend" not in pinned or "triton-ascend" in departed


def build_py(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, EMULATOR / "build.py", *arguments)


def test_list_prints_the_matrix() -> None:
    done = build_py("--list")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    for stack in STACKS.values():
        (row,) = [row for row in rows if row and row[0] == stack.name and row[1] not in ("departs:", "lacks:")]
        assert {stack.vllm_ascend, stack.vllm_version, stack.torch_npu, stack.torch} <= set(row)


def test_an_unknown_stack_is_wrong_usage_and_lists_the_known() -> None:
    done = build_py("--stack", "9.9")
    assert done.returncode == 2
    assert done.stderr == f"build.py: there is no stack '9.9': stacks.toml has {', '.join(STACKS)}\n"
    assert done.stdout == ""


def test_an_unknown_option_is_wrong_usage() -> None:
    assert build_py("--stak", "0.28").returncode == 2


def test_a_step_that_fails_is_one_sentence_and_exit_code_1(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    done = build_py("--venv", tmp_path / "file" / "venv")
    assert done.returncode == 1
    assert re.match(r"build\.py: step 'virtual environment' of stack [0-9.]+: .*\n", done.stderr)
    assert "Traceback" not in done.stderr
