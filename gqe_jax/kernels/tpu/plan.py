"""Defines what is static about one call of the TPU kernels, and how kernels read its scalars."""

import dataclasses
import functools
import math

import jax.numpy as jnp
from jax.experimental import pallas as pl

from gqe_jax.kernels.tpu import vmem
from gqe_jax.kernels.tpu.backward_blocks import BackwardBlocks, backward_blocks
from gqe_jax.kernels.tpu.blocks import Blocks, BlockSizes
from gqe_jax.kernels.tpu.schedule import BlockSchedule, make_schedule
from gqe_jax.rounding import round_up
from gqe_jax.tpu import GENERATIONS, LANES

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)
MASKED = -1e30
"""A score that the mask hides: finite, so that no difference of two of them is NaN."""
NO_MAX = 0.5 * MASKED
"""The maximum of a row that has seen nothing: its masked scores have probability 0 already."""


@dataclasses.dataclass(frozen=True)
class MaskKind:
    """Holds the static part of a `Mask`, and says which of its arrays exist."""

    causal: bool
    window: int | None
    aligned: bool
    has_length: bool
    has_segments: bool


@dataclasses.dataclass(frozen=True)
class KernelPlan:
    """Sizes and options of one call.

    Attributes:
      batch, num_groups, num_experts, num_slots: B, G, M, K.
      head_dim: lanes of a head, padding included; norm_dim: D.
      groups_per_block: 2 where two groups of D = 64 share the 128 lanes of a block, else 1.
      q_len, kv_len: S and T.
      rope_batch: batch rows of the rotary tables.
      norm_eps: of the queries' RMS norm.
      scale, softcap: as in `attend`.
      generation: name of the TPU's, in `gqe_jax.tpu.GENERATIONS`.
      block_sizes: in place of the tuned ones.
      has_kv_head: each group says which KV head it reads.
      interpret: what `pallas_call` takes.
    """

    batch: int
    num_groups: int
    num_experts: int
    num_slots: int
    head_dim: int
    norm_dim: int
    groups_per_block: int
    q_len: int
    kv_len: int
    rope_batch: int
    norm_eps: float
    scale: float
    softcap: float | None
    dtype: jnp.dtype
    mask: MaskKind
    generation: str
    block_sizes: BlockSizes
    interpret: object
    has_kv_head: bool = False

    @functools.cached_property
    def blocks(self) -> Blocks:
        """The block sizes of the forward kernel."""
        return vmem.fitting_blocks(self)

    @functools.cached_property
    def backward_blocks(self) -> BackwardBlocks:
        """The block sizes of the backward kernel."""
        return backward_blocks(self)

    @functools.cached_property
    def schedule(self) -> BlockSchedule:
        """The order in which the forward kernel visits blocks."""
        blocks = self.blocks
        return make_schedule(self.mask, self.q_len, self.kv_len, blocks.block_q, blocks.block_kv, blocks.unit)

    @property
    def vmem_limit_bytes(self) -> int:
        """What a kernel may take of a core's VMEM."""
        return GENERATIONS[self.generation].kernel_vmem

    @property
    def width(self) -> int:
        """W: lanes of a block of K and V."""
        return self.groups_per_block * self.head_dim

    @property
    def padded_q_len(self) -> int:
        """S, rounded up to whole rows of lanes: the length of q, o and lse in the kernels."""
        return round_up(self.q_len, LANES)

    @property
    def exact(self) -> bool:
        """Whether results are to be right to float32."""
        return self.dtype == jnp.float32

    @property
    def query_factor(self) -> float:
        """The factor on float32 queries that turns q·k into base-2 scores, or into the argument of tanh."""
        return self.scale * LOG2_E if self.softcap is None else self.scale / self.softcap

    @property
    def cap_factor(self) -> float:
        """The factor from tanh to base-2 scores."""
        return self.softcap * LOG2_E

    @property
    def ends_within_unit(self) -> bool:
        """Whether the last unit holds keys past T."""
        return self.kv_len % self.blocks.unit != 0

    def all_see(self, count: int, others: int) -> bool:
        """Says whether each of `count` queries is known to see one of `others` keys, or each key to be seen by a
        query."""
        mask = self.mask
        meets_itself = (mask.aligned and count <= others) or not (mask.causal or mask.window)
        return meets_itself and not mask.has_length and not mask.has_segments

    def has_hidden_keys(self, block: int) -> bool:
        """Says whether there may be keys that no query sees, or that lie past the array's end in blocks of that size:
        memory
        may hold anything there."""
        return round_up(self.kv_len, LANES) % block != 0 or not self.all_see(self.kv_len, self.q_len)

    def read_bounds(self, scalar_refs, b, i):
        """(first, whole_first, whole_end, end) of q block i, in kv blocks; None where they are in closed form."""
        if not self.schedule.bounded:
            return None
        count = self.schedule.num_q_blocks
        return [scalar_refs[0][(n * self.batch + b) * count + i] for n in range(4)]

    def read_limits(self, scalar_refs, b):
        """(q position − kv position of the first tokens, first key index past the end)."""
        if self.mask.aligned and not self.mask.has_length:
            return 0, self.kv_len
        return scalar_refs[-1][b], scalar_refs[-1][self.batch + b]

    def cost_estimate(self, num_matmuls: int) -> pl.CostEstimate:
        """Tells XLA's scheduler what the kernel costs: about half of the scores, if causal."""
        pairs = self.q_len * self.kv_len // (2 if self.mask.causal else 1)
        pairs *= self.batch * self.num_groups * self.num_slots
        tokens = self.batch * self.num_groups * self.head_dim * self.dtype.itemsize
        return pl.CostEstimate(
            flops=2 * num_matmuls * pairs * self.head_dim,
            transcendentals=pairs,
            bytes_accessed=tokens * (self.q_len * (self.num_experts + self.num_slots) + 2 * self.kv_len),
        )
