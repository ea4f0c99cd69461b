"""`ascend-safe smoke`: load a model, generate, check, report; the same report on every platform.

The process at the prompt imports neither torch nor vLLM: those are in `child`, and in vLLM's `worker`.
"""
