"""What must not leave the machine in a report: secrets, tokens, host names, addresses, user names, home folders.

A report is made to be pasted into an issue.  So it is cleaned where it turns into text, and not where its parts are
collected: nobody can forget it.  Better a word too many than a token too few: a report whose host is called `trainer`
loses that word.
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import os
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

SECRET = "[secret]"
HOST = "[host]"
ADDRESS = "[address]"
USER = "[user]"
EMAIL = "[email]"

Instead = str | Callable[[re.Match[str]], str]
Shape = tuple[str, Instead]
"""What is taken out, as a regular expression, and what takes its place."""

Identity = tuple[tuple[re.Pattern[str], Instead], ...]

_SECRET_WORD = (
    r"(?:tokens?|secrets?|passw(?:or)?d|passphrase|credentials?|(?:api|access|account|private|secret|auth)[_-]?key"
    r"|密码|口令|令牌|密钥|(?-i:(?<=[A-Z0-9])_(?:KEY|PAT|PWD|PASS|AUTH|AK|SK)))"
)
"""How the name of something secret ends (`_AK` and `_SK`: Huawei Cloud's).  A mere `_key` does not: verl has
`prompt_key`, and it is no secret."""

_VALUE = r"""(?!\[secret\])(?:(?P<quote>\\*["'])(?!\[secret\])(?P<quoted>(?:(?!(?P=quote))[^\n]){6,})
    |(?P<bare>(?:[^\s"',;|\uff0c\uff1b]|[,;](?=\S)){6,}))"""
_SECRET_VARIABLE = re.compile(rf".*{_SECRET_WORD}(?:[_-](?:id|value|file))?", re.IGNORECASE)
_HOST_VARIABLE = re.compile(
    r"HOSTNAME|HOST|RAY_ADDRESS|MASTER_ADDR|VLLM_HOST_IP|SLURMD_NODENAME|SLURM_(?:JOB_|STEP_)?NODELIST|"
    r"SLURM_SUBMIT_HOST|NODE_NAME|POD_NAME|SSH_CONNECTION|SSH_CLIENT|(?:https?|all|ftp)_proxy",
    re.IGNORECASE,
)
_USER_VARIABLE = ("USER", "LOGNAME", "SUDO_USER", "USERNAME", "SLURM_JOB_USER", "HADOOP_USER_NAME")

_PUBLIC_HOSTS = (
    "github.com",
    "githubusercontent.com",
    "gitee.com",
    "huggingface.co",
    "hf.co",
    "modelscope.cn",
    "python.org",
    "pytorch.org",
    "vllm.ai",
    "readthedocs.io",
    "hiascend.com",
    "nvidia.com",
    "ray.io",
    "arxiv.org",
    "quay.io",
    "localhost",
)
"""Hosts that everybody has: an address on them says nothing about the user."""

_ORDINARY = {
    *("root", "user", "users", "admin", "ubuntu", "debian", "centos", "runner", "nobody", "test", "tests", "build"),
    *("localhost", "auto", "local", "none", "host", "true", "false", "home", "data", "work", "python", "worker"),
    *("torch", "verl", "vllm", "ascend", "ray", "cuda", "docker", "server", "trainer", "driver", "model"),
}
"""Names that tell nothing about anybody, and without which a report could not be read."""


def redact(text: str) -> str:
    """Return the text without what identifies this machine and its user, and without anything that looks like a secret.

    Doing it twice changes nothing more.  Looks at this process's environment, host name, user and home folder.
    """
    return redact_for(text, _identity())


def redact_file(path: Path) -> None:
    """Redact a file in place; one that cannot be read or written stays as it is.

    What takes its place is complete before it does.
    """
    clean = path.with_name(f".{path.name}.clean")
    with contextlib.suppress(OSError):
        clean.write_text(redact(path.read_text(encoding="utf-8", errors="replace")), encoding="utf-8")
        clean.replace(path)


def identity_of(environ: Mapping[str, str], host: str, users: Iterable[str], homes: Iterable[str]) -> Identity:
    """Return all that must not go out, in the order in which it is taken out.

    Args:
        environ: environment variables: some have a secret's name, and some name hosts.
        host: this machine's name, short or with its domain.
        users: names of the user.
        homes: the user's home folders.
    """
    secrets = [value for name, value in environ.items() if _SECRET_VARIABLE.fullmatch(name) and len(value) >= 6]
    hosts = [host, host.partition(".")[0]]
    for name, value in environ.items():
        if _HOST_VARIABLE.fullmatch(name):
            for word in re.findall(r"[A-Za-z][A-Za-z0-9.-]*[A-Za-z0-9]", value.rpartition("@")[2]):
                if word not in ("http", "https", "socks5", "ray") and not word.endswith(_PUBLIC_HOSTS):
                    hosts += [word, word.partition(".")[0]]
    names = [*users, *(environ[name] for name in _USER_VARIABLE if environ.get(name))]
    # A home that is the root of the file system, or one part deep ("/root"), is no name to hide.
    folders = [home.rstrip("/") for home in homes if home.rstrip("/").count("/") >= 2]
    shapes: list[Shape] = [
        *((re.escape(secret), SECRET) for secret in _longest_first(secrets)),
        *_SECRETS,
        *((rf"{re.escape(home)}(?![\w-])", "~") for home in _longest_first(folders)),
        *_PLACES,
        *_words(hosts, HOST),
        *_words(names, USER),
        *_ADDRESSES,
    ]
    return tuple((re.compile(shape), instead) for shape, instead in shapes)


def redact_for(text: str, identity: Identity) -> str:
    """Redact as `redact` does, with what is to be taken out given."""
    for shape, instead in identity:
        text = shape.sub(instead, text)
    return text


@functools.cache
def _identity() -> Identity:
    users, homes = [], [os.path.expanduser("~")]
    try:
        import pwd

        entry = pwd.getpwuid(os.getuid())
        users.append(entry.pw_name)
        homes.append(entry.pw_dir)
    except (ImportError, KeyError):
        pass  # a container whose user id has no name
    with contextlib.suppress(OSError, RuntimeError):
        homes.append(str(Path.home().resolve()))
    return identity_of(dict(os.environ), socket.gethostname(), users, homes)


def _longest_first(words: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted({word for word in words if word}, key=len, reverse=True))


def _words(words: Iterable[str], instead: str) -> Iterator[Shape]:
    """Yield any of the words, standing alone; nothing where none of them tells anything."""
    telling = _longest_first(word for word in words if len(word) >= 3 and word.lower() not in _ORDINARY)
    if telling:
        yield rf"(?<![A-Za-z0-9[])(?:{'|'.join(map(re.escape, telling))})(?![A-Za-z0-9\]])", instead


def _value(match: re.Match[str]) -> str:
    """Return a name with its value taken out; a number of tokens is no secret."""
    if "token" in match["name"].lower() and (match["quoted"] or match["bare"]).isdecimal():
        return match[0]
    return f"{match['name']}{match['quote'] or ''}{SECRET}"


def _url_host(match: re.Match[str]) -> str:
    host = match["host"]
    public = any(host == name or host.endswith(f".{name}") for name in _PUBLIC_HOSTS)
    loopback = host in ("127.0.0.1", "0.0.0.0")
    shown = host if public or loopback else HOST
    return f"{match['user'] or ''}{shown}{match['rest'] or ''}"


def _address(match: re.Match[str]) -> str:
    try:
        address = ipaddress.ip_address(match[0])
    except ValueError:
        return match[0]  # a version of four parts with a number above 255
    return match[0] if address.is_loopback or address.is_unspecified else ADDRESS


# Each is linear in the text: where a match can fail only far away, it can begin in few places.
_SECRETS: tuple[Shape, ...] = (
    (r"(?s)-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", SECRET),
    # user:password@ in an address; a user alone may be a token.
    (r"(?<=://)(?!\[secret\]@)[^/\s@]+@", f"{SECRET}@"),
    # The signature, which is all that it takes, of an address that was signed (Azure, AWS, Google).
    (r"(?i)([?&](?:sig|(?:x-\w+-)?(?:signature|credential|security-token))=)[^&\s\"'<>]+", rf"\1{SECRET}"),
    # Tokens that say what they are: Hugging Face, ModelScope, GitHub, GitLab, PyPI, npm, Docker, NVIDIA, OpenAI and the
    # like, AWS, Slack, Google, a JWT.
    (
        r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{10,}|ms-[0-9a-f]{8}-[0-9a-f-]{20,}|(?:gh[pousr]_|github_pat_)\w{16,}"
        r"|(?:glpat|pypi|nvapi|sk|pk|rk)-[\w-]{16,}|npm_[A-Za-z0-9]{16,}|dckr_pat_[\w-]{16,}"
        r"|(?:AKIA|ASIA)[A-Z0-9]{16}\b|xox[abeoprs]-[A-Za-z0-9-]{10,}|AIza[\w-]{30,})",
        SECRET,
    ),
    (r"(?<![\w-])eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*", SECRET),
    (r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{8,}", rf"\1 {SECRET}"),
    # name=value and name: value, where the name says that the value is a secret; and `--name value`, also in a list.
    (rf"(?ix)(?P<name>{_SECRET_WORD}(?:\\*[\"'])?\s*(?:=>?|[:\uff1a])\s*){_VALUE}", _value),
    (rf"(?ix)(?P<name>(?<![\w-])--[\w-]*{_SECRET_WORD}[\"']?(?:[ \t]+|,\s*)(?!-)){_VALUE}", _value),
    # Programs that take a password by an option of one letter, or a key by its place.
    (
        r"(\bsshpass\s+-p\s*|\b(?:docker|podman|nerdctl)\s+login\s(?:[^\n|;&]{0,200}?\s)?-p\s*"
        r"|\bmysql\w*\s(?:[^\n|;&]{0,200}?\s)?-p)"
        r"(?!\[secret\])(?:'[^'\n]+'|\"[^\"\n]+\"|[^\s'\"|;&]+)",
        rf"\1{SECRET}",
    ),
    (
        r"(\bcurl\s(?:[^\n|;&]{0,200}?\s)?(?:-u|--user)\s*['\"]?[^\s:'\"]{1,100}:)(?!\[secret\])[^\s'\"|;&]+",
        rf"\1{SECRET}",
    ),
    (r"(?i)(\bwandb\W+login\W+|\bwandb_api_key\W+)[0-9a-f]{40}\b", rf"\1{SECRET}"),
    (r"(?i)(\bcookie:\s*)(?!\[secret\])[^\s\"'][^\n\"']*", rf"\1{SECRET}"),
    (r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]+@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+", EMAIL),
)

_PLACES: tuple[Shape, ...] = (
    (r"(?<![\w.])/(home|Users)/(?!\[user\])[^/\s:\"'|`,;)]+", rf"/\1/{USER}"),
    (r"(?<![\w.])/root(?=[/\s:\"'|`,;)]|$)", "~"),
    (r"(?<=://)(?P<user>[^/\s@]*@)?(?P<host>[A-Za-z0-9.-]+)(?P<rest>:\d+)?", _url_host),
    (
        r"(?<![\w@/.-])[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*\.(?:internal|local|localdomain|lan|intranet|corp)\b",
        HOST,
    ),
)

_ADDRESSES: tuple[Shape, ...] = (
    (r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w.]*\d)", _address),
    (
        r"(?<![\w:.])(?=[0-9A-Fa-f:]*:[0-9A-Fa-f:]*:)[0-9A-Fa-f]{1,4}(?::{1,2}[0-9A-Fa-f]{1,4}){2,7}(?![\w:])",
        _address,
    ),
)
