"""The matrix of test_weight_matrix.py on one stack, in one process and without an engine:

    weight_matrix_cases.py matrix FOLDER OUT.json

Real are vLLM's models and vllm-ascend's loaders, its `process_weights_after_loading`, and `NPUWorker.sleep` and
`wake_up` with their allocator.  Tensor parallelism is driven one rank at a time: the group has one rank and is told
that it is number `rank` of `tp`, which is all that layers ask it while they are made and loaded.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ASCEND_ENABLE_NZ", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("FAKE_CANN_DEVICES", "4")

import torch
import torch_npu  # noqa: F401 - makes torch.npu
from verl_files import verls_patches, verls_sync

from verl_ascend_rollout.worker.weights import expert_format, layerwise, weight_loader
from verl_ascend_rollout.worker.weights import sync as weight_sync
from verl_ascend_rollout.worker.weights.manifest import Manifest
from verl_ascend_rollout.worker.weights.plan import Plan

NamedTensor = tuple[str, torch.Tensor]

EXPERTS = 8
LAYERS = 1
VOCAB = 160
HEADS = 4
"""As many as the ranks of the widest cell; a vocabulary that is padded (to 192)."""

SYNCS = (1, 2, 3)
"""Seeds of the weights of three consecutive syncs; the engine starts with those of seed 0."""


@dataclass(frozen=True)
class Cell:
    """One rank's slice of one model.

    Attributes:
        model: `qwen2_moe` (shared expert, its gate, biases) or `qwen3_moe` (router inside the experts' layer).
        shape: the name of the shape, see `SHAPES`.
        expert_parallel: whether the ranks share out the experts instead of cutting each.
    """

    model: str
    shape: str
    tp: int
    rank: int
    expert_parallel: bool = False
    tied: bool = False

    @property
    def hidden(self) -> int:
        return SHAPES[self.shape](self.cut)[0]

    @property
    def intermediate(self) -> int:
        return SHAPES[self.shape](self.cut)[1]

    @property
    def heads(self) -> int:
        """How many attention heads there are: at least one a rank."""
        return max(HEADS, self.tp)

    @property
    def cut(self) -> int:
        """Into how many slices each expert is cut."""
        return 1 if self.expert_parallel else self.tp

    @property
    def square(self) -> str:
        """Which expert weight is square on this rank, if one is."""
        own = self.intermediate // self.cut
        return {2 * own: "w13_weight", own: "w2_weight"}.get(self.hidden, "")

    @property
    def name(self) -> str:
        more = " ep" * self.expert_parallel + " tied" * self.tied
        return f"{self.model} {self.shape} tp{self.tp} rank{self.rank}{more}"


SHAPES: dict[str, Callable[[int], tuple[int, int]]] = {
    "plain": lambda tp: (64, 96),
    "H == 2*I/tp": lambda tp: (64, 32 * tp),
    "I/tp == H": lambda tp: (32, 32 * tp),
    "I == H": lambda tp: (64, 64),
    "odd": lambda tp: (72, 11 * tp),
    "I/tp == 96": lambda tp: (64, 96 * tp),
}
"""Hidden size and one expert's intermediate size by the number of ranks.  In the second w13 is square on each rank, in
the third w2 is; there a shape says nothing about the layout.  The last is as Qwen3-30B-A3B's on eight ranks
(verl#5479)."""


def cells() -> list[Cell]:
    """Every cell of the matrix."""
    slices = [(tp, rank) for tp in (1, 2, 4) for rank in range(tp)]
    found = [
        Cell(model, shape, tp, rank)
        for model in TENSORS
        for shape in SHAPES
        for tp, rank in (slices if shape != "I/tp == 96" else [(8, rank) for rank in range(8)])
    ]
    found += [Cell("qwen2_moe", "H == 2*I/tp", tp, rank, expert_parallel=True) for tp, rank in slices if tp > 1]
    return found


# --------------------------------------------------------------------------------------------------------------------
# checkpoints


def config_of(cell: Cell) -> dict[str, Any]:
    common = {
        "hidden_size": cell.hidden,
        "moe_intermediate_size": cell.intermediate,
        "intermediate_size": 4 * HEADS,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": cell.heads,
        "num_key_value_heads": cell.heads,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": cell.tied,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "torch_dtype": "bfloat16",
    }
    if cell.model == "qwen2_moe":
        return {
            **common,
            "architectures": ["Qwen2MoeForCausalLM"],
            "model_type": "qwen2_moe",
            "shared_expert_intermediate_size": 2 * cell.intermediate,
        }
    return {
        **common,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "head_dim": cell.hidden // cell.heads,
    }


def qwen2_moe(cell: Cell) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Qwen1.5-MoE checkpoint."""
    hidden = cell.hidden
    yield from _around(cell)
    for layer in range(LAYERS):
        block = f"model.layers.{layer}"
        for part in "qkv":
            yield f"{block}.self_attn.{part}_proj.bias", (hidden,)
        yield from _mlp(f"{block}.mlp.shared_expert", hidden, 2 * cell.intermediate)
        yield f"{block}.mlp.shared_expert_gate.weight", (1, hidden)


def qwen3_moe(cell: Cell) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Qwen3-MoE checkpoint."""
    yield from _around(cell)
    for layer in range(LAYERS):
        for part in "qk":
            yield f"model.layers.{layer}.self_attn.{part}_norm.weight", (cell.hidden // cell.heads,)


def _around(cell: Cell) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden = cell.hidden
    yield "model.embed_tokens.weight", (VOCAB, hidden)
    yield "model.norm.weight", (hidden,)
    if not cell.tied:
        yield "lm_head.weight", (VOCAB, hidden)
    for layer in range(LAYERS):
        block = f"model.layers.{layer}"
        yield f"{block}.input_layernorm.weight", (hidden,)
        yield f"{block}.post_attention_layernorm.weight", (hidden,)
        for part in "qkvo":
            yield f"{block}.self_attn.{part}_proj.weight", (hidden, hidden)
        yield f"{block}.mlp.gate.weight", (EXPERTS, hidden)
        for expert in range(EXPERTS):
            yield from _mlp(f"{block}.mlp.experts.{expert}", hidden, cell.intermediate)


def _mlp(prefix: str, hidden: int, intermediate: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for part in ("gate", "up"):
        yield f"{prefix}.{part}_proj.weight", (intermediate, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, intermediate)


TENSORS: dict[str, Callable[[Cell], Iterator[tuple[str, tuple[int, ...]]]]] = {
    "qwen2_moe": qwen2_moe,
    "qwen3_moe": qwen3_moe,
}


def checkpoint(cell: Cell, seed: int) -> list[tuple[str, torch.Tensor]]:
    """The whole model's tensors, as a trainer sends them to every rank."""
    generator = torch.Generator().manual_seed(seed)
    return [(name, torch.randn(shape, generator=generator).bfloat16()) for name, shape in TENSORS[cell.model](cell)]


def buckets(tensors: list[tuple[str, torch.Tensor]]) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """The stream in three buckets."""
    size = -(-len(tensors) // 3)
    for start in range(0, len(tensors), size):
        yield tensors[start : start + size]


# --------------------------------------------------------------------------------------------------------------------
# the worker and its models


class World:
    """A real NPUWorker on `npu:0` without a model runner, and one model at a time in its sleep-mode memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.configs: dict[Any, Any] = {}
        config = self.config(Cell("qwen2_moe", "plain", 1, 0))
        worker_class: Any = _by_name(config.parallel_config.worker_cls)
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(config):
            self.worker = worker_class(
                vllm_config=config,
                local_rank=0,
                rank=0,
                distributed_init_method=f"file://{folder}/rendezvous",
                is_driver_worker=True,
            )
            self.worker.device = self.device = self.worker._init_device() or torch.device("npu:0")
            forward_context = importlib.import_module("vllm_ascend.ascend_forward_context")
            if hasattr(forward_context, "set_mc2_tokens_capacity"):  # 0.13 and later; the model runner does it
                forward_context.set_mc2_tokens_capacity(config, 8, 1)
        from vllm.plugins import load_general_plugins

        load_general_plugins()
        # Each sleep collects garbage: over all of vLLM that takes longer than everything else here together.
        gc.collect()
        gc.freeze()

    def config(self, cell: Cell) -> Any:
        """vLLM's configuration for that cell."""
        key = (cell.model, cell.hidden, cell.intermediate, cell.tp, cell.expert_parallel, cell.tied)
        if key not in self.configs:
            from vllm.engine.arg_utils import EngineArgs

            path = self.folder / f"model{len(self.configs)}"
            path.mkdir()
            (path / "config.json").write_text(json.dumps(config_of(cell)))
            self.configs[key] = EngineArgs(
                model=str(path),
                dtype="bfloat16",
                enforce_eager=True,
                max_model_len=64,
                skip_tokenizer_init=True,
                enable_sleep_mode=True,
                tensor_parallel_size=cell.tp,
                enable_expert_parallel=cell.expert_parallel,
                distributed_executor_backend="mp",
                additional_config={"weight_nz_mode": 0},
                # vLLM up to 0.18 wants 4 GiB of the machine for each rank, and refuses eight of them here.
                **({"swap_space": 0} if "swap_space" in EngineArgs.__dataclass_fields__ else {}),
            ).create_engine_config()
        return self.configs[key]

    @contextmanager
    def as_rank(self, cell: Cell) -> Iterator[Any]:
        """Within the block, this process is that cell's rank, under that cell's configuration."""
        from vllm.config import set_current_vllm_config
        from vllm.distributed import parallel_state
        from vllm_ascend import ascend_config

        config = self.config(cell)
        groups = {id(group): group for group in (parallel_state.get_tp_group(), parallel_state.get_ep_group())}
        before = [(group, group.world_size, group.rank_in_group) for group in groups.values()]
        clear = getattr(ascend_config, "clear_ascend_config", None)
        if clear is not None:
            clear()
        for group in groups.values():
            group.world_size, group.rank_in_group = cell.tp, cell.rank
        try:
            with set_current_vllm_config(config):
                ascend_config.init_ascend_config(config)
                yield config
        finally:
            for group, world_size, rank in before:
                group.world_size, group.rank_in_group = world_size, rank

    def load(self, cell: Cell, config: Any, tensors: list[NamedTensor], asleep: bool = False) -> torch.nn.Module:
        """A new model with those weights, through vLLM's own loading; in sleep-mode memory if it is to sleep."""
        from vllm.model_executor.model_loader.base_loader import BaseModelLoader

        class Loader(BaseModelLoader):
            def download_model(self, model_config: Any) -> None:
                """Nothing to download."""

            def load_weights(self, model: Any, model_config: Any) -> None:
                model.load_weights(iter(tensors))

        # What the first model of a process leaves for the next ones: each is to be the first.
        importlib.import_module("vllm.model_executor.layers.rotary_embedding")._ROPE_DICT.clear()
        rotary = importlib.import_module("vllm_ascend.ops.rotary_embedding")
        for name in ("_cos_cache", "_sin_cache", "_cos_sin_cache"):
            if hasattr(rotary, name):
                setattr(rotary, name, None)
        compilation = config.compilation_config
        for name in ("static_forward_context", "static_all_moe_layers"):
            getattr(compilation, name, []).clear()
        pool = self.allocator().use_memory_pool(tag="weights") if asleep else contextlib.nullcontext()
        with torch.no_grad(), pool:
            return Loader(config.load_config).load_model(vllm_config=config, model_config=config.model_config)

    def allocator(self) -> Any:
        from vllm_ascend.device_allocator.camem import CaMemAllocator

        return CaMemAllocator.get_instance()

    def sleep_and_wake_up(self, model: torch.nn.Module, config: Any, level: int = 1) -> None:
        """The worker's own sleep, and the first half of its wake-up, after which the weights are synced."""
        self.worker.vllm_config = config
        self.worker.model_runner = types.SimpleNamespace(model=model, post_kv_cache_wake_up=lambda: None)
        self.worker.sleep(level=level)
        self.worker.wake_up(tags=["weights"])


def _by_name(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor that hangs on a module: parameters, buffers, and what a layer keeps beside them."""
    found: dict[str, torch.Tensor] = {}
    for prefix, module in model.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False), *vars(module).items()]
        found.update({f"{prefix}.{name}": value for name, value in own if isinstance(value, torch.Tensor)})
    return found


def copied(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors on the CPU, laid out alike."""
    return {
        name: torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(tensor.detach())
        for name, tensor in state.items()
    }


def addresses(model: torch.nn.Module) -> dict[str, int]:
    """Where each tensor on the NPU lies: what a captured graph has written down."""
    return {name: tensor.data_ptr() for name, tensor in state_of(model).items() if tensor.device.type == "npu"}


def differences(state: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> list[str]:
    """Names whose tensors are not byte-equal and laid out alike, or that only one side has."""
    different = set(state) ^ set(reference)
    for name in set(state) & set(reference):
        one, other = state[name].detach(), reference[name]
        alike = (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())
        if not alike or not torch.equal(as_bytes(one), as_bytes(other)):
            different.add(name)
    return sorted(different)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A NaN equals itself as bytes."""
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8)


# --------------------------------------------------------------------------------------------------------------------
# what is done to a model


@dataclass
class Outcome:
    """What one sync left behind.

    Attributes:
        different: names of tensors that differ from a fresh load of the same weights.
        moved: names of tensors that are at another address than before the first sync.
        error: what was raised instead.
    """

    different: list[str] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)
    error: str = ""


def three_syncs(
    world: World, cell: Cell, config: Any, sync: Callable[..., None], fresh: dict[int, Any], sleep: bool = True
) -> list[Outcome]:
    """Sleep, wake up and sync, three times; the first error ends it, as it ends a job."""
    # Memory that really goes away in a sleep costs seconds as the cells go by: the cells of expert parallelism have it.
    model = world.load(cell, config, checkpoint(cell, 0), asleep=cell.expert_parallel)
    before = addresses(model)
    found = []
    for seed in SYNCS:
        try:
            if sleep:
                world.sleep_and_wake_up(model, config)
            with torch.no_grad():
                sync(model, config, buckets(checkpoint(cell, seed)))
            if sleep:
                world.worker.wake_up(tags=["kv_cache"])
                expert_format.restore_kernel_format(model)
        except Exception as error:
            found.append(Outcome(error=f"{type(error).__name__}: {error}"))
            break
        now = addresses(model)
        moved = sorted(name for name in before if now.get(name) != before[name])
        found.append(Outcome(differences(state_of(model), fresh[seed]), moved))
    return found


def our_sync(model: torch.nn.Module, config: Any, stream: Iterable[list[NamedTensor]]) -> None:
    # The first sync of a model goes through its loader, the others along the plan that the first left.
    if not hasattr(model, "_plan"):
        model._plan = Plan()
    with weight_sync.reload(model, config.model_config, Manifest(compare=True), model._plan) as load:
        for bucket in stream:
            load(bucket)


def matrix(world: World, cell: Cell) -> dict[str, Any]:
    """Three syncs on our path, by itself and beside verl's patches, and on verl's, with sleeps between and without."""

    def verl(model: torch.nn.Module, config: Any, stream: Iterable[list[NamedTensor]]) -> None:
        verls_sync(model, config.model_config, stream, world.device)

    with world.as_rank(cell) as config:
        fresh = {seed: copied(state_of(world.load(cell, config, checkpoint(cell, seed)))) for seed in SYNCS}
        found = {"ours": three_syncs(world, cell, config, our_sync, fresh)}
        with verls_patches():
            found["ours beside verl"] = three_syncs(world, cell, config, our_sync, fresh)
            found["verl"] = three_syncs(world, cell, config, verl, fresh)
            found["verl, never asleep"] = three_syncs(world, cell, config, verl, fresh, sleep=False)
    return {
        "square": cell.square,
        "hidden": cell.hidden,
        "intermediate": cell.intermediate,
        "tensors": len(fresh[SYNCS[0]]),
        **{way: [asdict(outcome) for outcome in outcomes] for way, outcomes in found.items()},
    }


def no_sync(world: World, cell: Cell) -> dict[str, Any]:
    """Two wake-ups that no sync follows: an adapter-only sync, a colocated reward model; then one sync."""
    found: dict[str, Any] = {"stock": [], "settled": [], "again": [], "loaders": []}
    with world.as_rank(cell) as config:
        model = world.load(cell, config, checkpoint(cell, 0), asleep=True)
        before, at = copied(state_of(model)), addresses(model)
        for _ in range(2):
            world.sleep_and_wake_up(model, config)
            world.worker.wake_up(tags=["kv_cache"])
            found["stock"].append(differences(state_of(model), before))
            expert_format.restore_kernel_format(model)
            found["settled"].append(differences(state_of(model), before))
            found["again"].append(expert_format.restore_kernel_format(model))
            found["loaders"].append(weight_loader.complaint(model))
        our_sync(model, config, buckets(checkpoint(cell, 1)))
        found["synced"] = differences(state_of(model), copied(state_of(world.load(cell, config, checkpoint(cell, 1)))))
        found["moved"] = sorted(name for name, address in addresses(model).items() if at[name] != address)
    return found


def merged(tensors: list[NamedTensor]) -> list[NamedTensor]:
    """The same checkpoint as transformers 5 keeps it: the experts of a layer in two tensors."""
    experts = {name: tensor for name, tensor in tensors if ".mlp.experts." in name}
    found = [(name, tensor) for name, tensor in tensors if name not in experts]
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([experts[f"{prefix}.{expert}.{part}_proj.weight"] for expert in range(EXPERTS)])
            for part in ("gate", "up", "down")
        )
        found += [(f"{prefix}.gate_up_proj", torch.cat([gate, up], dim=1)), (f"{prefix}.down_proj", down)]
    return found


def merged_experts(world: World, cell: Cell) -> dict[str, Any]:
    """Experts as one 3-D tensor a layer: what the release's own loader makes of them, and a sync of ours."""
    with world.as_rank(cell) as config:
        fresh = copied(state_of(world.load(cell, config, checkpoint(cell, 1))))
        try:
            stock = Outcome(differences(state_of(world.load(cell, config, merged(checkpoint(cell, 1)))), fresh))
        except Exception as error:
            stock = Outcome(error=f"{type(error).__name__}: {error}")
            torch.set_default_dtype(torch.float32)  # which vLLM 0.11 leaves changed after an error
        model = world.load(cell, config, checkpoint(cell, 0))
        our_sync(model, config, buckets(merged(checkpoint(cell, 1))))
        return {"stock": asdict(stock), "ours": differences(state_of(model), fresh)}


def tied_embeddings(world: World, cell: Cell) -> dict[str, Any]:
    """A tied head: a stream without it, with it, and with another one, which cannot be this model's."""
    found: dict[str, Any] = {}
    with world.as_rank(cell) as config:
        tensors = checkpoint(cell, 1)
        fresh = copied(state_of(world.load(cell, config, tensors)))
        embedding = dict(tensors)["model.embed_tokens.weight"]
        heads = {"without": [], "first": [embedding], "last": [embedding], "another": [embedding + 1]}
        for which, head in heads.items():
            stream = [*tensors, *(("lm_head.weight", tensor) for tensor in head)]
            if which == "first":
                stream = [stream[-1], *tensors]
            model = world.load(cell, config, checkpoint(cell, 0))
            try:
                our_sync(model, config, buckets(stream))
                found[which] = asdict(Outcome(differences(state_of(model), fresh)))
            except Exception as error:
                found[which] = asdict(Outcome(error=f"{type(error).__name__}: {error}"))
    return found


def sleep_level_2(world: World, cell: Cell) -> dict[str, Any]:
    """What neither a sync of ours nor the worker brings back after a sleep at level 2 with expert parallelism."""
    with world.as_rank(cell) as config:
        fresh = copied(state_of(world.load(cell, config, checkpoint(cell, 1))))
        found = {}
        for level in (1, 2):
            model = world.load(cell, config, checkpoint(cell, 0), asleep=True)
            world.sleep_and_wake_up(model, config, level=level)
            our_sync(model, config, buckets(checkpoint(cell, 1)))
            found[f"level {level}"] = differences(state_of(model), fresh)
    return found


def by_vllms_bracket(world: World, cell: Cell) -> dict[str, Any]:
    """Three syncs on the `layerwise` path, with sleeps between and without; or why this release has no such path."""

    def sync(model: torch.nn.Module, config: Any, stream: Iterable[list[NamedTensor]]) -> None:
        with layerwise.reload(model, config.model_config, Manifest(), Plan()) as load:
            for bucket in stream:
                load(bucket)

    with world.as_rank(cell) as config:
        fresh = {seed: copied(state_of(world.load(cell, config, checkpoint(cell, seed)))) for seed in SYNCS}
        found: dict[str, Any] = {"obstacle": layerwise.obstacle(world.load(cell, config, checkpoint(cell, 0)))}
        for sleep in (True, False):
            outcomes = three_syncs(world, cell, config, sync, fresh, sleep=sleep)
            found["asleep" if sleep else "awake"] = [asdict(outcome) for outcome in outcomes]
    return found


def run(world: World) -> dict[str, Any]:
    """The matrix, and the cases beside it."""
    started = time.monotonic()
    with verls_patches() as error:
        found: dict[str, Any] = {"verl cannot be imported": error, "cells": {}}
    for cell in cells():
        found["cells"][cell.name] = matrix(world, cell)
        gc.collect()
    found["seconds"] = time.monotonic() - started
    found["no sync"] = {
        cell.name: no_sync(world, cell)
        for cell in (Cell("qwen2_moe", "H == 2*I/tp", 2, 1), Cell("qwen3_moe", "odd", 1, 0))
    }
    found["merged experts"] = {
        cell.name: merged_experts(world, cell)
        for cell in (Cell("qwen2_moe", "odd", 2, 1), Cell("qwen3_moe", "I == H", 1, 0))
    }
    found["tied embeddings"] = tied_embeddings(world, Cell("qwen2_moe", "plain", 2, 1, tied=True))
    found["layerwise"] = {
        cell.name: by_vllms_bracket(world, cell)
        for cell in (
            Cell("qwen3_moe", "H == 2*I/tp", 1, 0),
            Cell("qwen2_moe", "I/tp == H", 2, 1),
            Cell("qwen2_moe", "odd", 4, 3),
            Cell("qwen2_moe", "H == 2*I/tp", 2, 0, expert_parallel=True),
        )
    }
    found["sleep level 2"] = sleep_level_2(world, Cell("qwen2_moe", "plain", 2, 1, expert_parallel=True))
    return found


if __name__ == "__main__":
    # The tensors are tiny; on a busy machine threads that wait for each other take most of the time.
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        Path(sys.argv[-1]).write_text(json.dumps(run(World(Path(folder)))))
    # The world's own end takes seconds, and there is nothing to keep.
    sys.stdout.flush()
    os._exit(0)
