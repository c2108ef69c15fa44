"""The adapters of a model: which there are, loading one beside others, and computing with one.

Requests name an adapter as its job or repository is called. peft makes modules of these names, in
which no dot may stand (`peft_name`). An adapter's file may hold weights of the base's own layers,
too, as trained biases; peft would load them into the base, where every other adapter would have
them: they are kept apart, and are in their places while that adapter computes alone (`acting`).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import torch
from torch import Tensor, nn

from openweights.errors import ConfigError
from openweights.models.forward import active_adapter, base_model

_BASE = "__base__"  # what peft calls the model without an adapter
# Of a `PeftModel`: adapter -> [(the base's parameter, values)].
_OWN_WEIGHTS = "weights_of_adapters"


def peft_name(name: str | None) -> str:
    """An adapter's name as peft writes it; None for the model without one."""
    if name is None:
        return _BASE
    written = name.replace("%", "%25").replace(".", "%2E")
    return "%5F" + written[1:] if written == _BASE else written


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """Every adapter that a model has."""
    return tuple(map(unquote, getattr(model, "peft_config", ())))


def has_own_weights(model: nn.Module) -> bool:
    """Whether an adapter of it has other values for weights of the base's own layers."""
    return any(getattr(model, _OWN_WEIGHTS, {}).values())


def not_plain(folder: Path) -> str | None:
    """What an adapter has beside LoRA's matrices, by its config; None for nothing."""
    file = folder / "adapter_config.json"
    config: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    if (kind := config.get("peft_type", "LORA")) != "LORA":
        return f"an adapter of kind {kind}"
    if config.get("bias", "none") != "none":
        return "an adapter with trained biases"
    others = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices")
    used = next((name for name in others if config.get(name)), None)
    return used and f"an adapter with {used}"


def can_mix(model: nn.Module) -> bool:
    """Whether one pass can compute rows of several adapters, or with one and without: peft does
    that for plain LoRA alone.
    """
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    def is_plain(layer: Any) -> bool:
        plain = isinstance(layer, LoraLayer) and not isinstance(layer, ParamWrapper)
        return plain and not any(layer.use_dora.values()) and not layer.lora_variant

    return not has_own_weights(model) and all(
        is_plain(module)
        for module in model.modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    )


@contextmanager
def acting(model: Any, name: str | None) -> Iterator[None]:
    """The model computes with one of its adapters inside, or with none, for all rows."""
    active = active_adapter(model)
    own = getattr(model, _OWN_WEIGHTS, {}).get(name, ())
    before = [parameter.data for parameter, _ in own]
    for parameter, values in own:
        parameter.data = values
    try:
        if name == active:
            yield
        else:
            with _switched(model, name, active):
                yield
    finally:
        for (parameter, _), data in zip(own, before, strict=True):
            parameter.data = data


@contextmanager
def _switched(model: Any, name: str | None, active: str | None) -> Iterator[None]:
    """peft marks what it switches to as trained, or as not: afterwards it is what it was."""
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        if name is None:
            with model.disable_adapter():
                yield
        else:
            model.set_adapter(peft_name(name))
            yield
    finally:
        model.set_adapter(peft_name(active))
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)


def with_adapter(model: Any, name: str, folder: Path) -> Any:
    """The model with an adapter from a folder, in the place of one of that name.

    Raises:
        ConfigError: The folder holds none that fits the model; it has then no adapter of that name.
    """
    from peft import PeftConfig
    from peft.utils import load_peft_weights
    from safetensors import SafetensorError

    failures = (ValueError, RuntimeError, OSError, LookupError, TypeError, SafetensorError)
    try:
        if not name:
            raise ValueError("it has no name")
        config: Any = PeftConfig.from_pretrained(str(folder))  # before the one of that name goes
        if config.is_prompt_learning:
            raise ValueError(f"{config.peft_type.value}, which is no change of layers; use a LoRA")
        others = [model.peft_config[peft_name(n)] for n in adapter_names(model) if n != name]
        if others and any(getattr(c, "trainable_token_indices", None) for c in [*others, config]):
            raise ValueError("peft loads no other beside one with trainable_token_indices")
        held = load_peft_weights(str(folder), device="cpu")
    except failures as error:
        raise _not_loaded(name, folder, error) from error
    if name in adapter_names(model):
        model = without_adapter(model, name)
    shared = _shared(base_model(model), held, getattr(config, "modules_to_save", None) or ())
    before = [parameter.detach().clone() for parameter, _ in shared]
    # peft takes one adapter with biases at most, whose place is the base.
    config.inference_mode, config.bias = True, "none"
    try:
        loaded = _loaded(model, name, folder, config)
    except failures as error:
        _set_data(shared, before)
        _remove_traces(model, name)
        raise _not_loaded(name, folder, error) from error
    _set_data(shared, before)
    held_own = [(p, values.to(p.device, p.dtype)) for p, values in shared]
    own = [(p, values) for p, values in held_own if not torch.equal(p.data, values)]
    setattr(loaded, _OWN_WEIGHTS, {**getattr(loaded, _OWN_WEIGHTS, {}), name: own})
    return loaded


def _loaded(model: Any, name: str, folder: Path, config: Any) -> Any:
    """The model with the adapter, all of it.

    Raises:
        ValueError: The folder holds other layers than the adapter has on this model.
    """
    from peft import get_peft_model

    written = peft_name(name)
    mapping = getattr(base_model(model), "_checkpoint_conversion_mapping", {})
    if not adapter_names(model):
        # peft writes where the base is here, and warns of any other place that it was loaded from.
        config.base_model_name_or_path = None
        model = get_peft_model(model, config, adapter_name=written)
    else:
        model.add_adapter(written, config)
    result = model.load_adapter(folder, written, key_mapping=mapping)
    # peft counts those of other adapters, too, in whose keys this one's name is found.
    others = {peft_name(other) for other in adapter_names(model) if other != name}
    parts = {key: set(key.split(".")) for key in result.missing_keys}
    missing = [key for key in parts if written in parts[key] and not others & parts[key]]
    known = {_plain(key) for key, _ in base_model(model).named_parameters(remove_duplicate=False)}
    unknown = [key for key in result.unexpected_keys if _plain(key) not in known]
    for keys, what in (
        (unknown, "it holds layers that the model lacks"),
        (missing, "it lacks layers of the model"),
    ):
        if keys:
            raise ValueError(f"{what}, as {keys[0]!r}: it was made for another model")
    return model.eval()


def _not_loaded(name: str, folder: Path, error: Exception) -> ConfigError:
    lines = " ".join(str(error).split())
    return ConfigError(f"adapter {name!r}: {folder} cannot be loaded ({lines})")


def _shared(
    base: nn.Module, held: Mapping[str, Tensor], copied: Collection[str]
) -> list[tuple[nn.Parameter, Tensor]]:
    """The base's own parameters that a file has values for, but of modules that peft copies."""
    own = {_plain(name): p for name, p in base.named_parameters(remove_duplicate=False)}
    found = {
        id(own[key]): (own[key], values)
        for name, values in held.items()
        if (key := _plain(name)) in own and not set(key.split(".")) & set(copied)
    }
    return list(found.values())


def _plain(name: str) -> str:
    """A parameter's name without what peft puts into it."""
    for part in ("base_layer.", "original_module."):
        name = name.replace(part, "")
    return name.removeprefix("base_model.model.")


@torch.no_grad()
def _set_data(shared: Sequence[tuple[nn.Parameter, Tensor]], values: Sequence[Tensor]) -> None:
    for (parameter, _), value in zip(shared, values, strict=True):
        parameter.copy_(value)


def without_adapter(model: Any, name: str) -> Any:
    """The model without one of its adapters; the base model itself where that was the last one.

    A `PeftModel` that has none left still calls the deleted one active, and fails when it is asked.
    """
    others = [other for other in adapter_names(model) if other != name]
    if others and active_adapter(model) == name:
        model.set_adapter(peft_name(others[0]), inference_mode=True)
    model.delete_adapter(peft_name(name))
    getattr(model, _OWN_WEIGHTS, {}).pop(name, None)
    if not adapter_names(model):
        return model.unload()
    _unwrap(base_model(model))
    return model


def _remove_traces(model: Any, name: str) -> None:
    """What loading has left of an adapter when it failed."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    written, base = peft_name(name), base_model(model)
    getattr(model, "peft_config", {}).pop(written, None)
    if not adapter_names(model) and hasattr(base, "peft_config"):
        del base.peft_config
    for layer in list(base.modules()):
        is_outer = isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper)
        if is_outer and written in layer._get_available_adapters():
            layer.delete_adapter(written)  # type: ignore[operator]
    _unwrap(base)


def _unwrap(base: nn.Module) -> None:
    """Layers that no adapter changes any more are what they were."""
    for parent in list(base.modules()):
        for name, child in list(parent.named_children()):
            layer = _inner_if_unused(child)
            if layer is not None:
                setattr(parent, name, layer)


def _inner_if_unused(module: Any) -> nn.Module | None:
    """The layer inside of one that peft has put around it, where no adapter is left in it."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    is_outer = isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    if not is_outer or module._get_available_adapters():
        return None
    is_layer = isinstance(module, BaseTunerLayer)
    return module.get_base_layer() if is_layer else module.original_module
