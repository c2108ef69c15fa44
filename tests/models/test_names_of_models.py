"""What a model may be called, and what an address of the hub means."""

from __future__ import annotations

import pytest

from openweights.errors import ConfigError
from openweights.models.names import ModelReference, full_name, id_in_address, model_reference

PAGE = "https://huggingface.co/Qwen/Qwen3-4B"


@pytest.mark.parametrize(
    ("address", "meant"),
    [
        (PAGE, "Qwen/Qwen3-4B"),
        (f"{PAGE}/", "Qwen/Qwen3-4B"),
        (f"{PAGE}?library=transformers#usage", "Qwen/Qwen3-4B"),
        (f"{PAGE}/tree/main", "Qwen/Qwen3-4B"),
        (f"{PAGE}/tree/main/checkpoints/step-100", "Qwen/Qwen3-4B/checkpoints/step-100"),
        ("http://www.huggingface.co/Qwen/Qwen3-4B", "Qwen/Qwen3-4B"),
        ("HTTPS://HuggingFace.co/Qwen/Qwen3-4B", "Qwen/Qwen3-4B"),
        ("huggingface.co/Qwen/Qwen3-4B", "Qwen/Qwen3-4B"),
        ("hf.co/Qwen/Qwen3-4B", "Qwen/Qwen3-4B"),
        ("hf://Qwen/Qwen3-4B", "Qwen/Qwen3-4B"),
        ("Qwen/Qwen3-4B", "Qwen/Qwen3-4B"),
        ("hf.company/model", "hf.company/model"),
        ("./folder", "./folder"),
    ],
)
def test_the_address_of_a_page_is_an_id(address: str, meant: str) -> None:
    assert id_in_address(address) == meant


def test_it_is_what_a_job_is_given() -> None:
    assert model_reference(PAGE) == ModelReference("repository", "Qwen/Qwen3-4B")
    assert full_name(PAGE) == "Qwen/Qwen3-4B"


@pytest.mark.parametrize(
    ("address", "words"),
    [
        (f"{PAGE}/blob/main/config.json", "address of a file, or .* give Qwen/Qwen3-4B"),
        (f"{PAGE}/resolve/main/config.json", "address of a file, or .* give Qwen/Qwen3-4B"),
        (f"{PAGE}/tree/v2", "another version than main, .* give Qwen/Qwen3-4B"),
        ("https://huggingface.co/datasets/a/b", "no address of a model"),
        ("https://huggingface.co/Qwen", "no address of a model"),
        ("https://huggingface.co/", "no address of a model"),
        ("https://example.org/Qwen/Qwen3-4B", "no address of a model on the Hugging Face hub"),
        ("s3://bucket/model", "no address of a model on the Hugging Face hub"),
        ("openai/", "neither a Hugging Face id"),
        ("a/b/./c", "neither a Hugging Face id"),
        ("a/b/../c", "neither a Hugging Face id"),
        ("a/b ", "neither a Hugging Face id"),
    ],
)
def test_other_addresses_are_refused_with_what_to_write(address: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        model_reference(address)
