#!/usr/bin/env bash
# Runs the acceptance list on all workers of a pod that is set up, and fetches its record. Do it before a long run.
#
#   acceptance.sh [common flags] [-- ARGUMENTS of acceptance.py, such as --config.mesh.fsdp=4]
#
# Writes acceptance-NAME-TIME.json here; ends with 1 if an item failed. acceptance.py --rehearse 2 needs no pod.

# shellcheck source=tpu_scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
arguments=(${COMMAND[@]+"${COMMAND[@]}"}) COMMAND=()
no_more
need PROJECT ZONE TYPE BUCKET
read_type
POLL_SECONDS=${GQE_POLL_SECONDS:-20}

stamp=$(date -u +%Y%m%dT%H%M%SZ)
out="${BUCKET%/}/acceptance/$NAME-$stamp"
record="acceptance-$NAME-$stamp.json"
forward
"$HERE/launch.sh" "${FORWARD[@]}" -- python tpu_scripts/acceptance.py "--out=$out" ${arguments[@]+"${arguments[@]}"}
if [ "$DRY_RUN" = 1 ]; then
  on_workers "$ASKING" 'bash gqe_jax/tpu_scripts/worker/state.sh'
  run "$CHANGING" gcloud storage cat "$out/record.json"
  exit 0
fi
# A single failed ssh is no end of the list, which takes ten minutes; nor is the list endless.
unheard=0
for ((looks = 0; ; looks++)); do
  if states=$(worker_states) && [ -n "$states" ]; then
    unheard=0
    grep -q ' running ' <<<"$states" || break
  else
    unheard=$((unheard + 1))
    [ "$unheard" -lt 10 ] || give_up "the workers do not answer: watch.sh --state; the pod is still paid for"
  fi
  [ "$looks" -lt 360 ] || give_up "the list does not end: watch.sh --once; stop.sh; the pod is still paid for"
  sleep "$POLL_SECONDS"
done
printf '%s\n' "$states"
if ! run "$CHANGING" gcloud storage cat "$out/record.json" >"$record"; then
  rm -f "$record"
  die "the list ended without a record: tpu_scripts/watch.sh --once shows why"
fi
say "record: $record"
if grep -q '^ "passed": true' "$record"; then say "all items passed"; else
  say "an item FAILED"
  exit 1
fi
