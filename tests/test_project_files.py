"""What the project says in two places agrees, and `import hydragen` stays light."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import hydragen

ROOT = Path(__file__).resolve().parent.parent


def pins() -> dict[str, str]:
    lines = (ROOT / "ci" / "constraints.txt").read_text().splitlines()
    found = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


def test_pre_commit_uses_the_pinned_ruff() -> None:
    config = (ROOT / ".pre-commit-config.yaml").read_text()
    assert set(re.findall(r"ruff==([\w.]+)", config)) == {pins()["ruff"]}


def test_every_direct_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = [
        project["build-system"]["requires"],
        project["project"]["dependencies"],
        *(project["project"]["optional-dependencies"][extra] for extra in ("test", "plot", "demo", "dev")),
    ]
    names = {re.split(r"[^\w-]", requirement)[0] for group in groups for requirement in group} - {"hydragen"}
    assert names <= set(pins()), f"not in ci/constraints.txt: {sorted(names - set(pins()))}"


def test_the_changelog_knows_this_version() -> None:
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert newest is not None
    assert newest.group(1) == hydragen.__version__


@pytest.mark.parametrize("package", ["src/hydragen", "reference/hydragen_reference"])
def test_packages_are_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").exists()


# Each of these costs a user seconds or does not exist on their machine: they are imported when first needed.
@pytest.mark.parametrize("module", ["triton", "matplotlib", "transformers", "hypothesis", "pytest", "tqdm"])
def test_importing_hydragen_does_not_import(module: str) -> None:
    # torch may import some of them itself; that is not ours to change.
    code = f"import sys, torch; before = {module!r} in sys.modules; import hydragen, hydragen.testing; \
sys.exit({module!r} in sys.modules and not before)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_hydragen_works_where_triton_cannot_be_imported() -> None:
    code = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] == 'triton':
            raise ModuleNotFoundError('no module named triton')
sys.meta_path.insert(0, Blocked())
import torch, hydragen
kv = torch.ones(1, 3, 1, 4)
assert hydragen.attention(torch.ones(2, 1, 1, 4), [(kv, kv)]).shape == (2, 1, 1, 4)
assert 'triton' not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
