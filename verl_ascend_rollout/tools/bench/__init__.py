"""`ascend-safe bench`: what our path costs, beside the alternatives and beside the floor, in one run.

Timings are comparable only within one run on one machine, so each bench measures its own floor (a plain copy, a plain
allocation) in the same process and reports ratios to it.
"""
