"""Defines what gqe_1b and gqe_8b share: the shape of Llama 3's models (arXiv 2407.21783), with routed query heads.

A step takes 4M tokens (1b: 2M) in rows of `context` tokens; the learning rate warms up, is stable, and decays over the
last fifth. `laptop` keeps head counts and schedule and shrinks everything else: bytes, four layers, minutes on a CPU.
"""

from gqe_jax.config_dict import defaults
from gqe_jax.config_overrides import parse_argument


def llama_config(name, argument, *, heads, top_k, context, tokens_per_step, tokens):
    """Makes the configuration of the model `name`; at full size the caller fills in width, depth and remat.

    Args:
      name: "gqe_..."; the dense twin gets the name "gqa_...".
      argument: what stands behind the colon on the command line: laptop, kind ("gqe" or "gqa"), context.
      heads: query heads, of which GQE's attend `top_k` in each of 8 groups, and one shared.
      context: tokens of a row, unless the argument says otherwise.
      tokens_per_step, tokens: tokens of the global batch, and of the whole run.

    Returns:
      (ConfigDict, whether it is the full size and not the laptop's).
    """
    arguments = parse_argument(argument, laptop=False, kind="gqe", context=context)
    dense = arguments.kind == "gqa"
    fields = {"num_query_heads": heads} if dense else {"num_query_experts": heads, "top_k": top_k}
    config = defaults(kind=arguments.kind, num_kv_heads=8, **fields)
    config.name = name.replace("gqe", arguments.kind)

    model, data, optimizer, train = config.model, config.data, config.optimizer, config.train
    if arguments.laptop:
        arguments.context, tokens_per_step, tokens = 256, 8 * 256, 200 * 8 * 256
    model.attention.head_dim = 16 if arguments.laptop else 128
    model.attention.rope_theta = 500_000.0
    model.norm_eps = 1e-5
    model.context = arguments.context
    data.batch_size = max(tokens_per_step // arguments.context, 1)
    train.steps = round(tokens / tokens_per_step)
    optimizer.warmup_steps = min(2000, train.steps // 10)
    optimizer.decay_steps = train.steps // 5

    if arguments.laptop:
        model.vocab_size = 259
        model.d_model = 128
        model.num_layers = 4
        model.d_ff = 384
        model.dtype = "float32"
        optimizer.learning_rate = 2e-3
        train.eval_every = 100
        train.checkpoint_every = 100
        return config, False

    model.vocab_size = 128_256
    model.dtype = "bfloat16"
    model.remat = "attention"
    config.mesh.fsdp = 16  # a ring of one dimension (v5e, v6e) or two (v5p): the rest is `data`; see docs/scaling.md
    train.eval_every = 1000
    train.eval_batches = 8
    train.checkpoint_every = 500
    return config, True
