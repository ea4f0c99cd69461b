"""What the user asks for, and for which model: the half of a decision that no machine can tell.

Read from verl's rollout config (`Wishes.from_rollout`) in the rollout server, and from a file by `ascend-safe explain`:
one reading, so that both decide the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from verl_ascend_rollout.options import AscendSafeOptions, KVRung, OnUnsafe, WeightPath

ROLLOUT = "actor_rollout_ref.rollout"
VLLM_KWARGS = f"{ROLLOUT}.engine_kwargs.vllm"
KV_RUNG = f"{ROLLOUT}.engine_kwargs.ascend_safe.kv_rung"
WEIGHT_PATH = f"{ROLLOUT}.engine_kwargs.ascend_safe.weight_path"
ON_UNSAFE = f"{ROLLOUT}.engine_kwargs.ascend_safe.on_unsafe"


@dataclass(frozen=True)
class ModelFacts:
    """What of a model's own configuration (its `config.json`) matters to a decision; `None`: not known.

    Attributes:
        model_type: the `model_type` of the configuration: `qwen2_moe`, ...
        layers: how many hidden layers the model has.
        experts: how many routed experts each MoE layer has; 0 for a dense model.
        head_size: numbers in one attention head; `None` also where attention has no one head size (MLA).
    """

    model_type: str | None = None
    layers: int | None = None
    experts: int | None = None
    head_size: int | None = None

    @classmethod
    def from_config(cls, config: Any) -> ModelFacts:
        """Read a Hugging Face configuration, as an object or as the mapping in `config.json`."""
        model_type = _get(config, "model_type")
        text = _get(config, "text_config") or config  # vision-language models keep the language model's below
        heads, hidden = _get(text, "num_attention_heads"), _get(text, "hidden_size")
        head_size = _get(text, "head_dim")
        if head_size is None and heads and hidden:
            head_size = hidden // heads
        if _get(text, "kv_lora_rank"):
            head_size = None
        # The names under which vLLM looks too (vllm 0.28, vllm/transformers_utils/model_arch_config_convertor.py:186).
        names = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")
        found = [number[0] if isinstance(number, list) else number for number in (_get(text, name) for name in names)]
        experts = next((number for number in found if isinstance(number, int)), None)
        layers = _get(text, "num_hidden_layers")
        if experts is None and layers and not _get(text, "block_configs"):
            experts = 0  # the configuration of a model without experts names none
        return cls(
            model_type=str(model_type) if model_type else None,
            layers=layers if isinstance(layers, int) else None,
            experts=experts,
            head_size=head_size if isinstance(head_size, int) else None,
        )


@dataclass(frozen=True)
class Wishes:
    """What the user set, as far as it matters to a decision.

    Attributes:
        enforce_eager: `rollout.enforce_eager`; `None` leaves it to us.
        enable_sleep_mode: `rollout.enable_sleep_mode` (verl's default is True).
        free_cache_engine: `rollout.free_cache_engine`: whether the KV cache is given back during training.
        kv_rung: our option `kv_rung`.
        weight_path: our option `weight_path`.
        on_unsafe: our option `on_unsafe`.
        expert_parallel_size: over how many devices the experts are spread; 1 is no expert parallelism.
        tensor_parallel_size, data_parallel_size: over how many devices the engine is spread; verl's names for them are
            `tensor_model_parallel_size` and `data_parallel_size`.
        max_num_seqs: how many sequences the engine decodes at once (verl's default is 256).
        cudagraph_capture_sizes: `rollout.cudagraph_capture_sizes`; `None` leaves it to us, and to vLLM.
        lora: adapters are trained, and only they are sent to the engine.
        mtp: the engine drafts with the model's multi-token prediction layers.
        model: what is known of the model.
        engine_kwargs: `rollout.engine_kwargs.vllm`, which verl merges last into vLLM's arguments (verl 0.9.1,
            vllm_async_server.py:349): what is in here goes before the fields above, save for the capture sizes
            (:321-322) and expert parallelism (:402), which verl sets from its own fields.
        environ: the environment variables that the engine would start with.
    """

    enforce_eager: bool | None = None
    enable_sleep_mode: bool = True
    free_cache_engine: bool = True
    kv_rung: KVRung = "auto"
    weight_path: WeightPath = "auto"
    on_unsafe: OnUnsafe = "keep"
    expert_parallel_size: int = 1
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    max_num_seqs: int = 256
    cudagraph_capture_sizes: tuple[int, ...] | None = None
    lora: bool = False
    mtp: bool = False
    model: ModelFacts = field(default_factory=ModelFacts)
    engine_kwargs: Mapping[str, Any] = field(default_factory=dict)
    environ: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_rollout(
        cls,
        rollout: Any,
        *,
        lora: bool = False,
        model: ModelFacts | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Wishes:
        """Read verl's rollout config: its dataclass, or a mapping, in which a key that is missing has verl's default.

        Raises:
            OptionError: an option of ours that does not exist, or a value that it cannot have.
        """
        options = AscendSafeOptions.from_rollout(rollout)

        def get(name: str, default: Any) -> Any:
            value = _get(rollout, name)
            return default if value is None else value

        sizes = _get(rollout, "cudagraph_capture_sizes")
        mtp = _get(rollout, "mtp")
        return cls(
            enforce_eager=_get(rollout, "enforce_eager"),
            enable_sleep_mode=bool(get("enable_sleep_mode", True)),
            free_cache_engine=bool(get("free_cache_engine", True)),
            kv_rung=options.kv_rung,
            weight_path=options.weight_path,
            on_unsafe=options.on_unsafe,
            expert_parallel_size=int(get("expert_parallel_size", 1)),
            tensor_parallel_size=int(get("tensor_model_parallel_size", 1)),
            data_parallel_size=int(get("data_parallel_size", 1)),
            max_num_seqs=int(get("max_num_seqs", 256)),
            cudagraph_capture_sizes=tuple(int(size) for size in sizes) if sizes else None,
            lora=lora,
            mtp=bool(mtp is not None and _get(mtp, "enable") and _get(mtp, "enable_rollout")),
            model=model or ModelFacts(),
            engine_kwargs=dict((_get(rollout, "engine_kwargs") or {}).get("vllm") or {}),
            environ=dict(environ or {}),
        )

    @property
    def expert_parallel(self) -> bool:
        """Whether verl will switch expert parallelism on."""
        return self.expert_parallel_size > 1

    def bool_of(self, name: str, value: bool | None) -> tuple[bool | None, str]:
        """A value and where it was set: `engine_kwargs.vllm` goes last, and so before the field of verl's."""
        passed = self.engine_kwargs.get(name)
        if passed is not None:
            return bool(passed), f"{VLLM_KWARGS}.{name}"
        return value, f"{ROLLOUT}.{name}"

    @property
    def compilation_config(self) -> Mapping[str, Any]:
        """vLLM's `compilation_config`, as far as the user set it."""
        return _mapping(self.engine_kwargs.get("compilation_config"))

    @property
    def additional_config(self) -> Mapping[str, Any]:
        """vllm-ascend's settings, as far as the user set them."""
        return _mapping(self.engine_kwargs.get("additional_config"))


def _mapping(value: Any) -> Mapping[str, Any]:
    """A mapping, also where it was given as JSON text, as vLLM's command line takes it."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return {}  # vLLM says what is wrong with it
    return value if isinstance(value, Mapping) else {}


def _get(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
