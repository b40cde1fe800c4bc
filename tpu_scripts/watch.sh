#!/usr/bin/env bash
# Shows what the workers' runs print, each line with its worker, until Ctrl-C (which ends only the watching).
#
#   watch.sh [--state | --once] [common flags]
#
#   --state    only whether the pod is there and what each worker's run does: running, ended with which code, idle
#   --once     the last 50 lines of each worker, and return

# shellcheck source=tpu_scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
what=follow
case "${REST[*]-}" in
  --state) what=state REST=() ;;
  --once) what=once REST=() ;;
esac
no_more
need_pod
need_active
case $what in
  state) worker_states ;;
  once) on_workers "$ASKING" 'bash gqe_jax/tpu_scripts/worker/log.sh -n 50' ;;
  follow) FOLLOW=1 GQE_CALL_SECONDS='' on_workers 31536000 'bash gqe_jax/tpu_scripts/worker/log.sh -n 20 -F' ;;
esac
