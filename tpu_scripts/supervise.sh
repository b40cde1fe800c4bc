#!/usr/bin/env bash
# Keeps a run going until it has ended well: creates the pod, sets it up, launches, and does so again after a preemption.
#
#   supervise.sh [--max-restarts N] [--delete-when-done] [common flags] -- COMMAND ...
#
#   --max-restarts N     give up after N failures in a row (default 10); preemptions do not count
#   --delete-when-done   tear the pod down when the run has ended with exit code 0
#
# The command must continue its run when it is started again, as gqe train does from gs://BUCKET/RUN. After a failure it
# waits a minute, after the next two, up to fifteen. Exit code 2 of the command (input that cannot be used) is not tried
# again. Run this where it outlives your laptop: in tmux on a small VM. Started again, it takes up what it finds.

# shellcheck source=tpu_scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
MAX_RESTARTS=10 DELETE=0
set -- ${REST[@]+"${REST[@]}"}
while [ $# -gt 0 ]; do
  case $1 in
    --max-restarts)
      [ $# -gt 1 ] || die "$1 needs a number"
      MAX_RESTARTS=$2
      shift
      ;;
    --max-restarts=*) MAX_RESTARTS=${1#*=} ;;
    --delete-when-done) DELETE=1 ;;
    *) die "unknown argument $1: see supervise.sh --help" ;;
  esac
  shift
done
case $MAX_RESTARTS in '' | *[!0-9]*) die "--max-restarts $MAX_RESTARTS must be a number" ;; esac
[ ${#COMMAND[@]} -gt 0 ] || die "no command: supervise.sh -- gqe train --distributed --config ... --run gs://BUCKET/RUN"
need PROJECT ZONE TYPE
read_type
POLL_SECONDS=${GQE_POLL_SECONDS:-60} # between looks; also the first wait after a failure
LONGEST_WAIT=$((15 * POLL_SECONDS))
HEALTHY=$((30 * POLL_SECONDS))   # a run that has lived so long has recovered: failures are counted anew
STRAGGLING=$((10 * POLL_SECONDS)) # workers may end so much after the first of them

forward

log() { say "$(date +%H:%M:%S) $*"; }

failures=0
failed() { # reason
  failures=$((failures + 1))
  [ "$failures" -le "$MAX_RESTARTS" ] || die "$1; that was failure $failures in a row: gave up (see watch.sh --once)"
  local wait=$((POLL_SECONDS * (1 << (failures > 5 ? 4 : failures - 1))))
  [ "$wait" -le "$LONGEST_WAIT" ] || wait=$LONGEST_WAIT
  log "$1; failure $failures of at most $MAX_RESTARTS in a row; next try in $wait s"
  sleep "$wait"
}

# Whether Google has taken a VM away although the queued resource still says ACTIVE.
vm_is_gone() {
  local i node
  for ((i = 0; i < SLICES; i++)); do
    node=$NAME
    [ "$SLICES" -eq 1 ] || node=$NAME-$i
    case $(ask gcloud compute tpus tpu-vm describe "$node" "--zone=$ZONE" "--project=$PROJECT" '--format=value(state)' \
      2>&1 | tee /dev/stderr) in
      *PREEMPTED* | *TERMINATED* | *STOPPED* | *DELETING* | *NOT_FOUND*) return 0 ;;
    esac
  done
  return 1
}

launched=0 # when, in seconds; 0: not on this pod
first_end=0
launch() {
  if "$HERE/setup.sh" "${FORWARD[@]}" && "$HERE/launch.sh" "${FORWARD[@]}" -- "${COMMAND[@]}"; then
    launched=$(date +%s) first_end=0
  else
    failed "set-up or launch failed"
  fi
}

# One look at the workers of an ACTIVE pod; returns 0 when the run is done.
look() {
  local states running ended bad
  if ! states=$(worker_states) || [ -z "$states" ]; then
    if vm_is_gone; then replace "a VM is gone"; else log "the workers do not answer: looking again"; fi
    return 1
  fi
  running=$(grep -c ' running ' <<<"$states" || true)
  ended=$(grep -c ' ended ' <<<"$states" || true)
  bad=$(sed -n 's/.* ended //p' <<<"$states" | grep -vx 0 | sort -u | tr '\n' ' ' || true)
  if [ "$running" -gt 0 ]; then
    if [ "$ended" -eq 0 ]; then
      [ $(($(date +%s) - launched)) -lt "$HEALTHY" ] || failures=0
    elif [ "$first_end" -eq 0 ]; then
      first_end=$(date +%s)
    elif [ $(($(date +%s) - first_end)) -ge "$STRAGGLING" ]; then
      log "$running worker(s) still run long after the first ended: stopping them"
      "$HERE/stop.sh" "${FORWARD[@]}" || true
    fi
    log "$running running, $ended ended${bad:+ (exit codes ${bad% })}"
    return 1
  fi
  case " $bad" in
    ' ')
      [ "$ended" -gt 0 ] && return 0
      log "nothing runs: launching"
      ;;
    *' 2 '*) die "the command cannot use its input (exit code 2), which another try would not change: watch.sh --once" ;;
    ' 143 ') log "the run was asked to stop and has saved: launching again" ;;
    *) failed "the run ended with exit codes ${bad% }" ;;
  esac
  launch
  return 1
}

replace() { # reason
  log "$1: deleting the pod and asking for another"
  launched=0
  "$HERE/teardown.sh" "${FORWARD[@]}" || failed "tear-down failed"
}

if [ "$DRY_RUN" = 1 ]; then
  "$HERE/create.sh" "${FORWARD[@]}"
  "$HERE/setup.sh" "${FORWARD[@]}"
  "$HERE/launch.sh" "${FORWARD[@]}" -- "${COMMAND[@]}"
  on_workers 'bash gqe_jax/tpu_scripts/worker/state.sh'
  [ "$DELETE" = 0 ] || "$HERE/teardown.sh" "${FORWARD[@]}"
  exit 0
fi

while true; do
  if ! state=$(pod_state); then
    failed "gcloud does not answer"
    continue
  fi
  case $state in
    ACTIVE)
      if [ "$launched" -eq 0 ]; then
        launch
      elif look; then
        break
      fi
      ;;
    ABSENT) "$HERE/create.sh" "${FORWARD[@]}" || failed "the request was refused" ;;
    SUSPENDED) replace "preempted (SUSPENDED)" ;;
    FAILED)
      failed "the request ended as FAILED"
      replace FAILED
      ;;
    *) log "$state" ;;
  esac
  sleep "$POLL_SECONDS"
done
log "the run is done"
[ "$DELETE" = 0 ] || "$HERE/teardown.sh" "${FORWARD[@]}"
[ "$DELETE" = 1 ] || say "the pod is still there, and paid for: tpu_scripts/teardown.sh"
