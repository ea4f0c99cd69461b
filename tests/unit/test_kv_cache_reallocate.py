"""`reallocate` on tensors alone: each form that vLLM has given the KV cache, and whoever else may hold it."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from verl_ascend_rollout.worker import kv_cache, kv_references

LAYER_BYTES = 1 << 20
FORMS: dict[str, Callable[[torch.Tensor], Any]] = {
    "a list of one tensor (vLLM until 0.18)": lambda tensor: [tensor],
    "a bare tensor (vLLM from 0.20.2 on)": lambda tensor: tensor.view(torch.bfloat16),
    "a tuple of key and value (vllm-ascend)": lambda tensor: (tensor[: LAYER_BYTES // 2], tensor[LAYER_BYTES // 2 :]),
    "a list of such tuples (vllm-ascend until 0.18)": lambda tensor: [(tensor[: LAYER_BYTES // 2], tensor[:4])],
}


class BindingLayer:
    """A layer of vLLM from 0.27.1 on: `bind_kv_cache` may unpack."""

    def __init__(self) -> None:
        self.kv_cache: Any = torch.tensor([])
        self.impl = SimpleNamespace(key_cache=None, value_cache=None, kv_cache_dtype="auto")

    def bind_kv_cache(self, cache: Any) -> None:
        self.kv_cache = cache


class Runner:
    """A model runner of two attention layers and one without a KV cache, as vLLM's V1 runner makes and binds them."""

    def __init__(self, form: str, parameters: tuple[str, ...] = ("kv_cache_config",)) -> None:
        self.form = FORMS[form]
        layers: dict[str, Any] = {f"layers.{number}.attn": BindingLayer() for number in range(2)}
        layers["layers.0.experts"] = SimpleNamespace(quant_method=object())
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(enforce_eager=True, enable_sleep_mode=False),
            compilation_config=SimpleNamespace(static_forward_context=layers),
            kv_transfer_config=None,
        )
        self.kv_caches: list[Any] = []
        self.kv_cache_config = SimpleNamespace(
            kv_cache_tensors=[SimpleNamespace(size=LAYER_BYTES)] * 2, needs_kv_cache_zeroing=True
        )
        self._kernel_block_sizes = [16]
        self._mamba_bufs: Any = object()
        self.cross_layers_kv_cache: torch.Tensor | None = None
        self.attn_groups: list[Any] = []
        self.zeroed: list[int] = []
        self.failures = 0
        self.initialize_kv_cache_tensors()

    def initialize_kv_cache_tensors(self, kv_cache_config: Any = None) -> None:
        assert not self.kv_caches, "vLLM's bind_kv_cache asserts that"
        for name in ("layers.0.attn", "layers.1.attn"):
            tensor = torch.zeros(LAYER_BYTES, dtype=torch.int8)
            self.kv_caches.append(tensor)
            self.vllm_config.compilation_config.static_forward_context[name].bind_kv_cache(self.form(tensor))
            if self.failures:
                self.failures -= 1
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1048576 bytes")

    def _init_kv_zero_meta(self) -> None:
        self.zeroed = sorted(kv_references.storages(self))

    def forward(self) -> None:
        """What vllm-ascend's attention does at its first forward pass, and never again."""
        for layer in kv_references.layers(self).values():  # type: ignore[union-attr]
            implementation = getattr(layer, "impl", None)
            if implementation is not None and implementation.key_cache is None:
                cache = next(kv_references._tensors_in(layer.kv_cache))
                implementation.key_cache = implementation.value_cache = cache[:16]


@pytest.fixture(autouse=True)
def no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one thing of vLLM that making tensors wants."""
    import sys
    from types import ModuleType

    module = ModuleType("vllm.config")
    module.set_current_vllm_config = lambda config: contextlib.nullcontext()  # type: ignore[attr-defined]
    package = ModuleType("vllm")
    package.config = module  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setitem(sys.modules, "vllm.config", module)


@pytest.fixture(params=FORMS)
def runner(request: pytest.FixtureRequest) -> Runner:
    return Runner(request.param)


def worker(runner: Runner) -> Any:
    return SimpleNamespace(model_runner=runner, vllm_config=runner.vllm_config, device=torch.device("cpu"))


def tensors(runner: Runner) -> Iterator[weakref.ref[torch.UntypedStorage]]:
    for storage in kv_references.storages(runner).values():
        yield weakref.ref(storage)


def test_freed_and_made_again_in_each_form(runner: Runner) -> None:
    it = worker(runner)
    assert kv_cache.probe(it).method == "reallocate"
    runner.forward()
    list_itself = runner.kv_caches
    for _ in range(3):
        freed = kv_cache.free(it, "reallocate")
        assert freed.changed and (freed.bytes_before, freed.bytes_after) == (2 * LAYER_BYTES, 0)
        assert runner.kv_caches is list_itself and not list_itself, "others hold this very list"
        assert runner._mamba_bufs is None, "it has the addresses of Mamba states"
        assert not kv_cache.free(it, "reallocate").changed

        made = kv_cache.init(it, "reallocate")
        assert made.changed and made.bytes_after == 2 * LAYER_BYTES
        assert runner.zeroed == sorted(kv_references.storages(runner)), "the block zeroer has the new addresses"
        assert not kv_cache.init(it, "reallocate").changed
        runner.forward()
        for layer in (runner.vllm_config.compilation_config.static_forward_context[f"layers.{n}.attn"] for n in (0, 1)):
            mine = next(kv_references._tensors_in(layer.kv_cache)).untyped_storage().data_ptr()
            assert layer.impl.key_cache.untyped_storage().data_ptr() == mine, "attention reads the new cache"


def test_the_cache_of_all_layers_in_one_tensor_is_let_go_of() -> None:
    runner = Runner("a bare tensor (vLLM from 0.20.2 on)")
    runner.cross_layers_kv_cache = torch.zeros(64)
    assert kv_cache.free(worker(runner), "reallocate").changed
    assert runner.cross_layers_kv_cache is None


@pytest.mark.parametrize("where", ["layer", "impl", "runner", "builder"])
def test_a_holder_that_is_not_known_stops_the_free_before_anything_is_dropped(where: str, runner: Runner) -> None:
    tensor = runner.kv_caches[0]
    layer = runner.vllm_config.compilation_config.static_forward_context["layers.0.attn"]
    builder = SimpleNamespace()
    runner.attn_groups = [[SimpleNamespace(metadata_builders=[builder])]]
    owner = {"layer": layer, "impl": layer.impl, "runner": runner, "builder": builder}[where]
    owner.mystery = {"views": [tensor[:4]]}
    del tensor
    it = worker(runner)
    with pytest.raises(kv_cache.KVCacheHeldError, match=r"\.mystery holds it too"):
        kv_cache.free(it, "reallocate")
    assert kv_cache.kv_bytes(it) == 2 * LAYER_BYTES
    del owner.mystery
    assert kv_cache.free(it, "reallocate").changed


def test_a_cycle_that_holds_a_tensor_is_collected() -> None:
    runner = Runner("a bare tensor (vLLM from 0.20.2 on)")
    it = worker(runner)
    cycle = SimpleNamespace(tensor=runner.kv_caches[0])
    cycle.itself = cycle
    del cycle
    gc.disable()
    try:
        assert kv_cache.free(it, "reallocate").changed
    finally:
        gc.enable()


def test_what_survives_is_named_and_nothing_new_is_made_beside_it() -> None:
    runner = Runner("a bare tensor (vLLM from 0.20.2 on)")
    it = worker(runner)

    class Thief:
        loot: Any = None

    thief = Thief()
    thief.loot = runner.kv_caches[1]
    with pytest.raises(kv_cache.KVCacheHeldError, match=rf"^{LAYER_BYTES} bytes .* by .*Thief\.loot"):
        kv_cache.free(it, "reallocate")
    with pytest.raises(kv_cache.KVCacheHeldError, match=r"Thief\.loot"):
        kv_cache.init(it, "reallocate")
    assert kv_cache.kv_bytes(it) == 0
    del thief.loot
    assert kv_cache.init(it, "reallocate").changed


def test_one_failed_allocation_is_tried_again() -> None:
    runner = Runner("a bare tensor (vLLM from 0.20.2 on)")
    it = worker(runner)
    kv_cache.free(it, "reallocate")
    runner.failures = 1
    assert kv_cache.init(it, "reallocate").bytes_after == 2 * LAYER_BYTES


def test_no_room_is_said_with_numbers_and_leaves_nothing_behind() -> None:
    runner = Runner("a bare tensor (vLLM from 0.20.2 on)")
    it = worker(runner)
    kv_cache.free(it, "reallocate")
    runner.failures = 2
    with pytest.raises(
        kv_cache.KVCacheMemoryError,
        match=r"it takes 0\.00 GiB, and .* available \(the allocator: .*1048576.*\); lower .*gpu_memory_util",
    ):
        kv_cache.init(it, "reallocate")
    assert kv_cache.kv_bytes(it) == 0
    assert kv_cache.init(it, "reallocate").changed, "and once there is room, all is well"


def test_another_error_is_no_lack_of_memory() -> None:
    runner = Runner("a bare tensor (vLLM from 0.20.2 on)")
    it = worker(runner)
    kv_cache.free(it, "reallocate")

    def broken(kv_cache_config: Any) -> None:
        raise RuntimeError("shape mismatch")

    runner.initialize_kv_cache_tensors = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="shape mismatch"):
        kv_cache.init(it, "reallocate")


@pytest.mark.parametrize(
    "signature",
    [
        "kv_cache_config",  # vLLM 0.11; vllm-ascend until 0.26
        "kv_cache_config, kernel_block_sizes",  # vLLM 0.13 to 0.28
        "kv_cache_config, kv_cache_allocation_context=None",  # vllm-ascend 0.28
        "kv_cache_config, kernel_block_sizes=None, kv_cache_allocation_context=None",  # vllm-ascend 0.30, vLLM 0.30 on
    ],
)
def test_arguments_go_by_name(signature: str) -> None:
    runner = Runner("a bare tensor (vLLM from 0.20.2 on)")
    given: dict[str, Any] = {}
    original = runner.initialize_kv_cache_tensors
    runner.initialize_kv_cache_tensors = eval(  # type: ignore[method-assign]
        f"lambda {signature}: (given.update(locals()), original())", {"given": given, "original": original}
    )
    it = worker(runner)
    kv_cache.free(it, "reallocate")
    kv_cache.init(it, "reallocate")
    assert given["kv_cache_config"] is runner.kv_cache_config
    assert given.get("kernel_block_sizes", [16]) == [16]
    assert given.get("kv_cache_allocation_context") is None


def test_an_argument_that_is_not_known_is_an_obstacle() -> None:
    runner = Runner("a bare tensor (vLLM from 0.20.2 on)")
    runner.initialize_kv_cache_tensors = lambda kv_cache_config, new_thing: None  # type: ignore[method-assign,assignment,misc]
    found = kv_cache.probe(worker(runner))
    assert found.method == "keep"
    assert "reallocate: Runner wants new_thing to make its KV tensors, which is not known here" in found.obstacles


def wants_block_sizes(runner: Runner) -> list[Any]:
    """Let a runner want what vLLM 0.13 wants, and not keep it; what it is given then."""
    del runner._kernel_block_sizes
    given: list[Any] = []
    original = runner.initialize_kv_cache_tensors

    def make(kv_cache_config: Any, kernel_block_sizes: Any) -> None:
        given.append(kernel_block_sizes)
        original()

    runner.initialize_kv_cache_tensors = make  # type: ignore[method-assign,assignment]
    return given


def test_block_sizes_are_computed_where_the_runner_keeps_none() -> None:
    runner: Any = Runner("a bare tensor (vLLM from 0.20.2 on)")
    given = wants_block_sizes(runner)
    runner._prepare_kernel_block_sizes = lambda kv_cache_config: [kv_cache_config is runner.kv_cache_config]
    it = worker(runner)
    kv_cache.free(it, "reallocate")
    kv_cache.init(it, "reallocate")
    assert given == [[True]]


def test_an_argument_that_is_missing_is_found_while_the_tensors_are_there() -> None:
    runner = Runner("a bare tensor (vLLM from 0.20.2 on)")
    wants_block_sizes(runner)
    found = kv_cache.probe(worker(runner))
    assert (found.method, "reallocate: Runner has no _kernel_block_sizes" in found.obstacles) == ("keep", True)
