"""Reads a study file, which is data (TOML), and checks every cell of the study before one is trained."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from gqe_jax.checked_json import LARGEST_COUNT, OBJECT, TEXT, TEXTS, Rule, check_record, is_whole, shown, unread_named
from gqe_jax.config import ConfigError, RunConfig, nearest
from gqe_jax.config_files import load_config
from gqe_jax.configs import shipped_studies

OWN = ("train.seed", "data.seed", "train.steps")
"""Fields that the study sets in every cell."""

_SEEDS: Rule = (
    lambda v: type(v) is list and len(v) >= 2 and len(set(map(str, v))) == len(v) and all(map(is_whole(0)[0], v)),
    "a list of at least two different whole numbers, as one seed gives no interval",
)
_RULES = {
    "reference": TEXT,
    "tokens": is_whole(1, LARGEST_COUNT),
    "seeds": _SEEDS,
    "overrides": TEXTS,
    "arms": OBJECT,
}
_REMEDY = "correct the study file"


@dataclasses.dataclass(frozen=True)
class Arm:
    """One setting that is compared with others: a configuration by name or path, and overrides ("a.b=value")."""

    config: str
    overrides: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Study:
    """What a study file says.

    Attributes:
      name: of the file; it marks the folder of the study's results.
      reference: the arm that all others are compared with.
      tokens: that each cell is trained on.
      seeds: of initialisation and order of rows: cell (arm, seed) has the rows of every other cell of that seed.
      arms: name → arm, in the file's order.
    """

    name: str
    reference: str
    tokens: int
    seeds: tuple[int, ...]
    arms: Mapping[str, Arm]

    def part(self, arms: Sequence[str] | None, seeds: Sequence[int] | None) -> Study:
        """Returns the study of some arms and seeds alone (None: of all); the reference stays.

        Raises:
          ConfigError: an arm or a seed is none of the study's.
        """
        for name in arms or ():
            if name not in self.arms:
                raise ConfigError(f"--arms {name}: the study {self.name} has no such arm: {nearest(name, self.arms)}")
        for seed in seeds or ():
            if seed not in self.seeds:
                known = ", ".join(map(str, self.seeds))
                raise ConfigError(f"--seeds {seed}: the study {self.name} has the seeds {known}: choose among these")
        chosen = set(self.arms if arms is None else [*arms, self.reference])
        return dataclasses.replace(
            self,
            seeds=tuple(seed for seed in self.seeds if seeds is None or seed in seeds),
            arms={name: arm for name, arm in self.arms.items() if name in chosen},
        )


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
      arm, seed: whose it is.
      spec, overrides: `--config` and `--config.…` of the `gqe train` that makes it.
      config: what these give.
    """

    arm: str
    seed: int
    spec: str
    overrides: tuple[str, ...]
    config: RunConfig

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.seed}"

    @property
    def tokens_per_step(self) -> int:
        return self.config.data.batch_size * self.config.model.context

    def command(self, run: str | Path) -> list[str]:
        """Returns the words of the command behind `gqe`."""
        return ["train", "--config", self.spec, "--run", str(run), *(f"--config.{text}" for text in self.overrides)]


def read_study(spec: str) -> Study:
    """Reads a study file.

    Args:
      spec: path of a TOML file, or the name of a study that comes with gqe_jax ("table2:laptop").

    Raises:
      ConfigError: there is no such file, or a field is missing, unknown or breaks a rule.
    """
    shipped = shipped_studies()
    path = shipped.get(spec, Path(spec))
    if not path.is_file():
        raise ConfigError(f"study {spec!r}: no such file, nor one that comes with gqe_jax; {nearest(spec, shipped)}")
    with unread_named(path, _REMEDY):
        content = path.read_bytes()
    try:
        values = tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no TOML ({error}): {_REMEDY}") from error
    values = check_record({"overrides": []} | values, _RULES, path, _REMEDY)
    arms = {name: _arm(name, arm, values["overrides"], path) for name, arm in values["arms"].items()}
    if values["reference"] not in arms:
        raise ConfigError(f"{path}: reference={values['reference']!r} is no arm: {nearest(values['reference'], arms)}")
    name = spec if spec in shipped else path.stem
    return Study(name, values["reference"], values["tokens"], tuple(values["seeds"]), arms)


def _arm(name: str, value: object, shared: Sequence[str], path: Path) -> Arm:
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", name):
        raise ConfigError(
            f"{path}: arms.{shown(name)} names a folder, so use small letters, digits, '_' and '-', at most 64"
        )
    origin = f"{path}, arms.{name}:"
    arm = check_record(
        {"overrides": []} | value if isinstance(value, dict) else value,
        {"config": TEXT, "overrides": TEXTS},
        origin,
        _REMEDY,
    )
    return Arm(arm["config"], (*shared, *arm["overrides"]))


def cells(study: Study, overrides: Sequence[str] = ()) -> list[Cell]:
    """Makes and checks every cell of the study, all arms of a seed before the next seed.

    The budget sets `train.steps`; warm-up and decay keep the share of the steps that the configuration gives them.

    Args:
      overrides: "a.b=value", for all arms, behind those of the study file.

    Raises:
      ConfigError: arms that have no valid configuration, or not the same number of tokens; all are listed.
    """
    problems, made = [], {}
    for name, arm in study.arms.items():
        try:
            made[name] = _cell(study, name, arm.config, (*arm.overrides, *overrides))
        except ConfigError as error:
            problems.append(f"arm {name}: {error}")
    if problems:
        raise ConfigError(f"{len(problems)} arm(s) of {study.name} cannot be trained:\n  " + "\n  ".join(problems))
    tokens = {name: cell.config.train.steps * cell.tokens_per_step for name, cell in made.items()}
    if len(set(tokens.values())) > 1:
        each = ", ".join(f"{name} {count:,}" for name, count in tokens.items())
        raise ConfigError(
            f"tokens={study.tokens} is not the same whole number of steps' tokens in every arm ({each}): set tokens to "
            f"a multiple of every arm's data.batch_size · model.context"
        )
    return [_with_seed(cell, seed) for seed in study.seeds for cell in made.values()]


def _cell(study: Study, name: str, spec: str, overrides: tuple[str, ...]) -> Cell:
    for text in overrides:
        if text.partition("=")[0] in OWN:
            raise ConfigError(f"the override {text!r} sets what the study sets: use the file's tokens and seeds")
    config = load_config(spec, overrides)
    steps = round(study.tokens / (config.data.batch_size * config.model.context))
    if not steps:
        raise ConfigError(
            f"tokens={study.tokens} is less than half a step of data.batch_size={config.data.batch_size} rows of "
            f"model.context={config.model.context}: raise tokens, or lower data.batch_size"
        )
    optimizer, before = config.optimizer, config.train.steps
    budget = (
        f"train.steps={steps}",
        f"optimizer.warmup_steps={optimizer.warmup_steps * steps // before}",
        f"optimizer.decay_steps={optimizer.decay_steps * steps // before}",
    )
    # At once with the budget, as the schedule of each alone may not fit the steps of the other.
    return Cell(name, 0, spec, overrides + budget, load_config(spec, overrides + budget))


def _with_seed(cell: Cell, seed: int) -> Cell:
    config = dataclasses.replace(
        cell.config,
        train=dataclasses.replace(cell.config.train, seed=seed),
        data=dataclasses.replace(cell.config.data, seed=seed),
    )
    seeds = (f"train.seed={seed}", f"data.seed={seed}")
    return dataclasses.replace(cell, seed=seed, overrides=cell.overrides + seeds, config=config)
