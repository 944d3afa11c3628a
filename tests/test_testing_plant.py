"""Planting replaces one piece of source text, everywhere in the package or nowhere, and puts it back."""

import importlib
import subprocess
import sys
import textwrap

import pytest

from hydragen.testing import plant, planted

PACKAGE = {
    "__init__.py": "",
    "low.py": """
        LIMIT = 3
        TABLE = {1: 1}
        def double(x):
            return 2 * x
        class Box:
            size = LIMIT
    """,
    "high.py": """
        from plantation.low import LIMIT, TABLE, Box, double
        def answer(x):
            return double(x) + LIMIT
    """,
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "plantation"
    folder.mkdir()
    for name, text in PACKAGE.items():
        (folder / name).write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(str(tmp_path))
    import plantation.high  # noqa: PLC0415 - made by this test
    import plantation.low  # noqa: PLC0415 - the same

    yield plantation
    for name in [name for name in sys.modules if name.partition(".")[0] == "plantation"]:
        del sys.modules[name]


def test_a_copy_is_changed_and_the_original_is_not(package):
    copy = plant("plantation.low", "2 * x", "3 * x")
    assert copy.double(2) == 6
    assert package.low.double(2) == package.high.answer(2) - 3 == 4
    assert copy.__package__ == "plantation"


def test_within_the_context_every_user_has_the_copy(package):
    original = package.low.double
    with planted(package.low, "2 * x", "3 * x") as copy:
        assert package.high.answer(2) == 9
        assert package.low.double is package.high.double is copy.double
        assert package.high.Box is copy.Box
    assert package.high.answer(2) == 7
    assert package.low.double is package.high.double is original
    assert copy.__name__ not in sys.modules


def test_modules_that_are_first_imported_meanwhile_forget_the_copy(package):
    original = package.low.double
    del sys.modules["plantation.high"]
    with planted(package.low, "2 * x", "3 * x") as copy:
        high = importlib.import_module("plantation.high")
        assert high.double is copy.double
        assert high.answer(2) == 9
    assert high.double is original
    assert high.answer(2) == 7


def test_constants_are_replaced_under_their_own_name(package):
    with planted("plantation.low", "LIMIT = 3", "LIMIT = 5"):
        assert package.high.answer(2) == 9
        assert package.high.Box.size == 5
    assert package.high.answer(2) == 7


def test_everything_is_put_back_after_an_error(package):
    with pytest.raises(ZeroDivisionError), planted("plantation.low", "2 * x", "x / 0"):
        package.high.answer(1)
    assert package.high.answer(2) == 7


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("2 * y", "3", "found 0 times"),
        ("1", "2", "found 2 times"),
        ("", "2", "found 0 times"),
        ("2 * x", "2 * x", "new must differ from old"),
    ],
)
def test_the_text_must_stand_there_exactly_once(package, old, new, message):
    with pytest.raises(ValueError, match=message):
        plant("plantation.low", old, new)


def test_source_that_does_not_run_leaves_nothing_behind(package):
    before = set(sys.modules)
    with pytest.raises(SyntaxError):
        plant("plantation.low", "return 2 * x", "return 2 *")
    assert set(sys.modules) == before


@pytest.mark.parametrize("module", ["math", "sys"])
def test_only_python_source_can_be_patched(module):
    with pytest.raises(ValueError, match="must be written in Python"):
        plant(module, "a", "b")


@pytest.mark.triton
def test_a_bug_can_be_planted_in_a_kernel():
    pytest.importorskip("triton")
    import torch  # noqa: PLC0415 - only this test needs it

    import hydragen  # noqa: PLC0415 - the same
    from hydragen.testing import Problem, assert_within_budget, run  # noqa: PLC0415 - the same

    def implementation(problem, inputs):
        made = problem.as_packed(inputs)
        return hydragen.attention(
            made.q, made.kv, tree=made.tree, cu_seqlens_q=made.cu_seqlens_q, return_lse=True, backend="triton"
        )

    problem = Problem((-1, 0, 0), (20, 3, 5), (1, 2), (1, 1), head_dim=16, head_dim_v=16)
    if torch.cuda.is_available():
        pytest.skip("compiled kernels keep the primitives they were first compiled with")
    assert_within_budget(problem, *run(implementation, problem))
    with (
        planted("hydragen.kernels.primitives", "LN_2 = tl.constexpr(0.69", "LN_2 = tl.constexpr(0.68"),
        pytest.raises(AssertionError, match="outside of the error budget"),
    ):
        assert_within_budget(problem, *run(implementation, problem))
    assert_within_budget(problem, *run(implementation, problem))


@pytest.mark.parametrize(
    "statement", ["import hydragen", "import hydragen.testing", "from hydragen.testing import run"]
)
def test_the_library_does_without_hypothesis(statement):
    code = f"import sys; {statement}; assert 'hypothesis' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_problems_say_what_to_install():
    code = """
        import sys
        sys.modules["hypothesis"] = None
        import hydragen.testing
        try:
            hydragen.testing.problems
        except ModuleNotFoundError as error:
            assert "pip install '.[test]'" in str(error), error
        else:
            raise SystemExit("no error")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
