"""What a study's finished cells say, as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from gqe_jax.config import ConfigError, ModelConfig
from gqe_jax.config_dict import to_dict
from gqe_jax.flops import forward_flops, parameter_count
from gqe_jax.study.definition import Study
from gqe_jax.study.records import Record, read_records
from gqe_jax.study.statistics import Difference, Interval, mean_interval, paired_differences

TABLE = "table"  # .md, .csv, .json
_SHOWN = 6  # cells that a message names


@dataclasses.dataclass(frozen=True)
class Row:
    """One arm over its seeds.

    Attributes:
      loss, bits_per_byte: on held-out text.
      difference: of the loss from the reference's; None for the reference.
      attention_flops: of scores and weighted sums of all heads that attend, forward, per token of a row.
      parameters: of the model, embedding included.
      tokens_per_second: median over cells of each cell's median.
      by_position: [first, last] → mean loss of the tokens with so much context.
    """

    arm: str
    loss: Interval
    bits_per_byte: Interval
    difference: Difference | None
    attention_flops: float
    parameters: int
    tokens_per_second: float | None
    by_position: Mapping[tuple[int, int], float]


def finished_cells(study: Study, out: Path) -> dict[str, dict[int, Record]]:
    """Reads the study's cells: arm → seed → record.

    Raises:
      ConfigError: as `read_records`; cells are missing or not finished; cells of different code or data, or of one arm
        with different settings.
    """
    known = read_records(out, study)
    wanted = [(arm, seed) for seed in study.seeds for arm in study.arms]
    missing = [f"{arm}-{seed}" for arm, seed in wanted if (arm, seed) not in known or known[arm, seed].result is None]
    if missing:
        names = ", ".join(missing[:_SHOWN]) + (", …" if len(missing) > _SHOWN else "")
        raise ConfigError(
            f"{len(missing)} of {len(wanted)} cells in {str(out)!r} are not finished ({names}): train them with `gqe "
            f"study run`, or choose seeds and arms that are, with --seeds and --arms"
        )
    found = {arm: {seed: known[arm, seed] for seed in study.seeds} for arm in study.arms}
    for what in ("code", "data"):
        hashes = sorted({getattr(record, what)[:16] for by_seed in found.values() for record in by_seed.values()})
        if len(hashes) > 1:
            raise ConfigError(
                f"cells in {str(out)!r} have different {what} (hashes {', '.join(hashes)}), and cannot be compared: "
                f"delete the records of the older ones, and train them again"
            )
    for arm, by_seed in found.items():
        if len({json.dumps(_without_seeds(record)) for record in by_seed.values()}) > 1:
            raise ConfigError(
                f"the cells of arm {arm} in {str(out)!r} have different settings: delete the older records, and train "
                f"these cells again"
            )
    return found


def _without_seeds(record: Record) -> dict[str, object]:
    config = to_dict(record.config)
    for group in ("train", "data"):
        del config[group]["seed"]
    return config


def rows(study: Study, cells: Mapping[str, Mapping[int, Record]]) -> list[Row]:
    """Computes the table's rows, in the order of the study file.

    Raises:
      ConfigError: fewer than two seeds.
    """
    losses = {arm: _by_seed(by_seed, "loss") for arm, by_seed in cells.items()}
    differences = paired_differences(losses, study.reference)
    return [_row(arm, list(by_seed.values()), differences.get(arm)) for arm, by_seed in cells.items()]


def _by_seed(records: Mapping[int, Record], name: str) -> dict[int, float]:
    return {seed: record.result[name] for seed, record in records.items()}


def _row(arm: str, records: Sequence[Record], difference: Difference | None) -> Row:
    results = [record.result for record in records]
    model = records[0].config.model
    rates = [result["tokens_per_second"] for result in results if result["tokens_per_second"] is not None]
    ranges = {}
    for result in results:
        for first, last, loss, _ in result["by_position"]:
            ranges.setdefault((int(first), int(last)), []).append(loss)
    return Row(
        arm,
        mean_interval([result["loss"] for result in results]),
        mean_interval([result["bits_per_byte"] for result in results]),
        difference,
        attention_flops(model),
        parameter_count(model)["total"],
        float(np.median(rates)) if rates else None,
        {span: float(np.mean(values)) for span, values in ranges.items()},
    )


def attention_flops(model: ModelConfig) -> float:
    """Counts the FLOPs of attending heads alone, forward, per token, averaged over a row of the model's context."""
    flops = forward_flops(model, model.context)
    return (flops.attention + flops.shared_head) / model.context


def write_tables(study: Study, cells: Mapping[str, Mapping[int, Record]], out: Path) -> str:
    """Writes table.md, table.csv and table.json into the study's folder; returns the Markdown."""
    table = rows(study, cells)
    text = markdown(study, cells, table)
    (out / f"{TABLE}.md").write_text(text + "\n")
    (out / f"{TABLE}.csv").write_text(_csv(table))
    values = {"study": study.name, "reference": study.reference, "seeds": list(study.seeds), **_provenance(cells)}
    values["arms"] = [_plain(row) for row in table]
    (out / f"{TABLE}.json").write_text(json.dumps(values, indent=1) + "\n")
    return text


def _provenance(cells: Mapping[str, Mapping[int, Record]]) -> dict[str, object]:
    first = next(record for by_seed in cells.values() for record in by_seed.values())
    versions = sorted({record.jax for by_seed in cells.values() for record in by_seed.values()})
    tokens = first.config.train.steps * first.config.data.batch_size * first.config.model.context
    return {"tokens": tokens, "code": first.code, "data": first.data[:16], "jax": ", ".join(versions)}


def markdown(study: Study, cells: Mapping[str, Mapping[int, Record]], table: Sequence[Row]) -> str:
    """Two tables, of losses and costs and of losses by position, and a line that says what they are of."""
    about = _provenance(cells)
    seeds = ", ".join(map(str, study.seeds))
    lines = [
        f"{study.name}: {about['tokens']:,} tokens a cell, seeds {seeds}; code {about['code']}, data {about['data']}, "
        f"JAX {about['jax']}. Losses are nats per token on held-out text; ± is a 95% interval over seeds. Difference: "
        f"arm minus {study.reference}, paired by seed; resolved: p at most 0.05 after Holm's correction.",
        "",
        f"| arm | loss | bits per byte | difference from {study.reference} | p | resolved "
        f"| attention FLOPs per token | parameters | tokens/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_markdown_row(row) for row in table]
    spans = list(dict.fromkeys(span for row in table for span in row.by_position))
    lines += ["", "Loss by tokens of context before the input:", ""]
    lines.append("| arm | " + " | ".join(f"{a}-{b}" if b > a else str(a) for a, b in spans) + " |")
    lines.append("|---" * (len(spans) + 1) + "|")
    for row in table:
        losses = [f"{row.by_position[span]:.3f}" if span in row.by_position else "" for span in spans]
        lines.append(f"| {row.arm} | " + " | ".join(losses) + " |")
    return "\n".join(lines)


def _markdown_row(row: Row) -> str:
    fields = [row.arm, _interval(row.loss), _interval(row.bits_per_byte)]
    if row.difference is None:
        fields += ["", "", ""]
    else:
        p, interval = row.difference.p, row.difference.interval
        fields += [_interval(interval, "+"), f"{p:.3f}" if p >= 0.001 else "< 0.001"]
        fields.append("yes" if row.difference.resolved else "no")
    rate = "" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}"
    return "| " + " | ".join([*fields, f"{row.attention_flops:,.0f}", f"{row.parameters:,}", rate]) + " |"


def _interval(value: Interval, sign: str = "") -> str:
    return f"{value.mean:{sign}.4f} ± {value.half_width:.4f}"


def _plain(row: Row) -> dict[str, object]:
    spans = [[first, last, loss] for (first, last), loss in row.by_position.items()]
    return dataclasses.asdict(dataclasses.replace(row, by_position={})) | {"by_position": spans}


def _csv(table: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    spans = list(dict.fromkeys(span for row in table for span in row.by_position))
    names = ["arm", "loss", "loss_half_width", "bits_per_byte", "bits_per_byte_half_width", "difference"]
    names += ["difference_half_width", "p", "resolved", "attention_flops", "parameters", "tokens_per_second"]
    writer.writerow([*names, *(f"loss_{first}_{last}" for first, last in spans)])
    for row in table:
        gap = row.difference
        compared = [None] * 4 if gap is None else [gap.interval.mean, gap.interval.half_width, gap.p, gap.resolved]
        fields = [row.arm, row.loss.mean, row.loss.half_width, row.bits_per_byte.mean, row.bits_per_byte.half_width]
        fields += [*compared, row.attention_flops, row.parameters, row.tokens_per_second]
        writer.writerow([*fields, *(row.by_position.get(span) for span in spans)])
    return text.getvalue()
