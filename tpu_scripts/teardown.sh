#!/usr/bin/env bash
# Deletes the pod and everything on its disks, and with it the cost. Checkpoints in the bucket stay.
#
#   teardown.sh [common flags]
#
# A run in progress is asked to save first. Deleting a pod that is not there changes nothing.

# shellcheck source=tpu_scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
no_more
need_pod

state=ACTIVE
[ "$DRY_RUN" = 1 ] || state=$(pod_state)
if [ "$state" = ABSENT ]; then
  say "there is no pod $NAME in $ZONE: nothing to do"
  exit 0
fi
if [ "$state" = ACTIVE ]; then
  # Not reaching the workers must not keep the pod, and its bill, alive.
  on_workers "$CHANGING" 'bash gqe_jax/tpu_scripts/worker/stop.sh' || say "warning: could not stop the run; deleting all the same"
fi
road_delete
say "$NAME is deleted; check that nothing is left: $road_list"
