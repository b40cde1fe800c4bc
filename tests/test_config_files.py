"""Config files by path and by name, their arguments, and overrides."""

import pytest

from gqe_jax.config import ConfigError
from gqe_jax.config_files import load_config, shipped_configs
from gqe_jax.config_overrides import parse_argument

FILE = '''
from gqe_jax.config_dict import defaults

def get_config(argument=None):
    config = defaults(num_query_experts=4, num_kv_heads=2)
    config.model.d_model = 32
    config.name = argument or "plain"
    return config
'''


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


def test_by_path_by_name_and_with_an_argument(file):
    """A path, the name of one that comes with the package, and what stands behind the colon."""
    assert load_config(str(file)).name == "plain"
    assert load_config(f"{file}:dense").name == "dense"
    assert load_config("smoke").name == "smoke_gqe" and "smoke" in shipped_configs()
    assert load_config("smoke:steps=50").train.steps == 50


def test_overrides(file):
    """Values are read as Python literals and as the field's type: an int for a float, None, words."""
    config = load_config(str(file), [
        "name=7",
        "model.attention.window=16",
        "model.attention.softcap=5",
        "model.attention.rope_theta=None",
        "model.attention.variant='hard_concat'",
        "optimizer.learning_rate=1e-3",
        "optimizer.clip=none",
        "train.tensorboard=true",
        "train.steps=2_000",
        "data.path=some/where",
    ])  # fmt: skip
    attention = config.model.attention
    assert (attention.window, attention.softcap, attention.rope_theta) == (16, 5.0, None)
    assert attention.variant == "hard_concat" and config.name == "7" and config.data.path == "some/where"
    assert (config.optimizer.learning_rate, config.optimizer.clip) == (1e-3, "none")
    assert config.train.tensorboard is True and config.train.steps == 2000
    assert load_config(str(file), ["data.path=None"]).data.path is None


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.step=3", "unknown config key 'train.step': did you mean 'steps'?"),
        ("trian.steps=3", "unknown config key 'trian': did you mean 'train'?"),
        ("xyzzy=3", "unknown config key 'xyzzy': known: data, mesh, model, name, optimizer, train"),
        ("train.steps.more=3", "config key 'train.steps' is no group of keys: drop what follows it"),
        ("train=3", "config key 'train' is a group: set one of "),
        ("train.steps", "--config.train.steps has no value: write --config.train.steps=VALUE"),
        ("train.steps=many", "train.steps='many' must be of type int: correct the value"),
        ("train.steps=1.5", "train.steps='1.5' must be of type int"),
        ("train.steps=", "train.steps='' must be of type int"),
        ("train.wandb=yes", "train.wandb='yes' must be of type bool"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate='fast' must be a finite number: correct the value"),
        ("optimizer.learning_rate=nan", "optimizer.learning_rate='nan' must be a finite number: correct the value"),
        ("optimizer.learning_rate=1e999", "optimizer.learning_rate=inf must be a finite number: correct the value"),
        ("model.attention.window=wide", "model.attention.window='wide' must be of type int"),
        ("=3", "unknown config key ''"),
        ("train..steps=3", "unknown config key 'train.'"),
    ],
)
def test_wrong_overrides(file, override, message):
    """Each says the key, the value as typed and what would do."""
    with pytest.raises(ConfigError) as error:
        load_config(str(file), [override])
    assert message in str(error.value)


@pytest.mark.parametrize(
    "content, message",
    [
        ("def get_config(:\n", r"mine.py, line 1: "),
        ("import no_such_module\n", "mine.py, line 1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("\nx = 1\n", "mine.py defines no get_config(arg=None): add it, returning a ConfigDict"),
        ("def get_config(argument=None):\n    pass\n", "returned NoneType: start from gqe_jax.config_dict.defaults()"),
        ("def get_config(argument=None):\n    return 1 / 0\n", "mine.py, line 2: ZeroDivisionError: division by zero"),
        ("def get_config():\n    pass\n", "mine.py: TypeError: get_config() takes 0 positional arguments but"),
        (FILE.replace("config.model.d_model = 32", "config.model.d_modle = 32"), "key 'model.d_modle': did you mean"),
        (FILE.replace("config.model.d_model = 32", "config.model.d_modle += 32"), "mine.py, line 6: AttributeError: "),
    ],
)
def test_wrong_files(file, content, message):
    """A config file is input: what is wrong with it comes with its line, not with our frames."""
    file.write_text(content)
    with pytest.raises(ConfigError) as error:
        load_config(str(file))
    assert message in str(error.value)


def test_no_such_file(tmp_path):
    """The nearest shipped name where there is one, else all of them."""
    with pytest.raises(ConfigError, match=r"--config=smok: no such file, nor a config that .*; did you mean 'smoke'"):
        load_config("smok")
    with pytest.raises(ConfigError, match=r"no such file.*known: .*smoke"):
        load_config(str(tmp_path / "none.py"))
    (tmp_path / "text.txt").write_text(FILE)
    with pytest.raises(ConfigError, match=r"is no Python file: name a \.py file"):
        load_config(str(tmp_path / "text.txt"))


def test_arguments_of_config_files():
    """Names with values, and a name alone for True; anything else is refused."""
    arguments = parse_argument("laptop,steps=20", laptop=False, steps=10, kind="gqe")
    assert (arguments.laptop, arguments.steps, arguments.kind) == (True, 20, "gqe")
    assert parse_argument(None, steps=10).steps == 10
    with pytest.raises(ConfigError, match="unknown config key 'stepz': did you mean 'steps'"):
        load_config("smoke:stepz=3")
    with pytest.raises(ConfigError, match="steps='many' must be of type int"):
        parse_argument("steps=many", steps=10)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("smoke:steps=-3", "steps=-3, behind the colon of --config, must be at least 1: raise steps"),
        ("smoke:steps=0", "steps=0, behind the colon of --config, must be at least 1: raise steps"),
        ("gqe_8b:context=0", "context=0, behind the colon of --config, must be at least 1: raise context"),
        ("gqa_250m:head_dim=0", "head_dim=0, behind the colon of --config, must be at least 1: raise head_dim"),
        ("gqe_250m:head_dim=2048", "head_dim=2048 does not divide 512, half of d_model: set it to 64 or 128"),
    ],
)
def test_arguments_are_checked_before_what_follows_from_them(spec, message):
    """The number that was typed is refused, not a field that the file computes from it."""
    with pytest.raises(ConfigError) as error:
        load_config(spec)
    assert str(error.value) == message


def test_arguments_that_may_be_zero():
    """Where the file's own value is 0, so may be the user's."""
    assert parse_argument("seed=0,shift=-1", seed=0, shift=0).shift == -1
