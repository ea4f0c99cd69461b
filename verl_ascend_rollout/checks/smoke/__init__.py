"""`ascend-safe smoke`: load a model, generate, check, report; the same report on every platform.

measured   what a smoke report's facts are: the one schema that smoke writes and compare reads
"""
