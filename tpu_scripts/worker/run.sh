#!/usr/bin/env bash
# On a worker: runs a command, its output to ~/gqe_run/log, its exit code to ~/gqe_run/exit_code. start.sh calls it.

set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
run_dir="$HOME/gqe_run"
exec 9>"$run_dir/lock" # inherited by the command: held until the last of them ends
flock -n 9 || exit 0
flag_set=$1 logs=$2
shift 2

export PATH="$HOME/gqe_venv/bin:$PATH"
export PYTHONUNBUFFERED=1
export JAX_COORDINATOR_PORT=${JAX_COORDINATOR_PORT:-8476} # JAX's own choice, 8482, is closed in some networks
LIBTPU_INIT_ARGS="$(bash "$here/xla_flags.sh" "$flag_set") ${LIBTPU_INIT_ARGS:-}"
export LIBTPU_INIT_ARGS

cd "$HOME/gqe_jax" || exit 1
{
  echo "==== $(date -u +%FT%TZ) $(hostname): $*"
  echo "==== LIBTPU_INIT_ARGS=$LIBTPU_INIT_ARGS"
} >>"$run_dir/log"
"$@" >>"$run_dir/log" 2>&1 &
child=$!
trap 'kill -TERM "$child" 2>/dev/null' TERM INT HUP # a shutdown signals this shell too: the command saves first
echo "$child" >"$run_dir/pid"

# The log outlives the VM: a copy goes to the bucket once a minute and at the end.
name=$(bash "$here/name.sh")
keep_log() {
  [ "$logs" = none ] || timeout 60 "$HOME/gqe_venv/bin/python" "$here/keep_log.py" "$run_dir/log" "$logs/$name.log"
}
{
  exec 9>&-
  while sleep "${GQE_LOG_SECONDS:-60}" && kill -0 "$child" 2>/dev/null; do keep_log; done
} >/dev/null 2>&1 &
keeper=$!

wait "$child"
while kill -0 "$child" 2>/dev/null; do wait "$child"; done # a signal interrupts the wait
wait "$child" # its exit code: an interrupted wait gives that of the signal
code=$?
echo "==== $(date -u +%FT%TZ) $(hostname): ended with exit code $code" >>"$run_dir/log"
kill "$keeper" 2>/dev/null
keep_log >/dev/null 2>&1
echo "$code" >"$run_dir/exit_code"
