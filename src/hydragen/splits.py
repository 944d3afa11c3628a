"""Over how many programs a segment's keys are split, and how long programs keep the memory busy.

No device is touched here; docs/experiments.md has the measurements behind what is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from hydragen.host_ints import IntArray
from hydragen.prefix_tiles import WIDE_SHARE, left_over
from hydragen.target import Target
from hydragen.tiles import Tile

# Keys per split under batch_invariant: fixed, so that no neighbour in the batch moves a boundary.
INVARIANT_SPLIT = 2048
# Start and end of a program: table, queries, first keys; the partial.
_PROGRAM_SECONDS = 3e-6
# What one more partial of a token costs the merge where nothing hides it.
_PARTIAL_SECONDS = 0.04e-6
# Share of the device's peak that a compute-bound tile reaches.
_COMPUTE_EFFICIENCY = 0.6
# What other launches take beyond their traffic where they run after one that nothing fits beside; and the
# part of them that is slow to end, as its programs share the few multiprocessors that were free. Fitted to
# docs/experiments.md, 31 and 32.
_AFTERWARDS_SECONDS = 8e-6
_SLOW_END = 0.25
# Bytes per second that one program of the smallest tile streams: what it has in flight over the latency of
# memory.
_PROGRAM_BANDWIDTH = 40e9


def stream_seconds(
    programs: int, size: float, tile: Tile, target: Target, occupied: int, beside: int
) -> float:
    """Return how long programs that each read `size` bytes keep the memory busy.

    If all find a place at once, the fullest multiprocessor decides, since nothing evens out the end; so a few
    more programs than that are better than a few less. Fitted to docs/experiments.md, 15.

    Parameters
    ----------
    programs : int
    size : float
    tile : Tile
        `resident` of it fit a free multiprocessor.
    target : Target
    occupied, beside : int
        Multiprocessors that hold a program of another launch, and how many of these fit beside it.
    """
    if target.arch < 90:
        occupied = 0  # launches follow one another
    if beside == 0:  # these run afterwards
        occupied = 0
    free = target.num_sms - occupied
    share = target.bandwidth / target.num_sms  # of one multiprocessor
    slots = free * tile.resident + occupied * beside
    for fullest in range(1, tile.resident + 1):
        if free * fullest + occupied * min(fullest, beside) >= programs:
            return 1.2 * fullest * size / min(share, 0.75 * share * fullest)
    most = beside if occupied > free else tile.resident
    return programs * (size / target.bandwidth + 0.4e-6 / slots) + 0.15 * most * size / share


def exclusive_seconds(busy: float, programs: int, beside: float, target: Target) -> float:
    """Return how long a launch and all others take, if nothing fits beside its programs.

    The others run on the multiprocessors that it leaves free, and afterwards: a split less than would fill
    the device may be the better choice. Not several tasks a program, which a device at its limit of power
    does not reward: those are taken to leave nothing free.

    Parameters
    ----------
    busy : float
        Seconds that the launch takes.
    programs : int
        Of the launch, one on a multiprocessor if there are so many.
    beside : float
        Seconds of memory traffic of all others.
    """
    alone = beside + _AFTERWARDS_SECONDS
    left = left_over(alone, busy, programs, target.num_sms)
    return busy + left + min(left, _SLOW_END * alone)


def split_size(
    kv_lens: IntArray,
    programs: IntArray,
    tile: Tile,
    target: Target,
    batch_invariant: bool,
    *,
    flops_per_key: float,
    bytes_per_key: float,
    seconds_per_split: float,
    beside: float,
) -> int:
    """Return the most keys that one program attends to, a multiple of `tile.step`.

    A small batch over a long prefix leaves most of the device idle unless the prefix is split over programs;
    but every split costs a partial per row.

    Parameters
    ----------
    kv_lens : int64 [segments]
        Keys in each segment that is attended with this tile.
    programs : int64 [segments]
        Programs per split of each segment (row blocks x blocks of KV heads).
    flops_per_key, bytes_per_key : float
        Of one program.
    seconds_per_split : float
        What one more split of all segments costs in partials written and read.
    beside : float
        Seconds of memory traffic that other launches have beside this one: being faster than they are gains
        nothing, and one program per multiprocessor leaves them room, or none (`exclusive_seconds`).
    """
    if batch_invariant:
        return INVARIANT_SPLIT
    longest, step = int(kv_lens.max()), tile.step
    best = -(-longest // step) * step
    if longest <= 6 * step:  # two splits would have less than four steps
        return best
    slots = target.num_sms * (1 if beside and tile.block_m > 16 else tile.resident)
    exclusive = beside > 0 and tile.prefix is not None and tile.prefix.beside == 0
    efficiency = WIDE_SHARE if exclusive else _COMPUTE_EFFICIENCY
    compute = flops_per_key * slots / (efficiency * target.flops)  # seconds per key of a busy device
    latency = bytes_per_key / _PROGRAM_BANDWIDTH  # seconds per key of a program alone
    keys = int(programs.dot(kv_lens))
    few = beside == 0 and keys < 2 * target.num_sms * longest
    traffic = keys * bytes_per_key / target.bandwidth

    def seconds(num_splits: int, size: int, total: int) -> float:
        # few programs: a partly filled last wave is felt in full; many: the scheduler evens it out
        waves = -(-total // slots) if total < 8 * slots else total / slots
        if exclusive:
            busy = -(-total // slots) * (size * compute + _PROGRAM_SECONDS)
            return exclusive_seconds(busy, total, beside, target) + num_splits * seconds_per_split
        if tile.block_m > 16:
            busy = waves * (size * compute + _PROGRAM_SECONDS)
        elif few:
            # counted in whole splits; a few places are left free, or the last programs wait for one
            whole = math.ceil(keys / size / 0.95)
            busy = stream_seconds(whole, size * bytes_per_key, tile, target, 0, 0) + _PROGRAM_SECONDS
            busy += num_splits * _PARTIAL_SECONDS
        elif total < 8 * slots:
            busy = max(traffic, waves * (size * latency + _PROGRAM_SECONDS))
        else:  # as many keys as there are, however long the longest segment is
            busy = max(traffic, (keys * latency + total * _PROGRAM_SECONDS) / slots)
        return max(busy, beside) + num_splits * seconds_per_split

    best_time = seconds(1, best, int(programs.sum()))
    # however soon all is read, so many splits and more cost too much
    least = beside if tile.block_m > 16 or few else max(traffic, beside)
    sizes = _split_sizes(longest, step, lambda count: least + count * seconds_per_split < 0.97 * best_time)
    totals = _programs_of_splits(kv_lens, programs, list(sizes.values()))
    for (num_splits, size), total in zip(sizes.items(), totals, strict=True):
        time = seconds(num_splits, size, total)
        if time < best_time * 0.97:
            best, best_time = size, time
    return best


def _split_sizes(longest: int, step: int, is_cheap: Callable[[int], bool]) -> dict[int, int]:
    """Return the sizes of 2 to 128 splits, four steps and more, while cheap; of equal ones the first."""
    sizes = {}
    before = -(-longest // step)
    for count in range(2, min(-(-longest // (3 * step)), 129)):
        if not is_cheap(count):
            break
        steps = -(-longest // (count * step))
        if steps < before:
            sizes[count] = steps * step
            before = steps
    return sizes


def _programs_of_splits(kv_lens: IntArray, programs: IntArray, sizes: list[int]) -> list[int]:
    """Return for each size the sum of ceil(kv_lens / size) * programs.

    In float64, which is exact up to 2**52 and divides many times as fast; by einsum, which wakes no threads.
    """
    if not sizes:
        return []
    longest, num_programs = int(kv_lens.max()), int(programs.sum())
    if longest == int(kv_lens.min()):
        return [-(-longest // size) * num_programs for size in sizes]
    splits = np.divide(kv_lens, np.array(sizes)[:, None])
    np.ceil(splits, out=splits)
    totals = np.einsum("ij,j->i", splits, programs.astype(np.float64))
    return [int(total) for total in totals.tolist()]
