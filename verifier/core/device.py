"""What is known of each kind of device: rates that turn counted work into time, and how much to take at once.

All are orders of magnitude that decide how much is tried, never what is proved. Rates differ by what is counted: the
same device does more of the batched matrix products of an attack per second than of the mixed work of a walk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch  # names and facts are needed without it


@dataclass(frozen=True)
class DeviceFacts:
    """One kind of device. FLOP are counted multiplications and additions; bytes, points and entries are at most.

    Attributes:
        walk_flops: FLOP per second of bounds at the root, as the strategy counts them.
        chunk_flops: FLOP of a chunk of rows at the root, elementwise work included: the clock is looked at after each.
        child_flops: FLOP per second of bounding and certifying the children of domains on a compact network.
        child_fixed_work: FLOP that the elementwise work on one child is worth, besides its matrices.
        probes: sides of splits that are probed per domain where the configuration leaves it open.
        neuron_batch_numbers: numbers in the widest tensor of a batch of a neuron search.
        free_batch_numbers: numbers in the widest table of such a batch up to which calling kernels takes longer than
            their work; ``None``: in any batch.
        box_batch_bytes: bytes of coefficients that a batch of an input search keeps alive.
        box_round_bytes: bytes of the bounds of all boxes of a round of an input search.
        attack_work: multiply-adds of a whole attack at the default restarts and steps.
        attack_step_work: multiply-adds of one gradient step, after which the deadline is looked at.
        attack_moving_entries: entries of the tables of points that move together.
        attack_batch_bytes: bytes of activations that a pass over a batch of points keeps alive.
        attack_batch_points: points of such a batch.
        sampling_work: multiply-adds that sampling before the first gradient costs in all.
        sampling_points: points of one box that are sampled.
        sampling_point_work: multiply-adds that making, keeping and judging a point is worth besides the network.
        direct_float32: float32 kernels obey the error bound of inner products: convolutions are direct and products in
            full precision, so that a first pass in float32 pays.
    """

    walk_flops: float
    chunk_flops: float
    child_flops: float
    child_fixed_work: float
    probes: int
    neuron_batch_numbers: int
    free_batch_numbers: int | None
    box_batch_bytes: int
    box_round_bytes: int
    attack_work: float
    attack_step_work: float
    attack_moving_entries: int
    attack_batch_bytes: int
    attack_batch_points: int
    sampling_work: float
    sampling_points: int
    sampling_point_work: float
    direct_float32: bool


CPU = DeviceFacts(
    walk_flops=2e10,
    chunk_flops=2.5e9,
    child_flops=4e10,
    child_fixed_work=2.5e6,
    probes=4,
    neuron_batch_numbers=1 << 18,  # near the caches
    free_batch_numbers=1 << 15,
    box_batch_bytes=32 << 20,
    box_round_bytes=2 << 30,
    attack_work=4e10,
    attack_step_work=5e8,
    attack_moving_entries=1 << 23,
    attack_batch_bytes=256 << 20,
    attack_batch_points=1 << 14,
    sampling_work=2e9,
    sampling_points=1 << 15,
    sampling_point_work=0.0,
    direct_float32=True,
)
CUDA = DeviceFacts(
    walk_flops=1e13,
    chunk_flops=2.5e12,
    child_flops=3.5e13,
    child_fixed_work=6e7,
    probes=0,  # probing takes as long as what it saves
    neuron_batch_numbers=1 << 25,
    free_batch_numbers=None,
    box_batch_bytes=4 << 30,
    box_round_bytes=16 << 30,
    attack_work=3e13,
    attack_step_work=3e12,
    attack_moving_entries=1 << 27,
    attack_batch_bytes=4 << 30,
    attack_batch_points=1 << 17,
    sampling_work=4e11,
    sampling_points=1 << 20,
    sampling_point_work=2e3,
    direct_float32=False,  # convolutions may be Winograd or FFT; float64 is fast
)
_KINDS = {"cpu": CPU, "cuda": CUDA}


def facts(device: torch.device | str) -> DeviceFacts:
    """What is known of a device, or of a kind of devices by its name."""
    return _KINDS[device if isinstance(device, str) else device.type]


_GIB = 1 << 30
_CPU_CHUNK = 256 << 20
_LEAST_CHUNK, _MEMORY_STEP = 64 << 20, 4 * _GIB


def default_chunk_bytes(device: torch.device) -> int:
    """``memory.chunk_bytes`` where it is left open: the largest power of two in a sixteenth of a GPU's memory.

    Memory is counted as it is sold, in steps of 4 GiB: what drivers keep for themselves differs, and equal GPUs are to
    make equal chunks.
    """
    if device.type == "cpu":
        return _CPU_CHUNK
    import torch  # names and facts are needed without it

    return chunk_bytes_for(torch.cuda.get_device_properties(device).total_memory)


def chunk_bytes_for(memory: int) -> int:
    """The default for a GPU that reports so many bytes."""
    nominal = -(-memory // _MEMORY_STEP) * _MEMORY_STEP
    return max(_LEAST_CHUNK, 1 << ((nominal // 16).bit_length() - 1))
