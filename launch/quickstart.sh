#!/usr/bin/env bash
# Makes the environment, then runs the quickstart on the recordings in samples/.
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/quickstart.sh [WORKDIR] [OPTION ...]

From a fresh clone to generated audio: makes the virtual environment .venv in the repository, installs the package
into it (a second run skips both), and runs `audiolm quickstart --workdir=WORKDIR` on the recordings in samples/.
The results: WORKDIR/report.html and the continuations in WORKDIR/continuations/.

  WORKDIR   default: runs/quickstart in the repository
  OPTION    handed to `audiolm quickstart`; paths in it are relative to the repository
  PYTHON    environment variable: the Python (3.11 or newer) to make .venv with; default: the first of python3.11,
            python3.12, python3.13, python3 and python that will do
END
}

for argument in "$@"; do
  case "$argument" in -h | --help) usage && exit 0 ;; esac
done

# shellcheck source=launch/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

workdir=runs/quickstart
if (($#)) && [[ "$1" != -* ]]; then
  workdir="$1"
  shift
  if [[ -z "$workdir" ]]; then
    die 2 "bad argument" "WORKDIR is empty" "name a folder, or leave it out for runs/quickstart"
  fi
  # It is relative to the caller's folder, not to the repository.
  if [[ "$workdir" != /* && ! "$PWD" -ef "$ROOT" ]]; then workdir="$PWD/$workdir"; fi
fi

cd -- "$ROOT"
ensure_environment ""
say "quickstart: writing to $workdir"
exec "$VENV/bin/audiolm" quickstart --workdir="$workdir" "$@"
