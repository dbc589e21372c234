#!/usr/bin/env bash
# Trains on a Cloud TPU slice: asks for it, waits, installs on every worker, trains, and begins anew after a preemption.
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/tpu_pod.sh --zone=ZONE --type=TYPE [OPTION ...] -- train --config=NAME --workdir=gs://… [...]

Runs on your own machine (with gcloud) and stays until training is finished: makes a queued resource, waits for it, copies
the repository to all workers, installs it with the extras tpu and gcs, and runs `audiolm train --distributed` on all of
them. Status 143 (a preemption notice, after which the run is saved) and lost workers start it again; a slice that was
taken away is deleted and asked for anew. At the end the slice is deleted. SIGTERM or Ctrl-C to this script stops the
run on the workers, waits until it has saved, and deletes the slice. Workers get the tracked files as they are.

  --zone=ZONE        such as us-central2-b
  --type=TYPE        accelerator type, such as v4-32 (16 chips) or v5litepod-16
  --name=NAME        of the queued resource and its node (default: from the workdir's last two parts)
  --runtime=VERSION  of the TPU VM (default: by the type)
  --bucket=BUCKET    mount gs://BUCKET with gcsfuse at /gcs/BUCKET on every worker, to read tokens from
  --slices=N         slices of that type, joined by the data-centre network (default: 1); give the training
                     --config.mesh.data=N, so that only gradients cross it
  --spot             the cheaper kind that may be taken away
  --detach           go to the background; print the process and its log file
  --keep             do not delete the slice at the end
  --dry-run          print the commands

Example: bash launch/tpu_pod.sh --zone=us-central2-b --type=v4-32 --bucket=lab -- train --config=coarse_librilight \
           --workdir=gs://lab/runs/coarse --config.data_dir=/gcs/lab/tokens
END
}

# shellcheck source=launch/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
# shellcheck source=launch/common.sh
source "$ROOT/launch/common.sh"

arguments=("$@")
zone="" type="" name="" runtime="" bucket="" slices=1 spot=() detach="" keep="" DRY_RUN=""
while (($#)); do
  case "$1" in
    -h | --help) usage && exit 0 ;;
    --dry-run) DRY_RUN=1 ;;
    --zone=*) zone="$(value "$1")" ;;
    --type=*) type="$(value "$1")" ;;
    --name=*) name="$(value "$1")" ;;
    --runtime=*) runtime="$(value "$1")" ;;
    --bucket=*) bucket="$(value "$1")" ;;
    --slices=*) slices="$(value "$1")" ;;
    --spot) spot=(--spot) ;;
    --detach) detach=1 ;;
    --keep) keep=1 ;;
    --) shift && break ;;
    *) die 2 "unknown argument" "$1" "see launch/tpu_pod.sh --help" ;;
  esac
  shift
done
workdir="$(require_train "$@")"
if [[ -z "$zone" ]]; then die 2 "no zone" "--zone" "add --zone=ZONE, such as us-central2-b"; fi
if [[ -z "$type" ]]; then die 2 "no accelerator type" "--type" "add --type=TYPE, such as v4-32"; fi
if [[ "$workdir" != gs://* ]]; then
  die 2 "workers do not share this workdir" "--workdir=$workdir" "give a folder in a bucket, gs://BUCKET/…"
fi
if [[ ! "$slices" =~ ^[1-9][0-9]*$ ]]; then die 2 "not a number of slices" "--slices=$slices" "give 1 or more"; fi
if [[ -z "$name" ]]; then
  name="$(job_name "$workdir")"
fi
if [[ -z "$runtime" ]]; then
  case "$type" in
    v4-*) runtime=tpu-ubuntu2204-base ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    *) die 2 "unknown accelerator type" "--type=$type" "give v4-…, v5litepod-…, v5p-…, v6e-…, or --runtime=VERSION" ;;
  esac
fi
if [[ -z "$DRY_RUN" ]] && ! command -v gcloud >/dev/null; then
  die 2 "no gcloud here" "gcloud" "install the Google Cloud CLI and log in"
fi
if [[ -n "$detach" ]]; then
  again=()
  for argument in "${arguments[@]}"; do
    if [[ "$argument" != --detach ]]; then again+=("$argument"); fi
  done
  if [[ -n "$DRY_RUN" ]]; then
    exec bash "${BASH_SOURCE[0]}" "${again[@]}"
  fi
  log="$PWD/$name.log"
  nohup setsid bash "${BASH_SOURCE[0]}" "${again[@]}" >"$log" 2>&1 </dev/null &
  printf 'process %s, log %s\n' "$!" "$log"
  exit 0
fi

nodes=("$name")
node_options=("--node-id=$name")
if ((slices > 1)); then
  node_options=("--node-count=$slices" "--node-prefix=$name")
  nodes=()
  for ((index = 0; index < slices; index++)); do nodes+=("$name-$index"); done
fi
poll="${TPU_POLL_SECONDS:-30}"

resource() { # resource ACTION OPTION...: of the queued resource
  run gcloud compute tpus queued-resources "$1" "$name" "--zone=$zone" "${@:2}"
}

create() {
  resource create "${node_options[@]}" "--accelerator-type=$type" "--runtime-version=$runtime" ${spot[@]+"${spot[@]}"}
}

delete() {
  resource delete --force --quiet
}

state() { gcloud compute tpus queued-resources describe "$name" "--zone=$zone" '--format=value(state.state)' 2>/dev/null; }

# Returns once the slice is there; asks for it (again) where it was never asked for, refused or taken away.
acquire() {
  local now
  if [[ -n "$DRY_RUN" ]]; then
    create
    return
  fi
  while true; do
    now="$(state)" || now=ABSENT
    case "$now" in
      ACTIVE) return ;;
      ABSENT | "") create || die 1 "the slice was refused" "$name in $zone" "see gcloud's message above" ;;
      FAILED | SUSPENDED | SUSPENDING)
        say "tpu_pod: the slice is $now; asking anew"
        delete || true
        ;;
      *) say "tpu_pod: the slice is $now" ;;
    esac
    sleep "$poll"
  done
}

# on_all_workers COMMAND: on every worker of every slice. Of several statuses, 2 (a mistake) counts before 143 (saved,
# whatever became of the others), and that before any other failure.
on_all_workers() {
  local node pids=() status=0 pid one
  for node in "${nodes[@]}"; do
    run gcloud compute tpus tpu-vm ssh "$node" "--zone=$zone" --worker=all "--command=$1" &
    pids+=("$!")
    if [[ -n "$DRY_RUN" ]]; then wait "$!"; fi
  done
  for pid in "${pids[@]}"; do
    if [[ -n "$DRY_RUN" ]]; then break; fi
    one=0
    wait "$pid" || one=$?
    if ((one != 0 && status != 2 && (one == 2 || status != 143))); then status="$one"; fi
  done
  return "$status"
}

# Ends what trains on the workers and waits until it has saved: a run whose connection was lost would hold the TPU.
leave() {
  local training='[.]venv/bin/audiolm train --distributed' # The brackets keep it from matching this command itself.
  on_all_workers "pkill -TERM -f '$training'; for second in \$(seq 600); do pgrep -f '$training' >/dev/null || exit 0; \
sleep 1; done; pkill -KILL -f '$training'; true"
}

install() {
  local folder commit node
  folder="$(mktemp -d)"
  # Changes that are not committed go along.
  commit="$(git -C "$ROOT" stash create)" || return
  git -C "$ROOT" archive --format=tar.gz --output="$folder/audiolm_jax.tar.gz" "${commit:-HEAD}" || return
  for node in "${nodes[@]}"; do
    run gcloud compute tpus tpu-vm scp "$folder/audiolm_jax.tar.gz" "$node:audiolm_jax.tar.gz" "--zone=$zone" \
      --worker=all || return
  done
  rm -r -- "$folder"
  on_all_workers "mkdir -p audiolm_jax && tar -xzf audiolm_jax.tar.gz -C audiolm_jax && \
bash audiolm_jax/launch/tpu_worker.sh $bucket"
}

# One attempt, from whatever there is of the slice to the end of the command. Runs where a failure does not end the
# script, so every step says what becomes of it.
attempt() {
  local command
  acquire
  leave || return
  install || return
  printf -v command '%q ' .venv/bin/audiolm "$1" --distributed "${@:2}"
  on_all_workers "cd audiolm_jax && exec $command"
}

if [[ -n "$DRY_RUN" ]]; then
  attempt "$@"
  delete
  exit 0
fi
status=0
supervise attempt "$@" || status=$?
# After a signal or lost connections the workers go on until they are told, and would lose what is not saved.
if ((status != 0)); then leave || say "tpu_pod: not all workers could be told to stop"; fi
if [[ -z "$keep" ]]; then delete || true; fi
exit "$status"
