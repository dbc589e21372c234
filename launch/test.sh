#!/usr/bin/env bash
# Makes the environment, then checks everything: lint, types, slow tests, fast tests.
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/test.sh [PYTEST_ARGUMENT ...]

Makes or updates .venv with what the tests need, then runs ruff, mypy, the tests marked slow, and all the others, on
the CPU. Every step runs; the exit status is 1 if any of them failed. With arguments it runs pytest alone, with these
arguments (for example tests/lm -k cached, or -m "not slow"), and exits with pytest's status.
END
}

case "${1-}" in -h | --help) usage && exit 0 ;; esac

# shellcheck source=launch/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
cd -- "$ROOT"
ensure_environment test

python="$VENV/bin/python"
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
# Compiled programs are kept between runs and shared by the workers.
export JAX_COMPILATION_CACHE_DIR="$ROOT/.cache/jax"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.3
export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1

if [[ $# -gt 0 ]]; then
  exec "$python" -m pytest "$@"
fi

failed=()

# step NAME COMMAND...: runs it, and remembers NAME if it failed.
step() {
  local name="$1" start=$SECONDS status=0
  shift
  say "== $name"
  "$@" || status=$?
  say "== $name: $( ((status == 0)) && echo passed || echo "failed with status $status"), $((SECONDS - start)) s"
  if ((status != 0)); then failed+=("$name"); fi
}

# pytest's status 5 says that no test was selected: none is marked slow.
slow_tests() {
  local status=0
  "$python" -m pytest -n 2 --dist worksteal -m slow --durations=10 || status=$?
  ((status == 5)) || return "$status"
}

fast_tests() { "$python" -m pytest -n 2 --dist worksteal -m "not slow" --durations=15; }

step "ruff" "$python" -m ruff check .
step "mypy" "$python" -m mypy
step "slow tests" slow_tests
if ((${#failed[@]})); then say "== failed so far: ${failed[*]}"; fi

# The fast tests come last, so that pytest's summary of them is the last thing printed.
status=0
fast_tests || status=$?
if ((status != 0)); then failed+=("fast tests"); fi
if ((${#failed[@]})); then
  say "== failed: ${failed[*]}"
  exit 1
fi
