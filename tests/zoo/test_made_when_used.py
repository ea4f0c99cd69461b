"""What layers of the installed vLLM make of weights when they are first used is known: no sync would renew the rest."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import vllm

from verl_ascend_rollout.worker.weights.derived import MADE_WHEN_USED

AT_LOADING = {"__init__", "process_weights_after_loading", "load_weights"}


def made_when_used(text: str) -> Iterator[str]:
    """Yield each attribute that a method makes of a weight if it is not there yet."""
    methods = (each for each in ast.walk(ast.parse(text)) if isinstance(each, ast.FunctionDef))
    conditions = (
        each
        for method in methods
        if method.name not in AT_LOADING
        for each in ast.walk(method)
        if isinstance(each, ast.If)
    )
    for condition in conditions:
        asked = ast.unparse(condition.test)
        for each in (inner for statement in condition.body for inner in ast.walk(statement)):
            if isinstance(each, ast.Assign) and isinstance(each.targets[0], ast.Attribute):
                name = each.targets[0].attr
                lacking = f".{name} is None" in asked or f"not hasattr(self, '{name}')" in asked
                if lacking and ".weight" in ast.unparse(each.value):
                    yield name


def test_each_tensor_that_a_layer_makes_of_weights_at_its_first_use_is_known() -> None:
    files = (path.read_text() for path in Path(vllm.__file__).parent.rglob("*.py"))
    found = {name for text in files if ".weight" in text for name in made_when_used(text)}
    assert found <= MADE_WHEN_USED.keys()
    assert "_combined_gate_weight" in found
