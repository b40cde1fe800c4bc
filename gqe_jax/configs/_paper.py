"""Defines what the configurations of about 250M parameters share: the setting of arXiv 2606.20945, section 4.

They train on 30B tokens of GPT-2's BPE in rows of 2048 tokens, 512 rows (1.05M tokens) a step; the learning rate warms
up over 3B tokens, is stable, and decays over the last 6B.
`head_dim=128` is the form for TPUs, whose matrix units are 128 wide: half as many heads, twice as wide, the same H · D.
`laptop` keeps head counts and schedule and shrinks everything else: bytes, four layers, minutes on a CPU.
"""

from gqe_jax.config import ConfigError
from gqe_jax.config_dict import defaults
from gqe_jax.config_overrides import parse_argument

TOKENS_PER_STEP = 512 * 2048


def paper_config(name, argument, attention, **arguments):
    """Makes the configuration `name` for `argument`, the text behind the colon on the command line.

    Args:
      attention: function (arguments, H query heads, G KV groups) → fields of model.attention.
      **arguments: the names that the file understands beside laptop and head_dim, with their defaults.
    """
    arguments = parse_argument(argument, laptop=False, head_dim=64, **arguments)
    if 1024 % (2 * arguments.head_dim):
        raise ConfigError(f"head_dim={arguments.head_dim} does not divide 512, half of d_model: set it to 64 or 128")
    heads = 1024 // arguments.head_dim
    config = defaults(**{"num_kv_heads": heads // 2} | attention(arguments, heads, heads // 2))
    config.name = name

    model, data, optimizer, train = config.model, config.data, config.optimizer, config.train
    model.attention.head_dim = arguments.head_dim
    model.vocab_size = 50_304  # GPT-2's 50,257, rounded up to a multiple of 128
    model.d_model = 1024
    model.num_layers = 16
    model.d_ff = 3072
    model.context = 2048
    model.dtype = "bfloat16"
    model.remat = "dots"

    data.batch_size = 512

    optimizer.learning_rate = 5e-4
    optimizer.min_learning_rate = 1e-5
    optimizer.warmup_steps = round(3e9 / TOKENS_PER_STEP)
    optimizer.decay_steps = round(6e9 / TOKENS_PER_STEP)  # the last fifth

    train.steps = round(30e9 / TOKENS_PER_STEP)
    train.eval_every = 1000
    train.eval_batches = 8
    train.checkpoint_every = 500

    if arguments.laptop:
        model.attention.head_dim = 16
        model.vocab_size = 259
        model.d_model = 128
        model.num_layers = 4
        model.d_ff = 384
        model.context = 256
        model.dtype = "float32"
        model.remat = "none"
        data.batch_size = 8
        optimizer.learning_rate = 2e-3
        optimizer.warmup_steps = 20
        optimizer.decay_steps = 40
        train.steps = 200
        train.eval_every = 100
        train.checkpoint_every = 100
    return config
