#!/usr/bin/env bash
# Asks the run on all workers to save and end (SIGTERM); after two minutes it is killed. The pod stays, and is paid for.
#
#   stop.sh [common flags]
#
# Where nothing runs, nothing happens. launch.sh with the same command continues the run.

# shellcheck source=tpu_scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
no_more
need_pod
need_active
on_workers "$CHANGING" 'bash gqe_jax/tpu_scripts/worker/stop.sh'
