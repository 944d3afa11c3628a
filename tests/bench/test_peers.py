"""The shapes of peers_h200.csv, on a GPU."""

import pytest
from suites import FIFTY_TWO
from timing import CLOCK

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.benchmark(timer=CLOCK, group="52"),
    pytest.mark.filterwarnings("default"),  # what torch warns about is no reason to lose a measurement
]


@pytest.mark.parametrize("shape", FIFTY_TWO, ids=str)
def test_peers(run_cell, shape):
    run_cell(shape)
