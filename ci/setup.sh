# Sourced by ci/test and ci/demo, from the repository root: makes .venv with the pinned packages and this checkout
# installed in it (editable), or reuses it. The stamp is a hash of what decides what would be installed.
# Sets PY to the environment's Python. PYTHON=python3.12 ci/test uses another interpreter.

set_up() {
  local base="${PYTHON:-python3}" stamp
  if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "hydragen needs Python 3.11 or newer; \`$base\` is older or missing. Set PYTHON, e.g. PYTHON=python3.12" >&2
    return 1
  fi
  PY="$PWD/.venv/bin/python"
  stamp="$("$base" -c '
import hashlib, pathlib, sys, tomllib
config = tomllib.loads(pathlib.Path("pyproject.toml").read_text())
deciding = sys.version, pathlib.Path.cwd(), config["build-system"], config["project"], config["tool"]["hatch"]
seen = hashlib.sha256(repr(deciding).encode())
for name in ("ci/constraints.txt", "ci/setup.sh"):
    seen.update(pathlib.Path(name).read_bytes())
print(seen.hexdigest())')" || return 1
  if [ -x "$PY" ] && [ "$(cat .venv/stamp 2>/dev/null)" = "$stamp" ]; then
    echo "set-up: .venv is up to date"
    return 0
  fi
  echo "set-up: installing the pinned packages into .venv (a minute or two, torch being the largest)"
  SECONDS=0
  local pip=("$PY" -m pip install --quiet --disable-pip-version-check --constraint ci/constraints.txt)
  "$base" -m venv --clear .venv &&
    # The build backend first, pinned like the rest: an isolated build would fetch whatever is newest.
    "${pip[@]}" hatchling editables &&
    "${pip[@]}" --no-build-isolation --editable '.[dev]' || return 1
  echo "$stamp" > .venv/stamp
  echo "set-up: done in $SECONDS s"
}
