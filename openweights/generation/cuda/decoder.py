"""One decode step of a Llama-like model as few kernels, for sampling on CUDA.

`transformers` runs a decode step as some sixty small kernels a layer, which at batch 32 take longer
than reading the weights. Here a layer is four matrix products and four fused kernels
(`decode_kernels.py`), with the adapters live beside them:

    add + norm | qkv (+ LoRA) | rope + cache write | attention | o (+ LoRA)
    add + norm | gate and up (+ LoRA) | silu * | down (+ LoRA)

Projections that read the same input become views of one weight, so nothing is held twice. The
adapters are small copies that `refresh` brings up to date.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


class UnsupportedModelError(Exception):
    """The model is not one that this decoder computes; the message says why."""


class FusedLinear:
    """Linear layers over the same input as one matrix product, with their LoRA adapters.

    The modules' weights become views of one tensor: same values, same memory in all.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        bases = [_base_linear(module) for module in modules]
        self.weight = _share_storage([base.weight for base in bases])  # (sum of outputs, inputs)
        self.bias = _joined_bias(bases)
        self._adapters = [_adapter(module) for module in modules]
        self._rows = [base.out_features for base in bases]
        self._down: Tensor | None = None  # (sum of ranks, inputs)
        self._up: Tensor | None = None  # (sum of ranks, sum of outputs), block-diagonal
        ranks = [0 if a is None else a.down.out_features for a in self._adapters]
        if sum(ranks):
            # Cores of tensor units come in eights: ranks are filled up with zeros.
            padded = -sum(ranks) % 8 + sum(ranks)
            self._down = self.weight.new_zeros(padded, self.weight.shape[1])
            self._up = self.weight.new_zeros(padded, sum(self._rows))
            self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the adapters' current weights, in place: captured graphs see them."""
        if self._down is None or self._up is None:
            return
        rank_at = row_at = 0
        for adapter, rows in zip(self._adapters, self._rows, strict=True):
            if adapter is not None:
                rank = adapter.down.out_features
                self._down[rank_at : rank_at + rank].copy_(adapter.down.weight)
                self._up[rank_at : rank_at + rank, row_at : row_at + rows].copy_(
                    adapter.up.weight.T * adapter.scaling
                )
                rank_at += rank
            row_at += rows

    def __call__(self, x: Tensor) -> Tensor:
        """Shape (N, inputs) -> (N, sum of outputs)."""
        out = F.linear(x, self.weight, self.bias)
        if self._down is not None and self._up is not None:
            out.addmm_(F.linear(x, self._down), self._up)
        return out


@dataclass(frozen=True, slots=True)
class _Adapter:
    down: nn.Linear
    up: nn.Linear
    scaling: float


@dataclass(frozen=True, slots=True)
class _Layer:
    input_norm: Tensor
    qkv: FusedLinear
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: FusedLinear
    mlp_norm: Tensor
    gate_up: FusedLinear
    down: FusedLinear

    def linears(self) -> tuple[FusedLinear, ...]:
        return self.qkv, self.o, self.gate_up, self.down


class KVCache:
    """Keys and values of B rows and up to S positions a layer, shape (B, K, S, D) each."""

    def __init__(self, decoder: LlamaDecoder, rows: int, positions: int) -> None:
        shape = (decoder.layer_count, rows, decoder.kv_heads, positions, decoder.head_dim)
        like = decoder.embedding
        self.keys = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.values = torch.zeros_like(self.keys)
        self.rows, self.positions = rows, positions

    def keep(self, rows: Tensor) -> None:
        """Move these rows to the front, in order."""
        for layer in range(len(self.keys)):
            for part in (self.keys[layer], self.values[layer]):
                part[: len(rows)] = part[rows]


class LlamaDecoder:
    """Computes logits of a Llama, Mistral, Qwen 2 or Qwen 3 model through fused steps.

    Args:
        base: The causal language model; its projections may carry LoRA adapters.
        ops: The fused operations: `torch_ops` anywhere, `triton_ops` on CUDA.

    Raises:
        UnsupportedModelError: Another architecture, quantised weights, or other adapters.
    """

    def __init__(self, base: Any, ops: Any) -> None:
        config = base.config
        check_supported(base)
        self._ops = ops
        self._rotary = base.model.rotary_emb
        self.embedding: Tensor = base.model.embed_tokens.weight
        self.head: Tensor = base.lm_head.weight
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads
        layers = base.model.layers
        self.head_dim: int = layers[0].self_attn.head_dim
        self.layer_count = len(layers)
        self._eps: float = config.rms_norm_eps
        self._norm: Tensor = base.model.norm.weight
        self._layers = [_fuse_layer(layer) for layer in layers]
        self._cos = self._sin = self.embedding.new_empty(0, self.head_dim)

    def refresh(self) -> None:
        """Take over the adapters' current weights."""
        for layer in self._layers:
            for linear in layer.linears():
                linear.refresh()

    def prepare(self, positions: int) -> None:
        """Rotary tables for so many positions."""
        if len(self._cos) < positions:
            ids = torch.arange(positions, device=self.embedding.device)[None]
            # transformers gives (1, S, D), unsloth its whole table, (longer S, D).
            tables = (t.reshape(-1, self.head_dim) for t in self._rotary(self.embedding[:1], ids))
            self._cos, self._sin = (table[:positions].float().contiguous() for table in tables)
            if len(self._cos) != positions:
                raise UnsupportedModelError(f"rotary tables of {len(self._cos)} positions")

    def prefill(self, ids: Tensor, lengths: Tensor, cache: KVCache, first_row: int) -> Tensor:
        """Logits after each prompt, shape (B, V); fills the cache's rows from `first_row` on.

        Args:
            ids: Prompts padded on the right, shape (B, T).
            lengths: Of each prompt, shape (B,).
        """
        batch, width = ids.shape
        rows = slice(first_row, first_row + batch)
        positions = torch.arange(width, device=ids.device).repeat(batch)
        residual = self.embedding[ids.flatten()]
        x = self._ops.rms_norm(residual, self._layers[0].input_norm, self._eps)
        for index, layer in enumerate(self._layers):
            q, k, v = self._rotated(layer, x, positions)
            q, k, v = (t.view(batch, width, -1, self.head_dim).transpose(1, 2) for t in (q, k, v))
            cache.keys[index, rows, :, :width] = k
            cache.values[index, rows, :, :width] = v
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            attended = attended.transpose(1, 2).reshape(batch * width, -1)
            x = self._after_attention(index, layer, attended, residual)
        last = x.view(batch, width, -1)[torch.arange(batch, device=ids.device), lengths - 1]
        return F.linear(last, self.head)

    def step(self, tokens: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        """Logits after one more token a row, shape (B, V); writes the cache at `positions` (B,)."""
        residual = self.embedding[tokens]
        x = self._ops.rms_norm(residual, self._layers[0].input_norm, self._eps)
        rows = len(tokens)
        for index, layer in enumerate(self._layers):
            attended = self._ops.rope_attend(
                layer.qkv(x),
                self._cos,
                self._sin,
                positions,
                cache.keys[index, :rows],
                cache.values[index, :rows],
                layer.q_norm,
                layer.k_norm,
                self._eps,
            )
            x = self._after_attention(index, layer, attended, residual)
        return F.linear(x, self.head)

    def _rotated(self, layer: _Layer, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Queries and keys with their positions, and values; shapes (N, heads, D)."""
        sizes = (self.heads, self.kv_heads, self.kv_heads)
        q, k, v = layer.qkv(x).view(len(x), -1, self.head_dim).split(sizes, dim=1)
        q, k = head_norm(q, layer.q_norm, self._eps), head_norm(k, layer.k_norm, self._eps)
        cos, sin = self._cos[positions][:, None], self._sin[positions][:, None]
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def _after_attention(
        self, index: int, layer: _Layer, attended: Tensor, residual: Tensor
    ) -> Tensor:
        """The rest of the layer; adds to `residual` in place, returns the next normed input."""
        eps, ops = self._eps, self._ops
        x = ops.add_rms_norm(layer.o(attended), residual, layer.mlp_norm, eps)
        x = layer.down(ops.silu_mul(layer.gate_up(x)))
        last = index + 1 == self.layer_count
        norm = self._norm if last else self._layers[index + 1].input_norm
        return ops.add_rms_norm(x, residual, norm, eps)


def check_supported(base: Any) -> None:
    """Raises:
    UnsupportedModelError: What this decoder cannot compute, in words.
    """
    config = base.config
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        raise UnsupportedModelError(f"architecture {config.model_type}")
    if getattr(config, "hidden_act", "silu") != "silu":
        raise UnsupportedModelError(f"activation {config.hidden_act}")
    if getattr(config, "use_sliding_window", config.model_type == "mistral") and getattr(
        config, "sliding_window", None
    ):
        raise UnsupportedModelError("sliding-window attention")
    if getattr(base.lm_head, "bias", None) is not None or type(base.lm_head) is not nn.Linear:
        raise UnsupportedModelError("an output head with bias or adapter")


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding in float32, halves rotated as in Llama."""
    half = x.shape[-1] // 2
    first, second = x.float().split(half, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x.float() * cos + turned * sin).to(x.dtype)


def head_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMS norm over each head, where the architecture has one."""
    if weight is None:
        return x
    normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def _fuse_layer(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return _Layer(
        input_norm=layer.input_layernorm.weight,
        qkv=FusedLinear([attention.q_proj, attention.k_proj, attention.v_proj]),
        q_norm=attention.q_norm.weight if hasattr(attention, "q_norm") else None,
        k_norm=attention.k_norm.weight if hasattr(attention, "k_norm") else None,
        o=FusedLinear([attention.o_proj]),
        mlp_norm=layer.post_attention_layernorm.weight,
        gate_up=FusedLinear([mlp.gate_proj, mlp.up_proj]),
        down=FusedLinear([mlp.down_proj]),
    )


def _base_linear(module: Any) -> nn.Linear:
    linear = getattr(module, "base_layer", module)
    if type(linear) is not nn.Linear:
        raise UnsupportedModelError(f"weights of kind {type(linear).__name__}")
    return linear


def _adapter(module: Any) -> _Adapter | None:
    if not hasattr(module, "base_layer"):
        return None
    if not hasattr(module, "lora_A") or list(module.active_adapters) != list(module.lora_A):
        raise UnsupportedModelError("adapters other than one active LoRA")
    (name,) = module.lora_A
    if any(module.use_dora.values()) or module.merged or module.lora_bias[name]:
        raise UnsupportedModelError("DoRA, a merged adapter, or an adapter with bias")
    return _Adapter(module.lora_A[name], module.lora_B[name], module.scaling[name])


@torch.no_grad()
def _share_storage(parameters: Sequence[Tensor]) -> Tensor:
    """One tensor that holds the parameters one after the other; they become views of it."""
    if len(parameters) == 1:
        return parameters[0].data
    joined = torch.cat([p.data for p in parameters])
    for parameter, part in zip(parameters, joined.split([len(p) for p in parameters]), strict=True):
        parameter.data = part
    return joined


def _joined_bias(bases: Sequence[nn.Linear]) -> Tensor | None:
    present = [base.bias for base in bases if base.bias is not None]
    if not present:
        return None
    if len(present) == len(bases):
        return _share_storage(present)
    raise UnsupportedModelError("projections of which only some have a bias")
