"""Facts about the machine: which accelerator, which versions, which abilities.  No decision is made here.

Nothing here imports torch, verl or vLLM, so that it works on a broken installation, and before the environment
variables are set that vLLM reads while it is imported.
"""

from __future__ import annotations
