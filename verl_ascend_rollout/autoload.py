"""Importing this module registers the rollout: it is what verl's entry point loads.

verl loads the object that an entry point names and calls nothing (verl 0.9.1, verl/__init__.py:74), so loading has to
be enough.  verl then writes a failure to its log at DEBUG only (verl/__init__.py:75-76): to the user nothing happened.
So a failure is said here, at ERROR and with its cause, before it is let go, and a job that chose our rollout all the
same is stopped in the driver.  Also right for
`VERL_USE_EXTERNAL_MODULES=verl_ascend_rollout.autoload`.
"""

from __future__ import annotations

import os

from verl_ascend_rollout import ROLLOUT_NAME, plugin

try:
    plugin.register()
except Exception as error:
    plugin.logger.error("The rollout %r is NOT registered in process %d: %s", ROLLOUT_NAME, os.getpid(), error)
    plugin.refuse(str(error))
    raise
