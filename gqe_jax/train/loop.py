"""Training from the configuration to the last checkpoint, in the order in which it happens."""

import contextlib
import functools
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from gqe_jax import flops
from gqe_jax.config import ConfigError, GQEConfig, RunConfig
from gqe_jax.config_dict import build, to_dict
from gqe_jax.data.pipeline import train_batches
from gqe_jax.data.prepared import PreparedData, open_data
from gqe_jax.data.tokenizer import tokenizer_from_files
from gqe_jax.evaluate import kernel_report
from gqe_jax.evaluate.heldout import HeldOut, evaluate
from gqe_jax.parallel.mesh import check_batch, check_model, describe, make_mesh, shard_batch
from gqe_jax.train import run as runs
from gqe_jax.train.checkpoint import CheckpointDamaged, Checkpoints
from gqe_jax.train.metrics import MetricWriter, Stopwatch, balance, progress_line, router_warnings
from gqe_jax.train.step import Step, TrainState


class NonFiniteLoss(FloatingPointError):
    """The loss or the gradient is no longer a number; the run has stopped, its last checkpoint is from before."""


class Interrupted(Exception):
    """A signal asked the run to stop; the state was saved first. `signal_number` says which signal."""

    def __init__(self, signal_number: int, step: int):
        super().__init__(f"stopped by {signal.Signals(signal_number).name} after step {step}; its checkpoint is saved")
        self.signal_number = signal_number


def train(config: RunConfig, directory: str | Path, *, previous_checkpoint: bool = False) -> HeldOut:
    """Trains to `config.train.steps`, from the run's newest checkpoint where there is one.

    Args:
      config: of the run.
      directory: of the run: receives `config.json`, `metrics.jsonl` and `checkpoints/`.
      previous_checkpoint: if the newest checkpoint is damaged, set it aside and go on from the one before.

    Returns:
      The evaluation of the final state on all held-out text.

    Raises:
      ConfigError: settings, data or an existing run that do not fit; nothing was written.
      CheckpointDamaged: the newest checkpoint is not what was written.
      OSError: something could not be written (full disk, say); CheckpointFailed, if it was a checkpoint.
      NonFiniteLoss: loss or gradient became infinite or NaN.
      Interrupted: SIGTERM or SIGINT, after saving.
    """
    directory = Path(directory)
    steps = config.train.steps

    # ---------------------------------------------------------------- mesh
    mesh = make_mesh(config.mesh)
    check_model(mesh, config.model)
    _say(f"devices: {describe(mesh)}, {jax.process_count()} process(es)")

    # ---------------------------------------------------------------- data
    data = open_data(config.data, config.model)
    check_batch(mesh, config.data.batch_size // config.train.accumulate, data.seq_len)
    _say(f"data: {data.describe()}")

    # ---------------------------------------------------------------- model
    step = Step(config, mesh)
    parameters = flops.parameter_count(config.model)["total"]
    gigaflops = flops.flops_per_step(config.model, config.data.batch_size, data.seq_len) / 1e9
    _say(
        f"model: {config.name}, {parameters:,} parameters, attention {config.model.attention.kind}, {gigaflops:,.1f} "
        f"GFLOP a step of {config.data.batch_size * data.seq_len:,} tokens"
    )

    rows = config.data.batch_size // config.train.accumulate
    _say(f"kernels: {kernel_report.training_line(config.model, batch=rows, q_len=data.seq_len)}")

    with contextlib.ExitStack() as stack:
        stack.enter_context(runs.write_failures_named(directory))
        stack.enter_context(jax.set_mesh(mesh))

        # ------------------------------------------------------------ restore
        # 1. the newest checkpoint; 2. the one before, if that is damaged and the user says so; 3. a fresh start
        checkpoints = stack.enter_context(
            Checkpoints(directory / runs.CHECKPOINTS, keep=config.train.keep, every=config.train.checkpoint_every)
        )
        state = _restore(checkpoints, directory, step, data, previous_checkpoint)
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

        def evaluate_state(limit: int | None) -> HeldOut:
            compiled = functools.partial(step.evaluate, state.params, state.router_bias)
            rows = config.data.batch_size // config.train.accumulate
            return evaluate(compiled, data, mesh, batch_size=rows, limit=limit)

        log = Log(config, writer, data, start=start)
        if start == steps:
            _say(f"step {start} is the last: nothing to train (raise train.steps to continue)")
            result = evaluate_state(None)
            log.evaluated(start, result)
            return result

        # ------------------------------------------------------------ step
        rows = train_batches(
            data,
            batch_size=config.data.batch_size,
            seed=config.data.seed,
            start_step=start,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            workers=config.data.workers,
        )
        batches = (shard_batch(mesh, batch) for batch in stack.enter_context(rows))
        batch = next(batches)
        began = time.monotonic()
        take_step = step.train.lower(state, batch).compile()
        _say(f"compiled the training step in {time.monotonic() - began:.1f} s; training from step {start} to {steps}")

        log.start_clock()
        stop = stack.enter_context(_signals())
        for now in range(start + 1, steps + 1):
            state, metrics = take_step(state, batch)
            log.dispatched(now, metrics)  # reads the metrics of the step before
            final = now == steps
            leaving = final or bool(stop)
            if not leaving:
                batch = next(batches)

            # -------------------------------------------------------- save
            if leaving or checkpoints.should_save(now):
                with log.pause():  # ends the wait for this step's metrics: only a finite step is saved
                    checkpoints.save(
                        now,
                        **runs.checkpoint_items(state),
                        data={"seed": config.data.seed, "step": now, "prepared": data.digest},
                        config=to_dict(config),
                        tokenizer=data.tokenizer.files(),
                        wait=leaving,
                    )

            # -------------------------------------------------------- eval
            if final or (config.train.eval_every and now % config.train.eval_every == 0 and not leaving):
                with log.pause():
                    result = evaluate_state(None if final else config.train.eval_batches or None)
                    log.evaluated(now, result)

            if stop and not final:
                raise Interrupted(stop[0], now)
    return result


class Log:
    """Progress lines, metrics file and the check for finite numbers, one step behind the device."""

    def __init__(self, config: RunConfig, writer: MetricWriter, data: PreparedData, *, start: int):
        self.config = config
        self.writer = writer
        self.seq_len = data.seq_len
        self.bits_per_nat = data.tokens_per_byte("train") / math.log(2)
        self.pending: tuple[int, dict[str, jax.Array]] | None = None
        self.stopwatch = Stopwatch()
        self.tokens = 0
        self.logged_step = start
        self.warned: list[str] = []
        self.start_clock()

    def start_clock(self) -> None:
        """Training time counts from here."""
        self.since = time.monotonic()
        self.paused = 0.0

    def dispatched(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of the step that was just dispatched and reads those of the one before."""
        self.read()
        self.pending = (step, metrics)

    def read(self) -> None:
        """Waits for the pending metrics; raises NonFiniteLoss, or logs them where a line is due."""
        if self.pending is None:
            return
        step, metrics = self.pending
        self.pending = None
        loss, norm, tokens = jax.device_get([metrics[name] for name in ("loss", "gradient_norm", "tokens")])
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFiniteLoss(
                f"step {step}: loss={loss}, gradient norm={norm}. The run has stopped; its last checkpoint is from "
                f"before this step. Lower optimizer.learning_rate (now {self.config.optimizer.learning_rate}) or "
                f"lengthen optimizer.warmup_steps, and start it again"
            )
        self.tokens += int(tokens)
        if step % self.config.train.log_every == 0 or step in (1, self.config.train.steps):
            self._write(step, jax.device_get(metrics))

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves what happens inside out of the training time, after reading the pending metrics."""
        self.read()
        began = time.monotonic()
        yield
        self.paused += time.monotonic() - began

    def evaluated(self, step: int, result: HeldOut) -> None:
        _say(
            f"step {step}: held-out loss {result.loss:.4f}, {result.bits_per_byte:.4f} bits/byte, perplexity "
            f"{result.perplexity:.2f} per token, over {result.tokens:,} tokens"
        )
        record: dict[str, Any] = {"eval/loss": result.loss, "eval/bits_per_byte": result.bits_per_byte}
        self.writer.write(step, record | {"eval/tokens": result.tokens, "eval/load": result.load})

    def _write(self, step: int, metrics: dict[str, Any]) -> None:
        now = time.monotonic()
        rate, left = self.stopwatch.lap(
            step - self.logged_step,
            self.tokens,
            now - self.since - self.paused,
            self.config.train.steps - step,
        )
        self.logged_step, self.tokens, self.since, self.paused = step, 0, now, 0.0
        work = flops.flops_per_token(self.config.model, self.seq_len) * rate  # FLOPs per second, of all devices
        shown = {
            "loss": float(metrics["loss"]),
            "bits_per_byte": float(metrics["loss"]) * self.bits_per_nat,
            "learning_rate": float(metrics["learning_rate"]),
            "gradient_norm": float(metrics["gradient_norm"]),
            "tokens_per_second": rate,
            "mfu": flops.mfu(work, 1.0, jax.device_count(), jax.devices()[0].device_kind),
        }
        load = metrics.get("load")
        worst = None if load is None else balance(load)
        _say(progress_line(step, self.config.train.steps, **shown, seconds_left=left, balance=worst))
        router = {name: metrics[name] for name in ("load", "entropy", "load_balance_loss") if name in metrics}
        self.writer.write(step, shown | {"clip_factor": metrics["clip_factor"]} | router)
        self._warn(load)

    def _warn(self, load: Any) -> None:
        attention = self.config.model.attention
        if isinstance(attention, GQEConfig) and attention.router.kind == "learned":
            warnings = router_warnings(load, attention.top_k)
            if warnings and not self.warned:  # once when it begins; again only after it was well in between
                _say("\n".join(f"warning: {line}" for line in warnings))
            self.warned = warnings


def _restore(
    checkpoints: Checkpoints,
    directory: Path,
    step: Step,
    data: PreparedData,
    previous_checkpoint: bool,
) -> TrainState | None:
    newest = checkpoints.latest()
    if newest is None:
        return None
    try:
        checkpoints.verify(newest, items=("config", "tokenizer", "data"))
        saved = build(checkpoints.read_config(newest))
        runs.check_same_model(directory, saved, step.config)
        data.check_tokenizer(tokenizer_from_files(checkpoints.read_tokenizer(newest)))
        read_so_far = checkpoints.read_data(newest)
        items = checkpoints.restore(newest, **runs.abstract_items(step))
    except CheckpointDamaged as damage:
        if not previous_checkpoint:
            raise
        _say(f"{damage}\nas --previous-checkpoint asks, it is kept aside as {checkpoints.set_aside(newest)}")
        return _restore(checkpoints, directory, step, data, previous_checkpoint)
    _say(f"resuming {directory} from step {newest}")
    for line in runs.differences(saved, step.config):
        _say(f"changed since: {line}")
    if read_so_far["prepared"] != data.digest:
        _say(f"changed since: the prepared data; the run goes on with the rows of {data.name}")
    return runs.state_from_items(items)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that receives SIGTERM and SIGINT instead of the process dying of them; a second one kills as usual."""
    received: list[int] = []

    def receive(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    previous = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)
