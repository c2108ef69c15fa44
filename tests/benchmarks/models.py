"""Models of real shapes with random weights, and a tokenizer of bytes for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from openweights.models.fused.layers import fuse_layers
from openweights.models.fused.lora_linear import fuse_lora
from openweights.models.shape import ModelShape, usual_shape

PAD = 258
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def shape(layers: int | None = None, billions: float = 7.6) -> Qwen2Config:
    """Qwen2.5's of that size; 7.6 B parameters are those of its 7B."""
    usual = usual_shape(billions)
    return qwen_config(replace(usual, layers=layers or usual.layers))


def qwen_7b(layers: int | None = None, billions: float = 7.6) -> Any:
    """Qwen2.5-7B's shape in bf16 on the GPU, or that of another of its sizes."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return Qwen2ForCausalLM(shape(layers, billions))
    finally:
        torch.set_default_dtype(torch.float32)


def qwen_config(shape: ModelShape) -> Qwen2Config:
    """A model of that shape, none of whose tokens is its end."""
    return Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=32_768,
        tie_word_embeddings=shape.is_tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=PAD,
    )


def adapted(base: Any) -> Any:
    """With a LoRA of rank 32 on all linear layers, whose parameters are float32, as jobs train
    it.
    """
    lora = LoraConfig(r=32, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    fuse_lora(model)
    fuse_layers(model)
    return model


def byte_tokenizer(more: int = 0) -> PreTrainedTokenizerFast:
    """A token for every byte, ChatML's three special ones, and so many more that no text has."""
    ids = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"):
        ids[token] = len(ids)
    ids |= {f"<{at}>": len(ids) + at for at in range(more)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = TEMPLATE
    return fast
