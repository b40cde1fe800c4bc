#!/usr/bin/env bash
# Asks Google Cloud for the pod, as a queued resource. Asking again for a pod that is there changes nothing.
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

describe=(ask gcloud compute tpus queued-resources describe "$NAME" "--zone=$ZONE" "--project=$PROJECT")
create=(gcloud compute tpus queued-resources create "$NAME" "--zone=$ZONE" "--project=$PROJECT"
  "--accelerator-type=$TYPE" "--runtime-version=$RUNTIME")
if [ "$SLICES" -gt 1 ]; then create+=("--node-count=$SLICES"); else create+=("--node-id=$NAME"); fi
[ "$SPOT" = 0 ] || create+=(--spot)
# shellcheck disable=SC2206  # CREATE_ARGS is a list
create+=($CREATE_ARGS)

state=ABSENT
[ "$DRY_RUN" = 1 ] || state=$(pod_state)
case $state in
  ABSENT)
    say "asking for $SLICES x $TYPE ($HOSTS host(s), $((CHIPS * SLICES)) chips$([ "$SPOT" = 0 ] || echo ', spot'))"
    run "${create[@]}"
    ;;
  FAILED | SUSPENDED)
    "${describe[@]}" '--format=yaml(state)' >&2
    die "a pod $NAME is there and $state (reason above); it never comes back: tpu_scripts/teardown.sh, then this again"
    ;;
  *)
    type=$("${describe[@]}" '--format=value(tpu.nodeSpec[0].node.acceleratorType.basename())')
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
        "${describe[@]}" '--format=yaml(state)' >&2 || true
        die "the request ended as $state (reason above): another zone, a smaller type, or SPOT=$((1 - SPOT))"
        ;;
    esac
    say "$(date +%H:%M:%S) $state"
    sleep "$POLL_SECONDS"
  done
  say "$NAME is ACTIVE; next: tpu_scripts/setup.sh"
fi
