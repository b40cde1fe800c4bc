"""What a run says while it trains: progress lines, metrics, warnings, and the check for finite numbers."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any, Literal

import jax

from gqe_jax import flops
from gqe_jax.config import RunConfig
from gqe_jax.data.reading.prepared import PreparedData
from gqe_jax.evaluate.heldout import HeldOut, format_perplexity
from gqe_jax.runs.checkpoint import Checkpoints
from gqe_jax.runs.metrics import MetricWriter, Stopwatch, progress_line
from gqe_jax.train.step import STEP_METRICS

SECONDS = ("step", "data_wait", "checkpoint", "evaluation", "compile")


class NonFiniteLoss(FloatingPointError):
    """The loss or the gradient is no longer a number; the run has stopped, and all its checkpoints are from before."""


def say(line: str) -> None:
    """Prints a line, of several processes on the first only."""
    if jax.process_index() == 0:
        print(line, flush=True)


class Log:
    """Progress lines, metrics file and the check for finite numbers, one step behind the device."""

    def __init__(
        self, config: RunConfig, writer: MetricWriter, checkpoints: Checkpoints, data: PreparedData, *, start: int
    ):
        self.config = config
        self.writer = writer
        self.checkpoints = checkpoints
        self.seq_len = data.seq_len
        self.bits_per_nat = data.tokens_per_byte("train") / math.log(2)
        self.pending: tuple[int, dict[str, jax.Array]] | None = None
        self.stopwatch = Stopwatch()
        self.tokens = 0
        self.logged_step = start
        self.warned: list[str] = []
        self.seconds = dict.fromkeys(SECONDS, 0.0)
        self.start_clock()

    def start_clock(self) -> None:
        """Starts the clock of training time."""
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
                f"step {step}: loss={loss}, gradient norm={norm}. The run has stopped; "
                f"{self.checkpoints.newest_in_words()}. Lower optimizer.learning_rate (now "
                f"{self.config.optimizer.learning_rate}) or lengthen optimizer.warmup_steps first"
            )
        self.tokens += int(tokens)
        if step % self.config.train.log_every == 0 or step in (1, self.config.train.steps):
            self._write(step, jax.device_get(metrics))

    @contextlib.contextmanager
    def pause(self, purpose: Literal["compile", "checkpoint", "evaluation"]) -> Iterator[None]:
        """A context manager that reads the pending metrics and counts the time inside as `purpose`, not as training."""
        self.read()
        began = time.monotonic()
        yield
        self.seconds[purpose] += time.monotonic() - began
        self.paused += time.monotonic() - began

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts what happens inside as waiting for data."""
        began = time.monotonic()
        yield
        self.seconds["data_wait"] += time.monotonic() - began

    def evaluated(self, step: int, result: HeldOut) -> None:
        """Tells the result of an evaluation, and records it unless the run's record has it already."""
        say(
            f"step {step}: held-out loss {result.loss:.4f}, {result.bits_per_byte:.4f} bits/byte, perplexity "
            f"{format_perplexity(result.perplexity)} per token, over {result.tokens:,} tokens"
        )
        if (step, result.tokens) in self.writer.evaluations:
            return
        record: dict[str, Any] = {"eval/loss": result.loss, "eval/bits_per_byte": result.bits_per_byte}
        record |= {"eval/tokens": result.tokens, "eval/load": result.load}
        record["eval/by_position"] = [dataclasses.astuple(part) for part in result.by_position]
        self.writer.write(step, record | self._split("checkpoint", "evaluation"))

    def _write(self, step: int, metrics: dict[str, Any]) -> None:
        now = time.monotonic()
        training = now - self.since - self.paused
        rate, left = self.stopwatch.lap(
            step - self.logged_step, self.tokens, training, self.config.train.steps - step
        )
        waited = self.seconds["data_wait"] / training
        self.seconds["step"] += training - self.seconds["data_wait"]
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
        layers = {name: value for name, value in metrics.items() if name not in STEP_METRICS}
        attention = self.config.model.attention
        note = attention.progress_note(layers)
        say(progress_line(step, self.config.train.steps, **shown, seconds_left=left, note=note, data_wait=waited))
        self.writer.write(step, shown | {"clip_factor": metrics["clip_factor"]} | layers | self._split(*SECONDS))
        warnings = attention.warnings(layers)
        if warnings and not self.warned:  # once when it begins; again only after it was well in between
            say("\n".join(f"warning: {line}" for line in warnings))
        self.warned = warnings

    def _split(self, *purposes: str) -> dict[str, float]:
        """Returns how the time since the last line was spent; over all lines of a run the parts add up to its time."""
        split = {f"seconds/{purpose}": self.seconds[purpose] for purpose in purposes if self.seconds[purpose]}
        self.seconds |= dict.fromkeys(purposes, 0.0)
        return split
