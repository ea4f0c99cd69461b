"""`ascend-safe compare`: smoke reports side by side, and which of their numbers may be compared at all.

Needs no platform, no torch and no vLLM: it reads JSON.
"""
