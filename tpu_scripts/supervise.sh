#!/usr/bin/env bash
# Keeps a run going until it has ended well: creates the pod, sets it up, launches, and does so again after a preemption.
#
#   supervise.sh [--max-restarts N] [--max-queue N] [--delete-when-done] [common flags] -- COMMAND ...
#
#   --max-restarts N     give up after N failures in a row (default 10); preemptions of a run that ran do not count
#   --max-queue N        give up after N looks, one a minute, at a request that waits for capacity (default 10080: a week)
#   --delete-when-done   tear the pod down when the run has ended with exit code 0
#
# The command must continue its run when it is started again, as gqe train does from gs://BUCKET/RUN. After a failure it
# waits a minute, after the next two, up to fifteen. Exit code 2 of the command, and what launch.sh refuses, is not tried
# again. Every wait ends, and at every end it says what is still paid for. Run this where it outlives your laptop: in tmux
# on a small VM. Started again, it takes up what it finds.

# shellcheck source=tpu_scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
MAX_RESTARTS=10 MAX_QUEUE=10080 DELETE=0
set -- ${REST[@]+"${REST[@]}"}
while [ $# -gt 0 ]; do
  case $1 in
    --max-restarts | --max-queue)
      [ $# -gt 1 ] || die "$1 needs a number"
      if [ "$1" = --max-queue ]; then MAX_QUEUE=$2; else MAX_RESTARTS=$2; fi
      shift
      ;;
    --max-restarts=*) MAX_RESTARTS=${1#*=} ;;
    --max-queue=*) MAX_QUEUE=${1#*=} ;;
    --delete-when-done) DELETE=1 ;;
    *) die "unknown argument $1: see supervise.sh --help" ;;
  esac
  shift
done
case $MAX_RESTARTS in '' | *[!0-9]*) die "--max-restarts $MAX_RESTARTS must be a number" ;; esac
case $MAX_QUEUE in '' | *[!0-9]*) die "--max-queue $MAX_QUEUE must be a number" ;; esac
[ ${#COMMAND[@]} -gt 0 ] || die "no command: supervise.sh -- gqe train --distributed --config ... --run gs://BUCKET/RUN"
need PROJECT ZONE TYPE
read_type
check_command "${COMMAND[@]}" # before anything is created
POLL_SECONDS=${GQE_POLL_SECONDS:-60} # between looks

# Bounds, in looks:
LONGEST_WAIT=15  # after a failure
HEALTHY=30       # a run that has lived so long has recovered: failures are counted anew
STRAGGLING=10    # workers may end, or start, so much after the first of them
SILENT=10        # workers may be out of reach for so long; then all are started again, and then the pod is replaced
LEAVING=30       # a pod that was ACTIVE may be something else for so long, and a pod that is deleted be there

forward

log() { say "$(date +%H:%M:%S) $*"; }

# ---------------------------------------------------------------- every end says what is still paid for

what_is_paid_for() {
  local code=$? state
  trap - EXIT
  state=$(pod_state 2>/dev/null) || state=UNKNOWN
  case $state in
    ABSENT) say "there is no pod $NAME: nothing is paid for but the bucket" ;;
    UNKNOWN) say "WARNING: whether the pod $NAME is there, and paid for, is not known: $road_list --project=$PROJECT" ;;
    ACTIVE) say "the pod $NAME is still there, and paid for: tpu_scripts/teardown.sh --name=$NAME" ;;
    *) say "$NAME is still there ($state), and paid for as soon as a VM of it runs: tpu_scripts/teardown.sh --name=$NAME" ;;
  esac
  exit "$code"
}

wait_looks() { # looks
  local i
  for ((i = 0; i < $1; i++)); do sleep "$POLL_SECONDS"; done
}

failures=0
failed() { # reason
  failures=$((failures + 1))
  [ "$failures" -le "$MAX_RESTARTS" ] || give_up "$1; that was failure $failures in a row: gave up (see watch.sh --once)"
  local looks=$((1 << (failures > 5 ? 4 : failures - 1)))
  [ "$looks" -le "$LONGEST_WAIT" ] || looks=$LONGEST_WAIT
  log "$1; failure $failures of at most $MAX_RESTARTS in a row; next try in $looks x $POLL_SECONDS s"
  wait_looks "$looks"
}

# ---------------------------------------------------------------- what is done

launched=0 # whether the command was started on this pod
ran=0      # whether it was seen to run everywhere on this pod
healthy=0 silent=0 partial=0 waiting=0 # looks of that kind in a row

# What was refused with 2 or 3 (another command is alive) another try would not change.
launch() {
  local code=0
  healthy=0 partial=0
  "$HERE/setup.sh" "${FORWARD[@]}" || code=$?
  [ "$code" != 0 ] || "$HERE/launch.sh" "${FORWARD[@]}" -- "${COMMAND[@]}" || code=$?
  case $code in
    0) launched=1 ;;
    2 | 3) die "set-up or launch was refused (above), which another try would not change" ;;
    *) failed "set-up or launch failed" ;;
  esac
}

restart() { # reason; stops what is left of the run everywhere first
  failed "$1"
  "$HERE/stop.sh" "${FORWARD[@]}" || true
  launch
}

replace() { # reason
  log "$1: deleting the pod and asking for another"
  launched=0 ran=0 silent=0
  "$HERE/teardown.sh" "${FORWARD[@]}" || failed "tear-down failed"
}

# A preemption is no failure of a run that ran; pods that go before it does are not asked for without end.
lost() { # reason
  [ "$ran" = 1 ] || failed "$1 before the run ran"
  replace "$1"
}

# ---------------------------------------------------------------- looks at a pod that is ACTIVE and launched

# The workers do not answer, or not all of them.
look_silent() {
  silent=$((silent + 1))
  if road_vm_is_gone; then
    lost "a VM is gone"
  elif [ "$silent" -ge $((2 * SILENT)) ]; then
    failed "the workers do not answer, though their VMs are there"
    replace "out of reach for $silent looks"
  elif [ "$silent" -eq "$SILENT" ]; then
    restart "a worker does not answer, though its VM is there: installing and starting it again"
  else
    log "the workers do not answer: looking again ($silent of $SILENT)"
  fi
}

# Some run, others do not, or not yet.
look_partial() { # running, ended, bad
  partial=$((partial + 1)) healthy=0
  if [ "$partial" -eq "$STRAGGLING" ]; then
    log "$1 worker(s) still run long after the first ended: stopping them"
    "$HERE/stop.sh" "${FORWARD[@]}" || true
  elif [ "$partial" -ge $((2 * STRAGGLING)) ]; then
    failed "$1 worker(s) cannot be stopped"
    replace "workers that do not stop"
  fi
  log "$1 running, $2 ended${3:+ (exit codes ${3% })}"
}

# Returns 0 when the run is done.
look() {
  local states running ended bad
  if ! states=$(worker_states) || [ "$(grep -c . <<<"$states" || true)" -lt "$HOSTS" ]; then
    look_silent
    return 1
  fi
  silent=0
  running=$(grep -c ' running ' <<<"$states" || true)
  ended=$(grep -c ' ended ' <<<"$states" || true)
  bad=$(sed -n 's/.* ended //p' <<<"$states" | grep -vx 0 | sort -u | tr '\n' ' ' || true)
  if [ "$running" -eq "$HOSTS" ]; then
    partial=0 ran=1 healthy=$((healthy + 1))
    [ "$healthy" -lt "$HEALTHY" ] || failures=0
    log "$running running, 0 ended"
    return 1
  elif [ "$running" -gt 0 ]; then
    look_partial "$running" "$ended" "$bad"
    return 1
  fi
  case " $bad" in
    ' ')
      [ "$ended" -lt "$HOSTS" ] || return 0
      failed "nothing runs on some workers"
      ;;
    *' 2 '*) die "the command cannot use its input (exit code 2), which another try would not change: watch.sh --once" ;;
    ' 143 ') log "the run was asked to stop and has saved: launching again" ;;
    *' 75 '*) failed "a process was stuck (exit code 75; its log has the stack of every thread)" ;;
    *) failed "the run ended with exit codes ${bad% }" ;;
  esac
  launch
  return 1
}

# ---------------------------------------------------------------- a look at the pod

# Not ACTIVE, and on its way to it or away.
look_waiting() { # state
  waiting=$((waiting + 1))
  log "$1"
  local leaves=0
  case $launched$1 in 1* | *DELETING | *SUSPENDING) leaves=1 ;; esac
  if [ "$leaves" = 1 ] && [ "$waiting" -ge "$LEAVING" ]; then
    failed "the pod has been $1 for $waiting looks"
    replace "$1"
    waiting=0
  elif [ "$leaves" = 0 ] && [ "$waiting" -ge "$MAX_QUEUE" ]; then
    "$HERE/teardown.sh" "${FORWARD[@]}" || true
    give_up "the request was $1 for $waiting looks (--max-queue), and no pod came of it: another zone, type or CAPACITY"
  fi
}

create() {
  local code=0
  launched=0 ran=0 waiting=0
  "$HERE/create.sh" "${FORWARD[@]}" || code=$?
  case $code in
    0) ;;
    2) die "the request was refused (above), which another try would not change" ;;
    *) failed "the request failed" ;;
  esac
}

if [ "$DRY_RUN" = 1 ]; then
  "$HERE/create.sh" "${FORWARD[@]}"
  "$HERE/setup.sh" "${FORWARD[@]}"
  "$HERE/launch.sh" "${FORWARD[@]}" -- "${COMMAND[@]}"
  on_workers "$ASKING" 'bash gqe_jax/tpu_scripts/worker/state.sh'
  [ "$DELETE" = 0 ] || "$HERE/teardown.sh" "${FORWARD[@]}"
  exit 0
fi

trap what_is_paid_for EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

while true; do
  if ! state=$(pod_state); then
    failed "gcloud does not answer"
    continue
  fi
  case $state in
    ACTIVE)
      waiting=0
      if [ "$launched" = 0 ]; then
        launch
      elif look; then
        break
      fi
      ;;
    ABSENT) create ;;
    SUSPENDED) lost "preempted (SUSPENDED)" ;;
    FAILED)
      failed "the request ended as FAILED"
      replace FAILED
      ;;
    *) look_waiting "$state" ;;
  esac
  sleep "$POLL_SECONDS"
done
log "the run is done"
[ "$DELETE" = 1 ] || exit 0
failures=0
until "$HERE/teardown.sh" "${FORWARD[@]}"; do failed "tear-down failed"; done
