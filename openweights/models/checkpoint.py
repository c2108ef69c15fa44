"""What the files of a model's folder say about it, read without torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openweights.errors import ConfigError

if TYPE_CHECKING:
    from pydantic import BaseModel

_LONGEST_HEADER = 100_000_000  # the format's own limit
_MATRIX = 2
_HEADS = ("lm_head", "embed_out")
_ADAPTER_CONFIG = "adapter_config.json"
# Files up to this size are read; of larger ones size and time of the last change count, because
# reading tens of GB would take longer than many a job.
READ_BYTES = 1 << 24
_COUNTS = frozenset(
    (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".json", ".jinja", ".model", ".txt", ".py")
)

DEFAULT_TARGET_MODULES = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
]


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of each saved tensor; empty where no safetensors can be read.

    A file begins with the length of its header in 8 bytes, and the header in JSON.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header: dict[str, Any] = json.loads(file.read(min(length, _LONGEST_HEADER)))
        except (OSError, ValueError):
            return {}  # whoever loads the model says what is wrong with it
        header.pop("__metadata__", None)
        shapes |= {name: tuple(tensor["shape"]) for name, tensor in header.items()}
    return shapes


def linear_modules(folder: Path) -> list[str] | None:
    """The modules of a saved model that an adapter can be put on: those with a matrix.

    None where its files do not tell: experts are saved under other names than they are loaded with.
    """
    shapes = weight_shapes(folder)
    if not shapes or any(".experts." in name for name in shapes):
        return None
    matrices = [name for name, shape in shapes.items() if len(shape) == _MATRIX]
    found = {name.rpartition(".")[0] for name in matrices if name.endswith(("weight", ".qweight"))}
    if "gpt_neox.embed_in" in found and "embed_out" in found:
        found = found - {"embed_out"} | {"lm_head"}  # transformers loads it under that name
    # A head that is not saved is tied to the embeddings.
    is_saved = any(head in name for head in _HEADS for name in found)
    return sorted(found if is_saved else found | {"lm_head"})


def check_target_modules(model: str, wanted: Sequence[str], modules: Iterable[str]) -> list[str]:
    """Those of the wanted modules that there are. All must be there, but for the default ones, of
    which one is enough.

    Args:
        modules: The model's, by their full names.

    Raises:
        ConfigError: They are not; names what the model has.
    """
    names = {module.rpartition(".")[2] for module in modules}
    existing = [name for name in wanted if name.rpartition(".")[2] in names]
    missing = [name for name in wanted if name not in existing]
    is_default = list(wanted) == DEFAULT_TARGET_MODULES
    if missing and not (is_default and existing):
        raise ConfigError(
            f"target_modules: {model} has no {', '.join(missing)}; "
            f"it has {', '.join(sorted(names))}"
        )
    return existing


def may_be_same_modules(
    asked: Sequence[str], kept: Sequence[str], modules: Iterable[str] | None
) -> bool:
    """Whether two lists of target modules can come to the same on a model, of which the default
    ones count where they are there.

    Args:
        modules: The model's, by their full names; None where they are not known.
    """
    if set(DEFAULT_TARGET_MODULES) not in (set(asked), set(kept)):
        return set(asked) == set(kept)
    if modules is None:
        return {*asked, *kept} == set(DEFAULT_TARGET_MODULES)
    names = {module.rpartition(".")[2] for module in modules}
    return set(asked) & names == set(kept) & names


def check_is_dense(model: str, config: Mapping[str, Any] | None) -> None:
    """See that the layers of a model can be spread over GPUs: nf4 is made of dense weights, a layer
    at a time, and parts of other formats make no whole.

    Args:
        config: Its config.json; None where that is not at hand.

    Raises:
        ConfigError: Its weights are saved quantised.
    """
    if (how := quantised_by(config)) is not None:
        raise ConfigError(
            f"parallel: 'fsdp' cannot spread the layers of {model}, whose weights are saved "
            f"quantised ({how}); give the model that it was made from, with load_in_4bit=True if "
            "memory is short, or use 'ddp'"
        )


def quantised_by(config: Mapping[str, Any] | None) -> str | None:
    """How the weights of a checkpoint with this config.json are quantised, such as "gptq" or "fp8";
    None for dense ones.
    """
    saved = (config or {}).get("quantization_config")
    return str(saved.get("quant_method", "in some way")) if isinstance(saved, dict) else None


# ---- going on from an adapter --------------------------------------------------------------------


def adapter_shape(lora: Mapping[str, Any]) -> dict[str, Any]:
    """What an adapter's `adapter_config.json` fixes for whoever goes on from it, as our fields."""
    shape: dict[str, Any] = {
        "r": lora.get("r"),
        "lora_alpha": lora.get("lora_alpha"),
        "use_rslora": lora.get("use_rslora", False),
        "lora_bias": lora.get("bias", "none"),
    }
    if isinstance(lora.get("target_modules"), list):
        shape["target_modules"] = sorted(lora["target_modules"])
    return {name: value for name, value in shape.items() if value is not None}


def check_adapter_shape(
    shape: Mapping[str, Any], asked: Mapping[str, Any], adapter: str | Path
) -> None:
    """See that what goes on from an adapter keeps its shape.

    Args:
        shape: What the adapter fixes, as `adapter_shape`.
        asked: The same fields of the config.

    Raises:
        ConfigError: A line for each field that is another.
    """
    wrong = [
        f"{name}: is {asked[name]}, but the adapter in {adapter} has {value}; give "
        f"{name}={value!r} to go on from it"
        for name, value in shape.items()
        if asked[name] != value
    ]
    if wrong:
        raise ConfigError("\n".join(wrong))


def check_can_go_on(*, is_peft: bool, engine: str) -> None:
    """See that a config can go on from an adapter at all.

    Raises:
        ConfigError: It trains all weights, or with an engine that loads no adapter.
    """
    if not is_peft:
        raise ConfigError(
            "is_peft: False trains all weights of a whole model, and this one is an adapter; push "
            "it with merge_before_push=True and train that model, or remove is_peft"
        )
    if engine == "unsloth":
        raise ConfigError(
            "engine: 'unsloth' cannot go on from an adapter; use 'auto' or 'transformers'"
        )


# ---- whether a folder is still what it was -------------------------------------------------------
# It keeps its name when other weights are saved into it. A job that names one is of what was there
# when it was submitted: that is part of its id, and it does not run with anything else.


def folders_of(params: BaseModel) -> dict[str, dict[str, str]]:
    """`folder_states` of the models that a job's parameters name, for the job; {} for none."""
    named = [getattr(params, name, None) for name in ("model", "models", "lora_adapters")]
    lists = (one if isinstance(one, list) else [one] for one in named)
    states = folder_states(name for one in lists for name in one if isinstance(name, str))
    return {"model_folders": states} if states else {}


def folder_states(models: Iterable[str]) -> dict[str, str]:
    """Of the models that are folders of this machine, named in full, and of the bases of adapters
    among them: folder -> `folder_state`.
    """
    states: dict[str, str] = {}
    waiting = list(models)
    while waiting:
        folder = Path(waiting.pop())
        if not folder.is_absolute() or str(folder) in states or not folder.is_dir():
            continue
        states[str(folder)] = folder_state(folder)
        waiting += _base_of(folder)
    return states


def folder_state(folder: Path) -> str:
    """A hash of weights, configs and tokenizer of a folder; "" of one that is not there."""
    if not folder.is_dir():
        return ""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in _COUNTS and path.is_file():
            digest.update(f"{path.name}\n{_file_state(path)}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def _file_state(path: Path) -> str:
    state = path.stat()
    if state.st_size > READ_BYTES:
        return f"{state.st_size} {state.st_mtime_ns}"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _base_of(folder: Path) -> list[str]:
    """What an adapter is on, where the folder is one and says so."""
    try:
        config = json.loads((folder / _ADAPTER_CONFIG).read_bytes())
        return [str(config["base_model_name_or_path"])]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # whoever loads it says what is wrong with it
