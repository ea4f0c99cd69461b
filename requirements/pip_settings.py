"""Print pip's own settings as the environment variables by which uv takes the same: `eval "$(python pip_settings.py)"`.

uv reads neither pip's configuration files nor its variables, so an index, a mirror or a folder of wheels that the user
has given to pip once would be ignored.
"""

from __future__ import annotations

import shlex
import subprocess
import sys

VARIABLES = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "cert": ("SSL_CERT_FILE", ""),
}


def settings(listing: str) -> dict[str, str]:
    """uv's variables for the output of `pip config list`; what pip's environment variables say goes first."""
    found: dict[str, str] = {}
    for line in sorted(listing.splitlines(), key=lambda line: not line.startswith(":env:")):
        name, _, value = line.partition("=")
        variable, separator = VARIABLES.get(name.rpartition(".")[2], ("", ""))
        if not variable or variable in found:
            continue
        # Quoted by pip as a Python string; several values stand on lines or between spaces.
        values = " ".join(shlex.split(value)).split()
        found[variable] = separator.join(values) if separator else " ".join(values)
    if "UV_INDEX" in found:
        # As pip does it: a package may come from any index that has it, not from the first that has the name.
        found["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    return found


def main() -> None:
    """Ask the pip of this interpreter."""
    listing = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    for variable, value in settings(listing.stdout).items():
        print(f"export {variable}={shlex.quote(value)};")


if __name__ == "__main__":
    main()
