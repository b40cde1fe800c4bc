#!/usr/bin/env bash
# Asks Google Cloud for the pod: a queued resource, or Compute Engine's VMs (ROAD). Asking again for a pod that is there changes nothing.
#
#   create.sh [--wait] [common flags]
#
#   --wait    return when the pod is ACTIVE. The queue can take minutes or days; Ctrl-C leaves the request in it.

# shellcheck source=tpu_scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
WAIT=0
if [ "${REST[*]-}" = --wait ]; then WAIT=1 REST=(); fi
no_more
need PROJECT ZONE TYPE
read_type
POLL_SECONDS=${GQE_POLL_SECONDS:-30}

state=ABSENT
[ "$DRY_RUN" = 1 ] || state=$(pod_state)
case $state in
  ABSENT)
    say "asking for $SLICES x $TYPE ($HOSTS host(s), $((CHIPS * SLICES)) chips, $CAPACITY)"
    road_create
    ;;
  FAILED | SUSPENDED)
    road_reason >&2 || true
    give_up "a pod $NAME is there and $state (reason above); it never comes back: tpu_scripts/teardown.sh, then this again"
    ;;
  *)
    type=$(road_found_type) || give_up "cannot read the type of the pod $NAME that is there"
    [ "$type" = "$TYPE" ] || die "a pod $NAME is there with type $type, not $TYPE: tear it down, or choose another --name"
    say "$NAME is there already ($state): nothing to do"
    ;;
esac

if [ "$WAIT" = 1 ] && [ "$DRY_RUN" = 0 ]; then
  while true; do
    state=$(pod_state)
    case $state in
      ACTIVE) break ;;
      FAILED | SUSPENDED | ABSENT)
        road_reason >&2 || true
        give_up "the request ended as $state (reason above): another zone, a smaller type, or another CAPACITY (now $CAPACITY)"
        ;;
    esac
    say "$(date +%H:%M:%S) $state"
    sleep "$POLL_SECONDS"
  done
  say "$NAME is ACTIVE; next: tpu_scripts/setup.sh"
fi
