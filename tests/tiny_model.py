"""A random two-layer Llama with its own small tokenizer, for tests that need a real model but no
real language.

It has what trips trainers up: grouped-query attention, a pad token that is no end token, and two
end tokens of which only the generation config knows both.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EOS, PAD, SECOND_EOS, START = "<|im_end|>", "<|pad|>", "<|endoftext|>", "<|im_start|>"
SPECIAL = [SECOND_EOS, START, EOS, PAD]
CHATML = (
    "{% if messages and messages[0]['role'] != 'system' %}"
    "<|im_start|>system\nYou are a test.<|im_end|>\n{% endif %}"
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(vocab: int = 320) -> PreTrainedTokenizerFast:
    """Byte-level: every byte is a token, plus four special tokens and a few merges up to
    `vocab`.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    merges: list[tuple[str, str]] = []
    for left, right in _PAIRS:
        if len(ids) >= vocab:
            break
        merges.append((left, right))
        ids[left + right] = len(ids)
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, model_max_length=512
    )
    fast.chat_template = CHATML
    return fast


# Frequent English pairs, so that texts are not all single bytes ("Ġ" is the byte-level space).
_PAIRS = [
    *[
        ("t", "h"),
        ("th", "e"),
        ("Ġ", "a"),
        ("i", "n"),
        ("e", "r"),
        ("o", "n"),
        ("Ġ", "t"),
        ("a", "n"),
    ],
    *[
        ("o", "u"),
        ("s", "t"),
        ("e", "n"),
        ("in", "g"),
        ("e", "s"),
        ("Ġ", "s"),
        ("o", "r"),
        ("i", "t"),
    ],
    *[
        ("y", "ou"),
        ("Ġ", "w"),
        ("an", "d"),
        ("a", "t"),
        ("r", "e"),
        ("Ġ", "i"),
        ("e", "d"),
        ("l", "l"),
    ],
]


def make_tiny_model(
    folder: Path, *, seed: int = 0, vocab: int = 320, layers: int = 2, head_dim: int = 8
) -> Path:
    """Save a random model and its tokenizer to `folder`, which is returned; loads in well under a
    second.
    """
    tokenizer = make_tokenizer(vocab)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=512,
        initializer_range=0.3,  # some contrast: uniform logits would hide errors
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(SECOND_EOS)],
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
