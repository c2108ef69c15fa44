"""Secrets never reach the log, however the output is cut into pieces."""

from __future__ import annotations

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
        "PATH": "/usr/local/bin",
    }
    expected = {"HF_TOKEN", "OPENWEIGHTS_API_KEY", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD"}
    assert set(secret_values(env)) == expected


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
