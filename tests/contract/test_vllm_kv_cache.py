"""The installed vLLM has what freeing the KV cache and the calls to its workers rely on.

No engine is started: vLLM's own classes and functions, on tensors that are made here.
"""

from __future__ import annotations

import collections
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from verl_ascend_rollout.worker import kv_cache, kv_references, worker_rpc

BLOCKS, HEADS, HEAD_SIZE, BLOCK_SIZE, LAYERS = 8, 2, 32, 32, 2


class Queue:
    """A worker's answers, as the executor reads them."""

    def __init__(self, found: list[Any]) -> None:
        self.found = collections.deque(found)

    def dequeue(self, timeout: float | None = None) -> Any:
        return self.found.popleft()


def executor(*workers: list[Any]) -> Any:
    """vLLM's multiprocess executor, with answers already in the workers' queues."""
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    it = object.__new__(MultiprocExecutor)
    it.rpc_broadcast_mq = SimpleNamespace(enqueue=lambda message: None)
    it.response_mqs = [Queue(found) for found in workers]
    it.is_failed = False
    it.futures_queue = collections.deque()
    return it


def test_an_exception_in_one_worker_leaves_the_others_answer_for_the_next_call() -> None:
    """Why our calls answer with errors as values.  If this fails, vLLM has mended it, and the comment can go."""
    from vllm.v1.executor.multiproc_executor import WorkerProc

    good, bad = WorkerProc.ResponseStatus.SUCCESS, WorkerProc.ResponseStatus.FAILURE
    it = executor([(bad, "boom"), (good, "second 0")], [(good, "first 1"), (good, "second 1")])
    with pytest.raises(RuntimeError, match="boom"):
        it.collective_rpc("first")
    assert it.collective_rpc("second") == ["second 0", "first 1"], "worker 1 answers the wrong question"


def test_an_error_as_a_value_leaves_nothing_behind() -> None:
    from vllm.v1.executor.multiproc_executor import WorkerProc

    good = WorkerProc.ResponseStatus.SUCCESS

    def boom() -> None:
        raise ValueError("boom")

    it = executor(
        [(good, worker_rpc.capture(boom, "first")), (good, "second 0")],
        [(good, worker_rpc.capture(lambda: "first 1", "first")), (good, "second 1")],
    )
    with pytest.raises(worker_rpc.WorkerError, match="worker 0: ValueError: boom"):
        worker_rpc.unwrap("first", it.collective_rpc("ascend_safe_call", args=("first",)))
    assert it.collective_rpc("second") == ["second 0", "second 1"]


def attention_layers() -> dict[str, Any]:
    """What a model's attention layers are to the KV cache: bound by vLLM's own method, where it has one."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    class Layer(AttentionLayerBase):
        def __init__(self) -> None:
            self.kv_cache = torch.tensor([])
            self.impl = SimpleNamespace()

        def get_attn_backend(self) -> Any:
            raise NotImplementedError

        def get_kv_cache_spec(self, vllm_config: Any) -> Any:
            raise NotImplementedError

    return {f"model.layers.{number}.self_attn.attn": Layer() for number in range(LAYERS)}


def v2_runner(layers: dict[str, Any]) -> Any:
    """vLLM's V2 model runner without a device: what its `initialize_kv_cache` sets and we rely on.  It wants Triton
    and so runs on no CPU (vLLM 0.28, config/vllm.py:652)."""
    from vllm.config import CacheConfig, CompilationConfig, VllmConfig
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, KVCacheTensor
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    source = inspect.getsource(GPUModelRunner.initialize_kv_cache)
    for attribute in ("kv_cache_config", "attn_groups", "kernel_block_sizes", "kv_caches"):
        assert f"self.{attribute}" in source, f"vLLM's V2 runner has no {attribute} any more"
    spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=HEADS, head_size=HEAD_SIZE, dtype=torch.bfloat16)
    it = object.__new__(GPUModelRunner)
    it.device = torch.device("cpu")
    it.kv_cache_config = KVCacheConfig(
        num_blocks=BLOCKS,
        kv_cache_tensors=[KVCacheTensor(size=BLOCKS * spec.page_size_bytes, shared_by=[name]) for name in layers],
        kv_cache_groups=[KVCacheGroupSpec(list(layers), spec)],
    )
    it.attn_groups = [
        [
            SimpleNamespace(
                backend=CPUAttentionBackend,
                layer_names=list(layers),
                kv_cache_spec=spec,
                kv_cache_group_id=0,
                metadata_builders=[],
            )
        ]
    ]
    it.kernel_block_sizes = [BLOCK_SIZE]
    it.kv_caches = []
    config = VllmConfig(cache_config=CacheConfig(block_size=BLOCK_SIZE), compilation_config=CompilationConfig(mode=0))
    config.model_config = SimpleNamespace(
        enforce_eager=True, enable_sleep_mode=False, hf_config=SimpleNamespace(model_type="qwen2")
    )
    config.compilation_config.static_forward_context.update(layers)
    it.vllm_config = config
    it.compilation_config = config.compilation_config
    return it


def test_direct_on_the_v2_model_runner() -> None:
    layers = attention_layers()
    runner = v2_runner(layers)
    it = SimpleNamespace(model_runner=runner, vllm_config=runner.vllm_config, device=torch.device("cpu"))
    assert not hasattr(runner, "initialize_kv_cache_tensors"), "the V2 runner makes its KV cache in a function"
    assert kv_cache.probe(it).method == "reallocate"
    made = kv_cache.init(it, "reallocate")
    wanted = LAYERS * BLOCKS * 2 * HEADS * BLOCK_SIZE * HEAD_SIZE * 2
    assert made.changed and made.bytes_after == wanted
    assert len(runner.kv_caches) == LAYERS
    shapes = [layer.kv_cache.shape for layer in layers.values()]
    for _ in range(2):
        freed = kv_cache.free(it, "reallocate")
        assert (freed.bytes_before, freed.bytes_after) == (wanted, 0)
        assert kv_cache.init(it, "reallocate").bytes_after == wanted
        assert [layer.kv_cache.shape for layer in layers.values()] == shapes
        assert {tensor.untyped_storage().data_ptr() for tensor in runner.kv_caches} == {
            layer.kv_cache.untyped_storage().data_ptr() for layer in layers.values()
        }


def test_the_v2_model_runner_with_mamba_states_keeps_its_memory() -> None:
    class MambaSpec:
        pass

    runner = v2_runner(attention_layers())
    runner.kv_cache_config.kv_cache_groups = [SimpleNamespace(kv_cache_spec=MambaSpec())]
    it = SimpleNamespace(model_runner=runner, vllm_config=runner.vllm_config, device=torch.device("cpu"))
    found = kv_cache.probe(it)
    assert found.method == "keep"
    assert any("addresses of Mamba states" in sentence for sentence in found.obstacles)


def test_the_v1_runner_makes_its_tensors_with_arguments_that_we_know() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    parameters = inspect.signature(GPUModelRunner.initialize_kv_cache_tensors).parameters.values()
    required = {parameter.name for parameter in parameters if parameter.default is parameter.empty}
    assert required <= {"self", "kv_cache_config", "kernel_block_sizes"}
    source = inspect.getsource(GPUModelRunner.initialize_kv_cache)
    assert "self._kernel_block_sizes" in source and "self.kv_cache_config" in source


def test_vllms_own_list_of_aliases_has_none_that_ours_lacks() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    source = inspect.getsource(GPUModelRunner._cleanup_profiling_kv_cache)
    set_there = {line.split("=")[0].strip() for line in source.splitlines() if " = None" in line}
    known = {f"layer.impl.{alias}" for alias in kv_references.IMPLEMENTATION_ALIASES}
    known |= {f"self.{alias}" for alias in kv_references.RUNNER_ALIASES}
    # Not of the tensors, but of a second `initialize_kv_cache`, which we do not call.
    known |= {"self.kv_caches[i]", "self.cross_layers_attn_backend", "self.cache_config.num_gpu_blocks"}
    assert set_there <= known


def test_the_kv_only_release_is_what_the_probe_asks_for() -> None:
    """`discard` came with vllm#44890; where vLLM has it, a CPU still refuses."""
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu_worker import Worker

    has = hasattr(Worker, "discard")
    assert hasattr(AsyncLLM, "release_kv_cache_memory") == has
    if has:
        assert list(inspect.signature(Worker.discard).parameters) == ["self", "tags"]
        with pytest.raises(RuntimeError, match="not supported on CPU"):
            CPUWorker.discard(object.__new__(CPUWorker), ("kv_cache",))
    it = object.__new__(CPUWorker)
    it.device = torch.device("cpu")
    it.vllm_config = SimpleNamespace(model_config=SimpleNamespace(enable_sleep_mode=True))
    (obstacle,) = kv_cache.probe(it, "kv_only").obstacles
    assert ("CPU worker refuses" if has else "no `discard`") in obstacle


def test_verls_gate_is_where_ours_stands() -> None:
    """A request waits in `_park_until_admitted`, which counts those that it lets in; of the two halves of
    `resume_generation` ours is the engine's."""
    from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer

    # Ray adds a parameter at the end to the methods of a class that was made an actor.
    assert list(inspect.signature(vLLMHttpServer._park_until_admitted).parameters)[:2] == ["self", "request_id"]
    assert "self._admitting += 1" in inspect.getsource(vLLMHttpServer._park_until_admitted)
    assert "_park_until_admitted" in inspect.getsource(vLLMHttpServer.generate)
    assert "resume_engine_generation" in inspect.getsource(vLLMHttpServer.resume_generation)
