"""Grouped Query Experts (arXiv 2606.20945) for Hugging Face's transformers, 4.57 or newer.

In each KV group g a router picks k of M query heads per token, e_1 … e_k, by p = softmax(x W_r); a head s is shared:

    o[g, j] = Attention(q[g, e_j], K_g, V_g)
    ō       = Σ_{g,j} w[g, j] · o[g, j],   w = p[g, e_j] / Σ of all selected p
    s       = Attention(q_s, mean_g K_g, mean_g V_g)
    y       = concat(o[1,1], …, o[G,k], ō, s) W_o

Keys, values and so the cache are those of grouped-query attention; queries that no one selected cost no attention.

In shapes and einsums: B batch, S query position, T key position, d width, G KV group, M expert, K selected slot, D head
dimension.
"""

import inspect
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple

from .configuration_gqe import GQEConfig

# What changed between transformers 4.57 and 5.24: the cache's name, and the arguments of the functions that make masks.
MASK_ARGUMENTS = inspect.signature(create_causal_mask).parameters
CACHE = "cache" if "cache" in MASK_ARGUMENTS else "past_key_values"
MASK_VALUES = {"config", "attention_mask", "inputs_embeds", "input_embeds", "position_ids", "cache_position", CACHE}
if any(value.default is value.empty for name, value in MASK_ARGUMENTS.items() if name not in MASK_VALUES | {"kwargs"}):
    raise ImportError(
        "this transformers' create_causal_mask wants arguments that modeling_gqe.py does not know: use a version from "
        f"4.57 to 5.24 (arguments: {', '.join(MASK_ARGUMENTS)})"
    )
# What other keywords `forward` hands on: to the attention's implementation, and to the loss.
ATTENTION_KEYWORDS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
LOSS_KEYWORDS = {"num_items_in_batch", "ignore_index", "shift_labels"}


@dataclass
class GQEModelOutput(MoeModelOutputWithPast):
    """Per layer: `router_logits` float32 [B, S, G, M]; `expert_index` int64 [B, S, G, K], by descending probability."""

    expert_index: tuple[torch.Tensor, ...] | None = None


@dataclass
class GQECausalLMOutput(MoeCausalLMOutputWithPast):
    """`aux_loss`: load-balance loss and z-loss, each times its coefficient, summed over layers."""

    expert_index: tuple[torch.Tensor, ...] | None = None


class GQERMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x², last axis) + eps) · weight, in float32, returned in x's dtype."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)


def rotary_tables(positions: torch.Tensor, config: GQEConfig) -> tuple[torch.Tensor, torch.Tensor] | None:
    """cos and sin of position · frequency, float32 [B or 1, S, D/2]; None without rotary embedding.

    Computed at every call and kept nowhere: a buffer that is not saved is left uninitialised by `from_pretrained`.
    """
    if config.rope_theta is None:
        return None
    rope, dim, theta = config.rope_parameters, config.rotary_dim, config.rope_theta
    kind, factor = rope["rope_type"], rope.get("factor")
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim
    frequency = theta**-exponent
    amplitude = 1.0
    if kind == "linear":
        frequency = frequency / factor
    elif kind == "dynamic":  # of each row: no row depends on another
        length = (positions.amax(-1, keepdim=True)[..., None] + 1).clamp(min=original)
        stretch = factor * length / original - (factor - 1)
        frequency = (theta * stretch ** (dim / (dim - 2))) ** -exponent
    elif kind == "llama3":
        rotations = original * frequency / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((rotations - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (keep + (1 - keep) / factor)
    elif kind == "yarn":
        low, high = (
            dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))
            for rotations in (rope.get("beta_fast") or 32.0, rope.get("beta_slow") or 1.0)
        )
        low, high = max(math.floor(low), 0), min(math.ceil(high), dim - 1)
        pair = torch.arange(dim // 2, dtype=torch.float32, device=positions.device)
        keep = 1 - ((pair - low) / max(high - low, 1e-3)).clamp(0, 1)
        frequency = frequency * (keep + (1 - keep) / factor)
        amplitude = rope.get("attention_factor") or 0.1 * math.log(factor) + 1.0
    angle = positions[..., None].float() * frequency
    return angle.cos() * amplitude, angle.sin() * amplitude


def rotate(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
    """Rotates the pairs (i, i + D/2) of x [B, S, H, D] by the tables, in float32, returned in x's dtype."""
    if rotary is None:
        return x
    cos, sin = (table[:, :, None] for table in rotary)
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class GQERouter(nn.Linear):
    """x W_r in float32, whatever the dtype of the weights and of an autocast around it: [B, S, d] → [B, S, G·M]."""

    def __init__(self, config: GQEConfig):
        super().__init__(config.hidden_size, config.num_attention_heads, bias=False)
        if config.router_bias:
            self.register_buffer("bias_correction", torch.zeros(config.num_attention_heads))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float())


def top_experts(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Indices of the k largest of the last axis, by descending score; equal scores resolve to the lower index."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def hashed_scores(positions: torch.Tensor, seed: int, layer: int, groups: int, experts: int) -> torch.Tensor:
    """Integers [B or 1, S, G, M] whose order is a uniform draw: a function of seed, layer and position alone, so that
    decoding repeats what a full pass chose. The draws are those of the JAX implementation."""
    column = torch.arange(groups * experts, device=positions.device).view(groups, experts)
    start = _mix(_mix(seed) + layer)
    return _mix(_mix(start + positions[..., None, None]) + column) >> 8


def _mix(bits):
    """The finalizer of MurmurHash3 on 32 bits, for an int or an int64 tensor."""
    bits = bits & 0xFFFFFFFF
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return bits ^ (bits >> 16)


def eager_attention(module, query, key, value, attention_mask, scaling: float, softcap: float | None = None, **kwargs):
    """Follows transformers' interface: query [B, H, S, D], key and value [B, G, T, D] → ([B, S, H, D], None)."""
    query = query.unflatten(1, (key.shape[1], -1))
    scores = query @ key[:, :, None].transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:  # additive, [B, 1, S, T]
        scores = scores + attention_mask[:, :, None, :, : key.shape[2]]
    probs = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    return (probs @ value[:, :, None]).flatten(1, 2).transpose(1, 2).contiguous(), None


class GQEHeads(nn.Module):
    """softmax(q Kᵀ / √width) V for `queries_per_kv` query heads on each KV head, by the chosen implementation."""

    def __init__(self, config: GQEConfig, queries_per_kv: int, width: int):
        super().__init__()
        self.config = config
        self.scaling = width**-0.5
        self.num_key_value_groups = queries_per_kv  # read, like is_causal, by transformers' implementations
        self.is_causal = True

    def forward(self, q, k, v, attention_mask, **kwargs) -> torch.Tensor:
        """q [B, S, H, width], k [B, G, T, width] and v [B, G, T, D] → [B, S, H, D]."""
        name, softcap = self.config._attn_implementation, self.config.attn_logit_softcapping
        if name == "sdpa" and softcap is not None:
            use = "use 'eager' or 'flash_attention_2'"
            raise ValueError(f"attn_implementation='sdpa' cannot cap scores (attn_logit_softcapping={softcap}): {use}")
        attend = eager_attention if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        kwargs |= {"scaling": self.scaling, "sliding_window": self.config.sliding_window}
        return attend(self, q.transpose(1, 2), k, v, attention_mask, softcap=softcap, **kwargs)[0]


class GQEAttention(nn.Module):
    """Causal self-attention of Grouped Query Experts, or dense, also in unequal groups (`attention_kind`)."""

    def __init__(self, config: GQEConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        width, dim, bias = config.hidden_size, config.head_dim, config.attention_bias
        heads, groups, experts = config.num_attention_heads, config.num_key_value_heads, config.experts_per_group
        self.routed = config.attention_kind == "gqe"
        self.mixed = self.routed and config.variant == "gqe"
        self.slots = config.router_top_k if self.routed else experts
        self.q_proj = nn.Linear(width, heads * dim, bias=bias)
        self.k_proj = nn.Linear(width, groups * dim, bias=bias)
        self.v_proj = nn.Linear(width, groups * dim, bias=bias)
        self.o_proj = nn.Linear((groups * self.slots + 2 * self.mixed) * dim, width, bias=bias)
        if config.qk_norm:
            self.q_norm = GQERMSNorm(dim, config.qk_norm_eps)
            self.k_norm = GQERMSNorm(dim, config.qk_norm_eps)
        self.key_driven = config.attention_kind == "key_driven"
        self.heads = GQEHeads(config, 1 if self.key_driven else self.slots, dim)
        if self.key_driven:  # the last two are read where training goes on
            self.register_buffer("heads_per_kv", torch.full((groups,), float(experts)))
            self.register_buffer("key_norm", torch.zeros(groups))
            self.register_buffer("allocation_steps", torch.zeros(1))
        if self.routed:
            self.router = GQERouter(config)
            self.router.weight.requires_grad_(config.router_kind == "learned")
        if config.attention_kind == "asym_gqa":  # 1 where a place of a padded group holds a head
            self.register_buffer("head_mask", torch.ones(groups, experts))
        if self.mixed:
            self.q_shared = nn.Linear(width, dim, bias=bias)
            self.shared_head = GQEHeads(config, 1, dim)

    def forward(
        self, x, *, positions, rotary, attention_mask, cache_position, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """x [B, S, d] → y [B, S, d], and of GQE router logits [B, S, G, M] and selected experts [B, S, G, K]."""
        batch, length, _ = x.shape
        cache = kwargs.pop(CACHE)
        config, dim = self.config, self.config.head_dim
        groups, experts = config.num_key_value_heads, config.experts_per_group

        q = self.q_proj(x).view(batch, length, groups, experts, dim)
        logits = index = None
        if self.routed:
            logits, index, probs = self._route(x, positions)
            q = q.gather(3, index[..., None].expand(-1, -1, -1, -1, dim))
        q = self._finish(q.flatten(2, 3), "q_norm", rotary)
        k = self._finish(self.k_proj(x).view(batch, length, groups, dim), "k_norm", rotary).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, groups, dim).transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx, {"cache_position": cache_position})
        if self.key_driven:
            ends = self.heads_per_kv.long().cumsum(0)
            kv_head = torch.searchsorted(ends, torch.arange(groups * experts, device=ends.device), right=True)
            k, v = k[:, kv_head], v[:, kv_head]

        o = self.heads(q, k, v, attention_mask, **kwargs).view(batch, length, groups, self.slots, dim)
        if self.routed and config.variant == "weighted_concat":
            o = (o * probs[..., None]).to(o.dtype)
        if config.attention_kind == "asym_gqa":
            o = o.masked_fill(self.head_mask[..., None] == 0, 0)
        if self.key_driven and config.perturb and self.training:
            noise, sample = torch.rand_like(o, dtype=torch.float32), o.float()
            deviation = (sample.var(-1, keepdim=True) + 1e-12).sqrt()
            noise = (noise - noise.mean(-1, keepdim=True)) / noise.std(-1, keepdim=True)
            o = (sample - noise * deviation - sample.mean(-1, keepdim=True)).to(o.dtype)
        slots = o.flatten(2)
        if self.mixed:
            weights = probs / probs.sum((-2, -1), keepdim=True).clamp(min=1e-9)
            mixed = (o * weights[..., None]).sum((2, 3)).to(o.dtype)
            mean_k, mean_v = (t.mean(1, keepdim=True, dtype=torch.float32).to(t.dtype) for t in (k, v))
            q_shared = self._finish(self.q_shared(x)[:, :, None], "q_norm", rotary)
            shared = self.shared_head(q_shared, mean_k, mean_v, attention_mask, **kwargs)
            slots = torch.cat([slots, mixed, shared.flatten(2)], dim=-1)
        return self.o_proj(slots), logits, index

    def _finish(self, x, norm: str, rotary) -> torch.Tensor:
        """Norm, then rotary embedding, of heads [B, S, H, D]."""
        return rotate(getattr(self, norm)(x) if self.config.qk_norm else x, rotary)

    def _route(self, x, positions) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Router logits [B, S, G, M]; selected experts [B, S, G, K] by descending probability; their probabilities."""
        config = self.config
        shape = (*x.shape[:2], config.num_key_value_heads, config.experts_per_group)
        if self.training and config.router_jitter:
            x = x.float() * (1 + config.router_jitter * (2 * torch.rand_like(x, dtype=torch.float32) - 1))
        learned = config.router_kind == "learned"
        logits = self.router(x).view(shape) if learned else torch.zeros(shape, device=x.device)
        probs = logits.softmax(dim=-1, dtype=torch.float32)

        selection = probs
        if config.router_kind == "random" and self.training:
            selection = torch.rand(shape, device=x.device)
        elif config.router_kind == "random":
            selection = hashed_scores(positions, config.router_seed, self.layer_idx, *shape[2:]).expand(shape)
        elif config.router_bias:
            router = getattr(self.router, "base_layer", self.router)  # under PEFT, a wrapper stands in its place
            selection = probs + router.bias_correction.float().view(shape[2:])
        index = top_experts(selection, config.router_top_k)
        if selection is not probs:  # selected by another score, but ordered by probability
            index = index.sort(dim=-1).values
            index = index.gather(-1, top_experts(probs.gather(-1, index), config.router_top_k))
        return logits, index, probs.gather(-1, index)


class GQELatentAttention(nn.Module):
    """Causal multi-head latent attention: keys and values are formed from a latent c and a rotated key k_r, the cache.

    score_h = (q_h · c W_kup,g + q_r,h · k_r) / √(D + R),  o_h = Σ p c W_vup,g, where g is the group of head h.
    """

    def __init__(self, config: GQEConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        width, dim, bias = config.hidden_size, config.head_dim, config.attention_bias
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        rank, rope_dim = config.kv_lora_rank, config.qk_rope_head_dim
        self.q_proj = nn.Linear(width, heads * (dim + rope_dim), bias=bias)
        self.kv_down = nn.Linear(width, rank, bias=bias)
        self.k_rope = nn.Linear(width, rope_dim, bias=bias)
        self.k_up = nn.Linear(rank, groups * dim, bias=False)
        self.v_up = nn.Linear(rank, groups * dim, bias=False)
        self.o_proj = nn.Linear(heads * dim, width, bias=bias)
        if config.latent_norm:
            self.latent_norm = GQERMSNorm(rank, 1e-6)
        self.heads = GQEHeads(config, heads // groups, dim + rope_dim)

    def forward(self, x, *, rotary, attention_mask, cache_position, positions, **kwargs):
        """x [B, S, d] → y [B, S, d], and None in the places of router logits and selected experts."""
        batch, length, _ = x.shape
        cache, config, dim = kwargs.pop(CACHE), self.config, self.config.head_dim
        if rotary is not None:
            rotary = tuple(table.repeat_interleave(config.rope_repeats, dim=-1) for table in rotary)
        q = self.q_proj(x).view(batch, length, -1, dim + config.qk_rope_head_dim)
        q = torch.cat([q[..., :dim], rotate(q[..., dim:], rotary)], dim=-1)
        c = self.kv_down(x)
        if config.latent_norm:
            c = self.latent_norm(c)
        c, k_rope = c[:, None], rotate(self.k_rope(x)[:, :, None], rotary).transpose(1, 2)
        if cache is not None:
            c, k_rope = cache.update(c, k_rope, self.layer_idx, {"cache_position": cache_position})
        k, v = (up(c[:, 0]).unflatten(-1, (-1, dim)).transpose(1, 2) for up in (self.k_up, self.v_up))
        k = torch.cat([k, k_rope.expand(-1, k.shape[1], -1, -1)], dim=-1)
        return self.o_proj(self.heads(q, k, v, attention_mask, **kwargs).flatten(2)), None, None


class GQEMLP(nn.Module):
    """SwiGLU: (silu(x W_gate) ⊙ x W_up) W_down."""

    def __init__(self, config: GQEConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class GQEDecoderLayer(GradientCheckpointingLayer):
    """x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, config: GQEConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = GQERMSNorm(config.hidden_size, config.rms_norm_eps)
        attention = GQELatentAttention if config.attention_kind == "mla" else GQEAttention
        self.self_attn = attention(config, layer_idx)
        self.post_attention_layernorm = GQERMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GQEMLP(config)

    def forward(self, x: torch.Tensor, **kwargs):
        """Returns what `GQEAttention` does. No nested tuple: reentrant checkpointing would lose gradients in one."""
        y, *routing = self.self_attn(self.input_layernorm(x), **kwargs)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), *routing


class GQEPreTrainedModel(PreTrainedModel):
    config_class = GQEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GQEDecoderLayer"]
    _skip_keys_device_placement = [CACHE]
    _keep_in_fp32_modules_strict = ["router"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: GQEConfig):
        super().__init__(config)
        if config.attention_kind != "gqe":
            self._keep_in_fp32_modules_strict = None  # transformers 4 wants each named module to be there
        if config.attn_logit_softcapping is not None and config._attn_implementation == "sdpa":
            config._attn_implementation = "eager"

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:  # else transformers guesses from the text of this file
        return True


class GQEModel(GQEPreTrainedModel):
    """The decoder without its output layer."""

    def __init__(self, config: GQEConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(GQEDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = GQERMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
        use_cache=None, output_attentions=None, output_hidden_states=None, output_router_logits=None, cache=None,
        **kwargs,
    ) -> GQEModelOutput:  # fmt: skip
        """Arguments as everywhere in transformers; without `position_ids`, positions count the tokens of the mask.

        `past_key_values` and `cache` are two names of one argument: transformers before and from 5.24.

        Raises:
          TypeError: a keyword that is unknown here.
          ValueError: `output_attentions`, not exactly one of `input_ids` and `inputs_embeds`, or two caches.
        """
        config = self.config
        cache_position = kwargs.pop("cache_position", None)  # transformers 4 passes it
        _refuse_unknown(kwargs, ATTENTION_KEYWORDS)
        cache = _either(past_key_values, cache)
        if config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError(
                "output_attentions=True is refused: each token attends with heads of its own choice, so there is no "
                "[heads, S, T] array to return; output_router_logits=True returns which heads attended (expert_index)"
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        output_hidden_states = _default(output_hidden_states, config.output_hidden_states)
        output_router_logits = _default(output_router_logits, config.output_router_logits)
        use_cache = _default(use_cache, config.use_cache) and not (self.gradient_checkpointing and self.training)

        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        length = x.shape[1]
        if use_cache and cache is None:
            cache = DynamicCache(config=config)
        if cache_position is None:
            seen = 0 if cache is None else cache.get_seq_length()
            cache_position = torch.arange(length, device=x.device) + seen
        if position_ids is None:
            position_ids = cache_position[None]
            if attention_mask is not None and attention_mask.ndim == 2:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]

        make_mask = create_causal_mask if config.sliding_window is None else create_sliding_window_causal_mask
        shared = {CACHE: cache, "cache_position": cache_position}
        mask_arguments = {"inputs_embeds": x, "input_embeds": x, "position_ids": position_ids, **shared}
        mask_arguments = {name: value for name, value in mask_arguments.items() if name in MASK_ARGUMENTS}
        mask = make_mask(config=config, attention_mask=attention_mask, **mask_arguments)
        rotary = rotary_tables(position_ids, config)
        hidden_states, routings = (x,), ()
        for layer in self.layers:
            x, *routing = layer(x, positions=position_ids, rotary=rotary, attention_mask=mask, **shared, **kwargs)
            if output_hidden_states:
                hidden_states += (x,)
            if output_router_logits and config.attention_kind == "gqe":
                routings += (routing,)
        x = self.norm(x)
        router_logits, expert_index = zip(*routings, strict=True) if routings else (None, None)
        return GQEModelOutput(
            last_hidden_state=x,
            **{CACHE: cache},
            hidden_states=(*hidden_states[:-1], x) if output_hidden_states else None,
            router_logits=router_logits,
            expert_index=expert_index,
        )


class GQEForCausalLM(GQEPreTrainedModel, GenerationMixin):
    """The language model.

    With `labels`, a model in training mode returns `loss` = LM + `aux_loss`; in evaluation mode `loss` is the LM loss
    alone, so that its exponential is the perplexity.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: GQEConfig):
        super().__init__(config)
        self.model = GQEModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
        labels=None, use_cache=None, output_router_logits=None, logits_to_keep=0, cache=None, **kwargs,
    ) -> GQECausalLMOutput:  # fmt: skip
        """Arguments as everywhere in transformers; `logits_to_keep` is a number of last positions, or their indices.

        Raises: as `GQEModel.forward`.
        """
        for_loss = {name: kwargs.pop(name) for name in LOSS_KEYWORDS & kwargs.keys()}
        output_router_logits = _default(output_router_logits, self.config.output_router_logits)
        outputs = self.model(
            input_ids, attention_mask, position_ids, _either(past_key_values, cache), inputs_embeds, use_cache,
            output_router_logits=output_router_logits or labels is not None, **kwargs,
        )  # fmt: skip
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])

        loss = aux_loss = None
        if outputs.router_logits is not None:
            aux_loss = self._aux_loss(outputs, attention_mask).to(logits.device)
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **for_loss)
        if labels is not None and aux_loss is not None and self.training:
            whole = for_loss.get("num_items_in_batch")  # given: this is a microbatch, and the parts' losses are added
            loss = loss + (aux_loss if whole is None else aux_loss * (labels[..., 1:] != -100).sum() / whole)
        return GQECausalLMOutput(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            **{CACHE: getattr(outputs, CACHE)},
            hidden_states=outputs.hidden_states,
            router_logits=outputs.router_logits if output_router_logits else None,
            expert_index=outputs.expert_index if output_router_logits else None,
        )

    def _aux_loss(self, outputs: GQEModelOutput, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Load balance is M Σ_m f[g,m] · P[g,m], averaged over groups; f and P are means over the real tokens."""
        first = outputs.router_logits[0]
        real = torch.ones(first.shape[:2], device=first.device)
        if attention_mask is not None and attention_mask.ndim == 2:
            real = attention_mask[:, -first.shape[1] :].to(real)
        real = real / real.sum().clamp(min=1)
        total = torch.zeros((), device=first.device)
        for logits, index in zip(outputs.router_logits, outputs.expert_index, strict=True):
            weights = real.to(logits.device)[..., None, None]
            experts = logits.shape[-1]
            load = (F.one_hot(index, experts).sum(-2) * weights).sum((0, 1))
            mean_prob = (logits.softmax(-1) * weights).sum((0, 1))
            balance = experts * (load * mean_prob).sum(-1).mean()
            z_loss = (logits.logsumexp(-1, keepdim=True).square() * weights).sum((0, 1)).mean()
            loss = self.config.router_aux_loss_coef * balance + self.config.router_z_loss_coef * z_loss
            total = total + loss.to(total.device)
        return total


def _default(value: bool | None, default: bool) -> bool:
    return default if value is None else value


def _either(past_key_values, cache):
    """Returns the one of the two arguments that is given."""
    if past_key_values is not None and cache is not None:
        raise ValueError("give one of past_key_values and cache: they are two names of one argument")
    return past_key_values if cache is None else cache


def _refuse_unknown(kwargs, known: set[str]) -> None:
    """Refuses keywords that nothing reads, from a newer transformers say: ignored, they would change the result."""
    unknown = sorted(kwargs.keys() - known)
    if unknown:
        raise TypeError(f"forward() does not know the keyword {', '.join(unknown)}: leave it out")
