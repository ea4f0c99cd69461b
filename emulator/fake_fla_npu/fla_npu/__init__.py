"""Fake fla_npu (flash-linear-attention-npu): kernels of linear attention, which are on no package index.

Stands in for its names, which vllm-ascend 0.30.0rc2 imports for every model (patch/worker/patch_qwen3_5.py, by
ops/gdn.py); its Dockerfile fetches the real one.  Left out: all of it.  Models without linear attention call none.
"""
