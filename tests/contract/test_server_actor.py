"""The class that Ray sees offers what the server does, and imports none of it."""

from __future__ import annotations

import inspect
import subprocess
import sys

from verl_ascend_rollout.integration.actor import METHODS, AscendSafeServerActor


def test_the_actor_has_every_public_method_of_the_server() -> None:
    from verl_ascend_rollout.integration.server import AscendSafeHttpServer

    public = {name for name, _ in inspect.getmembers(AscendSafeHttpServer, callable) if not name.startswith("_")}
    # The actor's own way to each of them, and what it counts for its metrics.
    assert {*METHODS, "call", "take_routing"} == public


def test_every_forwarder_is_a_coroutine_so_that_ray_makes_an_async_actor() -> None:
    for name in METHODS:
        assert inspect.iscoroutinefunction(getattr(AscendSafeServerActor, name))


def test_importing_the_actor_imports_neither_vllm_nor_verl() -> None:
    code = (
        "import sys, verl_ascend_rollout.integration.actor;"
        "print([name for name in ('vllm', 'verl', 'torch', 'ray') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
