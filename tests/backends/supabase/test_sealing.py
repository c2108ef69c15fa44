"""Sealed boxes: what goes in comes out, with the right key, for the right name, or not at all."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openweights.backends.supabase.sealing import KeyPair, new_key_pair, public_key_of, seal, unseal
from openweights.errors import ConfigurationError, InvalidInputError

PAIR, OTHER = new_key_pair(), new_key_pair()
PLACE = {"organization_id": "7c9e6679-7425-40de-944b-e07fc1f90ae7", "name": "HF_TOKEN"}


@settings(max_examples=50)
@given(st.binary(max_size=5000))
def test_round_trip(value: bytes) -> None:
    box = seal(value, PAIR.public, **PLACE)
    assert unseal(box, PAIR.private, **PLACE) == value
    assert box != seal(value, PAIR.public, **PLACE), "each box has a key of its own"
    if len(value) > 8:
        content = base64.urlsafe_b64decode(box[4:] + "==")
        assert value not in content and value not in box.encode()


@settings(max_examples=100)
@given(st.data())
def test_a_change_anywhere_is_noticed(data: st.DataObject) -> None:
    box = seal(b"hf_0123456789", PAIR.public, **PLACE)
    position = data.draw(st.integers(0, len(box) - 1))
    letter = data.draw(st.sampled_from("ABCxyz019-_.=\n é"))
    changed = box[:position] + letter + box[position + 1 :]
    if changed == box:
        return
    with pytest.raises((InvalidInputError, ConfigurationError), match="HF_TOKEN") as caught:
        unseal(changed, PAIR.private, **PLACE)
    assert "hf_0123456789" not in str(caught.value)


@settings(max_examples=50)
@given(st.text() | st.binary(max_size=200).map(lambda b: "ow1." + base64.b64encode(b).decode()))
def test_what_is_no_box_is_refused(text: str) -> None:
    with pytest.raises((InvalidInputError, ConfigurationError), match="secret HF_TOKEN"):
        unseal(text, PAIR.private, **PLACE)


@pytest.mark.parametrize(
    "place",
    [{**PLACE, "name": "WANDB_API_KEY"}, {**PLACE, "organization_id": "0" * 36}],
    ids=["name", "organization"],
)
def test_a_box_passes_for_no_other(place: dict[str, str]) -> None:
    box = seal(b"value", PAIR.public, **PLACE)
    with pytest.raises(InvalidInputError, match="or is that of another secret: set it again"):
        unseal(box, PAIR.private, **place)


def test_another_key_opens_nothing() -> None:
    box = seal(b"value", PAIR.public, **PLACE)
    with pytest.raises(ConfigurationError, match="sealed with another key.*OPENWEIGHTS_SECRETS_K"):
        unseal(box, OTHER.private, **PLACE)
    # Nor does it when the mark of the recipient is forged.
    content = base64.urlsafe_b64decode(box[4:] + "==")
    mark = base64.urlsafe_b64decode(seal(b"", OTHER.public, **PLACE)[4:] + "==")[:8]
    forged = "ow1." + base64.urlsafe_b64encode(mark + content[8:]).rstrip(b"=").decode()
    with pytest.raises(InvalidInputError, match="was changed"):
        unseal(forged, OTHER.private, **PLACE)


def test_a_point_of_small_order_is_refused() -> None:
    zero = "owpk_" + base64.urlsafe_b64encode(bytes(32)).rstrip(b"=").decode()
    with pytest.raises(ConfigurationError, match="public key for secrets is damaged"):
        seal(b"value", zero, **PLACE)


@pytest.mark.parametrize(
    "text",
    ["", "owsk_", PAIR.public, PAIR.private[:-1], PAIR.private + "A", "owsk_é", "key"],
    ids=["empty", "prefix", "public", "short", "long", "not ASCII", "word"],  # keys are random
)
def test_what_is_no_private_key(text: str) -> None:
    box = seal(b"value", PAIR.public, **PLACE)
    for use in (lambda: public_key_of(text), lambda: unseal(box, text, **PLACE)):
        with pytest.raises(ConfigurationError, match="holds no private key") as caught:
            use()
        assert len(text) < 9 or text not in str(caught.value)


def test_keys_are_not_shown() -> None:
    assert KeyPair(public_key_of(PAIR.private), PAIR.private) == PAIR
    assert PAIR.private not in repr(PAIR) and PAIR.public in repr(PAIR)
    with pytest.raises(ConfigurationError, match="public key for secrets is damaged"):
        seal(b"value", PAIR.private, **PLACE)
