"""Loads the model with a fresh adapter; the only file that knows which engine is used.

unsloth must be imported before trl, transformers and peft: `prepare_engine` is called before any of
them is imported, which is why their imports stand inside functions here and in `training.py`.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from openweights.errors import ConfigError, ConfigurationError, OpenWeightsError, wants_room
from openweights.models.at_hand import ends_at_hand
from openweights.models.checkpoint import (
    adapter_shape,
    check_adapter_shape,
    check_can_go_on,
    check_is_dense,
    check_target_modules,
)
from openweights.models.hub_files import base_in, out_of_reach, split_commit
from openweights.models.log_probs import check_logits
from openweights.models.names import location_here
from openweights.models.packing import cap_attention
from openweights.models.rotary import turn_by_row
from openweights.models.shape import check_row_length, made_for
from openweights.models.templates.ends import tell_ends_of_model
from openweights.models.templates.options import set_template
from openweights.models.tokens import set_tokens
from openweights.progress import transferring
from openweights.settings import Settings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TrainingEngine = Literal["unsloth", "transformers"]


class ModelRequest(Protocol):
    """What loading reads of a job's config; the fields are those of `TrainingConfig`."""

    model: str
    loss: Any
    engine: Any
    seed: int
    max_seq_length: int
    chat_template: str
    template_options: dict[str, Any]
    load_in_4bit: bool
    is_peft: bool
    r: int
    lora_alpha: int
    lora_dropout: float
    lora_bias: Any
    use_rslora: bool
    target_modules: list[str]


logger = logging.getLogger(__name__)


def resolve_engine(config: ModelRequest, *, goes_on: bool = False) -> TrainingEngine:
    """The engine that trains `config` here: transformers, but where unsloth is asked for.

    Args:
        goes_on: Whether a trained adapter is trained on.

    Raises:
        ConfigurationError: The engine that was asked for cannot run here.
        ConfigError: The engine cannot honour the config.
    """
    cuda = torch.cuda.is_available()
    if config.engine == "unsloth" and not (cuda and importlib.util.find_spec("unsloth")):
        lack = "no CUDA GPU is visible" if not cuda else "the package unsloth is not installed"
        raise ConfigurationError(
            f"engine='unsloth': {lack}; use engine='auto' or engine='transformers'"
        )
    if goes_on:
        check_can_go_on(is_peft=config.is_peft, engine=config.engine)
    if config.load_in_4bit and not (cuda and importlib.util.find_spec("bitsandbytes")):
        raise ConfigError(
            "load_in_4bit: needs a CUDA GPU and the package bitsandbytes, which this machine "
            "lacks; remove it, or run the job where there is a GPU, with 'openweights[gpu]'"
        )
    # Models that unsloth loads are not packed, and lack what `fused` does.
    return "unsloth" if config.engine == "unsloth" else "transformers"


def prepare_engine(config: ModelRequest, *, goes_on: bool = False) -> TrainingEngine:
    """Choose the engine and import it, before trl, transformers or peft are imported."""
    engine = resolve_engine(config, goes_on=goes_on)
    if engine == "unsloth":
        if config.loss == "grpo":
            # Its compiled log-softmax breaks on completions of changing lengths; read at import.
            os.environ["UNSLOTH_COMPILE_DISABLE"] = "partial"
        import unsloth  # noqa: F401  # pyright: ignore[reportMissingImports]
    return engine


def local_rank() -> int:
    """The number of this process's GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def device_name() -> str:
    """What the job trains on, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return f"CPU with {torch.get_num_threads()} threads"


def load_model(
    config: ModelRequest,
    engine: TrainingEngine | None = None,
    adapter: Path | None = None,
    *,
    spread: bool = False,
) -> tuple[PeftModel | PreTrainedModel, PreTrainedTokenizerBase]:
    """Base model with the LoRA to train, or the whole model where `is_peft` is False, and its
    tokenizer.

    A fresh adapter is created from `config.seed`. Trained weights are in float32. The tokenizer has
    a pad token, pads on the right, and has the chat template that the config asks for; the
    generation config knows every end token of model and tokenizer.

    Args:
        engine: What `prepare_engine` returned; None asks it.
        adapter: Folder of an adapter on `config.model` that is trained on; None for a fresh one.
        spread: Over the GPUs of all ranks (`sharding.py`); every rank must ask.

    Raises:
        ConfigError: Model or target modules do not exist, or the adapter has another shape than the
            config; one line that says which.
    """
    engine = engine or prepare_engine(config, goes_on=adapter is not None)
    from transformers import set_seed

    set_seed(config.seed)
    with clear_load_errors(config.model), transferring():
        if engine == "unsloth":
            model, tokenizer = _load_unsloth(config)
        else:
            model, tokenizer = _load_transformers(config, adapter, spread)
    # Not the folder in which a model with a name of its own happens to lie here.
    name, commit = split_commit(config.model)
    if not config.is_peft:
        model.config.name_or_path = config.model
    else:
        lora = model.peft_config["default"]
        lora.base_model_name_or_path = name if adapter is None else lora.base_model_name_or_path
        lora.revision = commit
    if config.is_peft:
        # "auto" would ask the hub about the base model's vocabulary, at every checkpoint, and warn
        # where it gets no answer; no adapter of ours trains it.
        model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    text: Any = model.config.get_text_config()
    check_row_length(text, config.max_seq_length, by_row=engine == "transformers")
    set_template(tokenizer, config.chat_template, config.template_options)
    set_tokens(model, tokenizer)
    _describe(model, config, engine)
    if adapter is not None:
        logger.info("training goes on from the adapter in %s", adapter)
    return model, tokenizer


def tokenizer_of(
    location: str,
    base: str,
    chat_template: str = "default",
    template_options: Mapping[str, Any] | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer beside an adapter, or its base's, as an adapter may come without one.

    Raises:
        ConfigError: It cannot be loaded, or the template has no such option.
    """
    from transformers import AutoTokenizer

    with clear_load_errors(location):
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(location_here(location))
        except (OSError, ValueError):
            tokenizer = AutoTokenizer.from_pretrained(location_here(base))
    tell_ends_of_model(tokenizer, ends_at_hand(base))
    set_template(tokenizer, chat_template, template_options or {})
    return tokenizer


def load_trained(
    location: str,
    base: str | None = None,
    *,
    chat_template: str = "default",
    template_options: Mapping[str, Any] | None = None,
    tokenizer_from: str | None = None,
    in_4bit: bool = False,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """A model that is not trained, and its tokenizer, with tokens as `load_model` sets them.

    Args:
        location: Folder or Hugging Face id of a model, or of an adapter, whose base is loaded, too.
        base: Where that base is; None for what the adapter names.
        template_options: What the chat template reads beside the messages.
        tokenizer_from: Where its tokenizer is, if that has one; else beside the model.
        in_4bit: Whether the weights are loaded in 4 bit.

    Raises:
        ConfigError: It cannot be loaded; one line that says why.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import find_adapter_config_file

    location = location_here(location)
    with clear_load_errors(location), transferring():
        found = find_adapter_config_file(location)
        adapter = json.loads(Path(found).read_text()) if found else {}
        base = location_here(base or base_in(adapter) or location)
        tokenizer = tokenizer_of(tokenizer_from or location, base, chat_template, template_options)
        model = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=base_dtype(base),
            quantization_config=_four_bit() if in_4bit else None,
            device_map={"": 0} if torch.cuda.is_available() else None,
        )
        cap_attention(model)
        turn_by_row(model)
        check_logits(model, base)
        if found:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, location)
    set_tokens(model, tokenizer)
    logger.info("loaded %s on %s", location, device_name())
    return model.eval(), tokenizer


def _describe(model: Any, config: ModelRequest, engine: TrainingEngine) -> None:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    every = sum(p.numel() for p in model.parameters())
    logger.info(
        "loaded %s with engine %s on %s: %.1f M parameters, %.2f M of them trained",
        config.model,
        engine,
        device_name(),
        every / 1e6,
        trained / 1e6,
    )
    longest = made_for(model.config)
    if longest is not None and config.max_seq_length > longest:
        logger.warning(
            "max_seq_length=%d is more than the %d positions that the model was made for",
            config.max_seq_length,
            longest,
        )


def _load_unsloth(config: ModelRequest) -> tuple[Any, Any]:
    import unsloth  # pyright: ignore[reportMissingImports]

    fast: Any = unsloth

    model, tokenizer = fast.FastLanguageModel.from_pretrained(
        model_name=location_here(config.model),
        max_seq_length=config.max_seq_length,
        dtype=None,
        load_in_4bit=config.load_in_4bit,
        token=Settings.from_env().hf_token,
    )
    model = fast.FastLanguageModel.get_peft_model(
        model,
        **_lora_options(model, config),
        use_gradient_checkpointing="unsloth",
        random_state=config.seed,
        max_seq_length=config.max_seq_length,
    )
    # A processor of a multimodal model holds the tokenizer that text needs.
    return model, getattr(tokenizer, "tokenizer", tokenizer)


def _load_transformers(config: ModelRequest, adapter: Path | None, spread: bool) -> tuple[Any, Any]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, PretrainedConfig

    from openweights.models.fused.layers import fuse_layers
    from openweights.models.fused.lora_linear import fuse_lora

    location = location_here(config.model)
    tokenizer = tokenizer_of(str(adapter or location), location)
    where = _place_to_load(spread)
    if spread:
        check_is_dense(config.model, PretrainedConfig.get_config_dict(location)[0])
    model = AutoModelForCausalLM.from_pretrained(
        location,
        # What is trained is kept in float32: small updates would be rounded away.
        dtype=base_dtype(location) if config.is_peft else torch.float32,
        quantization_config=_four_bit() if config.load_in_4bit and not spread else None,
        device_map=None if where is None else {"": where},
    )
    model.config.use_cache = False
    cap_attention(model)
    turn_by_row(model)
    if not spread:  # else the other ranks have no weights yet
        check_logits(model, config.model)
    if not config.is_peft:
        return model, tokenizer
    if adapter is None:
        lora = LoraConfig(**_lora_options(model, config), task_type="CAUSAL_LM")
        adapted: Any = get_peft_model(model, lora)
    else:
        adapted = _with_adapter(model, config, adapter)
    if spread:
        from openweights.models.sharding import spread_layers

        cuda = torch.cuda.is_available()
        device = torch.device("cuda", local_rank()) if cuda else torch.device("cpu")
        spread_layers(adapted, device, in_4bit=config.load_in_4bit)
        check_logits(model, config.model)
    fuse_lora(adapted)
    fuse_layers(adapted)
    return adapted, tokenizer


def _place_to_load(spread: bool) -> int | str | None:
    """Where weights are put first: the GPU, or the host's memory (None), from which the first rank
    spreads them, while the others load none.
    """
    if spread:
        return None if torch.distributed.get_rank() == 0 else "meta"
    return local_rank() if torch.cuda.is_available() else None


def _with_adapter(model: Any, config: ModelRequest, adapter: Path) -> Any:
    """The model with a trained adapter, to go on from.

    Raises:
        ConfigError: It has another shape than the config says.
    """
    from peft import LoraConfig, PeftModel

    shape = adapter_shape(json.loads((adapter / "adapter_config.json").read_text()))
    asked = {**shape, "r": config.r, "lora_alpha": config.lora_alpha}
    asked |= {"use_rslora": config.use_rslora, "lora_bias": config.lora_bias}
    if "target_modules" in shape:
        asked["target_modules"] = sorted(_existing_modules(model, config))
    check_adapter_shape(shape, asked, adapter)
    lora: Any = LoraConfig.from_pretrained(str(adapter))
    lora.lora_dropout, lora.inference_mode = config.lora_dropout, False
    return PeftModel.from_pretrained(model, str(adapter), config=lora, is_trainable=True)


def _lora_options(model: PreTrainedModel, config: ModelRequest) -> dict[str, Any]:
    """The adapter, in the words that peft and unsloth share."""
    return {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": _existing_modules(model, config),
        "bias": config.lora_bias,
        "use_rslora": config.use_rslora,
    }


def base_dtype(location: str) -> torch.dtype:
    """Precision of the frozen base: bfloat16 on CUDA, else float32.

    A CPU with native bfloat16 keeps a checkpoint that was saved in it as it is, which is faster and
    half the memory; one saved in float32 is never rounded.
    """
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    from transformers import AutoConfig

    saved = AutoConfig.from_pretrained(location_here(location)).dtype
    return torch.bfloat16 if saved == torch.bfloat16 and _cpu_has_bf16() else torch.float32


def saved_dtype(location: str) -> torch.dtype:
    """The type in which a model's weights are saved."""
    from transformers import AutoConfig

    saved: Any = AutoConfig.from_pretrained(location_here(location)).dtype
    return saved or torch.float32


def _cpu_has_bf16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split()
    except (OSError, IndexError):
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _four_bit() -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _existing_modules(model: PreTrainedModel, config: ModelRequest) -> list[str]:
    """The asked-for target modules that the model has.

    Raises:
        ConfigError: It has not all of them; of the default ones, none.
    """
    linear = [
        name
        for name, module in model.named_modules()
        if hasattr(module, "weight") and getattr(module.weight, "dim", lambda: 0)() == 2
    ]
    existing = check_target_modules(config.model, config.target_modules, linear)
    if missing := [name for name in config.target_modules if name not in existing]:
        logger.warning("target_modules: the model has no %s; left out", ", ".join(missing))
    return existing


@contextmanager
def clear_load_errors(name: str) -> Iterator[None]:
    """Turn what loading a model may raise into one line that says what to do."""
    from safetensors import SafetensorError

    try:
        yield
    except OpenWeightsError:
        raise
    except torch.OutOfMemoryError as error:
        raise ConfigurationError(
            f"model: {name} does not fit into the GPU's memory; ask for a larger GPU with "
            "requires_vram_gb, or use load_in_4bit=True"
        ) from error
    except (
        *(OSError, ValueError, KeyError, ImportError, AssertionError, RuntimeError),
        SafetensorError,
    ) as error:
        raise ConfigError(_load_problem(name, error)) from error


def _load_problem(name: str, error: Exception) -> str:
    """Why a model cannot be loaded, by the errors of the hub's client that stand behind `error`."""
    from huggingface_hub import errors as hub

    causes = list(_causes(error))
    if any(map(wants_room, causes)):
        return (
            f"model: there is no disk space left to load {name}; free some, or set HF_HOME to a "
            "larger disk"
        )
    codes = {c.response.status_code for c in causes if isinstance(c, hub.HfHubHTTPError)}
    not_found = (hub.RepositoryNotFoundError, hub.RevisionNotFoundError, hub.HFValidationError)
    if any(isinstance(c, hub.GatedRepoError) for c in causes) or 403 in codes:  # noqa: PLR2004
        return (
            f"model: {name} is gated or private; ask for access and set HF_TOKEN to a token that "
            "has it"
        )
    if any(isinstance(c, not_found) for c in causes):
        # The hub answers 401 to a stranger, whether there is a private repository or none.
        private = "; if it is private, set HF_TOKEN to a token that may read it"
        return (
            f"model: {name!r} was not found, neither as a folder nor on the Hugging Face hub; "
            f"check the spelling{private if codes else ''}"
        )
    unreachable = (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, ConnectionError)
    if any(isinstance(c, unreachable) for c in causes):
        return out_of_reach(name)
    lines = (line.strip() for line in str(error).splitlines())
    first = next((line for line in lines if line), type(error).__name__)
    return (
        f"model: {name} cannot be loaded: {first}; give a causal language model in the "
        "Hugging Face format"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and what it was raised from or beside."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
