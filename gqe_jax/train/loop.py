"""Training from the configuration to the last checkpoint, in the order in which it happens."""

import contextlib
import dataclasses
import functools
import json
from pathlib import Path

import jax
from etils import epath

from gqe_jax import flops
from gqe_jax.config import ConfigError, RunConfig, require
from gqe_jax.config_dict import build, to_dict
from gqe_jax.data.reading.pipeline import check_readable, train_batches
from gqe_jax.data.reading.position import BEGINNING, Position
from gqe_jax.data.reading.prepared import PreparedData, open_data
from gqe_jax.data.tokenizer import tokenizer_from_files
from gqe_jax.evaluate import kernel_report
from gqe_jax.evaluate.heldout import HeldOut, evaluate
from gqe_jax.parallel.mesh import check_batch, check_model, describe, local_rows, make_mesh, shard_batch
from gqe_jax.processes.joined import check_equal, first_says
from gqe_jax.runs import directory as runs
from gqe_jax.runs.checkpoint import CheckpointDamaged, Checkpoints
from gqe_jax.runs.load import abstract_items
from gqe_jax.runs.metrics import MetricWriter, import_extras
from gqe_jax.runs.state import TrainState, items_of, state_of
from gqe_jax.train.log import Log, say
from gqe_jax.train.profile import Profile, memory_line
from gqe_jax.train.step import Step
from gqe_jax.train.stop import Interrupted, stop_requests
from gqe_jax.train.watchdog import Watchdog


def train(config: RunConfig, directory: str | Path, *, previous_checkpoint: bool = False) -> HeldOut:
    """Trains to `config.train.steps`, from the run's newest checkpoint where there is one.

    Args:
      config: of the run.
      directory: of the run: receives `config.json`, `metrics.jsonl` and `checkpoints/`.
      previous_checkpoint: if the newest checkpoint is damaged, set it aside and go on from the newest that is whole.

    Returns:
      The evaluation of the final state on all held-out text.

    Raises:
      ConfigError: settings, data or an existing run that do not fit, or another process trains there; nothing was
        written.
      CheckpointDamaged: the newest checkpoint is not what was written.
      OSError: something could not be written (full disk, say); CheckpointFailed, if it was a checkpoint.
      NonFiniteLoss: loss or gradient became infinite or NaN.
      Interrupted: SIGTERM or SIGINT, after saving.
    """
    # Whatever can be refused is refused before the first write.
    directory = runs.check_directory(directory)
    if jax.process_index() == 0:
        import_extras(tensorboard=config.train.tensorboard, wandb=config.train.wandb)
    steps = config.train.steps

    # ---------------------------------------------------------------- mesh
    if config.train.compilation_cache is not None:
        jax.config.update("jax_compilation_cache_dir", config.train.compilation_cache)
    mesh = make_mesh(config.mesh)
    check_model(mesh, config.model)
    say(f"devices: {describe(mesh)}, {jax.process_count()} process(es)")

    # ---------------------------------------------------------------- data
    data = open_data(config.data, config.model)
    check_batch(mesh, config.data.batch_size // config.train.accumulate, data.seq_len)
    check_readable(data)
    say(f"data: {data.describe()}")
    check_equal("the prepared data", data.digest[:12], "point data.path at one directory that all machines share")

    # ---------------------------------------------------------------- model
    step = Step(config, mesh)
    parameters = flops.parameter_count(config.model)["total"]
    gigaflops = flops.flops_per_step(config.model, config.data.batch_size, data.seq_len) / 1e9
    say(
        f"model: {config.name}, {parameters:,} parameters, attention {config.model.attention.kind}, {gigaflops:,.1f} "
        f"GFLOP a step of {config.data.batch_size * data.seq_len:,} tokens"
    )

    rows = config.data.batch_size // config.train.accumulate
    say(f"kernels: {kernel_report.training_line(config.model, batch=rows, q_len=data.seq_len)}")

    with contextlib.ExitStack() as stack:
        stack.enter_context(runs.write_failures_named(directory))
        stack.enter_context(runs.locked(directory))
        stack.enter_context(jax.set_mesh(mesh))

        # ------------------------------------------------------------ restore
        # 1. the newest checkpoint; 2. the one before, if that is damaged and the user says so; 3. a fresh start
        checkpoints = stack.enter_context(
            Checkpoints(directory / runs.CHECKPOINTS, keep=config.train.keep, every=config.train.checkpoint_every)
        )
        state, position = _restore(checkpoints, directory, step, data, previous_checkpoint)
        start = 0 if state is None else int(state.step)
        if start > steps:
            raise ConfigError(
                f"train.steps={steps}, but --run={str(directory)!r} has taken {start} steps already: raise train.steps"
            )
        writer = stack.enter_context(
            MetricWriter(
                directory,
                resume_step=start,
                tensorboard=config.train.tensorboard,
                wandb=config.train.wandb,
                config=to_dict(config),
            )
        )
        runs.write_config(directory, config)
        if state is None:
            state = step.initial_state()

        log = Log(config, writer, checkpoints, data, start=start)
        watchdog = Watchdog(config.train.stall_seconds)

        def stop_request() -> int | None:
            watchdog.alive()
            return asked_to_stop()  # the same answer on every process

        def position_at(now: int) -> Position:
            return position.after(data, (now - start) * config.data.batch_size)

        def save(now: int, *, wait: bool) -> None:
            with watchdog.patient(), log.pause("checkpoint"):  # reads this step's metrics: only a finite step is saved
                writer.upload()
                checkpoints.save(
                    now,
                    **items_of(state),
                    data={"seed": config.data.seed, "step": now, "position": position_at(now).to_json()},
                    config=to_dict(config),
                    tokenizer=data.tokenizer.files(),
                    wait=wait,
                )

        def evaluate_state(now: int) -> HeldOut:
            def between() -> None:
                if (stop := stop_request()) is not None:  # the next start makes this evaluation
                    save(now, wait=True)
                    raise Interrupted(stop, now)

            with watchdog.patient(), log.pause("evaluation"):
                result = evaluate(
                    functools.partial(step.evaluate, state.params, state.buffers),
                    data,
                    mesh,
                    batch_size=config.data.batch_size // config.train.accumulate,
                    limit=None if now == steps else config.train.eval_batches or None,
                    between=between,
                )
            log.evaluated(now, result)
            return result

        if start == steps:
            say(f"step {start} is the last: nothing to train (raise train.steps to continue)")
            asked_to_stop = stack.enter_context(stop_requests())
            stack.enter_context(watchdog)
            return evaluate_state(start)

        # ------------------------------------------------------------ step
        rows = train_batches(
            data,
            batch_size=config.data.batch_size,
            seed=config.data.seed,
            start_step=start,
            position=position,
            rows=local_rows(mesh, config.data.batch_size),
            workers=config.data.workers,
        )
        batches = (shard_batch(mesh, batch) for batch in stack.enter_context(rows))
        batch = next(batches)
        with log.pause("compile"):
            take_step = step.train.lower(state, batch).compile()
        say(f"memory per device: {memory_line(take_step, state)}")
        say(f"compiled the training step in {log.seconds['compile']:.1f} s; training from step {start} to {steps}")
        profile = stack.enter_context(Profile(config.train.profile_window, directory / runs.PROFILE))

        log.start_clock()
        asked_to_stop = stack.enter_context(stop_requests())
        stack.enter_context(watchdog)
        if _evaluation_is_missing(config, writer, start):  # a kill or a signal came between it and its checkpoint
            evaluate_state(start)
        for now in range(start + 1, steps + 1):
            profile.before(now)
            state, metrics = take_step(state, batch)
            log.dispatched(now, metrics)  # reads the metrics of the step before
            profile.after(now, metrics)
            stop = stop_request()
            leaving = stop is not None or now == steps
            if not leaving:
                with log.waiting():
                    batch = next(batches)

            # -------------------------------------------------------- save
            if leaving or checkpoints.should_save(now):
                save(now, wait=leaving)
            if stop is not None:
                raise Interrupted(stop, now)

            # -------------------------------------------------------- eval
            if now == steps or (config.train.eval_every and now % config.train.eval_every == 0):
                result = evaluate_state(now)
    return result


def _evaluation_is_missing(config: RunConfig, writer: MetricWriter, step: int) -> bool:
    """Says whether the step that a run goes on from was to be evaluated, but process 0, which records, has no
    result."""
    if step == 0 or not config.train.eval_every or step % config.train.eval_every:
        return False
    return not first_says("recorded" if any(step == evaluated for evaluated, _ in writer.evaluations) else "")


def _restore(
    checkpoints: Checkpoints,
    directory: epath.Path,
    step: Step,
    data: PreparedData,
    previous_checkpoint: bool,
) -> tuple[TrainState | None, Position]:
    newest = json.loads(first_says(json.dumps(checkpoints.latest())))
    if newest is None:
        return None, BEGINNING
    try:
        checkpoints.verify(newest, items=("config", "tokenizer", "data"))
        saved = build(checkpoints.read_config(newest))
        runs.check_same_model(directory, saved, step.config)
        data.check_tokenizer(tokenizer_from_files(checkpoints.read_tokenizer(newest)))
        form = checkpoints.read_format(newest)
        position = _position(checkpoints, newest, saved, data)
        require(
            saved.data.seed == step.config.data.seed or not any(position.rows(data)),
            f"data.seed was {saved.data.seed} and is now {step.config.data.seed}: in another order the run would read "
            f"rows of an epoch that has begun again; set data.seed={saved.data.seed}, or choose another directory",
        )
        wanted = step.abstract_state
        if not checkpoints.has_optimizer(newest):
            wanted = dataclasses.replace(wanted, opt_state=None)
        items = checkpoints.restore(newest, **abstract_items(wanted, form, step.abstract_model, step.mesh))
    except CheckpointDamaged as damage:
        if not previous_checkpoint:
            raise
        aside = checkpoints.set_aside_damaged(newest)
        say(f"{damage}\nas --previous-checkpoint asks, kept aside: {', '.join(map(str, aside))}")
        return _restore(checkpoints, directory, step, data, previous_checkpoint=False)
    say(f"resuming {directory} from step {newest}")
    for line in runs.differences(saved, step.config):
        say(f"changed since: {line}")
    if position.prepared not in ("", data.digest):
        say("changed since: the prepared data or its weights")
    say(f"rows read so far: {position.describe(data)}")
    state = state_of(items, form)
    return (state if state.opt_state is not None else step.with_fresh_optimizer(state)), position


def _position(checkpoints: Checkpoints, newest: int, saved: RunConfig, data: PreparedData) -> Position:
    """Says how far the run has read; before form 3 that is step times batch size, if `data` is what it read."""
    content = checkpoints.read_data(newest)
    if checkpoints.read_format(newest) >= 3:
        return Position.read(content.get("position"), f"{checkpoints.directory}/{newest}/data")
    if newest == 0 or content.get("prepared") == data.digest:
        return BEGINNING.after(data, newest * saved.data.batch_size)
    say("changed since: the prepared data; the checkpoint is too old to say how far each set was read: all begin anew")
    return BEGINNING
