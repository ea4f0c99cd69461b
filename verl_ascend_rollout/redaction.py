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
from collections.abc import Iterable, Mapping
from pathlib import Path

SECRET = "[secret]"
HOST = "[host]"
ADDRESS = "[address]"
USER = "[user]"
EMAIL = "[email]"

_SECRET_NAME = (
    r"(?:[A-Za-z0-9]+[_-])*"
    r"(?:tokens?|secrets?|passw(?:or)?d|passphrase|credentials?|(?:api|access|private|secret|auth)[_-]?key)"
)
_SECRET_VARIABLE = re.compile(rf"{_SECRET_NAME}(?:[_-](?:id|value|file))?", re.IGNORECASE)
_HOST_VARIABLE = re.compile(
    r"HOSTNAME|HOST|RAY_ADDRESS|MASTER_ADDR|VLLM_HOST_IP|SLURMD_NODENAME|SLURM_(?:JOB_|STEP_)?NODELIST|"
    r"SLURM_SUBMIT_HOST|NODE_NAME|POD_NAME|SSH_CONNECTION|SSH_CLIENT|(?:https?|all|ftp)_proxy",
    re.IGNORECASE,
)
_USER_VARIABLE = ("USER", "LOGNAME", "SUDO_USER", "USERNAME", "SLURM_JOB_USER", "HADOOP_USER_NAME")

_SHAPES: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL),
        SECRET,
    ),
    # user:password@ in an address; a user alone may be a token.
    (re.compile(r"(?<=://)(?!\[secret\]@)[^/\s@]+@"), f"{SECRET}@"),
    # Tokens that say what they are: Hugging Face, GitHub, GitLab, OpenAI and the like, AWS, Slack, Google, a JWT.
    (re.compile(r"\bhf_[A-Za-z0-9]{10,}"), SECRET),
    (re.compile(r"\b(?:gh[pousr]_|github_pat_)[A-Za-z0-9_]{16,}"), SECRET),
    (re.compile(r"\bglpat-[A-Za-z0-9_-]{16,}"), SECRET),
    (re.compile(r"\b(?:sk|pk|rk)-[A-Za-z0-9_-]{16,}"), SECRET),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), SECRET),
    (re.compile(r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}"), SECRET),
    (re.compile(r"\bAIza[A-Za-z0-9_-]{30,}"), SECRET),
    (re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*"), SECRET),
    (re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{8,}"), rf"\1 {SECRET}"),
    # name=value and name: value, where the name says that the value is a secret; a number of tokens is none.
    (
        re.compile(
            rf"(?i)(?<![A-Za-z0-9])({_SECRET_NAME}[\"']?\s*(?:=|:)\s*[\"']?)"
            r"(?!\[secret\])(?!(?<=tokens[:=])\d|(?<=tokens[:=] )\d)[^\s\"',;|]{6,}"
        ),
        rf"\1{SECRET}",
    ),
    (re.compile(r"[A-Za-z0-9._%+-]+@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+"), EMAIL),
)

_HOMES = re.compile(r"(?<![\w.])/(home|Users)/(?!\[user\])[^/\s:\"'|`,;)]+")
_ROOT_HOME = re.compile(r"(?<![\w.])/root(?=[/\s:\"'|`,;)]|$)")
_URL_HOST = re.compile(r"(?<=://)(?P<user>[^/\s@]*@)?(?P<host>[A-Za-z0-9.-]+)(?P<rest>:\d+)?")
_INNER_HOST = re.compile(
    r"(?<![\w@/.-])[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*\.(?:internal|local|localdomain|lan|intranet|corp)\b"
)
_IPV4 = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w.]*\d)")
_IPV6 = re.compile(
    r"(?<![\w:.])(?=[0-9A-Fa-f:]*:[0-9A-Fa-f:]*:)[0-9A-Fa-f]{1,4}(?::{1,2}[0-9A-Fa-f]{1,4}){2,7}(?![\w:])"
)

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
    """The text without what identifies this machine and its user, and without anything that looks like a secret.

    Doing it twice changes nothing more.  Looks at this process's environment, host name, user and home folder.
    """
    return redact_for(text, _identity())


class Identity:
    """What is to be taken out by name: see `identity_of`."""

    def __init__(
        self, secrets: Iterable[str], homes: Iterable[str], hosts: Iterable[str], users: Iterable[str]
    ) -> None:
        self.secrets = _longest_first(secrets)
        self.homes = _longest_first(homes)
        self.hosts = _words(hosts)
        self.users = _words(users)


def identity_of(environ: Mapping[str, str], host: str, users: Iterable[str], homes: Iterable[str]) -> Identity:
    """Collect the words that must not go out.

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
    return Identity(secrets, folders, hosts, names)


def redact_for(text: str, identity: Identity) -> str:
    """As `redact`, with what is to be taken out given."""
    for secret in identity.secrets:
        text = text.replace(secret, SECRET)
    for shape, instead in _SHAPES:
        text = shape.sub(instead, text)
    for home in identity.homes:
        text = re.sub(rf"{re.escape(home)}(?![\w-])", "~", text)
    text = _HOMES.sub(rf"/\1/{USER}", text)
    text = _ROOT_HOME.sub("~", text)
    text = _URL_HOST.sub(_url_host, text)
    text = _INNER_HOST.sub(HOST, text)
    if identity.hosts:
        text = identity.hosts.sub(HOST, text)
    if identity.users:
        text = identity.users.sub(USER, text)
    text = _IPV4.sub(_address, text)
    return _IPV6.sub(_address, text)


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


def _words(words: Iterable[str]) -> re.Pattern[str] | None:
    """Any of the words, standing alone; `None` where none of them tells anything."""
    telling = _longest_first(word for word in words if len(word) >= 3 and word.lower() not in _ORDINARY)
    if not telling:
        return None
    return re.compile(rf"(?<![A-Za-z0-9[])(?:{'|'.join(map(re.escape, telling))})(?![A-Za-z0-9\]])")


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
