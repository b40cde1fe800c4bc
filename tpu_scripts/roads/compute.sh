# shellcheck shell=bash
# The road of Compute Engine, which Google develops: a VM for a slice of one host; for more, a managed instance group that
# a workload policy joins into one slice. The only road to TPU7x but for GKE.
# One VM:   docs.cloud.google.com/tpu/docs/create-instance-compute, docs.cloud.google.com/compute/docs/tpus/create-tpu-vm-instance
# A group:  docs.cloud.google.com/compute/docs/tpus/create-tpu-mig-multi-host-slice
# shellcheck disable=SC2034,SC2153  # common.sh sets and uses the rest

# Sets GENERATION, TOPOLOGY, CHIPS, HOSTS, MACHINE and IMAGE: docs.cloud.google.com/compute/docs/tpus/tpu-machines
road_type() {
  local size product=1 odd
  GENERATION=${TYPE%%:*} TOPOLOGY=${TYPE#*:}
  case $TYPE in
    v6e:*x* | v5p:*x*x* | tpu7x:*x*x*) ;;
    v4* | v5lite* | v5e*) die "TYPE=$TYPE: Compute Engine has v5p, v6e and tpu7x: set ROAD=queued" ;;
    *) die "TYPE=$TYPE is unknown: v6e:4x4, v5p:2x2x2, tpu7x:2x2x2, named as gqe plan --topology names them" ;;
  esac
  case $TOPOLOGY in *[!0-9x]* | x* | *x | *xx*) die "TYPE=$TYPE: after the colon stand chips by dimension, such as 4x4" ;; esac
  for size in ${TOPOLOGY//x/ }; do product=$((product * size)); done
  CHIPS=$product HOSTS=$(((product + 3) / 4)) odd=$((product % 4))
  case $GENERATION in
    v6e) MACHINE=ct6e-standard-4t IMAGE=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e ;;
    v5p) MACHINE=ct5p-hightpu-4t IMAGE=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e ;;
    tpu7x) MACHINE=tpu7x-standard-4t IMAGE=ubuntu-accel-2404-amd64-tpu-tpu7x ;;
  esac
  case $TYPE in v6e:1x1) MACHINE=ct6e-standard-1t odd=0 ;; esac
  [ "$odd" = 0 ] || die "TYPE=$TYPE: a host has 4 chips, so their number must be a multiple of 4 (v6e also 1x1)"
  [ "$SLICES" = 1 ] || die "SLICES=$SLICES: several slices are joined by ROAD=queued or by GKE (tpu_scripts/gke/jobset.yaml)"
  IMAGE=${RUNTIME:-$IMAGE} DISK_GB=${DISK_GB:-200} REGION=${ZONE%-*} # the images' own disks have 10 GB
}

# What a VM of either form is asked for. Provisioning models: docs.cloud.google.com/tpu/docs/spot-compute,
# docs.cloud.google.com/tpu/docs/consume-reservation-compute, docs.cloud.google.com/compute/docs/instances/about-flex-start-vms
# --maintenance-policy: TPU VMs cannot be moved. --scopes: the bucket is reached with the VM's service account.
vm_arguments() {
  VM=("--project=$PROJECT" "--machine-type=$MACHINE" "--image-family=$IMAGE"
    --image-project=ubuntu-os-accelerator-images "--boot-disk-size=${DISK_GB}GB" --maintenance-policy=TERMINATE
    --scopes=cloud-platform)
  case $CAPACITY in
    spot) VM+=(--provisioning-model=SPOT --instance-termination-action=STOP) ;;
    on-demand) VM+=(--provisioning-model=STANDARD) ;;
    flex-start)
      VM+=(--provisioning-model=FLEX_START "--max-run-duration=$MAX_RUN" --instance-termination-action=DELETE)
      ;;
    reserved) VM+=(--provisioning-model=RESERVATION_BOUND --reservation-affinity=specific "--reservation=$RESERVATION") ;;
  esac
  [ -z "$SERVICE_ACCOUNT" ] || VM+=("--service-account=$SERVICE_ACCOUNT")
  # shellcheck disable=SC2206  # CREATE_ARGS is a list
  VM+=($CREATE_ARGS)
}

# A group that is not complete is PENDING; one of whose VMs was stopped never trains again: SUSPENDED.
road_state() {
  local states running
  if [ "$HOSTS" = 1 ]; then
    states=$(ask gcloud compute instances describe "$NAME" "--zone=$ZONE" "--project=$PROJECT" '--format=value(status)')
  else
    states=$(ask gcloud compute instance-groups managed list-instances "$NAME" "--zone=$ZONE" "--project=$PROJECT" \
      '--format=value(instanceStatus)')
  fi || {
    printf '%s\n' "$states"
    return 1
  }
  running=$(grep -c '^RUNNING$' <<<"$states" || true)
  if grep -Eq '^(STOPPING|STOPPED|TERMINATED|SUSPENDING|SUSPENDED)$' <<<"$states"; then
    printf 'SUSPENDED\n'
  elif [ "$running" -ge "$HOSTS" ]; then
    printf 'ACTIVE\n'
  else
    printf 'PENDING\n'
  fi
}

road_reason() {
  if [ "$HOSTS" = 1 ]; then
    ask gcloud compute instances describe "$NAME" "--zone=$ZONE" "--project=$PROJECT" '--format=yaml(status,statusMessage)'
  else
    ask gcloud compute instance-groups managed list-errors "$NAME" "--zone=$ZONE" "--project=$PROJECT" --limit=5
  fi
}

road_found_type() { printf '%s\n' "$TYPE"; } # the name of a group does not say it

# The policy names the shape in which the VMs are joined. The group is asked for all of them at once (bulk): a slice
# that is not whole cannot train. What fails halfway leaves no VM, and is deleted by the next create or by teardown.sh.
road_create() {
  vm_arguments
  if [ "$HOSTS" = 1 ]; then
    [ "$CAPACITY" != flex-start ] || VM+=(--request-valid-for-duration=2h)
    run "$CHANGING" gcloud compute instances create "$NAME" "--zone=$ZONE" "${VM[@]}"
    return
  fi
  [ "$DRY_RUN" = 1 ] || delete_parts
  run "$CHANGING" gcloud compute resource-policies create workload-policy "$NAME" "--region=$REGION" \
    "--project=$PROJECT" --type=HIGH_THROUGHPUT "--accelerator-topology=$TOPOLOGY"
  run "$CHANGING" gcloud compute instance-templates create "$NAME" "--instance-template-region=$REGION" "${VM[@]}"
  run "$CHANGING" gcloud compute instance-groups managed create "$NAME" "--zone=$ZONE" "--project=$PROJECT" \
    "--template=projects/$PROJECT/regions/$REGION/instanceTemplates/$NAME" "--size=$HOSTS" \
    "--workload-policy=projects/$PROJECT/regions/$REGION/resourcePolicies/$NAME" \
    --target-size-policy-mode=bulk --default-action-on-vm-failure=do-nothing
}

# The group's template and policy; they cost nothing, and may be missing.
delete_parts() {
  run "$CHANGING" gcloud compute instance-templates delete "$NAME" "--region=$REGION" "--project=$PROJECT" --quiet || true
  run "$CHANGING" gcloud compute resource-policies delete "$NAME" "--region=$REGION" "--project=$PROJECT" --quiet || true
}

road_delete() {
  if [ "$HOSTS" = 1 ]; then
    run "$CHANGING" gcloud compute instances delete "$NAME" "--zone=$ZONE" "--project=$PROJECT" --quiet
  else
    run "$CHANGING" gcloud compute instance-groups managed delete "$NAME" "--zone=$ZONE" "--project=$PROJECT" --quiet
    delete_parts
  fi
}

road_list="gcloud compute instances list"

# Calls a command for each VM, sixteen at a time, each with what the VM printed; fails where one of them does.
each_vm() { # seconds, function of a VM's name
  local limit=$1 call=$2 vm vms jobs=() failed=0 scratch
  if [ "$HOSTS" = 1 ] || [ "$DRY_RUN" = 1 ]; then
    vms=$NAME
  else
    vms=$(ask gcloud compute instance-groups managed list-instances "$NAME" "--zone=$ZONE" "--project=$PROJECT" \
      '--format=value(instance.basename())') || return 1
  fi
  scratch=$(mktemp -d)
  [ "$FOLLOW" = 0 ] || trap 'kill "${jobs[@]}" 2>/dev/null; exit 130' INT TERM
  for vm in $vms; do
    if [ "$FOLLOW" = 1 ]; then "$call" "$limit" "$vm" & else "$call" "$limit" "$vm" >"$scratch/$vm" 2>&1 & fi
    jobs+=($!)
    if [ ${#jobs[@]} -ge 16 ] && [ "$FOLLOW" = 0 ]; then
      wait_for "${jobs[@]}" || failed=$?
      jobs=()
    fi
  done
  [ ${#jobs[@]} -eq 0 ] || wait_for "${jobs[@]}" || failed=$?
  [ "$FOLLOW" = 1 ] || cat "$scratch"/*
  rm -rf "$scratch"
  return "$failed"
}

wait_for() { # processes; returns an exit code of one that failed: gcloud compute ssh hands on the command's
  local job failed=0
  for job in "$@"; do wait "$job" || failed=$?; done
  return "$failed"
}

FOLLOW=0 # 1: what the VMs print is shown as it comes
road_ssh() { # seconds, command
  local remote=$2
  # shellcheck disable=SC2329  # each_vm calls it
  ssh_one() {
    # shellcheck disable=SC2086  # SSH_ARGS is a list
    run "$1" gcloud compute ssh "$2" "--zone=$ZONE" "--project=$PROJECT" $SSH_ARGS "--command=$remote"
  }
  each_vm "$1" ssh_one
}

road_copy() { # files
  local files=("$@")
  # shellcheck disable=SC2329
  copy_one() {
    # shellcheck disable=SC2086
    run "$1" gcloud compute scp "${files[@]}" "$2:" "--zone=$ZONE" "--project=$PROJECT" $SSH_ARGS
  }
  each_vm "$INSTALLING" copy_one
}

# The state of the group says it already.
road_vm_is_gone() { [ "$(pod_state)" != ACTIVE ]; }
