#!/usr/bin/env bash
# Hands a training run to Slurm: GPUs on one node or several, one process a GPU, requeued after every interruption.
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/slurm.sh [--dry-run] [--nodes=N] [--gpus=N] [SBATCH_OPTION ...] -- train --config=NAME --workdir=DIR [...]

Submits a job that runs `audiolm train --distributed` with one process a GPU. Five minutes before its time limit, or when
Slurm preempts it, the run gets SIGTERM, saves, ends with status 143 and is queued again; so it is after a failure, unless
it was queued again 20 times before. The repository and WORKDIR must lie where all nodes see them (or WORKDIR in a bucket).

  --nodes=N       nodes (default: 1)
  --gpus=N        GPUs a node (default: 8)
  --extra=cuda12  for drivers older than 580 (default: cuda, which is CUDA 13)
  --dry-run       print the job script
  SBATCH_OPTION   anything else that begins with --, such as --partition=gpu --account=lab --time=24:00:00;
                  --cpus-per-task=16 gives each process cores to read its input with

With AUDIOLM_INSTALLED=1 in the environment .venv is taken as it is.

Example: bash launch/slurm.sh --nodes=2 --partition=gpu -- train --config=coarse_librilight \
           --workdir=/shared/runs/coarse --config.data_dir=/shared/tokens
Prints the job's number.
END
}

# shellcheck source=launch/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
# shellcheck source=launch/common.sh
source "$ROOT/launch/common.sh"

nodes=1 gpus=8 extra=cuda options=() DRY_RUN=""
while (($#)); do
  case "$1" in
    -h | --help) usage && exit 0 ;;
    --dry-run) DRY_RUN=1 ;;
    --nodes=*) nodes="$(value "$1")" ;;
    --gpus=*) gpus="$(value "$1")" ;;
    --extra=*) extra="$(value "$1")" ;;
    --) shift && break ;;
    --*) options+=("$1") ;;
    *) die 2 "unknown argument" "$1" "see launch/slurm.sh --help" ;;
  esac
  shift
done
workdir="$(require_train "$@")"
if [[ "$workdir" == gs://* ]]; then extra+=",gcs"; fi
for number in "$nodes" "$gpus"; do
  if [[ ! "$number" =~ ^[1-9][0-9]*$ ]]; then die 2 "not a number" "$number" "give --nodes and --gpus of 1 or more"; fi
done

job_script() {
  cat <<END
#!/usr/bin/env bash
#SBATCH --job-name=$(job_name "$workdir")
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=$gpus
#SBATCH --gpus-per-node=$gpus
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300
END
  for option in ${options[@]+"${options[@]}"}; do
    if [[ "$option" == *=*[[:space:]]* ]]; then option="${option%%=*}=\"${option#*=}\""; fi
    printf '#SBATCH %s\n' "$option"
  done
  cat <<'END'

# srun does not take the cores a task from the job by itself.
if [[ -n "${SLURM_CPUS_PER_TASK:-}" ]]; then export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"; fi
status=0
END
  printf 'srun --kill-on-bad-exit=0 '
  printf '%q ' "$VENV/bin/audiolm" "$1" --distributed "${@:2}"
  cat <<'END'
|| status=$?
# 143: saved on a preemption notice. Above 128: a process or its node is gone, and the others with it. 1: a failure.
if ((status == 143 || ((status == 1 || status > 128) && status != 130 && ${SLURM_RESTART_COUNT:-0} < 20))); then
  echo "audiolm: status $status; queued again" >&2
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
END
}

if [[ -n "$DRY_RUN" ]]; then
  job_script "$@"
  exit 0
fi
if ! command -v sbatch >/dev/null; then
  die 2 "no Slurm here" "sbatch" "run this on a login node of the cluster"
fi
if [[ -z "${AUDIOLM_INSTALLED:-}" ]]; then ensure_environment "$extra"; fi
job_script "$@" | sbatch --parsable
