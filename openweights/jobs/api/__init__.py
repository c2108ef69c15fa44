"""`ow.api`: models behind an OpenAI-compatible server for as long as they are used. Client-side."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

from pydantic import BaseModel, ConfigDict, Field

from openweights import images
from openweights.arguments import as_texts
from openweights.client.job_kinds import Jobs
from openweights.client.serving.temporary_api import TemporaryApi
from openweights.errors import ConfigError
from openweights.jobs.inference import answering_needs
from openweights.jobs.known_models import check_on_hub
from openweights.jobs.numbers import MOST, MOST_ROWS, Count, Rows, Tokens
from openweights.jobs.pinning import adapter_base, job_base, pinned_model
from openweights.models.names import (
    AnyModel,
    ChatTemplate,
    full_name,
    guessed_vram_gb,
    model_reference,
)
from openweights.types import SERVED, JobType

if TYPE_CHECKING:
    from openweights.client.job_options import JobOptions, takes
    from openweights.client.jobs import Job
    from openweights.needs import Need


class ApiConfig(BaseModel):
    """What is served.

    Attributes:
        model: The base model: a repository or a local folder.
        lora_adapters: Adapters on it, each a model of its own: repositories, folders in them, local
            folders, and fine-tuning jobs, whose newest checkpoint is served while they train.
        max_lora_rank: Of the adapters, for vLLM; "guess" takes what it needs.
        max_loras: Adapters that vLLM computes at once; -1 for all of them.
        max_model_len: Prompt and completion together, in tokens, at most.
        max_num_seqs: Completions that grow at a time; more requests wait.
        quantization, kv_cache_dtype: As in vLLM.
        chat_template: A Jinja template, or "default" for the tokenizers' own.
        api_key: What requests must bear; default: one is made for each deployment.
        idle_timeout: Seconds without a request after which the deployment ends.
        engine: "auto" takes vLLM where it is installed and there is a GPU, else ours.
        job_id_suffix: Ends the job's id.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    model: AnyModel
    lora_adapters: list[AnyModel] = []
    max_lora_rank: Count | Literal["guess"] = "guess"
    max_loras: Annotated[int, Field(ge=-1, le=MOST_ROWS)] = -1
    max_model_len: Tokens = 2048
    max_num_seqs: Rows = 16
    quantization: str | None = None
    kv_cache_dtype: str | None = None
    chat_template: ChatTemplate = "default"
    api_key: Annotated[str, Field(min_length=8)] | None = None
    idle_timeout: Annotated[float, Field(ge=0.001, le=MOST, allow_inf_nan=False)] = 900.0
    engine: Literal["auto", "vllm", "cuda_graph", "transformers"] = "auto"
    job_id_suffix: str | None = None


_MODELS = "give models, such as ['org/name', job.id]"


class Api(Jobs):
    """Deploys models: `ow.api.deploy("org/model")` gives a `TemporaryApi`.

    On this machine a deployment is a server on a loopback port, beside whatever else runs; on a pod
    it stands behind the pod's proxy. A deployment that nobody uses ends by itself.
    """

    if TYPE_CHECKING:

        class _Arguments(ApiConfig, JobOptions): ...

        @takes(_Arguments)
        def create(self, **params: Any) -> Job: ...

    params: ClassVar[type[BaseModel]] = ApiConfig
    job_type: ClassVar[JobType] = SERVED
    base_image: ClassVar[str] = images.VLLM_IMAGE
    id_covers_mounts: ClassVar[bool] = False

    @property
    def id_prefix(self) -> str:
        """What the ids of its jobs begin with."""
        return "apijob"

    # ---- deploying -------------------------------------------------------------------------------

    def deploy(
        self, model: str, lora_adapters: Sequence[str] | None = None, **params: Any
    ) -> TemporaryApi:
        """Serve a model, which may be an adapter or a fine-tuning job.

        Use it as a context manager, whose value is an OpenAI client, or call `up` and `down`. A
        folder is served under its full path.

        Args:
            model: What `ApiConfig.model` or one of its `lora_adapters` can be.
            lora_adapters: Further adapters on the same base.
            **params: What `create` takes.

        Raises:
            ConfigError: A parameter is wrong, or a model is not there.
        """
        adapters = as_texts("lora_adapters", lora_adapters or (), _MODELS)
        model = full_name(model)
        base = adapter_base(self.ow, model)
        check_on_hub(self.ow, model)
        if base != model:
            adapters.insert(0, model)
        params.setdefault("max_num_seqs", 100)
        job = self.create(model=base, lora_adapters=adapters, **{"max_attempts": 1, **params})
        return TemporaryApi(self.ow, job.id, params.get("timeout"))

    def multi_deploy(
        self, models: Sequence[str], base_model_override: str | None = None, **params: Any
    ) -> dict[str, TemporaryApi]:
        """Serve several models: one deployment for each base, with all adapters on it.

        Args:
            models: As of `deploy`.
            base_model_override: The base of them all, whatever the adapters say.
            **params: What `create` takes.

        Returns:
            The deployment of each model, by its name.
        """
        models = as_texts("models", models, _MODELS)
        adapters: dict[str, list[str]] = {}
        override = full_name(base_model_override) if base_model_override else None
        for model in dict.fromkeys(map(full_name, models)):
            base = override or adapter_base(self.ow, model)
            adapters.setdefault(base, [])
            if model != base:
                adapters[base].append(model)
        apis = {base: self.deploy(base, sorted(own), **params) for base, own in adapters.items()}
        served = {name: apis[base] for base, own in adapters.items() for name in (base, *own)}
        return {model: served[full_name(model)] for model in models}

    # ---- the job ---------------------------------------------------------------------------------

    def needs(self, validated: BaseModel) -> Sequence[Need]:
        """What the engine takes."""
        config = cast("ApiConfig", validated)
        return answering_needs([config.model], config.engine)

    def validate(self, params: dict[str, Any]) -> ApiConfig:
        """The parameters, checked, with folders in full, and a key if none was given.

        Raises:
            ConfigError: A line for each field that is wrong, and what would work.
        """
        config = cast("ApiConfig", super().validate(params))
        kind = model_reference(config.model).kind
        if kind == "openai":
            raise ConfigError(f"model: {config.model} is OpenAI's; ask it through ow.chat")
        if kind == "job":
            raise ConfigError(
                f"model: {config.model} is an adapter, and this is to be its base; use "
                "ow.api.deploy, which finds it"
            )
        for adapter in config.lora_adapters:
            self._check_adapter(adapter, config.model)
        return config.model_copy(
            update={
                "model": pinned_model(self.ow, config.model),
                "lora_adapters": list(config.lora_adapters),
                "api_key": config.api_key or f"sk-{secrets.token_urlsafe(24)}",
            }
        )

    def _check_adapter(self, adapter: str, base: str) -> None:
        reference = model_reference(adapter)
        if reference.kind == "job":
            trained_on = job_base(self.ow, reference.name)
            if trained_on != base and adapter_base(self.ow, trained_on) != base:
                raise ConfigError(
                    f"lora_adapters: {adapter} was trained on {trained_on}, not on {base}; deploy "
                    "it by itself"
                )
        elif reference.kind == "folder":
            pinned_model(self.ow, adapter)

    def compute_id(
        self,
        validated: BaseModel,
        mounted_files: Mapping[str, str] | None = None,
        script: str = "",
    ) -> str:
        """As `Jobs.compute_id`; the key is no part of what is served."""
        without_key = validated.model_copy(update={"api_key": None})
        return super().compute_id(without_key)

    def vram_gb(self, validated: BaseModel) -> int | None:
        """By the model's size."""
        config = cast("ApiConfig", validated)
        return guessed_vram_gb(config.model, config.quantization)

    def get_entrypoint(self, validated_params: BaseModel) -> str:
        """See `Jobs`."""
        return "python -m openweights.jobs.api.serve {job_id}"
