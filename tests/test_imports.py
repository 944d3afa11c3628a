"""What `import hydragen` brings along: torch and numpy, and nothing that a user may lack."""

import subprocess
import sys
import textwrap
from functools import lru_cache

import pytest

# Slow to import, or absent: Triton is published for Linux only, the others are extras.
OPTIONAL = ["triton", "hypothesis", "transformers", "matplotlib", "tqdm", "pytest"]

ATTEND = """
import torch, hydragen
q, p, s = torch.randn(2, 1, 4, 8), torch.randn(1, 5, 2, 8), torch.randn(2, 3, 2, 8)
levels = [(p, p), (s, s)]
assert hydragen.attention(q, levels).shape == q.shape
state = hydragen.attention(q, levels, backend="reference", causal=True, return_lse=True)
assert hydragen.merge_states([state, state]).lse.shape == (2, 1, 4)
print(hydragen.PrefixTree.from_token_ids([[1, 2, 3], [1, 2, 4]]))
"""


def run(code: str, missing: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new interpreter in which the packages `missing` cannot be imported."""
    blocked = "".join(f"sys.modules[{name!r}] = None\n" for name in missing or [])
    program = f"import sys\n{blocked}{textwrap.dedent(code)}"
    return subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True)


@lru_cache
def modules_after(code: str) -> set[str]:
    done = run(f"{code}\nprint('modules:', *sorted(sys.modules))")
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].removeprefix("modules: ").split())


@pytest.mark.parametrize("name", OPTIONAL)
def test_import_does_not_bring(name: str) -> None:
    # torch brings some of them along by itself, depending on its version
    assert name not in modules_after("import hydragen") - modules_after("import torch")


def test_attention_on_a_cpu_does_not_bring_triton() -> None:
    assert "hydragen.backends.triton" not in modules_after(ATTEND)


def test_works_without_what_is_optional() -> None:
    done = run(ATTEND, missing=OPTIONAL)
    assert done.returncode == 0, done.stderr


def test_triton_missing_is_said() -> None:
    code = """
    import torch, hydragen
    x = torch.zeros(1, 1, 1, 8)
    try:
        hydragen.attention(x, [(x, x)], backend="triton")
    except ValueError as error:
        print(error)
    """
    done = run(code, missing=["triton"])
    assert done.returncode == 0, done.stderr
    assert "backend 'triton' needs the package triton, which cannot be imported here" in done.stdout
    assert '; install triton or pass backend="reference"' in done.stdout


def test_the_reference_alone() -> None:
    done = run(
        "import hydragen_reference.decomposed, hydragen_reference.oracle", missing=["hydragen", *OPTIONAL]
    )
    assert done.returncode == 0, done.stderr


def test_testing_without_hypothesis() -> None:
    """The judge needs no Hypothesis; only the strategies do, and say so."""
    code = """
    from hydragen.testing import Problem, assert_within_budget, oracle
    problem = Problem(parents=(-1,), kv_lens=(3,), row_to_node=(0,), q_lens=(1,))
    truth = oracle(problem)
    assert_within_budget(problem, truth.out.float(), truth.lse.float())
    try:
        from hydragen.testing import problems
    except ImportError as error:
        print(error)
    """
    done = run(code, missing=["hypothesis"])
    assert done.returncode == 0, done.stderr
    assert "hypothesis" in done.stdout.lower()


def test_public_names() -> None:
    code = """
    import hydragen
    for name in hydragen.__all__:
        assert getattr(hydragen, name).__doc__, name
    print(*sorted(hydragen.__all__))
    """
    done = run(code)
    assert done.returncode == 0, done.stderr
    names = set(done.stdout.split())
    assert {"attention", "merge_states", "AttentionState", "PackedKV", "PrefixTree"} <= names
