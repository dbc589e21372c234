#!/usr/bin/env bash
# Makes the environment in which benchmarks/speed.py times audiolm-pytorch.
set -euo pipefail

usage() {
  cat <<'END'
usage: benchmarks/make_peer.sh [DIRECTORY]

Makes a virtual environment with audiolm-pytorch 2.4.0 and what it imports, at the versions of
benchmarks/peer_requirements.txt. Without fairseq, torchaudio and wandb: what is timed uses none of them.

  DIRECTORY   default: .peer-venv in the repository's root, where benchmarks/speed.py looks for it
  PYTHON      environment variable: the Python (3.11) to make it with; default: python3.11
END
}

case "${1-}" in
  -h | --help) usage && exit 0 ;;
  -*) usage >&2 && exit 2 ;;
esac

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
directory="${1:-$root/.peer-venv}"

"${PYTHON:-python3.11}" -m venv "$directory"
pip_install() { "$directory/bin/python" -m pip install --quiet --disable-pip-version-check --no-input "$@"; }

pip_install --requirement "$root/benchmarks/peer_requirements.txt"
# These name fairseq, torchaudio and wandb among their needs.
pip_install --no-deps audiolm-pytorch==2.4.0 encodec==0.1.1
printf 'peer: %s\n' "$directory/bin/python" >&2
