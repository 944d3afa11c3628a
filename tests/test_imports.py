"""What `import hydragen` brings along: torch and numpy, and nothing that a user may lack.

Each question needs a fresh interpreter, and importing torch takes seconds: so a few of them answer all.
"""

import subprocess
import sys

import pytest

# Slow to import, or absent: Triton is published for Linux only, the others are extras.
OPTIONAL = ["triton", "hypothesis", "transformers", "matplotlib", "tqdm", "pytest"]

BRINGS = """
import torch
before = set(sys.modules)
import hydragen
print("import:", *sorted(set(sys.modules) - before))
q, k = torch.zeros(2, 1, 4, 8), torch.zeros(1, 5, 2, 8)
hydragen.attention(q, [(k, k)])
print("attention:", *sorted(set(sys.modules) - before))
"""

WITHOUT = """
import torch, hydragen
q, p, s = torch.randn(2, 1, 4, 8), torch.randn(1, 5, 2, 8), torch.randn(2, 3, 2, 8)
levels = [(p, p), (s, s)]
assert hydragen.attention(q, levels).shape == q.shape
state = hydragen.attention(q, levels, backend="reference", causal=True, return_lse=True)
assert hydragen.merge_states([state, state]).lse.shape == (2, 1, 4)
assert "└─" in str(hydragen.PrefixTree.from_token_ids([[1, 2, 3], [1, 2, 4]]))
for name in hydragen.__all__:
    assert getattr(hydragen, name).__doc__, name
print("public:", *sorted(hydragen.__all__))

try:
    hydragen.attention(q, levels, backend="triton")
except ValueError as error:
    print("triton:", error)

from hydragen.testing import Problem, assert_within_budget, oracle
problem = Problem(parents=(-1,), kv_lens=(3,), row_to_node=(0,), q_lens=(1,))
truth = oracle(problem)
assert_within_budget(problem, truth.out.float(), truth.lse.float())
try:
    from hydragen.testing import problems
except ImportError as error:
    print("hypothesis:", error)
"""


def answers(code: str, missing: list[str] | None = None) -> dict[str, str]:
    """Run `code` in a new interpreter without the packages `missing`; what it printed, by its first word."""
    blocked = "".join(f"sys.modules[{name!r}] = None\n" for name in missing or [])
    program = [sys.executable, "-W", "error", "-c", f"import sys\n{blocked}{code}"]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(line.split(": ", 1) for line in done.stdout.splitlines())


@pytest.fixture(scope="module")
def brings() -> dict[str, str]:
    return answers(BRINGS)


@pytest.fixture(scope="module")
def without() -> dict[str, str]:
    return answers(WITHOUT, missing=OPTIONAL)


@pytest.mark.parametrize("name", OPTIONAL)
def test_import_does_not_bring(name: str, brings: dict[str, str]) -> None:
    assert name not in brings["import"].split()
    assert "hydragen.work" in brings["import"].split()


def test_attention_on_a_cpu_does_not_bring_triton(brings: dict[str, str]) -> None:
    assert "hydragen.backends.reference" in brings["attention"].split()
    assert "hydragen.backends.triton" not in brings["attention"].split()


def test_works_without_what_is_optional(without: dict[str, str]) -> None:
    names = set(without["public"].split())
    assert {"attention", "merge_states", "AttentionState", "PackedKV", "PrefixTree"} <= names


def test_triton_missing_is_said(without: dict[str, str]) -> None:
    assert "backend 'triton' needs the package triton, which cannot be imported here" in without["triton"]
    assert '; install triton or pass backend="reference"' in without["triton"]


def test_hypothesis_missing_is_said(without: dict[str, str]) -> None:
    """The judge needs no Hypothesis; only the strategies do."""
    assert "needs Hypothesis" in without["hypothesis"]


def test_the_reference_stands_alone() -> None:
    answers(
        "import hydragen_reference.decomposed, hydragen_reference.oracle", missing=["hydragen", *OPTIONAL]
    )
