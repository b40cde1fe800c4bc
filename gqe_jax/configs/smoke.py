"""A small GQE language model on bytes: a few minutes on a laptop's CPU.

  gqe train --config smoke --run runs/smoke                     the default corpus
  gqe train --config smoke:steps=3600 --run runs/smoke          longer (about an hour on two cores): continues the run,
                                                                whose learning rate then rises to its peak again
  gqe train --config smoke:kind=gqa --run runs/smoke_gqa        its dense twin: all four query heads attend
"""

from gqe_jax.config_dict import defaults
from gqe_jax.config_overrides import parse_argument


def get_config(argument=None):
    """Arguments: steps (of the run), kind ("gqe" or "gqa")."""
    arguments = parse_argument(argument, steps=300, kind="gqe")
    heads = {"num_query_heads": 4} if arguments.kind == "gqa" else {"num_query_experts": 4, "top_k": 1}
    config = defaults(kind=arguments.kind, num_kv_heads=2, head_dim=64, **heads)
    config.name = f"smoke_{arguments.kind}"

    model = config.model
    model.vocab_size = 259  # bytes
    model.d_model = 192
    model.num_layers = 4
    model.d_ff = 512
    model.context = 512
    model.dtype = "float32"  # CPUs have no fast bfloat16

    config.data.batch_size = 8  # rows: 4096 tokens a step

    optimizer = config.optimizer
    optimizer.learning_rate = 2e-3
    optimizer.min_learning_rate = 2e-5
    optimizer.warmup_steps = min(60, arguments.steps // 10)
    optimizer.decay_steps = arguments.steps // 4

    train = config.train
    train.steps = arguments.steps
    train.log_every = 20
    train.eval_every = 100
    train.eval_batches = 12
    train.checkpoint_every = 100
    return config
