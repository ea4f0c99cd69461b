"""Print pip's own settings as the environment variables by which uv takes the same: `eval "$(python pip_settings.py)"`.

uv reads neither pip's configuration files nor its variables, so an index, a mirror or a folder of wheels that the user
has given to pip once would be ignored.
"""

from __future__ import annotations

import ast
import shlex
import subprocess
import sys

VARIABLES = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "cert": ("SSL_CERT_FILE", ""),
}
"""pip's settings, each with uv's variable for it and what that variable has between several values."""

SECTIONS = (":env:", "install", "global")


def settings(listing: str) -> dict[str, str]:
    """uv's variables for the output of `pip config list`.

    As in pip, its environment variables go before its files, and there the section [install] before [global].
    """
    found: dict[str, str] = {}
    for section in SECTIONS:
        for line in listing.splitlines():
            name, _, value = line.partition("=")
            variable, separator = VARIABLES.get(name.removeprefix(f"{section}."), ("", ""))
            if not variable or variable in found:
                continue
            # pip writes the value as a Python string; several stand on lines or between spaces.
            text = str(ast.literal_eval(value))
            found[variable] = separator.join(text.split()) if separator else text
    if "UV_INDEX" in found:
        # As pip does it: a package may come from any index that has it, not from the first that has the name.
        found["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    return found


def main() -> None:
    """Ask the pip of this interpreter."""
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    for variable, value in settings(listing.stdout).items():
        print(f"export {variable}={shlex.quote(value)};")


if __name__ == "__main__":
    main()
