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
  on_workers 'bash gqe_jax/tpu_scripts/worker/state.sh'
  run gcloud storage cat "$out/record.json"
  exit 0
fi
while states=$(worker_states) && grep -q ' running ' <<<"$states"; do
  sleep "$POLL_SECONDS"
done
printf '%s\n' "$states"
if ! run gcloud storage cat "$out/record.json" >"$record"; then
  rm -f "$record"
  die "the list ended without a record: tpu_scripts/watch.sh --once shows why"
fi
say "record: $record"
if grep -q '^ "passed": true' "$record"; then say "all items passed"; else
  say "an item FAILED"
  exit 1
fi
