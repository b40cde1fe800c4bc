"""Step times that others published for dense models on TPUs, and what they say about the roofline's predictions.

MaxText trains the same kind of step: matrix products, flash attention, parameters spread over `fsdp`. Its published
times over our serial prediction are, for each generation, the factor by which a plan's time is corrected. Sources:

- v6e, v5p: maxtext.readthedocs.io/en/maxtext-v0.2.0/reference/models/tiering.html, tokens per second of a device. Rows
  of a device: the recipes of github.com/AI-Hypercomputer/tpu-recipes (training/trillium); for v5p they are not given,
  and 4 are taken.
- v5e: github.com/AI-Hypercomputer/maxtext, MaxText/configs/v5e/README.md, 16b.sh and 32b.sh: TFLOP/s of a chip, of
  which MaxText then counted the whole square of attention.
"""

import dataclasses
import functools
import math

from gqe_jax.aot.topologies import topology
from gqe_jax.attention.gqa import GQAConfig
from gqe_jax.config import DataConfig, MeshConfig, ModelConfig, RunConfig
from gqe_jax.flops import parameter_count
from gqe_jax.plan.compile import Request
from gqe_jax.plan.roofline import Roofline
from gqe_jax.plan.search import candidate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """A published result.

    Attributes:
      topology: the slice; all devices lie along `fsdp`.
      rows, seq_len: of a device, and tokens of each.
      tokens_per_second: of a device, or None where teraflops are published.
      teraflops: TFLOP/s of a device.
    """

    name: str
    topology: str
    model: ModelConfig
    rows: int
    seq_len: int
    tokens_per_second: float | None = None
    teraflops: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds of the measured step."""
        tokens, attention = self.rows * self.seq_len, self.model.attention
        if self.tokens_per_second is not None:
            return tokens / self.tokens_per_second
        pairs = 12 * self.model.num_layers * attention.num_query_heads * attention.head_dim * self.seq_len
        return tokens * (6 * parameter_count(self.model)["total"] + pairs) / (self.teraflops * 1e12)


def _dense(layers: int, d_model: int, heads: int, kv_heads: int, d_ff: int, vocab: int, context: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab, d_model=d_model, num_layers=layers, d_ff=d_ff, context=context, dtype="bfloat16",
        remat="full", tie_embeddings=False,
        attention=GQAConfig(num_query_heads=heads, num_kv_heads=kv_heads, head_dim=128),
    )  # fmt: skip


PUBLISHED = (
    Published(
        name="Llama 2 70B", topology="v6e:16x16", model=_dense(80, 8192, 64, 8, 28672, 32000, 4096), rows=3,
        seq_len=4096, tokens_per_second=900,
    ),
    Published(
        name="Llama 3.1 8B", topology="v6e:16x16", model=_dense(32, 4096, 32, 8, 14336, 128256, 8192), rows=4,
        seq_len=8192, tokens_per_second=7207,
    ),
    Published(
        name="Llama 3.1 70B", topology="v6e:16x16", model=_dense(80, 8192, 64, 8, 28672, 128256, 8192), rows=5,
        seq_len=8192, tokens_per_second=960,
    ),
    Published(
        name="Llama 2 70B", topology="v5p:8x8x8", model=_dense(80, 8192, 64, 8, 28672, 32000, 4096), rows=4,
        seq_len=4096, tokens_per_second=692,
    ),
    Published(
        name="16B", topology="v5e:16x16", model=_dense(32, 4096, 64, 64, 28672, 32000, 2048), rows=6, seq_len=2048,
        teraflops=120,
    ),
    Published(
        name="32B", topology="v5e:16x16", model=_dense(32, 8192, 64, 64, 28672, 32000, 2048), rows=4, seq_len=2048,
        teraflops=132,
    ),
)  # fmt: skip


def predicted(result: Published) -> Roofline:
    """Returns the roofline of a published step, as `gqe plan --search` estimates it."""
    devices = topology(result.topology).num_devices
    config = RunConfig(
        model=result.model, mesh=MeshConfig(data=1, fsdp=devices), data=DataConfig(batch_size=devices * result.rows)
    )
    request = Request(
        config=config, topology=result.topology, mode="train", batch_size=devices * result.rows, seq_len=result.seq_len
    )
    return candidate(request, {"data": 1, "fsdp": devices, "expert": 1, "context": 1}).times


@functools.cache
def factor(generation: str) -> float | None:
    """Geometric mean of measured over predicted serial time of a generation's published steps; None: there are none."""
    ratios = [
        result.seconds / predicted(result).serial
        for result in PUBLISHED
        if result.topology.startswith(f"{generation}:")
    ]
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None
