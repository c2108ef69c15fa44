"""The shape of a causal language model, as its config.json or else its name tells it. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from openweights.errors import ConfigError
from openweights.models.hub_files import cached_file
from openweights.models.names import location_here, parameters_in_billions

# Architectures whose MLP has two layers instead of three.
_UNGATED = (
    *("gpt2", "gpt_neox", "gpt_neox_japanese", "gptj", "opt", "phi", "falcon", "starcoder2"),
    *("gpt_bigcode", "bloom", "mpt", "codegen", "nemotron", "biogpt", "persimmon", "arcee"),
    *("apertus", "jais2", "nanochat"),
)


_ALL_OF_ATTENTION = ("query_key_value", "qkv_proj", "c_attn", "Wqkv")


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder.

    Attributes:
        intermediate: Width of an MLP; of one expert where there are several.
        head_dim: Of an attention head; heads * head_dim need not be `hidden`.
        is_tied: Whether the output head is the embedding.
        experts: MLPs of a layer.
        experts_per_token: Those of them that a token goes through.
    """

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    is_tied: bool = False
    is_gated: bool = True
    experts: int = 1
    experts_per_token: int = 1

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of each linear layer of a layer, by its usual name."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        mlp = {"up_proj": (self.hidden, self.intermediate)}
        mlp["down_proj"] = (self.intermediate, self.hidden)
        if self.is_gated:
            mlp["gate_proj"] = (self.hidden, self.intermediate)
        return {
            "q_proj": (self.hidden, query),
            "k_proj": (self.hidden, key),
            "v_proj": (self.hidden, key),
            "o_proj": (query, self.hidden),
            **mlp,
        }

    def linear(self, name: str) -> tuple[int, int]:
        """Inputs and outputs of the linear layer that LoRA targets by a name: a usual one, or that
        of several of them in one; for a name that is not known, as large as any.
        """
        if name in self.linears:
            return self.linears[name]
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        up, down = (self.hidden, self.intermediate), (self.intermediate, self.hidden)
        known = {
            **dict.fromkeys(_ALL_OF_ATTENTION, (self.hidden, query + 2 * key)),
            **dict.fromkeys(("dense", "out_proj"), (query, self.hidden)),
            **dict.fromkeys(("dense_h_to_4h", "c_fc", "fc1", "fc_in"), up),
            **dict.fromkeys(("dense_4h_to_h", "fc2", "fc_out"), down),
            "c_proj": (query + self.intermediate, 2 * self.hidden),  # one behind each of the two
            "gate_up_proj": (self.hidden, 2 * self.intermediate),
        }
        return known.get(name, (self.hidden, max(query + 2 * key, self.intermediate)))

    @property
    def linear_parameters(self) -> int:
        """Weights of all layers' products, which quantisation makes smaller."""
        own = sum(self.copies(name) * i * o for name, (i, o) in self.linears.items())
        return self.layers * own

    @property
    def other_parameters(self) -> int:
        """Embeddings, head and norms."""
        tables = 1 if self.is_tied else 2
        return tables * self.vocabulary * self.hidden + (2 * self.layers + 1) * self.hidden

    @property
    def parameters(self) -> int:
        """All weights."""
        return self.linear_parameters + self.other_parameters

    def copies(self, name: str) -> int:
        """How often a layer has the linear layer called so."""
        return self.experts if name in ("gate_proj", "up_proj", "down_proj") else 1


def model_shape(model: str) -> ModelShape | None:
    """The shape of a model, read where its config is on this machine, else guessed by its name.

    Returns:
        None for a model whose name does not tell its size.
    """
    config = config_here(model)
    shape = None if config is None else shape_of(config)
    if shape is None and (billions := parameters_in_billions(model)) is not None:
        shape = usual_shape(billions)
    return shape


def shape_of(config: Mapping[str, Any]) -> ModelShape | None:
    """The shape that a config.json gives; None where it gives none."""
    config = config.get("text_config") or config

    def number(*names: str, default: int | None = None) -> int:
        found = next((config[n] for n in names if isinstance(config.get(n), int)), default)
        if found is None:
            raise KeyError(names[0])
        return found

    try:
        hidden = number("hidden_size", "n_embd", "d_model")
        heads = number("num_attention_heads", "n_head")
        kind = str(config.get("model_type", ""))
        names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
        experts = number(*names, default=1)
        one_key = config.get("multi_query") and not config.get("new_decoder_architecture")
        width = ("moe_intermediate_size",) if experts > 1 else ()
        return ModelShape(
            vocabulary=number("vocab_size"),
            hidden=hidden,
            intermediate=number(*width, "intermediate_size", "n_inner", default=4 * hidden),
            layers=number("num_hidden_layers", "n_layer"),
            heads=heads,
            kv_heads=1 if one_key else number("num_key_value_heads", "num_kv_heads", default=heads),
            head_dim=number("head_dim", default=hidden // heads),
            is_tied=bool(config.get("tie_word_embeddings", kind.startswith(("gemma", "gpt2")))),
            is_gated=kind not in _UNGATED,
            experts=experts,
            experts_per_token=number("num_experts_per_tok", "moe_k", default=1),
        )
    except KeyError:
        return None


# Of models that many are like: billions of parameters, vocabulary, hidden, intermediate, layers,
# heads, heads of keys, whether the head is the embedding.
_USUAL = (
    (0.135, 49_152, 576, 1_536, 30, 9, 3, True),
    (0.5, 151_936, 896, 4_864, 24, 14, 2, True),
    (1.5, 151_936, 1_536, 8_960, 28, 12, 2, True),
    (3.2, 128_256, 3_072, 8_192, 28, 24, 8, True),
    (7.6, 152_064, 3_584, 18_944, 28, 28, 4, False),
    (8.0, 128_256, 4_096, 14_336, 32, 32, 8, False),
    (14.8, 152_064, 5_120, 13_824, 48, 40, 8, False),
    (32.8, 152_064, 5_120, 27_648, 64, 40, 8, False),
    (70.6, 128_256, 8_192, 28_672, 80, 64, 8, False),
    (405.0, 128_256, 16_384, 53_248, 126, 128, 8, False),
)
_NEAR = 1.12  # names round: a "7B" has 6.7 to 7.7 billion


def usual_shape(billions: float) -> ModelShape:
    """The shape of a model of that size as models are usually made: the nearest one, with as many
    layers as make up the size.
    """
    size, vocabulary, hidden, inner, layers, heads, kv_heads, is_tied = min(
        _USUAL, key=lambda row: max(row[0] / billions, billions / row[0])
    )
    shape = ModelShape(vocabulary, hidden, inner, layers, heads, kv_heads, hidden // heads, is_tied)
    if max(size / billions, billions / size) <= _NEAR:
        return shape
    per_layer = shape.linear_parameters / layers
    rest = billions * 1e9 - shape.other_parameters
    return replace(shape, layers=max(1, round(rest / per_layer)))


def config_here(model: str) -> dict[str, Any] | None:
    """What config.json of a model says, where it is in a folder or in the cache of the hub."""
    try:
        path = Path(location_here(model)) / "config.json"
    except ConfigError:
        return None
    try:
        if not path.is_file():
            path = cached_file(model, "config.json") or path
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


# ---- how long a row it takes ---------------------------------------------------------------------
# Configs are taken as transformers has read them, and as they stand in config.json, where older
# ones write `rope_scaling` with a `type`.

LONGROPE = "longrope"
# What configs call the positions that a model was made for: most, MPT, GPT 2.
_POSITIONS = ("max_position_embeddings", "max_seq_len", "n_positions")
_NO_LIMIT = 32_768


def made_for(config: Any) -> int | None:
    """How many positions a model was made for; None where nothing limits them, as with ALiBi
    (Bloom) and states (Mamba).
    """
    known = (_given(_text_part(config), name) for name in _POSITIONS)
    return next((int(n) for n in known if isinstance(n, int | float) and n), None)


def longest_row(config: Any) -> int:
    """How many positions a row may have, also where nothing limits them."""
    return made_for(config) or _NO_LIMIT


def short_length(config: Any) -> int | None:
    """Positions of the longest row that has LongRoPE's first table; None where all rows have the
    same.
    """
    config = _text_part(config)
    for given in _rotary_settings(config):
        if _kind(given) == LONGROPE:
            first = given.get("original_max_position_embeddings")
            return int(first or _given(config, "original_max_position_embeddings"))
    return None


def check_row_length(config: Any, max_seq_length: int, *, by_row: bool) -> None:
    """See that no row will be read otherwise because of what it is trained with.

    Args:
        by_row: Whether `rotary.turn_by_row` holds for the model.

    Raises:
        ConfigError: Some may be.
    """
    config = _text_part(config)
    longest = None if by_row else short_length(config)
    why = "the longest row of a batch decides by which of two rotary tables all are turned"
    if any(_kind(given) == "dynamic" for given in _rotary_settings(config)):
        longest = made_for(config)
        why = (
            "this model's rotary table (rope_type 'dynamic') is that of the longest row of a batch"
        )
    if longest is not None and max_seq_length > longest:
        use = "" if by_row else ", or use engine='transformers'"
        raise ConfigError(
            f"max_seq_length: {max_seq_length} is more than {longest} positions, beyond which "
            f"{why}, so that a row's loss would depend on its neighbours; set it to {longest} or "
            f"less{use}"
        )


def _text_part(config: Any) -> Any:
    return _given(config, "text_config") or config


def _rotary_settings(config: Any) -> list[Mapping[str, Any]]:
    """The model's own, or those of each kind of its layers."""
    given: Any = _given(config, "rope_parameters") or _given(config, "rope_scaling") or {}
    if not isinstance(given, Mapping):
        return []
    settings = cast("Mapping[str, Any]", given)
    return [settings, *(own for own in settings.values() if isinstance(own, Mapping))]


def _kind(settings: Mapping[str, Any]) -> Any:
    return settings.get("rope_type") or settings.get("type")


def _given(config: Any, name: str) -> Any:
    if isinstance(config, Mapping):
        return cast("Mapping[str, Any]", config).get(name)
    return getattr(config, name, None)
