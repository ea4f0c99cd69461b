"""`ascend-safe doctor`: whether a rollout can work with what is installed, found out without importing any of it.

It runs where `import vllm` or `import torch_npu` fails, and says why: everything is read, from files, metadata,
environment variables and limits.
"""
