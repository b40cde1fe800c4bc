#!/usr/bin/env bash
# Starts one command on all workers at once, detached: it goes on when this shell ends. watch.sh shows its log.
#
#   launch.sh [common flags] -- COMMAND ...
#   launch.sh -- gqe train --distributed --config gqe_250m --run gs://BUCKET/RUN --config.data.path=gs://BUCKET/DATA
#
# Runs with the XLA flags of FLAG_SET; where BUCKET is set, each worker's log is copied to BUCKET/logs/NAME once a minute. Where the same command is alive, nothing is started; another command that is alive
# is an error (stop.sh first).

# shellcheck source=tpu_scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
[ ${#COMMAND[@]} -gt 0 ] || die "no command: launch.sh -- gqe train --distributed --config ... --run gs://BUCKET/RUN"
command=("${COMMAND[@]}") COMMAND=()
no_more
need PROJECT ZONE TYPE
read_type

check_command "${command[@]}"
need_active

logs=none
[ -z "$BUCKET" ] || logs="${BUCKET%/}/logs/$NAME"
remote="bash gqe_jax/tpu_scripts/worker/start.sh $FLAG_SET $logs"
for word in "${command[@]}"; do remote+=" $(printf '%q' "$word")"; done
on_workers "$CHANGING" "$remote"
say "next: tpu_scripts/watch.sh (logs), tpu_scripts/supervise.sh -- ... (restarts after preemption)"
