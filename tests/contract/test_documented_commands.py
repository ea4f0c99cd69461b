"""The recipes' command lines, as their READMEs give them, composed by verl itself: `--cfg job`, nothing is started."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


def documented() -> list[tuple[str, str]]:
    """Every command of a recipe's README that trains with a model of full size, and the recipe."""
    found = []
    for readme in sorted(ROOT.glob("recipes/grpo_qwen*/README.md")):
        for line in re.findall(r"^    (.*run\.sh.*)$", readme.read_text(encoding="utf-8"), re.MULTILINE):
            command = re.split(r"\s#\s|\s>\s", line)[0].strip()
            if not command.startswith("ray "):
                found.append((readme.parent.name, command))
    return sorted(set(found))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """gsm8k, of two questions, made by the recipes' own script."""
    folder = tmp_path_factory.mktemp("gsm8k")
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text('{"question": "1+1000?", "answer": "So\\n#### 1,001"}\n')
    script = [sys.executable, str(ROOT / "recipes/prepare_gsm8k.py"), str(folder), "--out", str(folder / "out")]
    subprocess.run(script, check=True, capture_output=True, timeout=120)
    return folder / "out"


def test_the_data_is_what_verls_reward_reads(data: Path) -> None:
    import pyarrow.parquet as parquet
    from verl.utils.reward_score import default_compute_score

    (row,) = parquet.read_table(data / "train.parquet").to_pylist()
    truth = row["reward_model"]["ground_truth"]
    assert truth == "1001" and row["prompt"][0]["role"] == "user"
    assert default_compute_score(row["data_source"], "so #### 1001", truth) == 1.0
    assert default_compute_score(row["data_source"], "so #### 1000", truth) == 0.0


def test_a_folder_without_the_data_is_one_sentence(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "recipes/prepare_gsm8k.py"), str(tmp_path), "--out", str(tmp_path / "out")]
    done = subprocess.run(script, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "train.jsonl" in done.stderr


def test_there_are_commands_of_both_recipes() -> None:
    assert {recipe for recipe, _ in documented()} == {"grpo_qwen1_5_moe", "grpo_qwen3_30b_a3b"}
    assert len(documented()) >= 8


@pytest.mark.parametrize(("recipe", "command"), documented(), ids=lambda value: value if "run.sh" in value else "")
def test_verl_composes_it(recipe: str, command: str, data: Path, tmp_path: Path) -> None:
    """On this machine, which has no device: with a platform where the command names none."""
    words = shlex.split(command)
    environ = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path / "out")}
    environ.pop("VERL_PLATFORM", None)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, _, value = words.pop(0).partition("=")
        environ[name] = value
    environ["DATA"] = str(data)
    script, given = words[0], words[1:]
    wanted = "vllm" if "rollout=vllm" in given else "ascend_safe"
    given += [] if "--cfg" in given else ["--cfg", "job"]
    megatron = environ.get("TRAINER") == "megatron"
    if not megatron and not any(word.startswith("platform=") for word in given):
        given.append("platform=npu")
    path = ROOT / script if script.startswith("recipes/") else ROOT / "recipes" / recipe / script
    done = subprocess.run(
        [str(path), *given], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    config = yaml.safe_load(done.stdout)
    rollout, actor = config["actor_rollout_ref"]["rollout"], config["actor_rollout_ref"]["actor"]
    assert rollout["name"] == wanted
    assert config["trainer"]["n_gpus_per_node"] == int(environ.get("DEVICES", 8))
    assert actor["strategy"] == ("megatron" if megatron else "fsdp2")
    if megatron:
        assert actor["megatron"]["expert_model_parallel_size"] == int(environ["TRAIN_EP"])
        assert actor["megatron"]["tensor_model_parallel_size"] == int(environ["TRAIN_TP"])
    else:
        assert actor["fsdp_config"]["param_offload"] is True
