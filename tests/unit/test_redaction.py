"""Nothing that identifies a machine or its user leaves in a report, and what a reader needs stays."""

from __future__ import annotations

import getpass
import socket
from pathlib import Path

import pytest

from verl_ascend_rollout.tools.redaction import identity_of, redact, redact_file, redact_for

IDENTITY = identity_of(
    {
        "HF_TOKEN": "plainlookingvalue",
        "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
        "TOKENIZERS_PARALLELISM": "false",
        "DB_PASSWORD": "hunter22",
        "RAY_ADDRESS": "head-7.cluster.example:6379",
        "MASTER_ADDR": "gpu-node-12",
        "https_proxy": "http://bob:pw12345@proxy.example.org:3128",
        "USER": "jdoe",
        "SUDO_USER": "root",
    },
    "npu-box-3.lab.example",
    ["jdoe"],
    ["/data/people/jdoe", "/root"],
)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("the token is plainlookingvalue.", "the token is [secret]."),
        ("wandb 0123456789abcdef0123456789abcdef01234567", "wandb [secret]"),
        ("opened with hunter22", "opened with [secret]"),
        ("TOKENIZERS_PARALLELISM=false", "TOKENIZERS_PARALLELISM=false"),
        ("hf_abcdefghijklmnop", "[secret]"),
        ("ghp_0123456789abcdefghij", "[secret]"),
        ("key sk-proj-0123456789abcdef end", "key [secret] end"),
        ("AKIAABCDEFGHIJKLMNOP", "[secret]"),
        ("eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.abc-_1", "[secret]"),
        ("Authorization: Bearer abc.def-123", "Authorization: Bearer [secret]"),
        ("MY_API_KEY=abcdef123", "MY_API_KEY=[secret]"),
        ('{"password": "opensesame"}', '{"password": "[secret]"}'),
        ("smoke --token abcdef123 --tp 2", "smoke --token [secret] --tp 2"),
        ("serve --api-key 'open sesame' x", "serve --api-key '[secret]' x"),
        ('["serve", "--hf-token", "abcdef123", "--tp"]', '["serve", "--hf-token", "[secret]", "--tp"]'),
        ("PGPASSWORD=opensesame psql", "PGPASSWORD=[secret] psql"),
        ("MYSQL_PWD=opensesame", "MYSQL_PWD=[secret]"),
        ("WANDB_KEY=abcdef123 GITHUB_PAT: abcdef123", "WANDB_KEY=[secret] GITHUB_PAT: [secret]"),
        (
            "HUAWEICLOUD_SDK_AK=abcdef123 HUAWEICLOUD_SDK_SK=abcdef",
            "HUAWEICLOUD_SDK_AK=[secret] HUAWEICLOUD_SDK_SK=[secret]",
        ),
        ("REDISCLI_AUTH=abcdef123 RAY_AUTH_MODE=disabled", "REDISCLI_AUTH=[secret] RAY_AUTH_MODE=disabled"),
        ("HF_TOKEN => abcdef123", "HF_TOKEN => [secret]"),
        ("密码\uff1aabcdef123\uff0c口令: abcdef123", "密码\uff1a[secret]\uff0c口令: [secret]"),
        ("sshpass -p 'open sesame' ssh x", "sshpass -p [secret] ssh x"),
        ("docker login -u bob -p abcdef r.example", "docker login -u bob -p [secret] r.example"),
        ("mysql -u bob -pabcdef db", "mysql -u bob -p[secret] db"),
        ("curl -s -u bob:abcdef http://127.0.0.1", "curl -s -u bob:[secret] http://127.0.0.1"),
        ("mysql -pabcdef db", "mysql -p[secret] db"),
        ("docker run -p 80:80 x", "docker run -p 80:80 x"),
        ("wandb login 1123456789abcdef0123456789abcdef01234567", "wandb login [secret]"),
        ("commit 1123456789abcdef0123456789abcdef01234567", "commit 1123456789abcdef0123456789abcdef01234567"),
        ("-H 'Cookie: session=abc; id=1' x", "-H 'Cookie: [secret]' x"),
        ("accessToken: abcdef123", "accessToken: [secret]"),
        ("AccountKey=abc/def+123==;Endpoint", "AccountKey=[secret]"),
        ('password="open sesame, please"', 'password="[secret]"'),
        ("{'password': 'open sesame'}", "{'password': '[secret]'}"),
        ('"{\\"password\\": \\"open sesame\\"}"', '"{\\"password\\": \\"[secret]\\"}"'),
        ("password=12345678", "password=[secret]"),
        ("x=token=abcdef123", "x=token=[secret]"),
        ("pypi-AgEIcHlwaS5vcmcCJDU", "[secret]"),
        ("npm_0123456789abcdefghij", "[secret]"),
        ("ms-01234567-89ab-cdef-0123-456789abcdef", "[secret]"),
        ("https://x.blob.example/a?sv=2&sig=a%2Fb%3D&se=3", "https://[host]/a?sv=2&sig=[secret]&se=3"),
        ("https://github.com/a?X-Amz-Signature=0a1b2c", "https://github.com/a?X-Amz-Signature=[secret]"),
        ("-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----", "[secret]"),
        ("https://bob:geheim@git.example.com/x", "https://[secret]@[host]/x"),
        ("http://proxy.example.org:3128", "http://[host]:3128"),
        ("https://github.com/vllm-project/vllm/issues/5915", "https://github.com/vllm-project/vllm/issues/5915"),
        ("tcp://127.0.0.1:5000 and 0.0.0.0", "tcp://127.0.0.1:5000 and 0.0.0.0"),
        ("npu-box-3.lab.example and npu-box-3 and npu-box-31", "[host] and [host] and npu-box-31"),
        ("joined head-7.cluster.example:6379 from gpu-node-12", "joined [host]:6379 from [host]"),
        ("store-1.rack.internal answered", "[host] answered"),
        ("from 10.1.22.3:8000, 192.168.0.7.", "from [address]:8000, [address]."),
        ("fe80::1ff:fe23:4567:890a and 2001:db8:0:0:1:2:3:4", "[address] and [address]"),
        ("write to jane.roe@example.com", "write to [email]"),
        ("jdoe ran it; jdoes did not", "[user] ran it; jdoes did not"),
        ("/data/people/jdoe/venv and /data/people/jdoe", "~/venv and ~"),
        ("/home/alice/x, /Users/Bob Smith", "/home/[user]/x, /Users/[user] Smith"),
        ("/root/.cache and /root", "~/.cache and ~"),
    ],
)
def test_what_is_taken_out(text: str, clean: str) -> None:
    assert redact_for(text, IDENTITY) == clean
    assert redact_for(clean, IDENTITY) == clean, "a second time changes something"


@pytest.mark.parametrize(
    "text",
    [
        "vllm/v1/worker/gpu_model_runner.py:5368: static_forward_context",
        "torch 2.13.0+cpu, torch-npu 2.10.0.post2, CANN 8.5.RC1, driver 25.2.3",
        "2025-12-29T12:34:56+00:00 took 00:01:02",
        "--max-tokens 123456 --tokenizer mistral-large --no-token",
        "data.prompt_key=question data.reward_fn_key=data_source",
        "PWD=/usr/lib OLDPWD=/usr/bin sort_key=descending",
        "ms-marco-distilbert-base and pypi-mirror",
        "max_tokens: 50, output tokens: 123456, skip_special_tokens=True",
        "root and user and localhost are nobody's names",
        "/usr/lib/python3.11/site-packages/verl/workers/config/rollout.py:188",
        "SHA aa:bb is short; a::b is C++",
        "`patch_weight_loader.py:41` (`UnquantizedLinearMethod.create_weights`)",
        "the 5 best tokens, token_ids=[1, 2]",
    ],
)
def test_what_a_reader_needs_stays(text: str) -> None:
    assert redact_for(text, IDENTITY) == text


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "piece",
    ["a", "a_", "a-", "a.", "a@", "a:", "a=", "eyJ-", "eyJaaaaaaaa.", "token=", "token='", 'token="', "--a", "--token ",
     "://", "sk-", "1.", "/home/", "-----BEGIN ", "[secret]", "\\", "\"'", "basic "],
)  # fmt: skip
def test_a_megabyte_without_an_end_is_linear(piece: str) -> None:
    """A pattern that begins anew at each character would take days."""
    redact_for(piece * (2**20 // len(piece)), IDENTITY)


def test_this_machine_and_this_user() -> None:
    text = redact(f"{socket.gethostname()} {getpass.getuser()} {Path.home()}/x")
    assert f"{Path.home()}/" not in text
    if len(socket.gethostname()) >= 3:
        assert socket.gethostname() not in text


def test_a_file_is_redacted_in_place(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    log.write_bytes(b"loading\nserve --token abcdef123\n\xff torn\n")
    redact_file(log)
    assert log.read_text() == "loading\nserve --token [secret]\n\ufffd torn\n"
    assert list(tmp_path.iterdir()) == [log]
    redact_file(tmp_path / "not there")
    assert list(tmp_path.iterdir()) == [log]
