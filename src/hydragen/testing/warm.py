"""Call an implementation once for every configuration, in processes side by side, before it is judged.

Kernels are compiled at their first call, one after the other in one process. Compilers keep what they made on
disk, so what these processes compile at the same time is only loaded by the one that judges.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from hydragen.testing.conformance.capabilities import Capabilities
from hydragen.testing.conformance.subject import adapt, load
from hydragen.testing.device_inputs import draw_inputs
from hydragen.testing.forests import configurations, draw_forest, inputs_for


def warm_up(
    path: str,
    can: Capabilities,
    *,
    seed: int,
    num_configurations: int,
    batch: int,
    processes: int,
    seconds: float,
) -> float:
    """Make the first calls of `hydragen.testing.scale.run_scale` in other processes.

    What goes wrong in them is left to the run itself to find. Processes that need longer are ended.

    Parameters
    ----------
    path
        The implementation, as ``module:function``.
    processes
        How many; each has its share of the configurations.

    Returns
    -------
    float
        Seconds that it took.
    """
    began = time.monotonic()
    context = multiprocessing.get_context("spawn")
    shares = [range(first, num_configurations, processes) for first in range(processes)]
    started = []
    for share in shares:
        arguments = (path, can, seed, num_configurations, batch, share)
        started.append(context.Process(target=_call, args=arguments, daemon=True))
        started[-1].start()
    for process in started:
        process.join(max(0.0, seconds - (time.monotonic() - began)))
        if process.is_alive():
            process.terminate()
    return time.monotonic() - began


def _call(
    path: str, can: Capabilities, seed: int, num_configurations: int, batch: int, share: Sequence[int]
) -> None:
    implementation = adapt(load(path), can)
    chosen = configurations(can, num_configurations, np.random.default_rng(seed))
    for number in share:
        forest = draw_forest(can, chosen[number], batch, np.random.default_rng([seed, number]))
        inputs: Any = draw_inputs(forest.problem, can.device)
        try:
            implementation(forest.problem, inputs_for(forest, inputs))
        except Exception as error:  # noqa: BLE001 - whatever it is, the run itself counts it
            sys.stderr.write(f"first call of configuration {number}: {error!r:.200}\n")
