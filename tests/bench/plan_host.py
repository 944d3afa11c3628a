"""What a call costs the host: a run of a ready plan, its launches alone, and a call of `attention`."""

from collections.abc import Callable
from typing import Any
from unittest import mock

from shapes import Inputs
from timing import host_seconds
from torch import Tensor

import hydragen

Run = Callable[[], Tensor]


def planned(inputs: Inputs, **options: Any) -> Run:
    """A run of a plan made for these inputs; the plan lives as long as it."""
    shape, kv = inputs.shape, inputs.kv
    if inputs.paged is not None:
        options["kv_lens"] = shape.tree.kv_lens.tolist()
    plan = hydragen.plan(shape.tree, kv, num_q_heads=shape.num_q_heads, q_len=shape.q_len, **options)
    return lambda: plan.run(inputs.q, kv, causal=shape.causal)


def launches_alone(run: Run) -> Callable[[], None]:
    """What `run` launches, through Triton's own launcher and nothing else; of the reference: nothing."""
    try:
        from hydragen.backends.launch import Launcher  # noqa: PLC0415 (the harness is tested without triton)
    except ImportError:
        return lambda: None
    launch, calls = Launcher.__call__, []

    def record(self: Launcher, tensors: tuple[Any, ...], aligned: tuple[bool, ...]) -> None:
        launch(self, tensors, aligned)
        calls.append((self._ready.get(aligned), (*tensors, *self._rest)))

    run()
    run()  # from the second on a launch goes past Triton's own checks
    with mock.patch.object(Launcher, "__call__", record):
        run()
    return lambda: [launcher(*arguments) for launcher, arguments in calls if launcher is not None]


def host_costs(inputs: Inputs, call: Run, synchronize: Callable[[], None]) -> dict[str, float]:
    """Median µs until control is back: of `call`, of a plan's run and its launches, of making the plan."""
    run = planned(inputs)
    launches = launches_alone(run)
    seconds = {
        "attention": host_seconds(call, synchronize),
        "run": host_seconds(run, synchronize, 100),
        "launches": host_seconds(launches, synchronize, 100),
        "plan": host_seconds(lambda: planned(inputs), synchronize, 5),
    }
    return {name: round(value * 1e6, 1) for name, value in seconds.items()}
