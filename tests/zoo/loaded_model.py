"""A model that vLLM's own loader has built, without an engine, and our worker's weight sync on it."""

from __future__ import annotations

import tempfile
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from verl_ascend_rollout.worker.lifecycle import AscendSafeLifecycle

NamedTensor = tuple[str, torch.Tensor]
State = dict[str, torch.Tensor]


class Refused(Exception):
    """A sync that the product refused; what it said."""


class LoadedModel:
    """A model in this process, and the worker that syncs it.

    Attributes:
        model: the model.
        config: vLLM's configuration of it.
    """

    def __init__(self, folder: Path, dtype: str, **engine: Any) -> None:
        """Build the model and load a checkpoint, as vLLM does it when an engine starts.

        Args:
            folder: of the checkpoint.
            dtype: of the engine.
            engine: more of vLLM's arguments.
        """
        from vllm.config import set_current_vllm_config
        from vllm.engine.arg_utils import EngineArgs
        from vllm.model_executor.model_loader import base_loader, get_model

        from verl_ascend_rollout.integration.patches.vllm import RECORD_LAYOUTS

        RECORD_LAYOUTS.apply(base_loader)
        _inspect_here(folder)
        self.config = EngineArgs(
            model=str(folder), dtype=dtype, max_model_len=192, enforce_eager=True, skip_tokenizer_init=True, **engine
        ).create_engine_config()
        with set_current_vllm_config(self.config):
            _be_one_rank()
            _let_mla_be_built()
            self.model: Any = get_model(vllm_config=self.config)
        self.start_over()

    def start_over(self, weight_path: str = "by_layout") -> None:
        """Forget every sync: the next one is the first of a new worker, and goes through the model's loader."""
        self._worker = AscendSafeLifecycle()
        self._worker._ascend_safe_weight_path = weight_path
        self._worker.model_runner = types.SimpleNamespace(model=self.model, vllm_config=self.config)

    def sync(self, pairs: Iterable[NamedTensor], bucket: int = 16, verify: str = "first") -> dict[str, Any]:
        """One weight sync.

        Args:
            pairs: names and tensors, in the order in which they are sent.
            bucket: how many come at once; their memory is used again as soon as they were taken.
            verify: the user's option.

        Raises:
            Refused: the product refused it.
        """

        def receive(load: Any) -> None:
            sent = list(pairs)
            for first in range(0, len(sent), bucket):
                received = _received(sent[first : first + bucket])
                load(received)
                for _, tensor in received:
                    tensor.untyped_storage().fill_(0x7F)

        self._worker._ascend_safe_verify = verify
        try:
            return self._worker._ascend_safe_reload(receive)
        except Exception as error:
            if not type(error).__module__.startswith("verl_ascend_rollout"):
                raise
            raise Refused(str(error)) from error

    def is_replayed(self) -> bool:
        """Whether the next sync goes by what the last one did, without the model's loader."""
        return bool(self._worker._ascend_safe_plan.replayable)

    def reload(self, folder: Path) -> dict[str, Any]:
        """Load a checkpoint again by the worker's own method."""
        return self._worker.ascend_safe_reload_from_disk(str(folder))

    def state(self) -> State:
        """Every tensor of the model, and what its layers make of fixed inputs: some keep their weights elsewhere."""
        from vllm.config import set_current_vllm_config

        with torch.no_grad(), set_current_vllm_config(self.config):
            return {**tensors(self.model), **_outputs(self.model, self.config.model_config.dtype)}


def differences(one: State, other: State) -> list[str]:
    """Names of tensors that are not bit for bit the same in both, with what is not the same beside their values.

    What is empty in both is the same: of a weight that a layer keeps elsewhere, its name (see `emptied`).
    """
    found = []
    for name in sorted(one.keys() | other.keys()):
        a, b = one.get(name), other.get(name)
        if a is None or b is None:
            found.append(f"{name} (in one of them only)")
        elif a.numel() == 0 and b.numel() == 0:
            continue
        elif (a.shape, a.dtype) != (b.shape, b.dtype):
            found.append(f"{name} ({a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)})")
        elif not torch.equal(_bits(a), _bits(b)):
            found.append(name)
    return found


def emptied(state: State) -> dict[str, torch.dtype]:
    """The dtypes of weights that layers keep elsewhere, of which vLLM leaves an empty tensor."""
    return {name: tensor.dtype for name, tensor in state.items() if tensor.numel() == 0}


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _received(bucket: list[NamedTensor]) -> list[NamedTensor]:
    """A bucket as a transport hands it over: views of one buffer.  What is not contiguous has memory of its own."""
    size = sum(_aligned(tensor.nbytes) for _, tensor in bucket)
    buffer, offset = torch.empty(size, dtype=torch.uint8), 0
    received = []
    for name, tensor in bucket:
        # Not `is_contiguous`, which a gap in a dimension of one is to torch.
        if not tensor.numel() or tensor.stride() != torch.empty(tensor.shape, device="meta").stride():
            received.append((name, _with_its_strides(tensor)))
            continue
        view = buffer[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        received.append((name, view.copy_(tensor)))
        offset += _aligned(tensor.nbytes)
    return received


def _aligned(size: int) -> int:
    return -(-size // 16) * 16


def _with_its_strides(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.numel() == 0:
        return tensor.clone()
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return torch.empty(span, dtype=tensor.dtype).as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def tensors(model: torch.nn.Module) -> State:
    """Every tensor of a model."""
    found = {}
    for prefix, module in model.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False), *_plain(vars(module))]
        for name, tensor in own:
            if "kv_cache" not in name and tensor.device.type != "meta":
                found[f"{prefix}.{name}"] = tensor.detach().clone()
    return found


def _plain(attributes: dict[str, Any]) -> Iterator[NamedTensor]:
    """Tensors among a module's attributes, also within lists and tuples."""
    for name, value in attributes.items():
        for number, item in enumerate(value if isinstance(value, list | tuple) else [value]):
            if isinstance(item, torch.Tensor):
                yield f"{name}[{number}]", item


def _outputs(model: torch.nn.Module, dtype: torch.dtype) -> State:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    generator = torch.Generator().manual_seed(1)
    made = {}
    for prefix, layer in model.named_modules():
        for rows in (1, 7):
            if isinstance(layer, RoutedExperts):
                inputs = torch.randn(rows, layer.hidden_size, generator=generator).to(dtype)
                output = _experts(layer, inputs)
            elif isinstance(layer, LinearBase | ParallelLMHead) and hasattr(layer, "cpu_linear"):
                # Without it, a convolution that is dressed as a linear layer; its weight is among the tensors.
                width = layer.input_size if isinstance(layer, LinearBase) else layer.embedding_dim
                inputs = torch.randn(rows, width, generator=generator).to(getattr(layer, "params_dtype", dtype))
                output = layer.quant_method.apply(layer, inputs)
            else:
                continue
            made[f"{prefix}: output for {rows} rows"] = output.detach().clone()
    return made


def _experts(layer: Any, inputs: torch.Tensor) -> torch.Tensor:
    """What a layer's experts make of inputs, each expert in turn; not by its router, which is not theirs."""
    experts, rows = layer.global_num_experts, len(inputs)
    chosen = torch.arange(rows * layer.top_k, dtype=torch.int32).reshape(rows, layer.top_k) % experts
    kernel = layer.quant_method.moe_kernel.fused_experts
    kernel._select_experts = lambda *of_the_router: (torch.full(chosen.shape, 0.5), chosen)
    try:
        return layer.forward_monolithic(inputs, router_logits=torch.zeros(rows, experts))
    finally:
        del kernel._select_experts


_distributed = False


def _be_one_rank() -> None:
    """vLLM's process groups, of this process alone."""
    global _distributed
    if _distributed:
        return
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment

    rendezvous = Path(tempfile.mkdtemp()) / "rendezvous"
    init_distributed_environment(1, 0, rendezvous.as_uri(), 0, "gloo")
    ensure_model_parallel_initialized(1, 1)
    _distributed = True


def _let_mla_be_built() -> None:
    """Let vLLM 0.28 build multi-head latent attention on an x86 CPU, as it is built on an accelerator.

    There it takes a back end for prefill that it cannot import (fa_utils.py), and packs kv_b_proj before the attention
    layer has read it (layers/utils.py).  Without the one, which holds no weights, and with the other left alone, the
    weights are kept as on an accelerator: kv_b_proj as it is, and twice more as W_UV and W_UK_T.
    """
    from vllm.model_executor.layers import utils
    from vllm.v1.attention.backends.mla.prefill.registry import MLAPrefillBackendEnum, register_mla_prefill_backend

    register_mla_prefill_backend(MLAPrefillBackendEnum.FLASH_ATTN, "types.SimpleNamespace")
    pack = utils.dispatch_cpu_unquantized_gemm
    if hasattr(pack, "leaves_mla"):
        return

    def pack_but(layer: Any, remove_weight: bool) -> None:
        if getattr(layer, "prefix", "").endswith("kv_b_proj"):
            layer.cpu_linear = torch.nn.functional.linear
        else:
            pack(layer, remove_weight)

    pack_but.leaves_mla = True
    utils.dispatch_cpu_unquantized_gemm = pack_but


def _inspect_here(folder: Path) -> None:
    """Let vLLM look at the model's class in this process, not in a new one, which takes six seconds a family."""
    import json

    from vllm.model_executor.models import ModelRegistry

    backend = ("TransformersForCausalLM", "TransformersMoEForCausalLM")
    for architecture in (*json.loads((folder / "config.json").read_text())["architectures"], *backend):
        known = ModelRegistry.models.get(architecture)
        if known is not None and hasattr(known, "module_name"):
            ModelRegistry.register_model(architecture, known.load_model_cls())
