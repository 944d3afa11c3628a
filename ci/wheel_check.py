"""Build the wheel, install it in an empty environment outside the repository and use it there.

The environment holds the wheel and its declared dependencies, with their own, and nothing else: they are
linked from the environment this runs in, so that nothing is downloaded twice. What pyproject.toml forgets to
declare is therefore missing, as it would be for a user. `--without triton` leaves one dependency out;
`--suite` adds pytest and Hypothesis and runs the conformance suite that the wheel brings along.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import venv
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from zipfile import ZipFile

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
SUITE = [
    *("--pyargs", "hydragen.testing.conformance"),
    *("--implementation", "hydragen.testing.adapters.ours:reference"),
    *("--hypothesis-profile=dev", "--hypothesis-seed=0", "-p", "no:cacheprovider", "-q"),
]


def run(*command: str | Path, cwd: Path) -> None:
    """Run a command with a clean Python environment; stop with its exit status if it fails."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def build_wheel(folder: Path) -> Path:
    """Build the wheel from this checkout into `folder`, with the build backend that is installed here."""
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps")
    run(*pip, "--no-build-isolation", "--wheel-dir", folder, ROOT, cwd=folder)
    (wheel,) = folder.glob("hydragen-*.whl")
    return wheel


def declared(wheel: Path) -> list[str]:
    """Requirements of the wheel that hold on this machine without extras, as `Requires-Dist` states them."""
    with ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = archive.read(name).decode()
    return re.findall(r"^Requires-Dist: (.*)$", metadata, flags=re.MULTILINE)


def closure(requirements: list[str], without: set[str]) -> dict[str, Distribution]:
    """Installed distributions that `requirements` lead to, by name."""
    found: dict[str, Distribution] = {}
    todo = list(requirements)
    while todo:
        requirement = Requirement(todo.pop())
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        # Extras are followed for none: neither the library nor its dependencies need one.
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if not applies or name in found or name in without:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            sys.exit(f"{requirement} is declared but not installed here: add it to ci/constraints.txt")
        todo += found[name].requires or []
    return found


def link(distributions: dict[str, Distribution], target: Path) -> None:
    """Put the distributions' top-level files and folders into `target` as links."""
    for dist in distributions.values():
        for name in {
            file.parts[0] for file in dist.files or [] if file.parts[0] not in ("..", "__pycache__")
        }:
            if not (target / name).exists():
                (target / name).symlink_to(Path(str(dist.locate_file(name))))


def main() -> None:
    """Build, install, link, probe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--without", action="append", default=[], metavar="NAME", help="leave a dependency out"
    )
    parser.add_argument("--suite", action="store_true", help="run the suite in the wheel as well")
    given = parser.parse_args()
    without = set(given.without)
    with tempfile.TemporaryDirectory(prefix="hydragen-wheel-") as name:
        folder = Path(name)
        wheel = build_wheel(folder)
        venv.create(folder / "env", with_pip=False)
        python = folder / "env" / "bin" / "python"
        pip = (
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "--python",
            python,
            "install",
            "--quiet",
        )
        run(*pip, "--no-deps", "--no-index", wheel, cwd=folder)
        (site_packages,) = (folder / "env" / "lib").glob("python*/site-packages")
        dependencies = closure(declared(wheel), without)
        link(dependencies, site_packages)
        run(python, ROOT / "ci" / "wheel_probe.py", *sorted(without), cwd=folder)
        if given.suite:
            link(closure(["pytest", "hypothesis"], without), site_packages)
            run(python, "-m", "pytest", *SUITE, cwd=folder)
        print(f"{wheel.name} works with {', '.join(sorted(dependencies))}")


if __name__ == "__main__":
    main()
