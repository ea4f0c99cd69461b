"""Importing this module registers the rollout: it is what verl's entry point loads.

verl loads the object that an entry point names and calls nothing (verl 0.9.1, verl/__init__.py:74), so loading has to
be enough.  Also right for `VERL_USE_EXTERNAL_MODULES=verl_ascend_rollout.autoload`.

A failure is said here, at ERROR, and ends here: an error out of this module would be lost (verl writes it to its log
at DEBUG, verl/__init__.py:75-76), or end `import verl` for every rollout (VERL_USE_EXTERNAL_MODULES).  A job that chose
our rollout is stopped in the driver.
"""

from __future__ import annotations

import os

from verl_ascend_rollout import ROLLOUT_NAME, plugin

try:
    plugin.register()
except Exception as error:
    plugin.logger.error("The rollout %r is NOT registered in process %d: %s", ROLLOUT_NAME, os.getpid(), error)
    plugin.refuse(str(error))
