"""Secrets never reach the log, however the output is cut into pieces."""

from __future__ import annotations

import base64
import json
import random
import time
from urllib.parse import quote

from hypothesis import given
from hypothesis import strategies as st

from openweights.worker.redaction import Redactor, secret_values

SECRETS = {"HF_TOKEN": b"hf_abcdefgh", "LONG_TOKEN": b"hf_abcdefghijkl", "KEY": b"zzzzzzzzzz"}


def test_names_of_secrets() -> None:
    env = {
        "HF_TOKEN": "hf_abcdefgh",
        "OPENWEIGHTS_API_KEY": "ow_12345678",
        "AWS_SECRET_ACCESS_KEY": "s" * 20,
        "DB_PASSWORD": "p" * 8,
        "SSH_PUBLIC_KEY": "ssh-ed25519 AAAA",
        "TOKENIZERS_PARALLELISM": "false-or-true",
        "SHORT_TOKEN": "true",
        "HF_TOKEN_2": "hf_other_one",
        "OPENAI_KEY2": "sk-other-one",
        "GITHUB_PAT": "github_pat_1",
        "API_KEYS": "first,second",
        "MYSQL_PWD": "pwd-of-mysql",
        "GPG_PASSPHRASE": "open sesame",
        "PWD": "/home/somebody",
        "OLDPWD": "/home/somebody",
        "PUBLIC_KEYS": "ssh-ed25519 AAAA",
        "SSH_AUTH_SOCKET_3": "/tmp/socket-of-mine",
        "PATH": "/usr/local/bin",
        "API_KEY_OPENAI": "sk-in-another-order",
        "PASSWORD_DB": "correct horse",
        "DB_PASS": "battery staple",
        "PGPASSWORD": "of-postgres",
        "MYTOKEN": "of-my-own",
        "SESSION_COOKIE": "crumbs-and-crumbs",
        "SLACK_WEBHOOK": "https://hooks.example/T0/B0/x",
        "SLACK_WEBHOOK_URL": "https://hooks.example/T0/B0/y",
        "AUTH": "Bearer of-news",
        "JSON_SECRET": '{"a": 1234567}',
        "HF_TOKEN_PATH": "/root/.cache/token",
        "SSH_AUTH_SOCK": "/tmp/agent.123",
        "AWS_ACCESS_KEY_FILE": "/etc/aws/key",
        "MAX_TOKEN_LENGTH": "1024 tokens",
        "COMPASS": "north-north-east",
    }
    expected = {
        *("API_KEY_OPENAI", "PASSWORD_DB", "DB_PASS", "PGPASSWORD", "MYTOKEN", "SESSION_COOKIE"),
        *("SLACK_WEBHOOK", "SLACK_WEBHOOK_URL", "AUTH", "JSON_SECRET"),
        *("HF_TOKEN", "OPENWEIGHTS_API_KEY", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD"),
        *("HF_TOKEN_2", "OPENAI_KEY2", "GITHUB_PAT", "API_KEYS", "MYSQL_PWD", "GPG_PASSPHRASE"),
    }
    assert set(secret_values(env)) == expected


def test_passwords_in_urls() -> None:
    env = {
        "DATABASE_URL": "postgres://me:correct-horse@db.example:5432/jobs?x=1",
        "REDIS": "redis://:battery-staple@cache",
        "HOMEPAGE": "https://example.org:8080/a@b",
        "PLAIN": "https://me@example.org",
    }
    found = {"DATABASE_URL": b"correct-horse", "REDIS": b"battery-staple"}
    assert secret_values(env) == found
    shown = Redactor(found).feed(env["DATABASE_URL"].encode() + b"\n")
    assert shown == b"postgres://me:[DATABASE_URL redacted]@db.example:5432/jobs?x=1\n"


def test_a_secret_in_two_pieces_and_ordinary_output_at_once() -> None:
    redactor = Redactor(SECRETS)
    assert redactor.feed(b"loss 0.5\n") == b"loss 0.5\n"
    assert redactor.feed(b"token hf_abc") == b"token "
    assert redactor.feed(b"defgh and") == b"[HF_TOKEN redacted] and"
    # What only looked like a secret comes out as it was.
    assert redactor.feed(b" hf_ab") == b" "
    assert redactor.feed(b"out") == b"hf_about"
    assert redactor.feed(b"hf_abcdefgh") == b""
    assert redactor.feed(b"ijkl") == b"[LONG_TOKEN redacted]"
    assert redactor.feed(b"hf_abcdefghi") == b""
    assert redactor.flush() == b"[HF_TOKEN redacted]i"
    assert Redactor({}).feed(b"hf_abcdefgh") == b"hf_abcdefgh"


def test_a_secret_as_long_as_a_file_costs_little() -> None:
    """Paired in one process: a secret sixteen times as long takes no hundred times the time."""

    def seconds(length: int) -> float:
        secret = bytes(random.Random(length).choices(range(33, 127), k=length))
        redactor = Redactor({"KEY": secret})
        begun = time.perf_counter()
        for _ in range(5):
            redactor.feed(secret[1:] + b"\n")
        return time.perf_counter() - begun

    assert min(seconds(1 << 16) for _ in range(3)) < 100 * min(seconds(1 << 12) for _ in range(3))


_VALUES = st.text(st.characters(min_codepoint=33, max_codepoint=0x24F), min_size=8, max_size=90)


@given(_VALUES, st.binary(max_size=5), st.binary(max_size=5))
def test_a_secret_is_found_as_programs_spell_it(value: str, before: bytes, after: bytes) -> None:
    """By `base64`, `repr`, `json.dumps`, in a URL, in hexadecimal; and the rest stays as it was."""
    secret = value.encode()
    redactor = Redactor({"KEY": secret})
    for spelled in (
        secret,
        secret.hex().encode(),
        repr(value)[1:-1].encode(),
        json.dumps(value)[1:-1].encode(),
        quote(value, safe="").encode(),
    ):
        shown = redactor.feed(b"<" + spelled + b">\n") + redactor.flush()
        assert spelled not in shown and b"KEY redacted" in shown
    shown = redactor.feed(base64.b64encode(before + secret + after) + b"\n") + redactor.flush()
    assert b"KEY redacted" in shown
    assert len(shown) < len("[KEY redacted]\n") + 4 * (len(before) + len(after)) / 3 + 16


def test_parts_of_secrets() -> None:
    key = "-----BEGIN KEY-----\nMIIEvQIBADANBg\nkqhkiG9w0BAQEF\n-----END KEY-----"
    account = '{"type": "service", "key": "of-the-service-account", "uri": "https://example.org/t"}'
    redactor = Redactor(
        {"PEM": key.encode(), "ACCOUNT": account.encode(), "AUTH": b"Bearer abcdefgh"}
    )
    for text, shown in (
        ("kqhkiG9w0BAQEF\n", "[PEM redacted]\n"),
        (repr(key), "'[PEM redacted]'"),
        ("of-the-service-account", "[ACCOUNT redacted]"),
        ("see https://example.org/t", "see https://example.org/t"),
        ("x-token: abcdefgh", "x-token: [AUTH redacted]"),
        ("-----BEGIN KEY-----", "-----BEGIN KEY-----"),
    ):
        assert (redactor.feed(text.encode()) + redactor.flush()).decode() == shown


def test_a_key_that_base64_breaks_into_lines() -> None:
    secret = bytes(range(48, 122)) * 2
    redactor = Redactor({"KEY": secret})
    lines = base64.encodebytes(secret).splitlines(keepends=True)
    shown = redactor.feed(b"".join(lines)) + redactor.flush()
    assert not any(line.strip() in shown for line in lines)


@given(
    st.lists(
        st.sampled_from([*SECRETS.values(), b"hf_", b"abc", b"zzz", b" ", b"\xf0\x9f", b"\n"]),
        max_size=12,
    ),
    st.lists(st.integers(1, 12), min_size=1, max_size=8),
)
def test_pieces_do_not_matter(parts: list[bytes], sizes: list[int]) -> None:
    text = b"".join(parts)
    redactor, shown, rest, turn = Redactor(SECRETS), b"", text, 0
    while rest:
        size = sizes[turn % len(sizes)]
        shown += redactor.feed(rest[:size])
        rest, turn = rest[size:], turn + 1
    shown += redactor.flush()
    whole = Redactor(SECRETS)
    assert shown == whole.feed(text) + whole.flush()
    assert not any(secret in shown for secret in SECRETS.values())
