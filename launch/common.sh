# shellcheck shell=bash
# Sourced by the scripts beside it, after environment.sh.

# supervise COMMAND...: runs it again for as long as it was interrupted, and returns the status it ends with.
#   143 (a preemption notice; the run is saved)   again, at once
#   0 (finished), 2 (the user's mistake), 130     the end
#   anything else                                 again after a pause; the fourth failure in a row is the end
# A command that ran for ten minutes begins a new row. SIGTERM or SIGINT to this shell goes to the command as SIGTERM,
# and that is the end of it, too.
supervise() {
  local status child="" stopping="" failures=0 started waited pause="${SUPERVISE_PAUSE:-30}"
  trap 'stopping=143; kill -TERM "$child" 2>/dev/null || true' TERM
  trap 'stopping=130; kill -TERM "$child" 2>/dev/null || true' INT
  while [[ -z "$stopping" ]]; do
    status=0 started=$SECONDS
    "$@" &
    child=$!
    # The signal may have come before there was a child to pass it to.
    if [[ -n "$stopping" ]]; then kill -TERM "$child" 2>/dev/null || true; fi
    wait "$child" || status=$?
    # A signal ends `wait` before the command has ended.
    while kill -0 "$child" 2>/dev/null; do
      status=0
      wait "$child" || status=$?
    done
    if [[ -n "$stopping" ]]; then break; fi
    case "$status" in
      0 | 2 | 130) return "$status" ;;
      143)
        failures=0
        say "supervise: interrupted and saved; going on"
        ;;
      *)
        failures=$((SECONDS - started < 600 ? failures + 1 : 1))
        if ((failures > 3)); then
          say "supervise: failed $failures times in a row, last with status $status; giving up"
          return "$status"
        fi
        say "supervise: failed with status $status; going on in $pause s"
        # A second at a time: a signal is looked at when the command in the foreground has ended.
        for ((waited = 0; waited < pause; waited++)); do
          if [[ -z "$stopping" ]]; then sleep 1; fi
        done
        ;;
    esac
  done
  say "supervise: stopped by a signal; the command ended with status $status"
  return "$stopping"
}

# run COMMAND...: runs it, or prints it where DRY_RUN is set.
run() {
  if [[ -n "${DRY_RUN:-}" ]]; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

# value OPTION: what stands after the = of --name=value.
value() { printf '%s\n' "${1#*=}"; }

# require_train "$@": the command must be `train` with a workdir; prints the workdir.
require_train() {
  local argument
  if [[ "${1-}" != train ]]; then
    die 2 "no training command" "$(basename -- "$0") … -- ${1-}" "write -- train --config=NAME --workdir=DIR …"
  fi
  for argument in "$@"; do
    if [[ "$argument" == --workdir=* ]]; then
      value "$argument"
      return
    fi
  done
  die 2 "no workdir" "-- $*" "add --workdir=DIR"
}

# job_name WORKDIR: a name that clusters take, of the last two parts of the workdir and a checksum of the whole. JobSet
# adds to it, up to 63 characters.
job_name() {
  local parent readable checksum
  parent="$(basename -- "$(dirname -- "$1")")"
  readable="$(printf 'audiolm-%s-%s\n' "$parent" "$(basename -- "$1")" |
    tr '[:upper:]' '[:lower:]' | tr -c '[:alnum:]\n' '-' | sed 's/--*/-/g' | cut -c1-36 | sed 's/-*$//')"
  checksum="$(printf '%s' "${1%/}" | cksum)"
  printf '%s-%08x\n' "$readable" "${checksum%% *}"
}
