"""Defines a run's configuration: frozen dataclasses that validate themselves.

Every error names the field, its value, the rule and the remedy. `config_dict` makes the dataclasses from what a config
file gives.
"""

from __future__ import annotations

import abc
import dataclasses
import difflib
import re
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    import jax

    from gqe_jax.kernels import Call

# The keys of gqe_jax.kernels.attend.IMPLEMENTATIONS, which this module may not import (a test compares them).
IMPLEMENTATIONS = ("reference", "xla", "cudnn", "pallas_tpu", "pallas_tpu_decode")


class ConfigError(ValueError):
    """Raised for input that cannot be used: the message names the field, the value, the rule and the remedy."""


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """Returns "did you mean ...?" for an error message, or the known names where none is near."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def require(rule: bool, message: str) -> None:
    """Raises ConfigError with the message unless the rule holds."""
    if not rule:
        raise ConfigError(message)


def require_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{name}={value} must be positive: set {name} to {least(value)}")


def least(value: float | None) -> str:
    return "at least 1" if isinstance(value, int) else "a value above 0"


def require_known(config: Any) -> None:
    """Raises ConfigError unless every field with a closed list of values (Literal) has one of them."""
    for name, hint in typing.get_type_hints(type(config)).items():
        if typing.get_origin(hint) is Literal:
            value, allowed = getattr(config, name), typing.get_args(hint)
            require(value in allowed, f"{name}={value!r} is unknown: use one of {', '.join(map(repr, allowed))}")


def require_seed(config: Any, path: str) -> None:
    require(0 <= config.seed < 2**32, f"{path}.seed={config.seed} must lie in [0, 2**32): choose another seed")


def require_fraction(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(0.0 <= value < 1.0, f"{name}={value} must lie in [0, 1): choose a value in that range")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Stretches rotary embeddings to contexts beyond the one trained on; formulas in `attention/rotary.py`."""

    kind: Literal["none", "linear", "dynamic", "llama3", "yarn"] = "none"  # which formula stretches the tables
    factor: float = 1.0  # context after / context before
    original_context: int = 2048  # tokens the unscaled tables were trained for (unused by "linear")
    low_freq_factor: float = 1.0  # llama3: fewer turns within original_context, and a frequency is divided by factor
    high_freq_factor: float = 4.0  # llama3: more turns, and it is left alone
    beta_fast: float = 32.0  # yarn: rotations above which a frequency is left alone
    beta_slow: float = 1.0  # yarn: rotations below which it is fully interpolated
    attention_factor: float | None = None  # yarn: multiplies cos and sin; None = 0.1 ln(factor) + 1

    def __post_init__(self):
        require_known(self)
        require(self.factor >= 1.0, f"rope_scaling.factor={self.factor} must be at least 1: it stretches the context")
        require_positive(self, "original_context")
        require(
            self.low_freq_factor < self.high_freq_factor,
            f"rope_scaling.low_freq_factor={self.low_freq_factor} must be below "
            f"high_freq_factor={self.high_freq_factor}: swap or separate them",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig(abc.ABC):
    """Holds the settings that all kinds of attention share, and asks each kind (`gqe_jax.attention.KINDS`) for its own.

    The fields are also the layers' constructor arguments. Nothing outside `gqe_jax.attention` asks which kind it is:
    counts, plans, reports and conversions use the abstract members below, all of which a kind has to define.
    """

    POSITIONAL: ClassVar[tuple[str, ...]]  # fields that the layer's constructor takes by position, after d_model

    kind: str  # which kind of attention, a name in `gqe_jax.attention.KINDS`
    num_kv_heads: int  # G, heads of keys and values
    head_dim: int | None = None  # D; None: d_model / number of query heads
    rope_theta: float | None = 10_000.0  # base of the rotary embedding; None: no rotary embedding
    rope_scaling: RopeScaling = RopeScaling()  # stretches it to longer contexts
    qk_norm: bool = False  # RMS norm of each query and key head before the rotary embedding; one scale [D] each
    qk_norm_eps: float = 1e-6  # added to the mean square under that norm's root
    bias: bool = False  # of the projections of q, k, v, o and a shared query; a router never has one
    softcap: float | None = None  # scores become softcap * tanh(scores / softcap)
    window: int | None = None  # a token sees itself and the window - 1 tokens before it
    implementation: str | None = None  # of `attend`, one of IMPLEMENTATIONS; None: the fastest on the platform
    context_parallel: Literal["auto", "gather", "ring"] = "auto"  # how K and V cross `context`; auto: by their size

    @property
    @abc.abstractmethod
    def query_heads(self) -> tuple[str, int]:
        """The field that holds the number of projected query heads, without a shared one: (its name, its value)."""

    @property
    @abc.abstractmethod
    def attending_heads(self) -> int:
        """How many heads attend for each token, shared ones included."""

    @property
    @abc.abstractmethod
    def output_slots(self) -> int:
        """How many head-sized vectors the output projection takes: W_o has output_slots · head_dim rows."""

    @property
    @abc.abstractmethod
    def summary(self) -> str:
        """One line with the settings that tell one model's attention from another's."""

    @property
    @abc.abstractmethod
    def description(self) -> str:
        """What the attention does, in Markdown without a full stop, for readers of a model card."""

    @abc.abstractmethod
    def parameters(self, d_model: int) -> dict[str, int]:
        """Counts the parameters of one layer by part: "attention", "norm" and, where there is one, "router"."""

    @abc.abstractmethod
    def flops(self, d_model: int, tokens: int, pairs: int) -> dict[str, int]:
        """Counts the FLOPs of one layer's forward pass by part.

        Args:
          d_model: width of the layer's input.
          tokens: number of tokens that pass through the projections.
          pairs: number of (query, key) pairs that one attending head scores.

        Returns:
          FLOPs of "projections", "router", "attention" (scores and weighted sums) and "shared_head".
        """

    @abc.abstractmethod
    def dense_twin(self) -> AttentionConfig | None:
        """Returns the config of the same layer with every query head attending; None where it is dense itself."""

    @abc.abstractmethod
    def saved_bytes(self, policy: str, *, d_model: int, itemsize: int, expert: int = 1) -> int:
        """Counts the bytes that a device keeps of one token in a layer for the backward pass, beside the layer's input.

        Args:
          policy: a key of `gqe_jax.remat.POLICIES`.
          d_model: width of the layer.
          itemsize: bytes of a number in the computation's dtype.
          expert: number of devices on the mesh's axis `expert`, which share out the KV heads.
        """

    @abc.abstractmethod
    def cached_numbers(self, expert: int = 1) -> int:
        """Counts the numbers that a device caches of a token in a layer, where `expert` devices share the KV heads."""

    @property
    def spread_sizes(self) -> dict[str, int]:
        """Sizes, beside d_model, that the mesh's `fsdp` and `context` have to divide: name below `model` → size."""
        return {}

    def attended_numbers(self, expert: int = 1) -> int:
        """Counts the numbers in the keys and values of one token as `attend` reads them in training."""
        return self.cached_numbers(expert)

    def decode_flops(self, d_model: int, seen: int) -> dict[str, int]:
        """Counts the FLOPs of one layer, as `flops` does, for one token that sees `seen` tokens of a cache."""
        return self.flops(d_model, 1, seen)

    @abc.abstractmethod
    def attend_calls(
        self, dtype: str, *, batch: int, q_len: int, kv_len: int, cached: bool, partitioned: bool
    ) -> dict[str, Call]:
        """Describes the calls of `gqe_jax.attend` that one layer makes, by a name of the heads that each computes.

        Args:
          dtype: name of the computation's dtype.
          batch, q_len, kv_len: B, S and T.
          cached: whether the tokens continue a cache (prefill and decode); otherwise they are rows of training data.
          partitioned: whether XLA splits the computation over several devices.
        """

    @property
    @abc.abstractmethod
    def transformers_classes(self) -> tuple[str, ...]:
        """The model types of transformers that compute this kind; a model's other settings may still exclude them."""

    @abc.abstractmethod
    def modelling_settings(self) -> dict[str, Any] | None:
        """Returns this kind's settings in the config.json of an exported model.

        `pytorch/modelling/modeling_gqe.py` reads them; None means that it cannot compute this kind.
        """

    @classmethod
    @abc.abstractmethod
    def from_modelling_settings(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns this kind's own fields from an exported config.json; raises KeyError if one is missing."""

    @abc.abstractmethod
    def zero_tensors(self, d_model: int) -> dict[str, tuple[int, ...]]:
        """Returns name → shape of tensors that an exported layer needs but this layer has not: they are zeros there.

        A router without parameters, for example, is exported as a `router.weight` of zeros.
        """

    @abc.abstractmethod
    def updated_buffers(self, buffers: dict[str, Any], metrics: Mapping[str, jax.Array]) -> dict[str, Any]:
        """Returns the buffers (state without gradient) of the attention layers after a training step.

        Args:
          buffers: the buffers before the step, stacked over layers; empty where a kind has none.
          metrics: the metrics of the layers' reports over the whole step, stacked over layers.
        """

    @abc.abstractmethod
    def progress_note(self, metrics: Mapping[str, Any]) -> str | None:
        """Says in a few words, for the progress line, what the layers' metrics of a step show; None: nothing."""

    @abc.abstractmethod
    def warnings(self, metrics: Mapping[str, Any]) -> list[str]:
        """Describes what is wrong with the layers' metrics of a step; an empty list where all is well."""

    @property
    def has_out_bias(self) -> bool:
        """Whether the output projection has a bias."""
        return self.bias

    @property
    def unsplit(self) -> str | None:
        """Why the devices on the mesh's axis `expert` cannot share out the KV heads; None where they can."""
        return None

    @property
    def query_dim(self) -> int:
        """The width of a query, and of the keys that it is multiplied with."""
        assert self.head_dim is not None  # of a config that is resolved
        return self.head_dim

    @property
    def rotary_dim(self) -> tuple[str, int | None]:
        """The setting that says how many dimensions have a rotary frequency table: (its name, its value)."""
        return "head_dim", self.head_dim

    def buffer_fault(self, buffers: Mapping[str, Any]) -> str | None:
        """Says what is wrong with a folder's buffers, stacked over layers and among the other arrays; None: nothing."""
        return None

    def __post_init__(self):
        require_known(self)
        name, heads = self.query_heads
        require(heads > 0, f"{name}={heads} must be positive: set it to a multiple of num_kv_heads")
        require_positive(self, "num_kv_heads")
        require(
            heads % self.num_kv_heads == 0,
            f"{name}={heads} is not a multiple of num_kv_heads={self.num_kv_heads}: every KV group needs the same "
            f"number of query heads; change either",
        )
        without = {"head_dim": "d_model / query heads", "rope_theta": "no rotary embedding", "softcap": "no cap",
                   "window": "all tokens before"}  # fmt: skip
        for field, meaning in without.items():
            value = getattr(self, field)
            require(
                value is None or value > 0,
                f"{field}={value} must be positive: set {field} to {least(value)}, or to None for {meaning}",
            )
        require(
            self.implementation is None or self.implementation in IMPLEMENTATIONS,
            f"implementation={self.implementation!r} is unknown: use one of {', '.join(map(repr, IMPLEMENTATIONS))}, "
            f"or None to choose by platform",
        )
        name, dim = self.rotary_dim
        require(
            self.rope_theta is None or dim is None or dim % 2 == 0,
            f"{name}={dim} is odd, but rotary embedding (rope_theta={self.rope_theta}) turns pairs of "
            f"dimensions: make {name} even, or set rope_theta=None",
        )
        require(
            self.rope_scaling.kind != "dynamic" or dim is None or dim > 2,
            f"{name}={dim} leaves rope_scaling.kind='dynamic' no frequency to stretch (its exponent is "
            f"D / (D - 2)): raise {name}, or choose another rope_scaling.kind",
        )
        require(
            self.rope_scaling.kind == "none" or self.rope_theta is not None,
            f"rope_scaling.kind={self.rope_scaling.kind!r} has nothing to scale, since rope_theta=None switches rotary "
            f"embedding off: set rope_theta, or rope_scaling.kind='none'",
        )

    def resolve(self, d_model: int) -> typing.Self:
        """Returns the same config with `head_dim` filled in for a model of width `d_model`."""
        if self.head_dim is not None:
            return self
        name, heads = self.query_heads
        require(
            d_model % heads == 0,
            f"head_dim=None means d_model / {name}, but {d_model} / {heads} is no integer: set head_dim",
        )
        return dataclasses.replace(self, head_dim=d_model // heads)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Configures a pre-norm decoder (RMSNorm, SwiGLU), compatible with Llama in every dense detail."""

    vocab_size: int = 259  # V; a tokenizer may have fewer tokens, never more
    d_model: int = 1024  # d, width of the residual stream
    num_layers: int = 24  # L, blocks of attention and SwiGLU
    d_ff: int = 2816  # hidden width of SwiGLU
    context: int = 2048  # longest sequence, in tokens: rows of training data, cache of generation
    tie_embeddings: bool = True  # the embedding is the output matrix too
    norm_eps: float = 1e-6  # added to the mean square under the root of the blocks' and the last RMS norm
    init_std: float = 0.02  # of every weight; the two projections into the residual stream: / sqrt(2 num_layers)
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the computation
    param_dtype: Literal["float32", "bfloat16"] = "float32"  # of the parameters, in which the optimizer updates them
    remat: Literal["none", "attention", "dots", "full"] = "none"  # what is kept for the backward pass: `remat.POLICIES`
    attention: AttentionConfig  # fields below, by its kind

    def __post_init__(self):
        require_known(self)
        require_positive(self, "vocab_size", "d_model", "num_layers", "d_ff", "context")
        object.__setattr__(self, "attention", self.attention.resolve(self.d_model))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Names the prepared rows to train on (`gqe prepare`), and says how they are read."""

    path: str | None = None  # a prepared directory (gs:// too); None: the text of Python's own standard library
    mixture: str | None = None  # several instead: "DIR:WEIGHT,DIR:WEIGHT", weights as shares of the rows
    tokenizer: str = "bytes"  # of the default corpus; a prepared directory brings its own
    batch_size: int = 512  # rows of the global batch
    seed: int = 0  # of the order of rows
    workers: int = 0  # processes that read rows; 0: threads of this one
    verify: bool = True  # compare every shard with its hash before the first step
    skip_damaged: bool = False  # leave damaged shards out, with a warning, rather than stop

    def __post_init__(self):
        require_positive(self, "batch_size")
        require_seed(self, "data")
        require(self.workers >= 0, f"data.workers={self.workers} must not be negative: set it to 0 or more")
        require(
            self.path is None or self.mixture is None,
            f"data.path={self.path!r} and data.mixture={self.mixture!r} exclude each other: set one of them",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Configures AdamW with a learning-rate schedule and gradient clipping (`train/optimizer.py`)."""

    learning_rate: float = 5e-4  # peak
    min_learning_rate: float = 1e-5  # floor that the decay ends on
    schedule: Literal["wsd", "cosine"] = "wsd"  # warm-up, stable, decay; or warm-up and half a cosine
    warmup_steps: int = 100  # steps in which the learning rate rises from 0
    decay_steps: int = 100  # "wsd": length of the last, decaying part
    b1: float = 0.9  # decay of the running mean of gradients
    b2: float = 0.95  # decay of the running mean of squared gradients
    eps: float = 1e-7  # added to the root of the latter
    weight_decay: float = 0.1  # matrices only
    clip: Literal["zclip", "norm", "none"] = "zclip"  # how a gradient that is too long is shortened
    clip_norm: float = 1.0  # "norm": longest global gradient norm
    zclip_threshold: float = 2.5  # z-score above which a gradient counts as a spike
    zclip_decay: float = 0.97  # of the running mean and variance of the norm
    zclip_warmup_steps: int = 25  # steps that only observe

    def __post_init__(self):
        require_known(self)
        require_positive(self, "learning_rate", "eps", "clip_norm", "zclip_threshold", "zclip_warmup_steps")
        require_fraction(self, "b1", "b2", "zclip_decay")
        for name in ("warmup_steps", "decay_steps", "weight_decay", "min_learning_rate"):
            value = getattr(self, name)
            require(value >= 0, f"optimizer.{name}={value} must not be negative: set it to 0 or more")
        require(
            self.min_learning_rate <= self.learning_rate,
            f"min_learning_rate={self.min_learning_rate} exceeds learning_rate={self.learning_rate}: lower the floor",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Says how many devices each axis of the mesh has; -1, for one axis at most, means what the others leave."""

    data: int = -1  # splits the rows of a batch: each device has a copy of the model
    fsdp: int = 1  # splits the rows of a batch too, and with `context` also parameters and optimizer state
    expert: int = 1  # splits KV groups with their query experts, hidden width of the MLP, vocabulary
    context: int = 1  # splits the sequence (not to be confused with model.context, its length)

    def __post_init__(self):
        sizes = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name, size in sizes.items():
            require(
                size > 0 or size == -1,
                f"mesh.{name}={size} is no number of devices: set mesh.{name} to at least 1, or to -1 for what the "
                f"other axes leave",
            )
        left = [name for name, size in sizes.items() if size == -1]
        require(len(left) <= 1, f"mesh.{' and mesh.'.join(left)} are -1: only one axis can take what is left")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Says how long a run is, how often it logs, evaluates and saves, and what it records."""

    steps: int = 1000  # updates of the parameters in the whole run
    seed: int = 0  # of initialisation and of all randomness in the model
    accumulate: int = 1  # microbatches per step; router statistics and the balance loss are taken per microbatch
    loss_chunk: int = 512  # tokens of each row whose logits exist at one time
    log_every: int = 10  # steps between two progress lines
    eval_every: int = 250  # 0: only at the end
    eval_batches: int = 0  # of held-out text, in evaluations before the last one; 0: all
    checkpoint_every: int = 250  # steps between two checkpoints
    keep: int = 3  # newest checkpoints kept
    tensorboard: bool = False  # write the metrics as TensorBoard events into the run too
    wandb: bool = False  # log the metrics to Weights & Biases too
    compilation_cache: str | None = None  # directory (gs:// too) of compiled steps, for the next start of the same run
    profile_steps: str | None = None  # "10:13": steps 10 to 13 are traced into the run's profile/
    stall_seconds: float | None = None  # a longer step ends the process, as stuck; None: from the steps so far

    @property
    def profile_window(self) -> tuple[int, int] | None:
        """The first and the last step of `profile_steps`; None where nothing is traced."""
        if self.profile_steps is None:
            return None
        first, _, last = self.profile_steps.partition(":")
        return int(first), int(last)

    def __post_init__(self):
        require_positive(self, "steps", "accumulate", "loss_chunk", "log_every", "checkpoint_every", "keep")
        require_seed(self, "train")
        window = self.profile_steps and re.fullmatch(r"([1-9]\d*):([1-9]\d*)", self.profile_steps)
        require(
            self.profile_steps is None or (bool(window) and int(window[1]) <= int(window[2])),
            f"train.profile_steps={self.profile_steps!r} is no window of steps: write FIRST:LAST, counted from 1, such "
            f"as 10:13",
        )
        require(
            self.stall_seconds is None or self.stall_seconds > 0,
            f"train.stall_seconds={self.stall_seconds} must be positive: set it to well above the seconds of a step, "
            f"or to None to derive it from the steps so far",
        )
        for name in ("eval_every", "eval_batches"):
            value = getattr(self, name)
            require(value >= 0, f"train.{name}={value} must not be negative: set it to 0 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Holds the whole configuration of a run; it is saved beside the run's checkpoints."""

    name: str = "gqe"  # of the run, in plans and reports
    model: ModelConfig  # the decoder
    data: DataConfig = DataConfig()  # the rows
    optimizer: OptimizerConfig = OptimizerConfig()  # the updates
    mesh: MeshConfig = MeshConfig()  # the devices
    train: TrainConfig = TrainConfig()  # the length, the log and the checkpoints

    def __post_init__(self):
        steps, optimizer = self.train.steps, self.optimizer
        decay = optimizer.decay_steps if optimizer.schedule == "wsd" else 0
        require(
            optimizer.warmup_steps + decay <= steps,
            f"optimizer.warmup_steps={optimizer.warmup_steps} + decay_steps={decay} exceed train.steps={steps}: "
            f"shorten warm-up or decay, or train longer",
        )
        require(
            self.data.batch_size % self.train.accumulate == 0,
            f"data.batch_size={self.data.batch_size} is not a multiple of train.accumulate={self.train.accumulate}: "
            f"every microbatch needs the same number of rows; change either",
        )
