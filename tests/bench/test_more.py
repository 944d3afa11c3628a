"""More shapes than those of peers_h200.csv, on a GPU: what else users have, and where sharing could lose."""

import pytest
from suites import MORE
from timing import CLOCK

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # what torch warns about is no reason to lose a measurement
]


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize(
    ("group", "shape"),
    [pytest.param(group, shape, id=str(shape)) for group, shapes in MORE.items() for shape in shapes],
)
def test_more(benchmark, run_cell, group, shape):
    benchmark.group = group
    run_cell(shape)
