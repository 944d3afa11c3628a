"""What measures is tested on a CPU: small shapes, fake timers, wrong results."""

import math
import os

import pytest
import torch
from cell import Bench, check, cpu_bench, measure
from contenders import Unshared, contenders, flex
from exact import assert_exact, solve
from facts import ceilings, machine
from merge_kernel import launch_merge
from shapes import BANDWIDTH, PEAK_FLOPS, PEERS, build, shape, uneven
from suites import FIFTY_TWO, MORE, WITH_FLEX
from timing import CLOCK, HostTimer, host_seconds, report, sample
from torch_kernels import flash, merge

import hydragen

ALL = [*FIFTY_TWO, *(this for group in MORE.values() for this in group)]
TINY = [
    shape("4/2 B4 P24 S5 d16 fp32"),
    shape("4/1 B3 P24 S0 d16"),
    shape("2/2 B4 P16 S4 d16"),
    shape("4/2 1x8>2x6>4x5 d16 fp32"),
    shape("4/2 2x8>4x5 d16 fp16"),
    shape("4/2 B3 P24 S5 q4 d16 fp32"),
    shape("4/2 B4 P24 S5 d16 fp32 pages4"),
    shape("4/2 1x8>2x6>4x5 q2 d16 pages16"),
]


class FakeTimer(HostTimer):
    """Tells how long each took: 1 s for the first made ready, 2 s for the second, ..."""

    def __init__(self):
        self.made = []

    def ready(self, run):
        run()
        self.made.append(run)
        return len(self.made)

    def time(self, ready):
        return float(ready)


def fake_bench(limit: float = 1e9) -> Bench:
    return cpu_bench()._replace(timer=FakeTimer(), facts={"device": "fake"}, limit=limit)


def test_names_are_unique_and_the_52_come_first():
    names = [this.name for this in ALL]
    assert len(FIFTY_TWO) == 52
    assert len(set(names)) == len(names)
    assert set(names) >= WITH_FLEX
    assert [name for name in names if name in PEERS] == names[:52] == list(PEERS)


def test_roofs_are_those_of_the_peers_file():
    for this in FIFTY_TWO:
        assert this.roof * 1e6 == pytest.approx(PEERS[this.name].roof_us, rel=2e-3, abs=0.06), this.name


def test_least_work_by_hand():
    this = shape("4/2 B3 P10 S6 q2 d16")
    # causal: of 16 keys the first of two queries does not see the last
    assert this.flops == 4 * 16 * 4 * 3 * (16 + 15)
    assert this.num_bytes == 2 * 16 * 2 * ((10 + 3 * 6) * 2 + 3 * 2 * 4)
    assert this.unshared_bytes == 2 * 16 * 2 * 3 * 16 * 2
    assert this.roof == max(this.flops / PEAK_FLOPS, this.num_bytes / BANDWIDTH)


def test_trees_by_name():
    this = shape("32/8 1x4096>8x1024>256x256")
    assert (this.batch, this.tree.num_nodes, set(this.tree.path_lens.tolist())) == (256, 265, {5376})
    assert shape("8/1 B5 P7 S0").tree.path_lens.tolist() == [7] * 5
    for bad in ("32/8 B4 S3 P2", "32/8 B4 P3 S2 z9"):
        with pytest.raises(ValueError, match="name"):
            shape(bad)


def test_uneven_trees_come_from_the_seed_and_keep_rows_in_tree_order():
    two, three = MORE["uneven"]
    assert two == uneven(two.name, groups=100)
    assert (two.tree.level_nodes[0].size, three.tree.num_levels) == (100, 3)
    for this in (two, three):
        assert this.tree.row_order.tolist() == list(range(this.batch))
        assert len(set(this.tree.path_lens.tolist())) > 100


@pytest.mark.parametrize("this", [*TINY, uneven("uneven", groups=3, longest=30)], ids=str)
def test_everybody_computes_the_same(this):
    inputs, _, truth = check(this, cpu_bench())
    forms = {}
    for other in contenders(inputs, 1e9, with_flex=False):
        if other.name != "cudnn":
            forms |= {f"{other.name} {form}": call for form, call in other.forms().items()}
    assert len(forms) == 2 + (this.q_len == 1 and this.group_size > 1 and this.levels is not None)
    for name, call in forms.items():
        assert_exact(truth, call(), name)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_computes_the_same():
    inputs, _, truth = check(shape("4/2 B4 P24 S8 d16 fp32"), cpu_bench())
    for name, call in flex(inputs, compiled=False).items():
        assert_exact(truth, call(), name)


@pytest.mark.parametrize("this", [shape("4/2 B40 P8000 S5 d16"), shape("4/2 B40 P8000 S5 q2 d16")], ids=str)
def test_a_wrong_suffix_after_a_long_prefix_is_seen(this):
    inputs = build(this, "cpu")
    truth = solve(inputs)
    assert 8 <= len(truth.rows) < 40
    prefix, (k, v) = inputs.levels
    right = hydragen.attention(inputs.q, [prefix, (k, v)], causal=this.causal)
    assert_exact(truth, right, "right")
    wrong = hydragen.attention(inputs.q, [prefix, (k.roll(1, 0), v.roll(1, 0))], causal=this.causal)
    with pytest.raises(AssertionError, match=r"wrong: row .* budget"):
        assert_exact(truth, wrong, "wrong")
    with pytest.raises(AssertionError, match="not finite"):
        assert_exact(truth, right * math.nan, "wrong")


def test_a_wrong_result_gets_no_time():
    bench = fake_bench()
    with pytest.raises(AssertionError, match="hydragen: row"):
        measure(TINY[0], bench, run=lambda inputs: lambda: torch.zeros_like(inputs.q))
    assert bench.timer.made == []


def test_a_cell():
    cell = measure(TINY[0], fake_bench())
    info = cell.info
    # fa2 in two forms took 1 and 2 s, the original 3 s, we 4 s
    assert info["us"] == 4e6
    assert set(cell.samples) == {4.0}
    assert info["baselines"]["fa2"] == {
        "shares": False,
        "us": 1e6,
        "form": "grouped",
        "rounds": 7,
        "time_ratio": 4.0,
    }
    assert info["baselines"]["original"]["time_ratio"] == pytest.approx(4 / 3, abs=1e-4)
    assert info["baselines"]["cudnn"] == {"shares": False, "left_out": {"all": "cuDNN needs a GPU"}}
    assert info["best_unshared"] == {"name": "fa2", "us": 1e6, "time_ratio": 4.0}
    assert info["times_roof"] == pytest.approx(4 / TINY[0].roof, rel=1e-3)
    assert info["host_us"].keys() == {"attention", "run", "launches", "plan"}
    assert info["host_us"]["run"] > 0
    assert info["batch_invariant_us"] > 0
    assert "best_peer_of_another_run" not in info


def test_copies_that_do_not_fit_are_left_out_with_the_reason():
    info = measure(TINY[0], fake_bench(limit=100)).info
    assert "copied keys and values take" in info["baselines"]["fa2"]["left_out"]["all"]
    assert "best_unshared" not in info
    with pytest.raises(Exception, match="more than"):
        _ = Unshared(build(TINY[0], "cpu"), 100).padded


def test_samples_are_taken_in_turn():
    timer = FakeTimer()
    order = []
    timer.time = lambda ready: order.append(ready) or ready
    samples = sample(timer, {"fast": 0.01, "slow": 1.0}, seconds=0.1, least=2, most=50)
    assert {name: len(times) for name, times in samples.items()} == {"fast": 10, "slow": 2}
    assert order[6:11] == [0.01, 1.0, 0.01, 1.0, 0.01]
    assert host_seconds(lambda: None, lambda: None) < 0.1


@pytest.mark.benchmark(timer=CLOCK, group="harness")
def test_statistics_are_of_the_samples(benchmark):
    report(benchmark, [3e-6, 1e-6, 2e-6])
    if not benchmark.disabled:
        stats = benchmark.stats.stats
        assert stats.rounds == 3
        assert stats.median == pytest.approx(2e-6, rel=1e-6)
        assert stats.data == pytest.approx([3e-6, 1e-6, 2e-6], rel=1e-6)


def test_facts():
    found = ceilings(HostTimer(), torch.device("cpu"), size=16, copy_bytes=1 << 10)
    assert set(found) == {"matmul_tflops", "copy_tbs", "empty_graph_us"}
    assert machine(torch.device("cpu"))["torch"] == torch.__version__


@pytest.mark.triton
@pytest.mark.parametrize("num_states", [2, 3])
def test_merge_kernel(num_states):
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q = torch.randn(2, 6, 5, 24, device=device, dtype=torch.float16)
    parts = [torch.randn(2, 2, n, 24, device=device, dtype=torch.float16) for n in (7, 3, 9)[:num_states]]
    states = []
    for i, kv in enumerate(parts):
        out, lse = (
            flash(q, kv, kv) if device == "cuda" else (x.half() for x in flash(q.float(), *2 * [kv.float()]))
        )
        out, lse = out.transpose(1, 2).reshape(10, 6, 24), lse.float()
        # each state may have another grouping of the ten tokens
        states.append((out, lse.transpose(0, 1).reshape(1, 6, 10) if i == 1 else lse))
    expected = merge([(out.cpu(), lse.cpu()) for out, lse in states])
    torch.testing.assert_close(launch_merge(states).cpu(), expected, rtol=2e-3, atol=2e-3)
