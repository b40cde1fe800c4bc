# shellcheck shell=bash
# The road of the Cloud TPU API: a queued resource, whose TPU VMs come and go together. Google keeps the API, but adds
# nothing to it. Commands: docs.cloud.google.com/tpu/docs/queued-resources
# shellcheck disable=SC2034,SC2153  # common.sh sets and uses the rest

# Sets GENERATION, CHIPS, HOSTS, and RUNTIME where none is given: docs.cloud.google.com/tpu/docs/runtimes
road_type() {
  local size=${TYPE##*-} image sizes
  case $TYPE in
    v4-*) GENERATION=v4 image=tpu-ubuntu2204-base ;;
    v5litepod-*) GENERATION=v5e image=v2-alpha-tpuv5-lite ;;
    v5p-*) GENERATION=v5p image=v2-alpha-tpuv5 ;;
    v6e-*) GENERATION=v6e image=v2-alpha-tpuv6e ;;
    tpu7x*) die "TYPE=$TYPE: TPU7x comes through Compute Engine and GKE only: set ROAD=compute (docs/tpu_pods.md)" ;;
    v5e-*) die "TYPE=$TYPE: Cloud TPU calls it v5litepod-$size" ;;
    *) die "TYPE=$TYPE is unknown: one of v4-N, v5p-N (N cores), v5litepod-N, v6e-N (N chips)" ;;
  esac
  case $GENERATION in
    v4 | v5p)
      sizes="a multiple of 8 (cores: 2 a chip, 4 chips a host)"
      case $size in '' | *[!0-9]* | 0*) die "TYPE=$TYPE: N must be $sizes" ;; esac
      [ $((size % 8)) -eq 0 ] || die "TYPE=$TYPE: N must be $sizes"
      CHIPS=$((size / 2)) HOSTS=$((size / 8))
      ;;
    *)
      case $size in
        1 | 4 | 8) HOSTS=1 ;;
        16 | 32 | 64 | 128 | 256) HOSTS=$((size / 4)) ;;
        *) die "TYPE=$TYPE: N must be one of 1, 4, 8, 16, 32, 64, 128, 256 (chips)" ;;
      esac
      CHIPS=$size
      ;;
  esac
  RUNTIME=${RUNTIME:-$image}
  [ "$CAPACITY" != flex-start ] || die "CAPACITY=flex-start: this road has no such flag outside gcloud alpha: set ROAD=compute"
  [ -z "$DISK_GB" ] || die "DISK_GB=$DISK_GB: TPU VMs of the Cloud TPU API have disks of 100 GB: set ROAD=compute"
}

road_state() { ask gcloud compute tpus queued-resources describe "$NAME" "--zone=$ZONE" "--project=$PROJECT" \
  '--format=value(state.state)'; }

road_reason() { ask gcloud compute tpus queued-resources describe "$NAME" "--zone=$ZONE" "--project=$PROJECT" \
  '--format=yaml(state)'; }

# Prints the type of the pod that is there.
road_found_type() { ask gcloud compute tpus queued-resources describe "$NAME" "--zone=$ZONE" "--project=$PROJECT" \
  '--format=value(tpu.nodeSpec[0].node.acceleratorType.basename())'; }

# --node-id, --node-count, --spot, --reserved, --service-account:
# docs.cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources/create
road_create() {
  local command=(gcloud compute tpus queued-resources create "$NAME" "--zone=$ZONE" "--project=$PROJECT"
    "--accelerator-type=$TYPE" "--runtime-version=$RUNTIME")
  if [ "$SLICES" -gt 1 ]; then command+=("--node-count=$SLICES"); else command+=("--node-id=$NAME"); fi
  case $CAPACITY in
    spot) command+=(--spot) ;;
    reserved) command+=(--reserved) ;;
  esac
  [ -z "$SERVICE_ACCOUNT" ] || command+=("--service-account=$SERVICE_ACCOUNT")
  # shellcheck disable=SC2206  # CREATE_ARGS is a list
  command+=($CREATE_ARGS)
  run "$CHANGING" "${command[@]}"
}

road_delete() {
  run "$CHANGING" gcloud compute tpus queued-resources delete "$NAME" "--zone=$ZONE" "--project=$PROJECT" --force --quiet
}

road_list="gcloud compute tpus queued-resources list"

# --batch-size: beyond 64 workers only the first batch would answer. docs.cloud.google.com/sdk/gcloud/reference/compute/
# tpus/queued-resources/ssh
road_ssh() { # seconds, command
  # shellcheck disable=SC2086  # SSH_ARGS is a list
  run "$1" gcloud compute tpus queued-resources ssh "$NAME" "--zone=$ZONE" "--project=$PROJECT" --node=all --worker=all \
    --batch-size=all $SSH_ARGS "--command=$2"
}

road_copy() { # files
  # shellcheck disable=SC2086
  run "$INSTALLING" gcloud compute tpus queued-resources scp "$@" "$NAME:" "--zone=$ZONE" "--project=$PROJECT" \
    --node=all --worker=all --batch-size=all $SSH_ARGS
}

# Whether Google has taken a VM away although the queued resource still says ACTIVE.
road_vm_is_gone() {
  local i node answer
  for ((i = 0; i < SLICES; i++)); do
    node=$NAME
    [ "$SLICES" -eq 1 ] || node=$NAME-$i
    answer=$(ask gcloud compute tpus tpu-vm describe "$node" "--zone=$ZONE" "--project=$PROJECT" '--format=value(state)' \
      2>&1) || true
    printf '%s\n' "$answer" >&2
    case $answer in *PREEMPTED* | *TERMINATED* | *STOPPED* | *DELETING* | *NOT_FOUND*) return 0 ;; esac
  done
  return 1
}
