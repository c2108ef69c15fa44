"""The forward pass of Llama-like models as few kernels, over a paged cache.

`transformers` runs a decode step as some sixty small kernels a layer, which at batch 32 take longer
than reading the weights. Here a layer is four matrix products and few fused kernels
(`torch_ops.py` says what each computes), with the adapters live in the products (`linear.py`):

    norm | qkv | rotate and store | attend | o | add and norm | gate and up | act * | down | add

The same pass serves whole prompts, slices of them and single tokens: it takes tokens of any
sequences (`batch.py`), and keeps their keys and values in pages, which a table names for each
sequence. So a sequence takes as many pages as it needs, and several share those of a common prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from openweights.generation.cuda.batch import TokenBatch
from openweights.generation.cuda.linear import FusedLinear, UnsupportedModelError
from openweights.generation.cuda.torch_ops import Norm
from openweights.models.forward import decoder_of, logit_transform

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma3", "gemma3_text")
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu"}
ROTARY_TYPES = ("default", "linear", "llama3", "yarn")
ONE_TABLE = ""  # the rotary table of architectures that have but one
PREFILL_TILE = 64  # rows of queries that share what they read: tokens times heads of a group

Linear = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer: its parameters and how it sees.

    Attributes:
        head_norms: Of queries and keys (Qwen 3, Gemma 3).
        after_attention, after_mlp: Norms of what is added to the residual (Gemma 3).
        experts: The model's own module, in the place of `gate_up` and `down`.
        window: How many positions a token sees, itself included; 0 for all.
        rotary: Which of the rotary tables.
    """

    input_norm: Norm
    qkv: FusedLinear
    head_norms: tuple[Norm, Norm] | None
    o: FusedLinear
    after_attention: Norm | None
    mlp_norm: Norm
    gate_up: FusedLinear | None
    down: FusedLinear | None
    experts: nn.Module | None
    after_mlp: Norm | None
    window: int
    scale: float
    rotary: str


class PagedCache:
    """Keys and values of every layer in pages, shape (layers, pages, K, page size, D) each."""

    def __init__(self, decoder: Decoder, pages: int, page_size: int) -> None:
        shape = (decoder.layer_count, pages, decoder.kv_heads, page_size, decoder.head_dim)
        # Zeros: what lies behind a sequence's end is hidden by weights of 0, which NaN survives.
        self.keys = torch.zeros(shape, dtype=decoder.dtype, device=decoder.device)
        self.values = torch.zeros_like(self.keys)
        self.page_count, self.page_size = pages, page_size

    def take(self, other: PagedCache) -> None:
        """Copy the pages of a smaller cache, but the last, which is that of idle rows."""
        kept = other.page_count - 1
        self.keys[:, :kept] = other.keys[:, :kept]
        self.values[:, :kept] = other.values[:, :kept]

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy whole pages."""
        for part in (self.keys, self.values):
            part[:, list(targets)] = part[:, list(sources)]


class Decoder:
    """Computes hidden states and logits of a causal language model.

    Args:
        base: The model, whose projections may carry LoRA adapters.
        adapters: Names of the adapters that rows may name by their index.
        ops: `torch_ops` anywhere, `triton_ops` on CUDA.
        narrow: Keep fp8 copies of the layers' weights, for decoding (`step`).

    Raises:
        UnsupportedModelError: Another architecture, or weights or adapters of another kind.
    """

    def __init__(
        self, base: Any, adapters: Sequence[str], ops: Any, *, narrow: bool = False
    ) -> None:
        check_supported(base)
        config, model = base.config.get_text_config(), decoder_of(base)
        self.ops = ops
        self._rotary = model.rotary_emb
        self._embedding: Tensor = model.embed_tokens.weight
        self._embedding_scale: Tensor | None = getattr(model.embed_tokens, "embed_scale", None)
        self._linears: list[FusedLinear] = []
        first = model.layers[0].self_attn
        self.kv_heads: int = config.num_key_value_heads
        self.head_dim: int = first.head_dim
        self.group: int = config.num_attention_heads // config.num_key_value_heads
        self.dtype, self.device = self._embedding.dtype, self._embedding.device
        self.vocabulary = len(self._embedding)
        self._activation = ACTIVATIONS[_activation(config)]
        self._logit_scale, self._logit_cap = logit_transform(base)
        self._norm = _norm(model.norm)

        def fused(*modules: nn.Module) -> FusedLinear:
            linear = FusedLinear(modules, adapters, self.dtype, ops, narrow=narrow)
            self._linears.append(linear)
            return linear

        self._layers = [_read_layer(layer, config, fused) for layer in model.layers]
        self.layer_count = len(self._layers)
        head = base.get_output_embeddings()
        self._head = FusedLinear([head], adapters, self.dtype, ops, narrow=False)
        self._linears.append(self._head)
        self._tables: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def can_be_captured(self) -> bool:
        """Whether a step waits for nothing on the host: experts wait but in bfloat16, for which
        alone there is a grouped product.
        """
        has_experts = any(layer.experts is not None for layer in self._layers)
        return self.device.type == "cuda" and (self.dtype == torch.bfloat16 or not has_experts)

    @property
    def tile_tokens(self) -> int:
        """Tokens of a prompt whose queries are attended together."""
        return max(1, PREFILL_TILE // self.group)

    def refresh(self) -> None:
        """Take over the adapters' current weights."""
        for linear in self._linears:
            linear.refresh()

    def prepare(self, positions: int) -> None:
        """Rotary tables for so many positions; captured graphs hold those they were made with."""
        for name in {layer.rotary for layer in self._layers}:
            if name not in self._tables or len(self._tables[name][0]) < positions:
                self._tables[name] = self._rotary_tables(name, positions)

    def _rotary_tables(self, name: str, positions: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of half a head, shape (S, D / 2), rounded as the model rounds them."""
        ids = torch.arange(positions, device=self.device)[None]
        more = {} if name == ONE_TABLE else {"layer_type": name}
        # transformers gives (1, S, D), unsloth its whole table, (longer S, D).
        both = [t.reshape(-1, t.shape[-1]) for t in self._rotary(self._embedding[:1], ids, **more)]
        cos, sin = (t[:positions, : self.head_dim // 2].contiguous() for t in both)
        if len(cos) != positions or both[0].shape[1] != self.head_dim:
            raise UnsupportedModelError(f"rotary tables of shape {tuple(both[0].shape)}")
        return cos, sin

    def hidden(self, batch: TokenBatch, cache: PagedCache, *, narrow: bool = False) -> Tensor:
        """Last hidden states of every token, shape (T, H); fills the cache at `batch.slots`."""
        residual = self._embedding[batch.ids]
        if self._embedding_scale is not None:
            residual *= self._embedding_scale.to(self.dtype)
        x = self.ops.rms_norm(residual, self._layers[0].input_norm)
        for index, layer in enumerate(self._layers):
            qkv = layer.qkv(x, batch.adapters, narrow=narrow)
            keys, values = cache.keys[index], cache.values[index]
            cos, sin = self._tables[layer.rotary]
            self.ops.rotate_and_store(qkv, cos, sin, batch, keys, values, layer.head_norms)
            attended = self.ops.attend(qkv, batch, keys, values, layer.scale, layer.window)
            x = layer.o(attended, batch.adapters, narrow=narrow)
            x = self.ops.add_norm(x, residual, layer.mlp_norm, layer.after_attention)
            x = self._mlp(layer, x, batch.adapters, narrow)
            last = index + 1 == self.layer_count
            norm = self._norm if last else self._layers[index + 1].input_norm
            x = self.ops.add_norm(x, residual, norm, layer.after_mlp)
        return x

    def _mlp(self, layer: _Layer, x: Tensor, adapters: Tensor, narrow: bool) -> Tensor:
        if layer.gate_up is None or layer.down is None:
            assert layer.experts is not None
            return layer.experts(x[None])[0]
        x = self.ops.gated(layer.gate_up(x, adapters, narrow=narrow), self._activation)
        return layer.down(x, adapters, narrow=narrow)

    def logits(self, hidden: Tensor, adapters: Tensor) -> Tensor:
        """Logits of hidden states, shape (N, V), in the model's type."""
        logits = self._head(hidden, adapters)
        if self._logit_scale != 1.0:
            logits = logits * self._logit_scale
        if self._logit_cap is not None:
            logits = torch.tanh(logits / self._logit_cap) * self._logit_cap
        return logits


def check_supported(base: Any) -> None:
    """Raises:
    UnsupportedModelError: What this decoder cannot compute, in words.
    """
    config = base.config.get_text_config()
    if config.model_type not in ARCHITECTURES:
        raise UnsupportedModelError(f"architecture {config.model_type}")
    if _activation(config) not in ACTIVATIONS:
        raise UnsupportedModelError(f"activation {_activation(config)}")
    if getattr(config, "use_bidirectional_attention", False):
        raise UnsupportedModelError("attention to both sides")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise UnsupportedModelError("soft-capped attention")
    if len({parameter.device for parameter in base.parameters()}) > 1:
        raise UnsupportedModelError("weights on several devices")
    if any(isinstance(module, AuxiliaryTrainingWrapper) for module in base.modules()):
        raise UnsupportedModelError("layers that are trained whole")
    model = decoder_of(base)
    if not isinstance(model.embed_tokens, nn.Embedding):
        raise UnsupportedModelError(f"embeddings of kind {type(model.embed_tokens).__name__}")
    types = getattr(model.rotary_emb, "rope_type", "default")
    for name in types.values() if isinstance(types, dict) else [types]:
        if name not in ROTARY_TYPES:
            raise UnsupportedModelError(f"rotary embedding {name}")


def _activation(config: Any) -> str:
    return getattr(config, "hidden_activation", None) or config.hidden_act


def _read_layer(layer: Any, config: Any, fused: Callable[..., FusedLinear]) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    is_gemma = hasattr(layer, "pre_feedforward_layernorm")
    has_tables = config.model_type.startswith("gemma3")  # one for each kind of layer
    has_experts = hasattr(mlp, "experts")
    if has_experts and any("lora_" in name for name, _ in mlp.named_parameters()):
        raise UnsupportedModelError("adapters on experts")
    has_head_norms = getattr(attention, "q_norm", None) is not None
    return _Layer(
        input_norm=_norm(layer.input_layernorm),
        qkv=fused(attention.q_proj, attention.k_proj, attention.v_proj),
        head_norms=(_norm(attention.q_norm), _norm(attention.k_norm)) if has_head_norms else None,
        o=fused(attention.o_proj),
        after_attention=_norm(layer.post_attention_layernorm) if is_gemma else None,
        mlp_norm=_norm(
            layer.pre_feedforward_layernorm if is_gemma else layer.post_attention_layernorm
        ),
        gate_up=None if has_experts else fused(mlp.gate_proj, mlp.up_proj),
        down=None if has_experts else fused(mlp.down_proj),
        experts=mlp if has_experts else None,
        after_mlp=_norm(layer.post_feedforward_layernorm) if is_gemma else None,
        window=_window(attention, config),
        scale=float(getattr(attention, "scaling", attention.head_dim**-0.5)),
        rotary=attention.layer_type if has_tables else ONE_TABLE,
    )


def _window(attention: Any, config: Any) -> int:
    """How far a layer sees; its own word counts where the architecture has kinds of layers."""
    if hasattr(attention, "sliding_window"):
        return int(attention.sliding_window or 0)
    return int(config.sliding_window or 0) if config.model_type == "mistral" else 0


def _norm(module: Any) -> Norm:
    """A norm's weight, read where it is trained."""
    if hasattr(module, "variance_epsilon"):
        return Norm(module.weight, module.variance_epsilon)
    return Norm(module.weight, module.eps, from_one=True)
