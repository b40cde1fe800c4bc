"""Configuration of a Grouped Query Experts language model (arXiv 2606.20945) for Hugging Face's transformers."""

from transformers import PretrainedConfig

ATTENTION_KINDS = ("gqe", "gqa", "asym_gqa", "key_driven", "mla")
VARIANTS = ("gqe", "hard_concat", "weighted_concat")
ROUTER_KINDS = ("learned", "fixed", "random")
ROPE_KEYS = {  # kind → what it needs beside itself
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}


class GQEConfig(PretrainedConfig):
    """A Llama-style decoder with Grouped Query Experts ("gqe"), latent ("mla") or dense attention (the other kinds).

    Keys that Llama has too mean what they mean there. The others, and those that differ:

    Args:
      attention_kind: "gqe"; "gqa" for dense attention by head counts (MHA, MQA, GQA, SQA); "asym_gqa" for dense
        attention in groups of unequal size, padded; "key_driven" for dense attention in which run g of the query heads,
        `heads_per_kv[g]` of them in the weights, reads KV head g; "mla" for latent attention. Training here does not
        move `heads_per_kv`.
      num_attention_heads: N, query-head experts of all groups; "gqa", "mla": query heads; "asym_gqa": places for them,
        of which `num_query_heads` are taken, as the layers' `head_mask` says.
      num_key_value_heads: G, KV heads, each with its group of N / G experts; "mla": those that a latent expands to.
      kv_lora_rank: r, numbers of the latent of "mla".
      qk_rope_head_dim: R, width of the rotated key of "mla" that all heads share.
      rope_repeats: how many neighbouring pairs of R turn with the same frequency.
      latent_norm: whether the latent has an RMS norm.
      router_top_k: k, experts that attend per token and group.
      head_dim: D; None is hidden_size / num_attention_heads.
      perturb: "key_driven": in training, subtract noise with the mean and deviation of each head's output.
      variant: "gqe", "hard_concat" (no mixed slot, no shared head) or "weighted_concat" (likewise; slots times p).
      router_kind: "learned", "fixed" (experts 0..k-1 always) or "random" (a uniform draw per token).
      router_seed: of the "random" router outside training.
      router_jitter: ε of the factor U(1 - ε, 1 + ε) on the router's input in training.
      router_bias: whether the routers hold `bias_correction`, added to the probabilities for the selection only.
      router_aux_loss_coef, router_z_loss_coef: of the load-balance loss and of the z-loss, each summed over layers.
      output_router_logits: whether forward returns `router_logits` and `expert_index` unless told otherwise.
      qk_norm, qk_norm_eps: RMS norm of each query and key head before the rotary embedding.
      rope_theta: base of the rotary embedding; None switches it off.
      rope_scaling: Llama's dictionary: `rope_type` ("linear", "dynamic", "llama3", "yarn") with its parameters.
      rope_parameters: the same with `rope_theta` in it, as transformers 5 writes it; goes before the two others.
      sliding_window: a token sees itself and the sliding_window - 1 tokens before it; None: all before it.
      attn_logit_softcapping: scores become c · tanh(scores / c); None: off. The sdpa implementation cannot do it.

    Raises:
      ValueError: a value that is unknown or does not fit another.
    """

    model_type = "gqe"
    # What Trainer.evaluate leaves out of the predictions; it adds a list to this, so a tuple fails.
    keys_to_ignore_at_inference = ["past_key_values", "cache", "aux_loss"]  # noqa: RUF012

    def __init__(
        self,
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=None,
        attention_kind="gqe",
        perturb=False,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        rope_repeats=1,
        latent_norm=False,
        router_top_k=1,
        variant="gqe",
        router_kind="learned",
        router_seed=0,
        router_jitter=0.0,
        router_bias=False,
        router_aux_loss_coef=0.01,
        router_z_loss_coef=0.0,
        output_router_logits=False,
        qk_norm=False,
        qk_norm_eps=1e-6,
        attention_bias=False,
        sliding_window=None,
        attn_logit_softcapping=None,
        rope_theta=10000.0,
        rope_scaling=None,
        rope_parameters=None,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        hidden_act="silu",
        initializer_range=0.02,
        use_cache=True,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = hidden_size // num_attention_heads if head_dim is None else head_dim
        self.attention_kind = attention_kind
        self.perturb = perturb
        self.kv_lora_rank = kv_lora_rank
        self.qk_rope_head_dim = qk_rope_head_dim
        self.rope_repeats = rope_repeats
        self.latent_norm = latent_norm
        self.router_top_k = router_top_k
        self.variant = variant
        self.router_kind = router_kind
        self.router_seed = router_seed
        self.router_jitter = router_jitter
        self.router_bias = router_bias
        self.router_aux_loss_coef = router_aux_loss_coef
        self.router_z_loss_coef = router_z_loss_coef
        self.output_router_logits = output_router_logits
        self.qk_norm = qk_norm
        self.qk_norm_eps = qk_norm_eps
        self.attention_bias = attention_bias
        self.sliding_window = sliding_window
        self.attn_logit_softcapping = attn_logit_softcapping
        # One dictionary in all versions: transformers 5 makes `rope_scaling` another name of `rope_parameters`.
        rope = dict(rope_parameters or rope_scaling or {})
        self.rope_theta = rope.setdefault("rope_theta", rope_theta)
        rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type", "default")
        self.rope_parameters = rope
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.hidden_act = hidden_act
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self._check()
        super().__init__(
            tie_word_embeddings=tie_word_embeddings,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            **kwargs,
        )

    @property
    def experts_per_group(self):
        """M; of dense attention, the query heads of a KV head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def rotary_dim(self):
        """How many dimensions have a frequency table."""
        return self.qk_rope_head_dim // self.rope_repeats if self.attention_kind == "mla" else self.head_dim

    @property
    def ignore_keys_at_rope_validation(self):
        """Names a key for transformers 5, which does not know it in "dynamic"."""
        return {"original_max_position_embeddings"} if self.rope_parameters["rope_type"] == "dynamic" else set()

    def _check(self):
        heads, groups, kind = self.num_attention_heads, self.num_key_value_heads, self.rope_parameters["rope_type"]
        for name, known in (
            ("attention_kind", ATTENTION_KINDS),
            ("variant", VARIANTS),
            ("router_kind", ROUTER_KINDS),
            ("hidden_act", ("silu",)),
        ):
            value = getattr(self, name)
            _require(value in known, f"{name}={value!r} is unknown: use one of {', '.join(map(repr, known))}")
        _require(
            heads > 0 and groups > 0 and heads % groups == 0,
            f"num_attention_heads={heads} is not a multiple of num_key_value_heads={groups}: every KV head needs the "
            "same number of query heads; change either",
        )
        _require(
            self.attention_kind != "gqe" or 1 <= self.router_top_k <= heads // groups,
            f"router_top_k={self.router_top_k} must lie between 1 and the {heads // groups} experts of a group "
            f"(num_attention_heads={heads} / num_key_value_heads={groups}): lower it or raise num_attention_heads",
        )
        _require(
            kind in ROPE_KEYS,
            f"rope_type={kind!r} is not supported: use one of {', '.join(map(repr, ROPE_KEYS))}",
        )
        missing = [key for key in ROPE_KEYS[kind] if key not in self.rope_parameters]
        _require(not missing, f"rope_scaling lacks {', '.join(missing)}, which rope_type={kind!r} needs: add it")
        name = "qk_rope_head_dim / rope_repeats" if self.attention_kind == "mla" else "head_dim"
        _require(
            self.rope_theta is None or self.rotary_dim % 2 == 0,
            f"{name}={self.rotary_dim} is odd, but rotary embedding (rope_theta={self.rope_theta}) turns pairs of "
            f"dimensions: make {name} even, or set rope_theta to null",
        )


def _require(rule, message):
    if not rule:
        raise ValueError(message)
