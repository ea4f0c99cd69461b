"""The GPU kit's own parts (tests/gpu/kit.py), which need no GPU: what is carried, and how steps are supervised."""

from __future__ import annotations

import importlib
import json
import random
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file

from verl_ascend_rollout.options import WeightPath
from verl_ascend_rollout.tools.toy_model import Geometry

FOLDER = Path(__file__).resolve().parents[1] / "gpu"
MIB = 2**20


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, ModuleType]]:
    sys.path.insert(0, str(FOLDER))
    names = ("fatbin", "kit", "kit_steps", "kit_wheels", "weight_paths", "weight_state")
    yield {name: importlib.import_module(name) for name in names}
    sys.path.remove(str(FOLDER))
    for name in names:
        sys.modules.pop(name, None)


# Device code ---------------------------------------------------------------------------------------------------------

PTX, CODE = 1, 2
WIDE = 112
"""Bytes of an entry's header where there is more in it than in the shortest."""


def fat_binary(*entries: tuple[int, int, bytes], header: int = 64) -> bytes:
    body = b""
    for kind, architecture, code in entries:
        fixed = struct.pack("<HHIQQHHI", kind, 0x101, header, len(code), 0, 9, 0, architecture)
        body += fixed.ljust(header, b"\x7e") + code
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def library(*binaries: bytes) -> bytes:
    """A shared library with nothing in it but a section `.nv_fatbin`; fat binaries begin at multiples of eight."""
    section = b"".join(one.ljust(-(-len(one) // 8) * 8, b"\0") for one in binaries)
    names = b"\0.nv_fatbin\0.shstrtab\0"
    start, names_at = 64, 64 + len(section)
    table_at = -(-(names_at + len(names)) // 8) * 8
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header += struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 0, table_at, 0, 64, 0, 0, 64, 3, 2)
    sections = bytes(64)
    sections += struct.pack("<IIQQQQIIQQ", 1, 1, 2, 0, start, len(section), 0, 0, 8, 0)
    sections += struct.pack("<IIQQQQIIQQ", 12, 3, 0, 0, names_at, len(names), 0, 0, 1, 0)
    return (header + section + names).ljust(table_at, b"\0") + sections


def test_only_what_a_gpu_takes_is_left_of_the_device_code_and_nothing_moves(modules: dict[str, Any]) -> None:
    whole = library(
        fat_binary((CODE, 80, b"A" * 24), (CODE, 90, b"B" * 40), (PTX, 90, b"C" * 8), (CODE, 100, b"D" * 16)),
        fat_binary((PTX, 80, b"E" * 32), (CODE, 80, b"F" * 12), (PTX, 100, b"G" * 8), header=WIDE),
        fat_binary((CODE, 120, b"H" * 48)),
    )
    cut, left = modules["fatbin"].keep_only(whole, 90)
    kept = {letter for letter in b"ABCDEFGH" if bytes([letter]) * 8 in cut}
    # Its own code and PTX; where there is none, the PTX that the driver can compile for it.
    assert {chr(letter) for letter in kept} == {"B", "C", "E"}
    assert left == 40 + 8 + 32
    assert len(cut) == len(whole)
    differing = [index for index, (one, other) in enumerate(zip(whole, cut, strict=True)) if one != other]
    assert len(differing) == 24 + 16 + 12 + 8 + 48, "headers stay"


def test_device_code_in_a_form_that_is_not_known_is_refused(modules: dict[str, Any]) -> None:
    strange = library(fat_binary((7, 90, b"B" * 16)))
    with pytest.raises(modules["fatbin"].FatbinError, match="kind 7 that is not known"):
        modules["fatbin"].keep_only(strange, 90)
    with pytest.raises(modules["fatbin"].FatbinError, match="no fat binary of version 1"):
        modules["fatbin"].keep_only(library(b"something else entirely!"), 90)


def test_a_library_without_device_code_stays_as_it_is(modules: dict[str, Any]) -> None:
    assert modules["fatbin"].keep_only(Path(sys.executable).resolve().read_bytes(), 90)[1] == 0


# Wheels --------------------------------------------------------------------------------------------------------------


def make_wheel(folder: Path, name: str, version: str, files: dict[str, bytes]) -> Path:
    info = f"{name}-{version}.dist-info"
    files = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},sha256=x,{len(content)}\n" for path, content in files.items()) + f"{info}/RECORD,,\n"
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in {**files, f"{info}/RECORD": record.encode()}.items():
            archive.writestr(path, content)
    return wheel


def test_a_small_vllm_says_so_in_its_name_lists_what_it_has_and_is_installed_by_pip(
    modules: dict[str, Any], tmp_path: Path
) -> None:
    fat = library(fat_binary((CODE, 80, b"A" * 4000), (CODE, 90, b"B" * 40)))
    files = {
        "vllm/__init__.py": b"WORDS = 'vllm' * 3\n",
        "vllm/_C.so": fat,
        "vllm/vllm-rs": b"server" * 100,
    }
    small = modules["kit_wheels"].smaller(make_wheel(tmp_path, "vllm", "0.24.0", files), 90)
    assert small.name == "vllm-0.24.0-0sm90-py3-none-any.whl"
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(target)]
    done = subprocess.run([*pip, str(small)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (target / "vllm" / "__init__.py").read_bytes() == files["vllm/__init__.py"]
    assert not (target / "vllm" / "vllm-rs").exists()
    cut = (target / "vllm" / "_C.so").read_bytes()
    assert b"B" * 40 in cut and b"A" * 8 not in cut
    with zipfile.ZipFile(small) as archive:
        record = archive.read("vllm-0.24.0.dist-info/RECORD").decode().splitlines()
    (line,) = [line for line in record if line.startswith("vllm/_C.so,")]
    assert line.endswith(f",{len(cut)}") and "sha256=x" not in line
    assert not any("vllm-rs" in line for line in record)


def test_wheels_in_parts_come_together_again_and_a_part_that_is_missing_or_damaged_is_named(
    modules: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels = modules["kit_wheels"]
    source = random.Random(1)
    contents = {f"w{size}-1-py3-none-any.whl": source.randbytes(size * MIB // 2) for size in (1, 3, 9)}

    def download(wanted: list[str], into: Path) -> None:
        for name, content in contents.items():
            (into / name).write_bytes(content)

    monkeypatch.setattr(wheels, "_download", download)
    folder = tmp_path / "wheels"
    wheels.fetch(folder, [], None, 3 * MIB)
    parts = sorted(folder.glob("part-*"))
    assert len(parts) > 2
    assert all(sum(file.stat().st_size for file in part.iterdir()) <= 3 * MIB for part in parts)
    found = wheels.gather(folder, tmp_path / "joined")
    assert {path.name: path.read_bytes() for path in found} == contents
    with pytest.raises(wheels.KitError, match="is not empty"):
        wheels.fetch(folder, [], None, None)

    piece = next(folder.rglob("w9-*.whl.001"))
    piece.write_bytes(piece.read_bytes()[:-1])
    with pytest.raises(wheels.KitError, match=r"w9-1-py3-none-any.whl is not as it was fetched"):
        wheels.gather(folder, tmp_path / "joined")
    next(folder.rglob("w1-*.whl")).unlink()
    with pytest.raises(wheels.KitError, match=r"w1-1-py3-none-any.whl is missing"):
        wheels.gather(folder, tmp_path / "joined")


def test_what_the_machine_has_is_not_carried(
    modules: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels, asked = modules["kit_wheels"], []
    monkeypatch.setattr(wheels, "_download", lambda wanted, into: asked.extend(wanted))
    wheels.fetch(tmp_path / "wheels", ["NumPy", "opencv_python_headless==1"], None, None)
    names = {line.partition("==")[0] for line in asked}
    assert {"vllm", "verl", "ray", "transformers"} <= names
    assert not names & {"numpy", "opencv-python-headless", "torch", "triton"}
    assert not any(name.startswith("nvidia-") for name in names), "torch's own come with torch"
    assert "vllm==0.24.0" in asked and "verl==0.9.1" in asked


# Steps ---------------------------------------------------------------------------------------------------------------


def test_the_weight_paths_are_those_of_the_options(modules: dict[str, Any]) -> None:
    assert modules["kit_steps"].weight_paths() == [path for path in get_args(WeightPath) if path != "auto"]
    steps = modules["kit_steps"].steps(modules["kit_steps"].Context(Path(sys.executable), Path(), False))
    assert {f"weights-{path}" for path in get_args(WeightPath) if path != "auto"} <= {step.name for step in steps}


@pytest.mark.parametrize("rehearse", [False, True])
def test_each_step_runs_something_that_is_there(rehearse: bool, modules: dict[str, Any], tmp_path: Path) -> None:
    steps = modules["kit_steps"]
    context = steps.Context(Path(sys.executable), tmp_path, rehearse, brought=Path(sys.executable))
    names = [step.name for step in steps.steps(context)]
    assert len(set(names)) == len(names)
    for step in steps.steps(context):
        command = step.command(context, step.seconds)
        assert all(isinstance(word, str) for word in command)
        assert Path(command[0]) == Path(sys.executable)
        assert [word for word in command if word.endswith(".py") and not Path(word).is_file()] == []
        assert isinstance(step.figures(context.place(step.name)), dict), "nothing was written: no exception"


@pytest.mark.parametrize(("device", "host", "layers"), [(139, 500, 24), (139, 120, 19), (79, 500, 15), (8, 500, 1)])
def test_the_bench_takes_as_many_layers_as_fit(device: int, host: int, layers: int, modules: dict[str, Any]) -> None:
    steps = modules["kit_steps"]
    assert steps.layers_that_fit(device * 2**30, host * 2**30) == layers
    assert steps.host_memory() > 2**30


def test_the_bytes_that_the_bench_is_sized_by_are_those_of_its_geometry(modules: dict[str, Any]) -> None:
    steps = modules["kit_steps"]
    per_layer = Geometry(layers=2).bytes() - Geometry(layers=1).bytes()
    assert abs(per_layer - steps.LAYER_BYTES) < per_layer / 1000
    assert {name.replace("-", "_"): width for name, width in steps.WIDTHS.items()}.items() <= {
        "hidden": Geometry.hidden,
        "moe_intermediate": Geometry.moe_intermediate,
        "shared_intermediate": Geometry.shared_intermediate,
        "vocabulary": Geometry.vocabulary,
    }.items()
    assert Geometry.layers == steps.LAYERS


def in_a_process(out: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run code with `step`, which runs one step of the kit, and `run`, in a process of its own: a step ends with every
    process below the one that runs it, and that shall not be this one's."""
    begin = f"""
import sys
sys.path[:0] = [{str(FOLDER)!r}]
import kit, kit_steps
from pathlib import Path
context = kit_steps.Context(Path(sys.executable), Path({str(out)!r}), False)
context.environment = kit_steps.environment(False, {{}})
kit.become_subreaper()
run = kit.Run(context, None)
def step(name, code, seconds=60, **more):
    return run.step(kit_steps.Step(name, seconds, lambda context, limit: [sys.executable, "-c", code], **more))
"""
    command = [sys.executable, "-c", begin + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_a_step_that_hangs_ends_with_all_that_it_started_and_the_next_one_runs(tmp_path: Path) -> None:
    code = """
hang = '''
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
below = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", below], start_new_session=True, stdout=subprocess.PIPE)
child.stdout.readline()
print("hanging", flush=True)
time.sleep(600)
'''
kit.SIGTERM_SECONDS = kit.ORPHAN_SECONDS = 0.3
step("hangs", hang, 1)
step("fine", "print(1)")
assert kit.descendants() == [], kit.descendants()
print("\\n".join(run.lines()))
sys.exit(run.status())
"""
    done = in_a_process(tmp_path, code)
    assert done.returncode == 1, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [(one["step"], one["outcome"]) for one in summary["steps"]] == [("hangs", "timed out"), ("fine", "passed")]
    assert summary["steps"][0]["ended"] == 2
    assert "1 passed, 1 timed out" in done.stdout


def test_a_check_that_failed_gives_1_with_its_reason_and_what_passed_is_kept(tmp_path: Path) -> None:
    code = """
step("good", "print(1)", figures=lambda folder: {"seconds": 1.5})
assert run.status() == 0
step("bad", "raise SystemExit('the weights are wrong')")
step("wrong", "print(2)", figures=lambda folder: {"error": "3 tensors differ"})
sys.exit(run.status())
"""
    done = in_a_process(tmp_path, code)
    assert done.returncode == 1, done.stderr
    kept = json.loads((tmp_path / "summary.json").read_text())["steps"]
    assert [one["outcome"] for one in kept] == ["passed", "failed", "failed"]
    assert kept[0]["figures"] == {"seconds": 1.5}
    assert [one.get("error") for one in kept] == [None, "the weights are wrong", "3 tensors differ"]
    assert "the weights are wrong" in done.stdout


def test_a_step_for_which_no_time_is_left_is_not_run_and_not_passed(tmp_path: Path) -> None:
    done = in_a_process(tmp_path, "run.limit = 5\nprint(step('late', 'print(1)')['outcome'])\nsys.exit(run.status())")
    assert (done.returncode, done.stdout) == (1, "not run\n"), done.stderr


def test_a_rehearsal_says_what_a_cpu_does_not_have_and_passes(tmp_path: Path) -> None:
    code = """
left_out = kit_steps.on_a_gpu_only("vLLM has no graphs on a CPU")
run.context.rehearse = True
outcome = step("graphs", "raise SystemExit(1)", left_out=left_out)
assert (outcome["outcome"], outcome["error"]) == ("left out", "vLLM has no graphs on a CPU")
assert run.status() == 0
run.context.rehearse = False
assert step("graphs", "raise SystemExit(1)", left_out=left_out)["outcome"] == "failed"
"""
    done = in_a_process(tmp_path, code)
    assert done.returncode == 0, done.stderr


def test_a_checkpoint_of_the_matrix_and_its_spoiled_streams_are_what_they_say(
    modules: dict[str, Any], tmp_path: Path
) -> None:
    weight_paths = modules["weight_paths"]
    whole = load_file(weight_paths.make_checkpoint(tmp_path / "model", 0) / "model.safetensors")
    found = {}
    for case, (files, _) in weight_paths.malformed(whole).items():
        came = [(key, tensor) for file in files for key, tensor in file.items()]
        same = [key for key, tensor in came if key in whole and torch.equal(tensor, whole[key])]
        found[case] = (len(came) - len(whole), len(came) - len(same))
    assert found == {
        "an expert left out": (-1, 0),
        "a bias left out": (-1, 0),
        "the head left out": (-1, 0),
        "a name that the model does not have": (1, 1),
        "a norm too short": (0, 1),
        "NaN in an expert": (0, 1),
        "Inf in a norm": (0, 1),
        "a norm twice": (1, 0),
    }


# The command ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "COMMAND"),
        (("run", "--only", "nothing"), "invalid choice: 'nothing'"),
        (("run", "--minutes", "0"), "'0' is no number of minutes above 0"),
        (("fetch", "--wheels", "{new}", "--part-mib", "x"), "'x' is no whole number of MiB"),
        (("fetch", "--wheels", "{used}"), "is not empty: name a new folder"),
        (("run", "--out", "{new}"), "no GPU here"),
        (("bring", "--wheels", "{used}", "--venv", "{new}"), ""),
    ],
)
def test_a_usage_error_is_one_sentence_and_exit_status_2(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("x")
    command = [word.format(new=tmp_path / "new", used=tmp_path / "used") for word in words]
    environment = {"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(FOLDER / "kit.py"), *command],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_the_digest_that_carries_the_proof_is_of_the_bytes(modules: dict[str, Any]) -> None:
    # A control for the matrix: one bit, a transposition and another dtype all change it.
    digest = modules["weight_state"].digest
    one = torch.arange(12, dtype=torch.float32).view(3, 4).bfloat16()
    bit = one.clone()
    bit.view(torch.int16)[0, 0] ^= 1
    assert digest(one) == digest(one.clone())
    assert len({digest(each) for each in (one, bit, one.t(), one.half(), one.view(4, 3))}) == 5
    nan = one.clone()
    nan[0, 0] = float("nan")
    assert digest(nan) == digest(nan.clone())
