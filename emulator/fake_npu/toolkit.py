"""Where the fake CANN toolkit is, for what asks for one by a path; and a program run with it.

    python -m fake_npu.toolkit PROGRAM.py ARGUMENT...

runs a program as on a machine with one NPU that has sourced CANN's set_env.sh.

Stands in for `source set_env.sh` of an installed CANN.  verl reads ascend_toolkit_install.info below ASCEND_HOME_PATH
and runs `npu-smi` from the PATH (verl 0.9.1, verl/utils/device.py, get_npu_versions).  With ASCEND_HOME_PATH set,
torch_npu also wants ASCEND_OPP_PATH and the folders `runtime` and `compiler` (torch-npu 2.13.0, _init/registry).  Left
out: all contents, so nothing can be compiled with it.  vLLM alone needs none of this.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def environment() -> dict[str, str]:
    """ASCEND_HOME_PATH, ASCEND_OPP_PATH and a PATH with the fake npu-smi, to be set before torch is imported.

    FileNotFoundError where the environment of the running Python was not made by build.py.
    """
    home = Path(sys.prefix) / "fake-ascend-toolkit"
    if not home.is_dir():
        raise FileNotFoundError(f"{home} is not there: make the environment with emulator/build.py")
    path = os.pathsep.join([str(Path(sys.prefix) / "bin"), os.environ.get("PATH", os.defpath)])
    return {"ASCEND_HOME_PATH": str(home), "ASCEND_OPP_PATH": str(home / "opp"), "PATH": path}


if __name__ == "__main__":
    variables = {"VERL_PLATFORM": "npu", "FAKE_CANN_DEVICES": "1", **os.environ, **environment()}
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], variables)
