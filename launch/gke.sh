#!/usr/bin/env bash
# Hands a training run to Google Kubernetes Engine as a JobSet on TPU slices; restarted after every interruption.
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/gke.sh --image=IMAGE --topology=TOPOLOGY [OPTION ...] -- train --config=NAME --workdir=gs://… [...]

Applies a JobSet (jobset.x-k8s.io, which XPK's clusters have) that runs `audiolm train --distributed` on every host of the
slices. Status 143 (a preemption notice, after which the run is saved) and evicted pods restart it without limit, failures
three times. Prints the JobSet's name.

  --image=IMAGE        built from launch/Dockerfile: docker build -t IMAGE -f launch/Dockerfile . && docker push IMAGE
  --topology=TOPOLOGY  as for `audiolm compile`: v4:2x2x4, v5e:4x4, v5p:2x2x4, v6e:4x4, …
  --slices=N           slices of it (default: 1); give the training --config.mesh.data=N, so that only gradients
                       cross the network between them
  --name=NAME          of the JobSet (default: from the workdir's last two parts)
  --bucket=BUCKET      mount gs://BUCKET by Cloud Storage FUSE at /gcs/BUCKET, to read tokens from
  --account=ACCOUNT    Kubernetes service account that may use the bucket (default: default)
  --dry-run            print the JobSet

Example: bash launch/gke.sh --image=gcr.io/lab/audiolm --topology=v5e:16x16 --bucket=lab -- train \
           --config=coarse_librilight --workdir=gs://lab/runs/coarse --config.data_dir=/gcs/lab/tokens
END
}

# shellcheck source=launch/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
# shellcheck source=launch/common.sh
source "$ROOT/launch/common.sh"

image="" topology="" slices=1 name="" bucket="" account=default DRY_RUN=""
while (($#)); do
  case "$1" in
    -h | --help) usage && exit 0 ;;
    --dry-run) DRY_RUN=1 ;;
    --image=*) image="$(value "$1")" ;;
    --topology=*) topology="$(value "$1")" ;;
    --slices=*) slices="$(value "$1")" ;;
    --name=*) name="$(value "$1")" ;;
    --bucket=*) bucket="$(value "$1")" ;;
    --account=*) account="$(value "$1")" ;;
    --) shift && break ;;
    *) die 2 "unknown argument" "$1" "see launch/gke.sh --help" ;;
  esac
  shift
done
workdir="$(require_train "$@")"
if [[ -z "$image" ]]; then die 2 "no image" "--image" "build launch/Dockerfile and give --image=IMAGE"; fi
if [[ "$workdir" != gs://* ]]; then
  die 2 "pods do not share this workdir" "--workdir=$workdir" "give a folder in a bucket, gs://BUCKET/…"
fi
if [[ ! "$slices" =~ ^[1-9][0-9]*$ ]]; then die 2 "not a number of slices" "--slices=$slices" "give 1 or more"; fi
case "$topology" in
  v4:*) accelerator=tpu-v4-podslice ;;
  v5e:*) accelerator=tpu-v5-lite-podslice ;;
  v5p:*) accelerator=tpu-v5p-slice ;;
  v6e:*) accelerator=tpu-v6e-slice ;;
  *) die 2 "unknown topology" "--topology=$topology" "give one such as v4:2x2x4, v5e:4x4, v5p:2x2x4, v6e:4x4" ;;
esac
shape="${topology#*:}"
if [[ ! "$shape" =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]]; then
  die 2 "unknown topology" "--topology=$topology" "give the chips along each axis, such as 4x4"
fi
chips=$((${shape//x/*}))
# Four chips a host; a slice of fewer is one host.
hosts=$(((chips + 3) / 4))
chips_per_host=$((chips < 4 ? chips : 4))
if [[ -z "$name" ]]; then
  name="$(job_name "$workdir")"
fi

quoted() { # quoted ARGUMENT...: as a YAML list in one line (JSON strings)
  local argument separator=""
  printf '['
  for argument in "$@"; do
    argument="${argument//\\/\\\\}"
    printf '%s"%s"' "$separator" "${argument//\"/\\\"}"
    separator=", "
  done
  printf ']'
}

jobset() {
  cat <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: 3
    rules:
      # Saved on a preemption notice, or a pod was evicted: neither is a failure of the run.
      - action: RestartJobSetAndIgnoreMaxRestarts
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: $slices
      template:
        spec:
          parallelism: $hosts
          completions: $hosts
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes:
                  containerName: train
                  operator: In
                  values: [143]
              - action: FailJob
                onPodConditions:
                  - type: DisruptionTarget
          template:
END
  if [[ -n "$bucket" ]]; then
    cat <<END
            metadata:
              annotations:
                gke-gcsfuse/volumes: "true"
END
  fi
  cat <<END
            spec:
              serviceAccountName: $account
              restartPolicy: Never
              # Time to save after the notice.
              terminationGracePeriodSeconds: 300
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $accelerator
                cloud.google.com/gke-tpu-topology: $shape
              containers:
                - name: train
                  image: $image
                  command: $(quoted audiolm "$1" --distributed "${@:2}")
                  ports:
                    - containerPort: 8471
                    - containerPort: 8080
                  resources:
                    requests:
                      google.com/tpu: $chips_per_host
                    limits:
                      google.com/tpu: $chips_per_host
END
  if [[ -n "$bucket" ]]; then
    cat <<END
                  volumeMounts:
                    - name: bucket
                      mountPath: /gcs/$bucket
                      readOnly: true
              volumes:
                - name: bucket
                  csi:
                    driver: gcsfuse.csi.storage.gke.io
                    readOnly: true
                    volumeAttributes:
                      bucketName: $bucket
                      mountOptions: implicit-dirs
END
  fi
}

if [[ -n "$DRY_RUN" ]]; then
  jobset "$@"
  exit 0
fi
if ! command -v kubectl >/dev/null; then
  die 2 "no kubectl here" "kubectl" "install it and fetch the cluster's credentials"
fi
# A JobSet that has failed for good is not started by applying it again.
if [[ "$(kubectl get jobset "$name" -o 'jsonpath={.status.terminalState}' 2>/dev/null)" == Failed ]]; then
  kubectl delete jobset "$name" >&2
fi
jobset "$@" | kubectl apply -f - -o name
