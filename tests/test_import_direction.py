"""Imports go one way, downward: the order of design section 3, checked file by file from the source alone."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "src" / "hydragen"
REFERENCE = ROOT / "reference" / "hydragen_reference"

# Top floor first. A file may import from its own floor and from every floor below, never from above.
# A name covers a module or a package with everything in it; names without a file yet are not an error.
FLOORS: list[set[str]] = [
    {"__main__", "cli"},
    {"cli_checks"},
    {"demo", "distributed", "transformers"},
    {"__init__"},
    {"api"},
    {"planned"},
    {"runner"},
    {"plan_state"},
    {"slots"},
    {"appending", "merging", "ops"},
    {"backends"},
    {"block_tables", "explain"},
    {"predict"},
    {"validation"},
    {"capacity"},
    {"work"},
    {"layout"},
    {"apart", "runs"},
    {"queries"},
    {"testing"},
    {"lengths"},
    {"kv"},
    {"tuning"},
    {"splits"},
    {"tiles"},
    {"prefix_tiles", "warp_tiles"},
    {"kernels"},
    {"tree"},
    {"radix", "tree_changes", "tree_levels", "tree_text"},
    {"forest", "ragged", "tree_checks"},
    {"handles", "host_ints", "types", "target", "transforms"},
]


def imports(path: Path, package: str) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything `path`, a module of `package`, imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def modules(folder: Path, root_name: str) -> Iterator[tuple[Path, str, str]]:
    """Every module below `folder`: its path, its package and its name below `root_name`."""
    for path in sorted(folder.rglob("*.py")):
        relative = path.relative_to(folder)
        package = ".".join([root_name, *relative.parts[:-1]])
        yield path, package, ".".join([*relative.parts[:-1], relative.stem])


def floor_of(name: str) -> int | None:
    """Index of the floor that holds `name` (dotted, below hydragen); None if it is on none."""
    top = name.split(".")[0]
    return next((i for i, floor in enumerate(FLOORS) if top in floor), None)


def library_modules() -> list[tuple[Path, str, str]]:
    return list(modules(LIBRARY, "hydragen"))


def test_no_import_goes_up() -> None:
    wrong = []
    for path, package, name in library_modules():
        own = floor_of(name)
        if own is None:
            wrong.append(f"{path}: not on any floor; add it to FLOORS here where it belongs")
            continue
        for line, target in imports(path, package):
            root, _, rest = target.partition(".")
            if root != "hydragen" or not rest:
                continue
            there = floor_of(rest)
            if there is None:
                # `from hydragen import attention`: something of __init__; modules are reported by file.
                is_module = any(other == rest.split(".")[0] for _, _, other in library_modules())
                there = own if is_module else FLOORS.index({"__init__"})
            if there < own:
                wrong.append(f"{path}:{line}: {name} imports {target} from a floor above")
    assert not wrong, "\n".join(wrong)


def test_kernels_import_only_triton_and_each_other() -> None:
    wrong = [
        f"{path}:{line}: {target}"
        for path, package, name in library_modules()
        if name.startswith("kernels.")
        for line, target in imports(path, package)
        if target.split(".")[0] != "triton" and not target.startswith("hydragen.kernels")
    ]
    assert not wrong, "\n".join(wrong)


def test_only_the_judge_imports_the_oracle() -> None:
    wrong = [
        f"{path}:{line}: {target}"
        for path, package, name in library_modules()
        if not name.startswith("testing.")
        for line, target in imports(path, package)
        if target.startswith("hydragen_reference.oracle")
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("banned", ["hydragen", "triton"])
def test_the_reference_stands_alone(banned: str) -> None:
    wrong = [
        f"{path}:{line}: {target}"
        for path, package, _ in modules(REFERENCE, "hydragen_reference")
        for line, target in imports(path, package)
        if target.split(".")[0] == banned
    ]
    assert not wrong, "\n".join(wrong)
