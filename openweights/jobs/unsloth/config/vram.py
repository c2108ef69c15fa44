"""How much memory a fine-tuning job needs, by its config and the shape of its model. No torch.

What is there between steps is counted exactly: weights, what is trained with its gradients and the
optimizer's states, the teacher, the cache of rollouts. On top of it comes the worst moment of a
step, which is the largest of

    rollout    a slice of the prompts in one layer, without gradients
    teacher    its micro-batch in one layer, without gradients
    head       what all layers keep for the backward pass, and a chunk of logits
    backward   what all layers keep, and gradients within the last one
    optimizer  what it makes of a parameter in passing

Layers keep, for each token, the tensors that autograd saves for LoRA layers as they are here
(`models/fused/lora_linear.py`), norms (in float32 on a CPU), and an attention that never holds the
square of the length. With recomputation a layer keeps its input alone, and one layer at a time
keeps the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from openweights.gpu_catalogue import CATALOGUE, GPU_COUNTS, surely_usable_gb
from openweights.jobs.unsloth.config.fields import TrainingFields
from openweights.jobs.unsloth.config.problems import spreading_problems
from openweights.models.checkpoint import quantised_by
from openweights.models.shape import ModelShape, config_here, model_shape

CONTEXT_GB = 1.2  # what CUDA, its libraries and the gaps between pieces take beside the tensors
_FLOAT = 4
# Of a weight in nf4, whose scales are quantised, too: one byte for 64 weights, and four for 256.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
_PREFILL_TOKENS = 16_384
_PASSED = 2**20  # logits that a core of a CPU passes over at a time, in three forms
# Of layers that are spread, one computes, the next one comes, and what came is copied.
_GATHERED_LAYERS = 3


@dataclass(frozen=True, slots=True)
class Device:
    """How a device computes.

    Attributes:
        value_bytes: Of a weight that is neither trained nor quantised, and of an activation.
        recomputes: Whether layers recompute their activations where memory is short.
        is_fused: Whether logits go through kernels that make few tensors of them.
    """

    value_bytes: int
    recomputes: bool
    is_fused: bool


GPU = Device(value_bytes=2, recomputes=True, is_fused=True)
CPU = Device(value_bytes=4, recomputes=False, is_fused=False)


@dataclass(frozen=True, slots=True)
class Tokens:
    """The largest that come.

    Attributes:
        micro: Of a forward pass with gradients, padding included.
        teacher: Of one without.
        scored: Of those that go through the output head.
        cached: Whose keys and values rollouts keep.
    """

    micro: int
    teacher: int = 0
    scored: int = 0
    cached: int = 0


@dataclass(frozen=True, slots=True)
class Memory:
    """What a job holds at its worst moment, in bytes.

    Attributes:
        weights: Of the model, as they are loaded.
        trained: Trained parameters beside them, and gradients.
        optimizer: Its states.
        teacher: The teacher's weights.
        rollout: Keys and values of the completions that grow, copies of weights for decoding.
        activations: Everything that comes and goes within a step.
    """

    weights: int
    trained: int
    optimizer: int
    teacher: int
    rollout: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        parts = ((field.name, getattr(self, field.name) / 2**30) for field in fields(self))
        listed = ", ".join(f"{name} {gb:.1f}" for name, gb in parts if round(gb, 1))
        return f"{self.total / 2**30:.1f} GiB ({listed})"


def gpu_gb(config: TrainingFields, model: str) -> int | None:
    """The memory that a job needs, in GiB, at the largest batches that its config allows: of one
    GPU, or of as many together as it takes to spread its layers over.

    Args:
        model: The base of its model.

    Returns:
        None where nothing tells the size of the model.
    """
    shape = model_shape(model)
    if shape is None:
        return None
    alone = _on_each_gb(config, shape, 1)
    largest = max(surely_usable_gb(gpu) for gpu in CATALOGUE.values() if gpu.is_automatic)
    if alone <= largest or config.parallel == "ddp" or not _may_spread(config, model):
        return alone
    together = ((n, _on_each_gb(config, shape, n)) for n in GPU_COUNTS)
    return next((n * each for n, each in together if each <= largest), alone)


def _on_each_gb(config: TrainingFields, shape: ModelShape, gpus: int) -> int:
    return math.ceil(vram_needed(config, shape, gpus=gpus).total / 2**30 + CONTEXT_GB)


def must_spread(config: TrainingFields, gpus: int, gpu_bytes: int) -> bool:
    """Whether the model's layers are to be spread over so many GPUs, with so much memory each.

    Args:
        config: With the base of its model as `model`.
    """
    if gpus == 1 or config.parallel != "auto":
        return gpus > 1 and config.parallel == "fsdp"
    shape = model_shape(config.model)
    fits = shape is None or _on_each_gb(config, shape, 1) * 2**30 <= gpu_bytes
    return not fits and _may_spread(config, config.model)


def _may_spread(config: TrainingFields, model: str) -> bool:
    """Whether the layers of a job's model can be spread, as far as is known here."""
    return not any(spreading_problems(config)) and quantised_by(config_here(model)) is None


# What can be made smaller, and still be the same job.
_LOWERED: tuple[str, ...] = (
    *("per_device_train_batch_size", "max_seq_length", "r"),
    *("sdft_max_new_tokens", "grpo_max_completion_length"),
)


def settings_to_lower(config: TrainingFields, shape: ModelShape) -> list[str]:
    """The two settings whose halves would save the most memory, the best first."""

    def saved(name: str) -> int:
        half = config.model_copy(update={name: max(1, getattr(config, name) // 2)})
        return vram_needed(config, shape).total - vram_needed(half, shape).total

    return sorted(_LOWERED, key=saved, reverse=True)[:2]


def vram_needed(
    config: TrainingFields,
    shape: ModelShape,
    *,
    device: Device = GPU,
    tokens: Tokens | None = None,
    kept_layers: int = 0,
    gpus: int = 1,
) -> Memory:
    """What a job holds at its worst moment.

    Args:
        tokens: The largest batches that come; None for the largest that the config allows.
        kept_layers: Layers that keep their activations on a device that recomputes: as many as fit
            do so (`runtime/recomputation.py`), and a job that has less memory needs none.
        gpus: Over which the layers are spread; what one of them holds is counted.
    """
    tokens = tokens or most_tokens(config)
    trained = trained_parameters(config, shape)
    gradients = _FLOAT * trained
    step = _Step(config, shape, device, tokens, kept_layers)
    waiting = gradients if config.gradient_accumulation_steps > 1 else 0
    worst = max(
        waiting + max(step.rollout, step.teacher, step.head, step.backward),
        gradients + step.optimizer,
    )
    return Memory(
        weights=_weight_bytes(config, shape, device, gpus),
        trained=_FLOAT * trained * config.is_peft,
        optimizer=_optimizer_bytes(config, device) * trained,
        teacher=_teacher_copies(config, device) * _FLOAT * trained,
        rollout=step.kept_for_rollouts,
        activations=worst,
    )


def most_tokens(config: TrainingFields) -> Tokens:
    """The largest batches that a config allows."""
    rows, whole = config.per_device_train_batch_size, config.micro_batch_tokens
    cached = config.step_size * config.max_seq_length  # of losses that sample
    match config.loss:
        case "sft":
            return Tokens(whole, scored=whole)
        case "dpo":
            return Tokens(2 * whole, teacher=2 * whole, scored=2 * whole)
        case "orpo":
            return Tokens(2 * whole, scored=2 * whole)
        case "sdft":
            scored = rows * config.sdft_max_new_tokens
            return Tokens(whole, whole, scored, cached=cached)
        case "grpo":
            scored = rows * config.grpo_max_completion_length
            return Tokens(whole, whole, scored, cached=cached)


def trained_parameters(config: TrainingFields, shape: ModelShape) -> int:
    """How many numbers are trained."""
    if not config.is_peft:
        return shape.parameters
    in_layers = sum(sum(sizes) for sizes in _adapted(config, shape).values())
    return config.r * (shape.layers * in_layers + sum(_adapted_head(config, shape)))


@dataclass(frozen=True, slots=True)
class _Step:
    """What comes and goes within a step: the bytes of each of its moments."""

    config: TrainingFields
    shape: ModelShape
    device: Device
    tokens: Tokens
    kept_layers: int

    @property
    def rollout(self) -> int:
        """A slice of the prompts in a layer; on a CPU the keys and values, which go afterwards."""
        if not self.tokens.cached:
            return 0
        passing = min(self.tokens.cached, _PREFILL_TOKENS) * self._passing
        return passing + (0 if self.device.is_fused else self._cache)

    @property
    def kept_for_rollouts(self) -> int:
        """Cache and copies of weights that stay on a GPU from rollout to rollout."""
        if not self.tokens.cached or not self.device.is_fused:
            return 0
        adapters = self.device.value_bytes * trained_parameters(self.config, self.shape)
        narrow = self.shape.linear_parameters * (self.config.rollout_precision == "fp8")
        return self._cache + adapters + narrow

    @property
    def teacher(self) -> int:
        """A layer of a forward pass without gradients."""
        return self.tokens.teacher * self._passing

    @property
    def head(self) -> int:
        """When a chunk's logits are there."""
        value, hidden = self.device.value_bytes, self.shape.hidden
        states = 3 if self.config.loss == "sdft" else 2  # with the gradient of the student's
        return (
            self._kept
            + hidden * value * (self.tokens.micro + states * self.tokens.scored)
            + (self._logits)
        )

    @property
    def backward(self) -> int:
        """Within the last layer, which is computed again where it has kept its input alone."""
        value, hidden = self.device.value_bytes, self.shape.hidden
        again = self._layer if self.device.recomputes and not self.kept_layers else 0
        last_norm = hidden * (2 * value + 3 * _FLOAT)
        last_layer = again + 2 * (self._width + hidden) * value
        return self._kept + self.tokens.micro * max(last_norm, last_layer)

    @property
    def optimizer(self) -> int:
        """A tensor of the parameters on the way; on a GPU all of them are taken at once."""
        if self.device.is_fused:
            return _FLOAT * trained_parameters(self.config, self.shape)
        return 2 * _FLOAT * self._largest

    @property
    def _largest(self) -> int:
        """Numbers of the largest trained tensor."""
        if not self.config.is_peft:
            return self.shape.vocabulary * self.shape.hidden
        adapted = _adapted(self.config, self.shape).values()
        return self.config.r * max(map(max, (*adapted, _adapted_head(self.config, self.shape))))

    @property
    def _kept(self) -> int:
        """What all layers keep of the micro-batch for the backward pass."""
        layers, value = self.shape.layers, self.device.value_bytes
        whole = min(self.kept_layers, layers) if self.device.recomputes else layers
        inputs = (layers - whole) * self.shape.hidden * value
        norm = self.shape.hidden * _FLOAT if value < _FLOAT else 0
        return self.tokens.micro * (whole * self._layer + inputs + norm)

    @property
    def _layer(self) -> int:
        """Bytes that a layer keeps of a token."""
        kept = _layer_bytes(self.config, self.shape, self.device)
        if not _is_packed(self.config):  # its row of the mask
            kept += self.device.value_bytes * (
                self.tokens.micro // self.config.per_device_train_batch_size
            )
        return kept

    @property
    def _logits(self) -> int:
        """Of a chunk, in all the forms in which they are there at a time."""
        chunk, each = _logit_bytes(self.config, self.device)
        words = min(chunk, self.tokens.scored) * self.shape.vocabulary
        passed = 0 if self.device.is_fused or self.config.loss == "sdft" else min(words, _PASSED)
        return words * each + passed * 3 * _FLOAT

    @property
    def _passing(self) -> int:
        """Bytes of a token on its way through a layer."""
        return (3 * self._width + 3 * self.shape.hidden) * self.device.value_bytes

    @property
    def _width(self) -> int:
        return self.shape.intermediate * self.shape.experts_per_token

    @property
    def _cache(self) -> int:
        own = 2 * self.shape.layers * self.shape.kv_heads * self.shape.head_dim
        return own * self.device.value_bytes * self.tokens.cached


def _layer_bytes(config: TrainingFields, shape: ModelShape, device: Device) -> int:
    """What autograd saves of a token in a layer."""
    value, width = device.value_bytes, shape.intermediate * shape.experts_per_token
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    adapted = _adapted(config, shape) if config.is_peft else shape.linears
    own_inputs = config.is_peft and config.lora_dropout > 0
    inputs = {_INPUT_OF.get(name, name): sizes[0] for name, sizes in adapted.items()}
    # Into the norms, and their factors.
    kept = 2 * shape.hidden * (value if device.is_fused else _FLOAT) + 2 * _FLOAT
    kept += value * (2 * query + 2 * key) + _FLOAT * shape.heads  # attention
    if not _is_packed(config):
        kept += value * 2 * (query - key)  # under a mask, keys and values are repeated
    is_fused = device.is_fused and shape.is_gated and config.is_peft  # `models/fused/layers.py`
    branches = 1 if not shape.is_gated else 2 if is_fused else 3
    kept += value * branches * width
    # The inputs of the layers that are trained. That of o_proj is attention's own output, but for
    # packed rows on a CPU, whose outputs are joined.
    if device.is_fused or not _is_packed(config):
        inputs.pop("attention", None)
    if is_fused and not own_inputs:
        inputs.pop("MLP", None)  # it is made again
    kept += value * sum(inputs.values())
    if own_inputs:
        kept += sum(i for i, _ in adapted.values()) * (value + 1)  # and a mask
    if config.is_peft:
        kept += value * config.r * len(adapted)
    else:
        kept += value * 2 * shape.hidden  # what the norms' weights are multiplied with
    return kept


def _is_packed(config: TrainingFields) -> bool:
    return config.packing or config.loss != "sft"


_INPUT_OF = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "attention norm"),
    **dict.fromkeys(("query_key_value", "qkv_proj", "c_attn", "Wqkv"), "attention norm"),
    **dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj"), "MLP norm"),
    **dict.fromkeys(("dense_h_to_4h", "c_fc", "fc1", "fc_in"), "MLP norm"),
    **dict.fromkeys(("o_proj", "dense", "out_proj"), "attention"),
    **dict.fromkeys(("down_proj", "dense_4h_to_h", "fc2", "fc_out"), "MLP"),
}


def _logit_bytes(config: TrainingFields, device: Device) -> tuple[int, int]:
    """Tokens of a chunk, and bytes of one word of one token in all its forms."""
    match config.loss, device.is_fused:
        case "sdft", True:
            return 512, 10  # of student and teacher in float32, and the gradient
        case "sdft", False:
            return 1024, _FLOAT * {"reverse_kl": 7, "forward_kl": 8, "jsd": 10}[
                config.sdft_divergence
            ]
        case _, True:
            return 1024, 6
        case _, False:
            return 1024, 2 * _FLOAT  # and the gradient


def _adapted(config: TrainingFields, shape: ModelShape) -> dict[str, tuple[int, int]]:
    """The linear layers of a layer that get an adapter."""
    return {name: shape.linear(name) for name in sorted(_target_names(config) - {"lm_head"})}


def _adapted_head(config: TrainingFields, shape: ModelShape) -> tuple[int, int]:
    """Inputs and outputs of the head if it gets an adapter, else nothing."""
    return (shape.hidden, shape.vocabulary) if "lm_head" in _target_names(config) else (0, 0)


def _target_names(config: TrainingFields) -> set[str]:
    return {name.rsplit(".", 1)[-1] for name in config.target_modules}


def _weight_bytes(config: TrainingFields, shape: ModelShape, device: Device, gpus: int) -> int:
    if not config.is_peft:
        return _FLOAT * shape.parameters
    each = NF4_BYTES if config.load_in_4bit else device.value_bytes
    layers = each * shape.linear_parameters
    if gpus > 1:
        layers *= 1 / gpus + _GATHERED_LAYERS / shape.layers
    return int(layers) + device.value_bytes * shape.other_parameters


def _teacher_copies(config: TrainingFields, device: Device) -> int:
    """Of what is trained: the teacher, and its first weights where it moves away from them.

    A GPU's teacher of all weights is on the host.
    """
    if config.loss != "sdft" or (device.is_fused and not config.is_peft):
        return 0
    return 2 if config.sdft_ema_alpha else 1


def _optimizer_bytes(config: TrainingFields, device: Device) -> int:
    """Of a trained parameter; states of 8 bits exist on CUDA alone."""
    known = {"sgd": 0, "adamw_8bit": 2 if device.is_fused else 8}
    return known.get(config.optim, 8)
