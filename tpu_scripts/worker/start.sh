#!/usr/bin/env bash
# On a worker: starts a command in the background unless one is alive. launch.sh calls it.
#
#   start.sh FLAG_SET LOGS COMMAND ...      LOGS: where in the bucket the log is kept, or none

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
run_dir="$HOME/gqe_run"
mkdir -p "$run_dir"
wanted=$(printf '%q ' "$@")

if ! flock -n "$run_dir/lock" true; then # run.sh holds it as long as the command lives
  if [ "$(cat "$run_dir/command")" = "$wanted" ]; then
    echo "$(hostname): runs already, process $(cat "$run_dir/pid"): nothing started"
    exit 0
  fi
  echo "$(hostname): another command is alive ($(cat "$run_dir/command")): tpu_scripts/stop.sh first" >&2
  exit 3
fi
printf '%s\n' "$wanted" >"$run_dir/command"
rm -f "$run_dir/pid" "$run_dir/exit_code"
setsid nohup bash "$here/run.sh" "$@" </dev/null >/dev/null 2>&1 &
for _ in $(seq 100); do
  [ ! -s "$run_dir/pid" ] || break
  sleep 0.1
done
echo "$(hostname): started process $(cat "$run_dir/pid"), log $run_dir/log"
