#!/usr/bin/env bash
# Trains on the GPUs of this machine, and goes on after every interruption.
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/gpus.sh [--dry-run] [--gpus=N] [--extra=cuda|cuda12] -- train --config=NAME --workdir=DIR [OPTION ...]

Makes .venv with CUDA, then runs `audiolm train` on the GPUs of this machine, all of them by one process. Status 143 (a
preemption notice, after which the run is saved) starts it again, as does a failure up to three times in a row.

  --gpus=N        use the first N GPUs (default: all)
  --extra=cuda12  for drivers older than 580 (default: cuda, which is CUDA 13)
  --dry-run       print what would be run

With AUDIOLM_INSTALLED=1 in the environment .venv is taken as it is.

Example: bash launch/gpus.sh -- train --config=coarse_librilight --workdir=runs/coarse --config.data_dir=tokens
END
}

# shellcheck source=launch/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
# shellcheck source=launch/common.sh
source "$ROOT/launch/common.sh"

gpus="" extra=cuda DRY_RUN=""
while (($#)); do
  case "$1" in
    -h | --help) usage && exit 0 ;;
    --dry-run) DRY_RUN=1 ;;
    --gpus=*) gpus="$(value "$1")" ;;
    --extra=*) extra="$(value "$1")" ;;
    --) shift && break ;;
    *) die 2 "unknown argument" "$1" "see launch/gpus.sh --help" ;;
  esac
  shift
done
workdir="$(require_train "$@")"
if [[ "$workdir" == gs://* ]]; then extra+=",gcs"; fi

environment=(env)
if [[ -n "$gpus" ]]; then
  if [[ ! "$gpus" =~ ^[1-9][0-9]*$ ]]; then die 2 "not a number of GPUs" "--gpus=$gpus" "give 1 or more"; fi
  environment+=("CUDA_VISIBLE_DEVICES=$(seq -s, 0 $((gpus - 1)))")
fi
command=("${environment[@]}" "$VENV/bin/audiolm" "$@")
if [[ -n "$DRY_RUN" ]]; then
  run "${command[@]}"
  exit 0
fi
if [[ -z "${AUDIOLM_INSTALLED:-}" ]]; then ensure_environment "$extra"; fi
supervise "${command[@]}"
