"""`ascend_safe`: verl's own vLLM rollout, guarded, for CUDA GPUs, Ascend NPUs and (at toy size) a CPU.

Importing this package imports nothing heavy: neither verl, nor vLLM, nor torch.
"""

__version__ = "0.1.0"

ROLLOUT_NAME = "ascend_safe"
"""The name in `actor_rollout_ref.rollout.name`, and the first part of every Ray actor name of ours."""

PATCHED = "_ascend_safe_patched"
"""The attribute of a function or class that took the place of another's: which patches it has, by name."""
