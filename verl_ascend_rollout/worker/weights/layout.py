"""Which layout each weight has in its kernel, recorded when the layer is made and never guessed afterwards.

A layer's `process_weights_after_loading` may leave a weight as it came (`identity`), swap its last two axes
(`transposed`: vllm-ascend's experts in every release from 0.11 on), pack it in blocks in a tensor of the same shape
(`blocked`: experts on a CPU, see `cpu`), or make something else of it that is no view of the checkpoint's form
(`repacked`: oneDNN, shuffles, FRACTAL_NZ).  What it did is found here by looking: a sample of the weight's elements is
taken before and looked for after.  Shapes would not tell: with hidden == 2 * intermediate / tp
the two forms of `w13_weight` have the same shape, and guessing by it is silently wrong (verl 0.8.0, npu_vllm_patch.py;
the loaders of vllm-ascend 0.11.0, ops/common_fused_moe.py:336).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from verl_ascend_rollout import PATCHED
from verl_ascend_rollout.worker.weights import padding
from verl_ascend_rollout.worker.weights.cpu.packed_experts import PackedLayout, Sample
from verl_ascend_rollout.worker.weights.placement import Placement, Probe
from verl_ascend_rollout.worker.weights.region import Region, storage_of

Layout = Literal["identity", "transposed", "blocked", "repacked", "unknown"]

RECORD = "_ascend_safe_layout"
"""The attribute of a layer that holds its LayerRecord."""

VIEWS = "_ascend_safe_views"
"""The attribute of a layer that holds its `View`s until it is recorded."""

SAMPLE = 4096
"""Elements looked at for each weight.  Two layouts of random bf16 weights agree in all of them by chance never."""


@dataclass(frozen=True)
class WeightRecord:
    """One weight as the checkpoint has it, and what became of it."""

    layout: Layout  # `unknown` where the weight is constant and square, so that looking cannot tell
    shape: tuple[int, ...]  # in checkpoint form, for this rank
    dtype: torch.dtype  # in checkpoint form
    # What vLLM had set on the parameter, `weight_loader` before all; vllm-ascend 0.11 to 0.26 makes new ones without.
    attributes: Mapping[str, Any]
    parameter_class: type[torch.nn.Parameter] = torch.nn.Parameter  # vLLM has classes of its own, with loading methods
    blocks: PackedLayout | None = None  # of `blocked` weights, how they lie
    placement: Placement | None = None  # of `blocked` and `repacked` ones, where a few elements lie


@dataclass(frozen=True)
class View:
    """A tensor of another module, or of the same, that lies in the memory of a weight."""

    weight: str  # the name of the weight in its layer
    tensor: torch.Tensor  # which it is
    region: Region  # where in the weight


@dataclass(frozen=True)
class LayerRecord:
    """A layer whose weights were processed after loading."""

    weights: Mapping[str, WeightRecord]  # its own parameters by name
    # Names of tensors that the processing made beside them, such as vllm-ascend's fp32 copy of the router
    # (`weight_fp32`, ops/linear.py; 0.23 for DeepSeek-V4, 0.28 for all): they go stale with every new weight.
    derived: tuple[str, ...]
    device: str = ""  # the type of device that the weights are on
    # What else in the model lies in a weight's memory, such as the `conv_weights` of vLLM's Mamba (0.28,
    # mamba_mixer2.py): where the processing packs the weight elsewhere, these keep the checkpoint's form.
    views: tuple[View, ...] = ()


def watch(model: torch.nn.Module) -> None:
    """Record each layer of `model` when its weights are next processed after loading; then let go of it."""
    views = _views(model)
    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        if hasattr(method, "process_weights_after_loading") and not hasattr(layer, RECORD):
            if layer in views:
                setattr(layer, VIEWS, tuple(views[layer]))
            _watch_method(method)


def _views(model: torch.nn.Module) -> dict[torch.nn.Module, list[View]]:
    """Return the tensors beside parameters that lie in a parameter's memory, by the layer that has the parameter."""
    owners: dict[int, tuple[torch.nn.Module, str, torch.Tensor]] = {}
    for layer in model.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            owners.setdefault(storage_of(parameter), (layer, name, parameter))
    found: dict[torch.nn.Module, list[View]] = {}
    for layer in model.modules():
        for tensor in _tensors(layer).values():
            owner = owners.get(storage_of(tensor))
            if owner is not None and not isinstance(tensor, torch.nn.Parameter) and tensor.device.type != "meta":
                region = Region.of(tensor, int(owner[2].storage_offset()))
                found.setdefault(owner[0], []).append(View(owner[1], tensor, region))
    return found


def record(layer: torch.nn.Module) -> LayerRecord | None:
    """Return what was recorded of a layer; `None` where its weights were never processed, or before we were there."""
    found: LayerRecord | None = getattr(layer, RECORD, None)
    return found


def recorded_layers(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, LayerRecord]]:
    """Prefix, layer and record of each layer that has one."""
    for prefix, layer in model.named_modules():
        found = record(layer)
        if found is not None:
            yield prefix, layer, found


def _watch_method(method: Any) -> None:
    """Let the method (one object a layer, or one for several) record what it does to a layer the first time."""
    process = method.process_weights_after_loading
    if hasattr(process, PATCHED):
        return

    @functools.wraps(process)
    def process_and_record(layer: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if hasattr(layer, RECORD):
            return process(layer, *args, **kwargs)
        before = {
            name: _Look.at(name, parameter, padding.filled(layer, name, parameter)[0])
            for name, parameter in layer.named_parameters(recurse=False)
        }
        tensors = set(_tensors(layer))
        result = process(layer, *args, **kwargs)
        after = _tensors(layer)
        weights = {name: look.record(after.get(name)) for name, look in before.items()}
        if any(weight.layout == "repacked" for weight in weights.values()):
            # A layer is rebuilt as a whole, or not at all.
            weights = {name: _whole(weight) for name, weight in weights.items()}
        device = next((look.device for look in before.values()), "")
        derived = tuple(sorted(set(after) - tensors))
        setattr(layer, RECORD, LayerRecord(weights, derived, device, getattr(layer, VIEWS, ())))
        return result

    setattr(process_and_record, PATCHED, ("layout",))
    # On the object: vllm-ascend 0.13 to 0.23 wraps it there as well, for shared experts (ops/fused_moe/fused_moe.py).
    method.process_weights_after_loading = process_and_record


def _whole(weight: WeightRecord) -> WeightRecord:
    return dataclasses.replace(weight, layout="repacked", blocks=None) if weight.layout == "blocked" else weight


def _tensors(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the layer's own tensors by name: parameters, buffers, and plain attributes."""
    found: dict[str, torch.Tensor] = dict(layer.named_parameters(recurse=False))
    found.update(layer.named_buffers(recurse=False))
    found.update({name: value for name, value in vars(layer).items() if isinstance(value, torch.Tensor)})
    return found


@dataclass(frozen=True)
class _Look:
    """A sample of a weight in checkpoint form."""

    positions: tuple[torch.Tensor, ...]
    bits: torch.Tensor
    address: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    attributes: dict[str, Any]
    parameter_class: type[torch.nn.Parameter]
    device: str
    experts: Sample | None
    probe: Probe | None

    @classmethod
    def at(cls, name: str, weight: torch.nn.Parameter, filled: torch.Tensor) -> _Look:
        # A generator of its own: the engine's random numbers must not depend on being watched.
        generator = torch.Generator().manual_seed(0)
        positions = tuple(
            torch.randint(max(size, 1), (SAMPLE,), generator=generator).to(weight.device) for size in weight.shape
        )
        return cls(
            positions=positions,
            bits=_bits_at(weight, positions),
            address=weight.data_ptr(),
            shape=tuple(weight.shape),
            stride=weight.stride(),
            dtype=weight.dtype,
            attributes=dict(vars(weight)),
            parameter_class=type(weight),
            device=weight.device.type,
            experts=Sample.of(name, weight),
            probe=Probe.of(weight, filled),
        )

    def record(self, after: torch.Tensor | None) -> WeightRecord:
        layout = self._layout(after)
        blocks = self.experts.blocks_in(after) if layout == "repacked" and self.experts is not None else None
        if blocks is not None:
            blocks.compile_for(self.dtype)
        return WeightRecord(
            layout="blocked" if blocks is not None else layout,
            shape=self.shape,
            dtype=self.dtype,
            attributes=self.attributes,
            parameter_class=self.parameter_class,
            blocks=blocks,
            placement=self.probe.find_in(after) if layout == "repacked" and self.probe is not None else None,
        )

    def _layout(self, after: torch.Tensor | None) -> Layout:
        if after is None or after.dtype != self.dtype or after.numel() == 0 or self.bits.numel() == 0:
            return "repacked"
        if _has_internal_format(after):
            return "repacked"
        swapped = (*self.shape[:-2], self.shape[-1], self.shape[-2]) if len(self.shape) > 1 else None
        same = tuple(after.shape) == self.shape and torch.equal(_bits_at(after, self.positions), self.bits)
        turned = (
            swapped is not None
            and tuple(after.shape) == swapped
            and torch.equal(_bits_at(after, (*self.positions[:-2], self.positions[-1], self.positions[-2])), self.bits)
        )
        untouched = (after.data_ptr(), after.stride()) == (self.address, self.stride)
        if same and (untouched or not turned):
            return "identity"
        if turned and not same:
            return "transposed"
        return "unknown" if same and turned else "repacked"


BASE_FORMATS = frozenset({-1, 0, 1, 2, 30})
"""aclFormat of tensors whose bytes lie as their strides say: undefined, NCHW, NHWC, ND, NCDHW (CANN, acl_base.h)."""


def _has_internal_format(weight: torch.Tensor) -> bool:
    """Whether an NPU tensor is stored in tiles, such as FRACTAL_NZ (29).

    Reading it converts, so its elements look right; a copy from the host into a view of it does not, and overwrites
    others (torch-npu's CopyKernel).
    """
    if weight.device.type != "npu":
        return False
    import torch_npu

    return int(torch_npu.get_npu_format(weight)) not in BASE_FORMATS


def _bits_at(weight: torch.Tensor, positions: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return the sampled elements as integers, so that a NaN equals itself."""
    if weight.numel() == 0:
        return torch.empty(0, dtype=torch.int8)
    values = weight.detach()[positions] if positions else weight.detach().reshape(1)
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    return values.contiguous().view(integer).cpu()
