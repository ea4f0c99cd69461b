"""What the user asks for, and for which model: the half of a decision that no machine can tell.

Read from verl's rollout config (`EngineRequest.from_rollout`) in the rollout server, and from a file by `ascend-safe
explain`: one reading, so that both decide the same.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from verl_ascend_rollout.options import (
    KEY,
    ROLLOUT,
    AscendSafeOptions,
    KVRelease,
    OnUnsafe,
    OptionError,
    WeightPath,
)

VLLM_KWARGS = f"{ROLLOUT}.engine_kwargs.vllm"
KV_RELEASE = f"{KEY}.kv_release"
WEIGHT_PATH = f"{KEY}.weight_path"
ON_UNSAFE = f"{KEY}.on_unsafe"
MAPPINGS = ("compilation_config", "additional_config")
"""vLLM's arguments that what we decide joins."""

UNLIKE = (
    *("mamba_d_state", "mamba_d_ssm", "mamba_expand", "mamba_num_heads", "ssm_state_size", "ssm_cfg", "state_size"),
    *("attn_layer_period", "attn_layer_indices", "attn_type_list", "full_attn_idxs", "full_attention_interval"),
    *("layers_block_type", "block_types", "hybrid_override_pattern", "linear_attn_config", "linear_num_value_heads"),
    *("lru_width", "conv_L_cache", "global_head_dim"),
)
"""Settings of models whose layers are not all attention of one size, also where they name no `layer_types`
(transformers 5.10: Jamba, Bamba, Falcon-H1, Zamba2, Nemotron-H, RecurrentGemma, LFM2, Qwen3-Next, Gemma 4; vLLM's
Kimi-Linear)."""

LARGEST = 2**31 - 1
"""The largest number that is taken for a size: what an integer of 32 bits holds."""


@dataclass(frozen=True)
class ModelFacts:
    """What of a model's own configuration (its `config.json`) matters to a decision; `None`: not known.

    Attributes:
        model_type: the `model_type` of the configuration: `qwen2_moe`, ...
        layers: how many hidden layers the model has.
        experts: how many routed experts each MoE layer has; 0 for a dense model.
        head_size: numbers in one attention head; `None` also where attention has no one head size (MLA).
        quantization: how the checkpoint's weights are quantized: `fp8`, ...
        top_k: how many experts a token is routed to.
        kv_bytes_per_token: what one token takes in the KV cache of the whole model, at two bytes a number; `None` also
            where layers do not all keep keys and values of one size (MLA, state-space layers).
        positions: the longest sequence that the model takes, in tokens.
    """

    model_type: str | None = None
    layers: int | None = None
    experts: int | None = None
    head_size: int | None = None
    quantization: str | None = None
    top_k: int | None = None
    kv_bytes_per_token: int | None = None
    positions: int | None = None

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
        layers, top_k = _get(text, "num_hidden_layers"), _get(text, "num_experts_per_tok")
        if experts is None and layers and not _get(text, "block_configs"):
            experts = 0  # the configuration of a model without experts names none
        kv_heads = _get(text, "num_key_value_heads") or heads
        positions = _get(text, "max_position_embeddings")
        alike = {"full_attention", "sliding_attention"}.issuperset(_get(text, "layer_types") or ()) and not any(
            _get(text, name) for name in UNLIKE
        )
        sizes = (layers, kv_heads, head_size)
        # Where vLLM looks (vllm 0.28, vllm/config/model.py, _parse_quant_hf_config).
        quantized = _get(config, "quantization_config") or _get(text, "quantization_config")
        return cls(
            model_type=str(model_type) if model_type else None,
            layers=layers if isinstance(layers, int) else None,
            experts=experts,
            top_k=top_k if isinstance(top_k, int) else None,
            head_size=head_size if isinstance(head_size, int) else None,
            quantization=str(_get(quantized, "quant_method") or "of an unknown kind") if quantized else None,
            # Keys and values, two bytes each.
            kv_bytes_per_token=4 * math.prod(sizes) if alike and all(isinstance(size, int) for size in sizes) else None,
            positions=positions if isinstance(positions, int) else None,
        )


@dataclass(frozen=True)
class EngineRequest:
    """What the user set, as far as it matters to a decision.

    Attributes:
        enforce_eager: `rollout.enforce_eager`; `None` leaves it to us.
        enable_sleep_mode: `rollout.enable_sleep_mode` (verl's default is True).
        free_cache_engine: `rollout.free_cache_engine`: whether the KV cache is given back during training.
        kv_release: our option `kv_release`.
        weight_path: our option `weight_path`.
        on_unsafe: our option `on_unsafe`.
        expert_parallel_size: over how many devices the experts are spread; 1 is no expert parallelism.
        tensor_parallel_size, data_parallel_size: over how many devices the engine is spread; verl's names for them are
            `tensor_model_parallel_size` and `data_parallel_size`.
        max_num_seqs: how many sequences the engine decodes at once (verl's default is 256).
        max_model_len: `rollout.max_model_len`, in tokens; `None` is the model's own limit (verl 0.9.1,
            vllm_async_server.py:1104).
        cudagraph_capture_sizes: `rollout.cudagraph_capture_sizes`; `None` leaves it to us, and to vLLM.
        lora: adapters are trained, and only they are sent to the engine.
        mtp: the engine drafts with the model's multi-token prediction layers.
        routing_replay: `rollout.enable_rollout_routing_replay`: the engine records each token's experts (R3).
        model: what is known of the model.
        engine_kwargs: `rollout.engine_kwargs.vllm`, which verl merges last into vLLM's arguments (verl 0.9.1,
            vllm_async_server.py:349): what is in here goes before the fields above, save for the capture sizes
            (:321-322) and expert parallelism (:402), which verl sets from its own fields.
        environ: the environment variables that the engine would start with.
    """

    enforce_eager: bool | None = None
    enable_sleep_mode: bool = True
    free_cache_engine: bool = True
    kv_release: KVRelease = "auto"
    weight_path: WeightPath = "auto"
    on_unsafe: OnUnsafe = "keep"
    expert_parallel_size: int = 1
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    max_num_seqs: int = 256
    max_model_len: int | None = None
    cudagraph_capture_sizes: tuple[int, ...] | None = None
    lora: bool = False
    mtp: bool = False
    routing_replay: bool = False
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
    ) -> EngineRequest:
        """Read verl's rollout config: its dataclass, or a mapping, in which a key that is missing has verl's default.

        Raises:
            OptionError: an option of ours that does not exist, or a value that it cannot have; or settings of verl's
                and vLLM's by which we decide are of the wrong kind, all of them in one message.
        """
        options = AscendSafeOptions.from_rollout(rollout)
        fields = _Fields(rollout)
        kwargs = _Fields((_get(rollout, "engine_kwargs") or {}).get("vllm") or {}, "engine_kwargs.vllm.")
        for name in ("enforce_eager", "enable_sleep_mode"):
            kwargs.flag(name)
        for name in MAPPINGS:
            kwargs.mapping(name)
        mtp = _get(rollout, "mtp")
        request = cls(
            enforce_eager=fields.flag("enforce_eager"),
            enable_sleep_mode=fields.flag("enable_sleep_mode") is not False,
            free_cache_engine=fields.flag("free_cache_engine") is not False,
            kv_release=options.kv_release,
            weight_path=options.weight_path,
            on_unsafe=options.on_unsafe,
            expert_parallel_size=fields.number("expert_parallel_size", 1),
            tensor_parallel_size=fields.number("tensor_model_parallel_size", 1),
            data_parallel_size=fields.number("data_parallel_size", 1),
            max_num_seqs=fields.number("max_num_seqs", 256),
            max_model_len=fields.number("max_model_len", 0, least=-1) or None,  # -1: what fits (vLLM 0.28)
            cudagraph_capture_sizes=fields.numbers("cudagraph_capture_sizes"),
            lora=lora,
            mtp=bool(mtp is not None and _get(mtp, "enable") and _get(mtp, "enable_rollout")),
            routing_replay=bool(fields.flag("enable_rollout_routing_replay")),
            model=model or ModelFacts(),
            engine_kwargs=kwargs.given,
            environ=dict(environ or {}),
        )
        if fields.problems or kwargs.problems:
            raise OptionError(f"{ROLLOUT}: {'; '.join([*fields.problems, *kwargs.problems])}")
        return request

    @property
    def expert_parallel(self) -> bool:
        """Whether verl will switch expert parallelism on."""
        return self.expert_parallel_size > 1

    def bool_of(self, name: str, value: bool | None) -> tuple[bool | None, str]:
        """Return a value and where it was set: `engine_kwargs.vllm` goes last, and so before the field of verl's."""
        passed = self.engine_kwargs.get(name)
        if passed is not None:
            return bool(passed), f"{VLLM_KWARGS}.{name}"
        return value, f"{ROLLOUT}.{name}"

    @property
    def compilation_config(self) -> Mapping[str, Any]:
        """vLLM's `compilation_config`, as far as the user set it."""
        return mapping(self.engine_kwargs, "compilation_config")

    @property
    def additional_config(self) -> Mapping[str, Any]:
        """vllm-ascend's settings, as far as the user set them."""
        return mapping(self.engine_kwargs, "additional_config")


def mapping(engine_kwargs: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return one of vLLM's arguments that is a mapping, also where it was written as JSON text.

    Raises:
        ValueError: it is neither.
    """
    value = engine_kwargs.get(name) or {}
    if isinstance(value, str):
        value = json.loads(value)
    if not isinstance(value, Mapping):  # of pairs, which dict() takes as well, vLLM makes nothing
        raise ValueError(f"{name} is no mapping")
    return dict(value)


class _Fields:
    """Settings by name, and what is wrong with their kinds: verl looks at none, and Python takes any word for True."""

    def __init__(self, given: Any, prefix: str = "") -> None:
        self.problems: list[str] = []
        self.given, self._prefix = given, prefix
        if prefix and not isinstance(given, Mapping):
            self._wrong("", given, "must be a mapping")
            self.given = {}

    def flag(self, name: str) -> bool | None:
        """Return True or False; `None` where it is not set."""
        value = _get(self.given, name)
        if value is None or isinstance(value, bool):
            return value
        self._wrong(name, value, "must be True or False")
        return None

    def number(self, name: str, default: int, least: int = 1) -> int:
        """Return a whole number that a size can be."""
        value = _get(self.given, name)
        if value is not None and (not _is_whole(value) or not least <= int(value) <= LARGEST):
            self._wrong(name, value, f"must be a whole number from {least} to {LARGEST}")
            value = None
        return default if value is None else int(value)

    def numbers(self, name: str) -> tuple[int, ...] | None:
        """Return whole numbers; `None` where there are none."""
        value = _get(self.given, name)
        if not value:
            return None
        whole = isinstance(value, Sequence) and not isinstance(value, str) and all(map(_is_whole, value))
        if not whole or not all(1 <= int(each) <= LARGEST for each in value):
            self._wrong(name, value, f"must be a list of whole numbers from 1 to {LARGEST}")
            return None
        return tuple(map(int, value))

    def mapping(self, name: str) -> None:
        """Look at a mapping, or the JSON text of one."""
        with contextlib.suppress(ValueError):
            mapping(self.given, name)
            return
        self._wrong(name, self.given[name], "must be a mapping, or the JSON text of one")

    def _wrong(self, name: str, value: Any, what: str) -> None:
        self.problems.append(f"{f'{self._prefix}{name}'.rstrip('.')}={value!r} {what}")


def _is_whole(value: Any) -> bool:
    return not isinstance(value, bool) and re.fullmatch(r"-?\d+", str(value)) is not None


def _get(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
