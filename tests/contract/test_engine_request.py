"""One request, read from the config class that the rollout server has and from the file of `explain --config`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from verl_ascend_rollout.policy import job_config
from verl_ascend_rollout.policy.engine_args import EngineRequest

SETTINGS: dict[str, Any] = {
    "enforce_eager": None,
    "enable_sleep_mode": False,
    "free_cache_engine": False,
    "cudagraph_capture_sizes": [1, 2, 4],
    "tensor_model_parallel_size": 2,
    "data_parallel_size": 2,
    "expert_parallel_size": 4,
    "max_num_seqs": 100,
    "engine_kwargs": {
        "vllm": {"compilation_config": {"cudagraph_mode": "PIECEWISE"}, "additional_config": None},
        "ascend_safe": {"kv_release": "keep", "on_unsafe": None},
    },
}


@pytest.mark.parametrize("settings", [{}, SETTINGS])
def test_the_servers_config_and_the_file_give_the_same_wishes(tmp_path: Path, settings: dict[str, Any]) -> None:
    import verl
    from omegaconf import OmegaConf
    from verl.utils.config import omega_conf_to_dataclass

    stock = Path(verl.__file__).parent / "trainer" / "config" / "rollout" / "rollout.yaml"
    node = OmegaConf.load(stock)
    node.update({"name": "ascend_safe", **settings})
    whole = OmegaConf.create({"actor_rollout_ref": {"rollout": node}})
    # What hydra puts in from other files; no request depends on it.
    for name, value in list(OmegaConf.to_container(node, resolve=False).items()):
        if isinstance(value, str) and "${" in value:
            whole.actor_rollout_ref.rollout[name] = None
    file = tmp_path / "config.yaml"
    OmegaConf.save(whole, file)
    from_file = job_config.read(str(file)).request
    config = omega_conf_to_dataclass(whole.actor_rollout_ref.rollout)
    assert type(config).__name__ == "RolloutConfig"
    assert EngineRequest.from_rollout(config) == from_file
    if settings:
        assert from_file.max_num_seqs == 100
        assert from_file.cudagraph_capture_sizes == (1, 2, 4)
        assert from_file.kv_release == "keep"
        assert from_file.expert_parallel
        assert from_file.compilation_config["cudagraph_mode"] == "PIECEWISE"
    else:
        assert (from_file.enable_sleep_mode, from_file.max_num_seqs, from_file.mtp) == (True, 256, False)
