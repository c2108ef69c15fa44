"""What an inference job is asked for. No torch here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from openweights.arguments import as_list
from openweights.jobs.numbers import MOST_TOKENS, Rows, TemperatureOrGreedy, Tokens, TopP
from openweights.models.names import AnyModel, ChatTemplate, TemplateOptions

# The log-probabilities of the tokens, and of so many likeliest ones; True for those of the tokens.
TopLogprobs = Annotated[int, Field(ge=0, le=20)]


class InferenceConfig(BaseModel):
    """What is asked of a model.

    Attributes:
        model: A repository (`org/name`), a folder in one (`org/name/checkpoint-100`), a local
            folder, a fine-tuning job (`ftjob-…`, `ftjob-…/checkpoint-N`), or `openai/<name>`.
        other_models: These answer the same rows; a base is loaded once, with all its adapters. The
            result then has the rows once for each model, one model after the other, with its name
            as `model`.
        input_file_id: File id from `ow.files.upload`, or a local path. Rows have `messages` or
            `text`; their other keys stay. A last message of the assistant is continued.
            `max_tokens` and `temperature` of a row count for it.
        max_tokens: Completions are cut here, or where the model's context ends.
        temperature: 0 takes the likeliest token.
        top_p: Of the likeliest tokens those that hold so much; 1 for all.
        stop: Texts that end a completion; it does not hold them.
        prefill: How each answer begins; the completion is what comes after it.
        min_tokens: Nothing ends a completion before it has so many.
        max_model_len: Prompt and completion together, in tokens, at most.
        logprobs: Of so many likeliest tokens at each place, beside the token's own; None for none.
        n_completions_per_prompt: With more than one, `completion` is a list.
        chat_template: A Jinja template, or "default" for the tokenizer's own.
        template_options: What it reads beside the messages, such as `{"enable_thinking": False}`.
        quantization: "bitsandbytes" loads the weights in 4 bit, as does "4bit" in the name.
        load_format: Taken for older scripts; the format is seen from the files.
        use_batch: Models of OpenAI: their batch API, which is cheaper and takes up to a day,
            instead of parallel requests.
        seed: The completions are a function of it, the weights and the rows.
        engine: "auto" takes the fastest of ours that can compute the model.
        job_id_suffix: Ends the job's id.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    model: AnyModel
    other_models: Annotated[list[AnyModel], BeforeValidator(as_list)] = []
    input_file_id: str
    max_tokens: Tokens = 600
    temperature: TemperatureOrGreedy = 1.0
    top_p: TopP = 1.0
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(as_list)] = []
    prefill: str = ""
    min_tokens: Annotated[int, Field(ge=0, le=MOST_TOKENS)] = 1
    max_model_len: Tokens = 8196
    logprobs: TopLogprobs | None = None
    n_completions_per_prompt: Rows = 1
    chat_template: ChatTemplate = "default"
    template_options: TemplateOptions = {}
    quantization: Literal["bitsandbytes"] | None = None
    load_format: str | None = None
    use_batch: bool = True
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    engine: Literal["auto", "vllm", "cuda_graph", "transformers"] = "auto"
    job_id_suffix: str | None = None

    @property
    def models(self) -> list[str]:
        """All that are asked."""
        return [self.model, *self.other_models]

    def of_model(self, model: str) -> InferenceConfig:
        """What is asked of one of them."""
        return self.model_copy(update={"model": model, "other_models": []})

    @property
    def in_4bit(self) -> bool:
        """Whether the weights are loaded in 4 bit."""
        return self.quantization is not None or "4bit" in self.model.lower()
