#!/usr/bin/env bash
# On a worker: SIGTERM to the run, so that it saves; SIGKILL to all of it after GRACE seconds.

run_dir="$HOME/gqe_run"
grace=${GRACE:-120}
if [ ! -e "$run_dir/lock" ] || flock -n "$run_dir/lock" true; then
  echo "$(hostname): nothing runs"
  exit 0
fi
pid=$(cat "$run_dir/pid")
kill -TERM "$pid" 2>/dev/null
if flock -w "$grace" "$run_dir/lock" true; then
  echo "$(hostname): stopped, exit code $(cat "$run_dir/exit_code" 2>/dev/null)"
else
  kill -KILL -- "-$(ps -o pgid= -p "$pid" | tr -d ' ')" # the session that start.sh made for it
  echo "$(hostname): killed after $grace s"
fi
