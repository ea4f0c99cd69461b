"""Fake `fla_npu.ops`: see fla_npu."""
