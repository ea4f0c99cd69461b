"""pip's own settings, handed on to uv: an index or a folder of wheels that the user gave to pip must not be ignored."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "requirements" / "pip_settings.py"


@pytest.fixture(scope="module")
def pip_settings() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pip_settings", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("listing", "expected"),
    [
        ("", {}),
        ("global.timeout='60'\nglobal.trusted-host='one.example'", {}),
        ("global.index-url='https://one.example/simple'", {"UV_DEFAULT_INDEX": "https://one.example/simple"}),
        ("global.cert='/etc/my  certificates.crt'", {"SSL_CERT_FILE": "/etc/my  certificates.crt"}),
        (
            "global.extra-index-url='https://one.example https://two.example'",
            {"UV_INDEX": "https://one.example https://two.example", "UV_INDEX_STRATEGY": "unsafe-best-match"},
        ),
        # As a file with a value to a line comes out.
        (r"global.find-links='\n/wheels\nhttps://one.example/'", {"UV_FIND_LINKS": "/wheels,https://one.example/"}),
        # pip's Python puts a value with an apostrophe between double quotes.
        ('global.find-links="/it\'s/wheels"', {"UV_FIND_LINKS": "/it's/wheels"}),
        ("global.index-url='https://one.example/?a=b'", {"UV_DEFAULT_INDEX": "https://one.example/?a=b"}),
        # Of another command than install.
        ("download.find-links='/elsewhere'\nwheel.index-url='https://one.example'", {}),
    ],
)
def test_a_listing_of_pip_config(listing: str, expected: dict[str, str], pip_settings: ModuleType) -> None:
    assert pip_settings.settings(listing) == expected


@pytest.mark.parametrize("order", [1, -1])
def test_environment_before_install_before_global(order: int, pip_settings: ModuleType) -> None:
    lines = [
        "global.index-url='https://global.example'",
        "global.find-links='/global'",
        "global.cert='/global.crt'",
        "install.index-url='https://install.example'",
        "install.find-links='/install'",
        ":env:.index-url='https://env.example'",
    ]
    assert pip_settings.settings("\n".join(lines[::order])) == {
        "UV_DEFAULT_INDEX": "https://env.example",
        "UV_FIND_LINKS": "/install",
        "SSL_CERT_FILE": "/global.crt",
    }


def test_what_the_real_pip_says_reaches_a_shell(tmp_path: Path) -> None:
    """As the Makefile uses it: `eval` of the output, with a value that a shell would tear apart."""
    (tmp_path / "pip.conf").write_text(
        "[global]\nextra-index-url =\n    https://one.example/simple?a=1&b=$HOME\n    https://two.example/simple\n",
        encoding="utf-8",
    )
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))}
    environ |= {"PIP_CONFIG_FILE": str(tmp_path / "pip.conf"), "PIP_FIND_LINKS": "/some wheels"}
    shell = f'eval "$({sys.executable} {SCRIPT})"; printf "%s\\n" "$UV_INDEX" "$UV_FIND_LINKS" "$UV_INDEX_STRATEGY"'
    done = subprocess.run(["bash", "-euc", shell], capture_output=True, text=True, env=environ, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    indexes, find_links, strategy = done.stdout.splitlines()
    # A machine-wide configuration file may add to these, and never replaces what was given here.
    assert indexes == "https://one.example/simple?a=1&b=$HOME https://two.example/simple"
    assert find_links == "/some,wheels"
    assert strategy == "unsafe-best-match"
