#!/usr/bin/env bash
# Installs on one worker of a Cloud TPU slice what training needs; launch/tpu_pod.sh sends it there and runs it.
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/tpu_worker.sh [BUCKET]

Installs Python 3.11 (by uv) where the image has no Python that is new enough, mounts gs://BUCKET at /gcs/BUCKET for
reading (installing gcsfuse where it is missing), and makes .venv with the extras tpu and gcs. What is there already is
left as it is.
END
}

case "${1-}" in -h | --help) usage && exit 0 ;; esac

# shellcheck source=launch/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
bucket="${1-}"

if [[ -n "$bucket" ]] && ! command -v gcsfuse >/dev/null; then
  say "tpu_worker: installing gcsfuse"
  packages=https://packages.cloud.google.com/apt
  key=/usr/share/keyrings/cloud.google.asc
  curl -fsSL "$packages/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
  echo "deb [signed-by=$key] $packages gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get update -q && sudo apt-get install -yq gcsfuse
fi
if [[ -n "$bucket" ]] && ! mountpoint -q "/gcs/$bucket"; then
  sudo mkdir -p "/gcs/$bucket"
  sudo gcsfuse --implicit-dirs -o allow_other,ro "$bucket" "/gcs/$bucket"
fi

if ! (find_python) >/dev/null 2>&1; then
  say "tpu_worker: installing Python 3.11"
  export PATH="$HOME/.local/bin:$PATH"
  command -v uv >/dev/null || curl -fsSL https://astral.sh/uv/install.sh | sh
  uv python install 3.11
  PYTHON="$(uv python find 3.11)"
fi
ensure_environment tpu,gcs
