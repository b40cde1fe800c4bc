#!/usr/bin/env bash
# On a worker: one line, "gqe-state: HOST running PID", "HOST ended CODE" or "HOST idle".

run_dir="$HOME/gqe_run"
if [ -e "$run_dir/lock" ] && ! flock -n "$run_dir/lock" true; then
  echo "gqe-state: $(hostname) running $(cat "$run_dir/pid")"
elif [ -s "$run_dir/exit_code" ]; then
  echo "gqe-state: $(hostname) ended $(cat "$run_dir/exit_code")"
elif [ -s "$run_dir/pid" ]; then # killed with its shell, or the machine was restarted
  echo "gqe-state: $(hostname) ended 137"
else
  echo "gqe-state: $(hostname) idle"
fi
