"""Generation by vLLM where it is installed: the only importer of it.

vLLM loads the base model by its name, in a process of its own, beside the one that trains; adapters
that are trained are written to a folder and handed over as LoRA requests, whenever the engine
begins anew. Its samples are its own for a seed, not those of the other engines, and its weights are
rounded in its own way: `is_exact` is False, so that trainers weigh its samples by their own
log-probabilities. What ends a completion, and its text, is decided here as for every engine.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import vllm  # type: ignore[import-not-found]
from torch import nn
from transformers import PreTrainedTokenizerBase
from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]

from openweights.errors import ConfigError, InvalidStateError
from openweights.generation.engine import GenerationEngine, check_request
from openweights.generation.params import MOST_TOP_LOGPROBS, Delta, GenerationRequest
from openweights.generation.samples import Sample
from openweights.models.adapters import adapter_names, peft_name
from openweights.models.forward import base_model
from openweights.models.names import location_here
from openweights.models.shape import longest_row
from openweights.models.tokens import eos_token_ids
from openweights.settings import Settings

MEMORY_SHARE = 0.35  # of the GPU, beside a training in the same memory
MOST_ADAPTERS = 8
# Ranks that vLLM has kernels for.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


class VLLMEngine(GenerationEngine):
    """See `GenerationEngine`.

    Args:
        model: The model that is trained, or served; vLLM reads its base from where it was loaded.
        tokenizer: Decodes completions, and knows what ends them.
        memory_share: How much of the GPU's memory vLLM takes.
        scaled_logprobs: Whether its log-probabilities are of the logits divided by the temperature;
            one engine can tell those or the model's own.
    """

    name = "vllm"
    is_exact = False

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        memory_share: float = MEMORY_SHARE,
        scaled_logprobs: bool = False,
    ) -> None:
        base = base_model(model)
        self._model: Any = model
        self._tokenizer = tokenizer
        self._scaled = scaled_logprobs
        self._folder = tempfile.TemporaryDirectory(
            prefix="openweights-vllm-", dir=Settings.from_env().scratch
        )
        self._folders: dict[str, Path] = {}  # of adapters that were set
        self._handed: dict[str, LoRARequest] = {}  # since the engine began anew
        self._ids = count(1)
        self._samples: dict[str, Sample] = {}
        self.end_token_ids = tuple(eos_token_ids(base, tokenizer))
        self.max_length = longest_row(base.config.get_text_config())
        self.vocabulary = int(base.config.get_text_config().vocab_size)
        self._engine = vllm.LLMEngine.from_engine_args(
            vllm.EngineArgs(
                model=location_here(base.config.name_or_path),
                gpu_memory_utilization=memory_share,
                max_model_len=self.max_length,
                enable_prefix_caching=True,
                enable_lora=True,
                max_loras=MOST_ADAPTERS,
                max_lora_rank=_rank(getattr(model, "peft_config", {})),
                max_logprobs=MOST_TOP_LOGPROBS,
                logprobs_mode="processed_logprobs" if scaled_logprobs else "raw_logprobs",
            )
        )

    # ---- adapters

    @property
    def adapters(self) -> tuple[str, ...]:
        """See `GenerationEngine`."""
        return (*adapter_names(self._model), *self._folders)

    def set_adapter(self, name: str, folder: Path) -> None:
        """See `GenerationEngine`."""
        self._refuse_in_use(name)
        if not (folder / "adapter_config.json").is_file():
            raise ConfigError(f"adapter {name!r}: {folder} cannot be loaded (holds no adapter)")
        self._folders[name] = folder
        self._handed.pop(name, None)

    def remove_adapter(self, name: str) -> None:
        """See `GenerationEngine`."""
        if name not in self._folders:
            raise ConfigError(f"adapter {name!r}: is not loaded")
        self._refuse_in_use(name)
        del self._folders[name]
        self._handed.pop(name, None)

    def _refuse_in_use(self, name: str) -> None:
        if any(sample.request.adapter == name for sample in self._samples.values()):
            raise InvalidStateError(f"adapter {name!r}: is in use; wait for its requests")

    def _handed_over(self, name: str | None) -> LoRARequest | None:
        """The adapter with its current weights, as vLLM asks for it."""
        if name is None:
            return None
        if name not in self._handed:
            number = next(self._ids)
            folder = self._folders.get(name) or self._written(name, number)
            self._handed[name] = LoRARequest(f"{name}-{number}", number, str(folder))
        return self._handed[name]

    def _written(self, name: str, number: int) -> Path:
        folder = Path(self._folder.name) / str(number)
        written = peft_name(name)
        self._model.save_pretrained(folder, selected_adapters=[written])
        return folder if written == "default" else folder / written

    # ---- requests

    @property
    def is_idle(self) -> bool:
        """See `GenerationEngine`."""
        return not self._samples

    def submit(self, request: GenerationRequest) -> None:
        """See `GenerationEngine`."""
        check_request(self, request)
        params = request.params
        matters = params.logprobs and params.temperature not in (0, 1)
        if matters and params.logprobs_after_temperature != self._scaled:
            raise ConfigError(
                "logprobs_after_temperature: this vLLM engine tells the other log-probabilities; "
                "make one with scaled_logprobs changed"
            )
        if self.is_idle:
            # The weights may have changed; those that were set have not.
            self._handed = {n: lora for n, lora in self._handed.items() if n in self._folders}
        lora = self._handed_over(request.adapter)
        for index in range(params.n):
            sample = Sample(request, index, self._tokenizer, self.end_token_ids, self.max_length)
            name = f"{request.id}/{index}"
            self._engine.add_request(
                name,
                vllm.TokensPrompt(prompt_token_ids=list(request.prompt_ids)),
                _vllm_params(sample),
                lora_request=lora,
            )
            self._samples[name] = sample

    def step(self) -> list[Delta]:
        """See `GenerationEngine`."""
        if self.is_idle:
            return []
        deltas: list[Delta] = []
        for output in self._engine.step():
            sample = self._samples.get(output.request_id)
            if sample is None:
                continue
            part = output.outputs[0]
            deltas.append(_pushed(sample, list(part.token_ids), part.logprobs or []))
            if sample.is_finished:
                del self._samples[output.request_id]
                if not output.finished:  # a stop text, of which vLLM does not know
                    self._engine.abort_request([output.request_id])
        return deltas

    def abort(self, request_id: str) -> None:
        """See `GenerationEngine`."""
        gone = [name for name, s in self._samples.items() if s.request.id == request_id]
        if gone:
            self._engine.abort_request(gone)
        for name in gone:
            del self._samples[name]


def _pushed(sample: Sample, tokens: list[int], logprobs: list[Mapping[int, Any]]) -> Delta:
    """The delta that new tokens make, with what their request asks for."""
    params = sample.request.params
    values = [known[token].logprob for token, known in zip(tokens, logprobs, strict=False)]
    tops: list[dict[int, float]] = []
    if params.top_logprobs:
        for known in logprobs:
            ranked = sorted(known.items(), key=lambda entry: entry[1].rank)
            tops.append({token: one.logprob for token, one in ranked[: params.top_logprobs]})
    return sample.push(tokens, values, tops)


def _vllm_params(sample: Sample) -> Any:
    """vLLM's parameters for one sample; its texts and stop texts are not vLLM's business."""
    params = sample.request.params
    return vllm.SamplingParams(
        n=1,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k or 0,
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        seed=(sample.key[0] << 31) ^ sample.key[1],
        max_tokens=sample.limit,
        min_tokens=params.min_new_tokens,
        ignore_eos=True,
        stop_token_ids=list(sample.ends),
        logprobs=params.top_logprobs if params.logprobs else None,
        detokenize=False,
        output_kind=vllm.sampling_params.RequestOutputKind.DELTA,
    )


def _rank(configs: Mapping[str, Any]) -> int:
    """The smallest rank of vLLM's that holds every adapter of the model."""
    largest = max((config.r for config in configs.values()), default=RANKS[3])
    return next((rank for rank in RANKS if rank >= largest), RANKS[-1])
