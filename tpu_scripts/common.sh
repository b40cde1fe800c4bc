# shellcheck shell=bash
# What the scripts of this folder share: settings, errors, printing and running of commands, state of the pod.
# Settings come from pod.env and are overridden by flags. Runs on bash 3.2 too, which macOS still has.
# shellcheck disable=SC2034  # what is set here is used by the scripts

set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CHECKOUT=$(dirname "$HERE")
SETTINGS="PROJECT ZONE NAME TYPE SLICES SPOT RUNTIME BUCKET PYTHON_VERSION FLAG_SET CREATE_ARGS SSH_ARGS"
DRY_RUN=0

# ---------------------------------------------------------------- messages

say() { printf '%s: %s\n' "$(basename "$0")" "$*"; }

die() {
  printf '%s: error: %s\n' "$(basename "$0")" "$*" >&2
  exit 2
}

show() { # the command, quoted so that it can be pasted
  local word line='+'
  for word in "$@"; do line+=" $(printf '%q' "$word")"; done
  printf '%s\n' "$line" >&2
}

# Prints a command and runs it, unless this is a dry run.
run() {
  show "$@"
  [ "$DRY_RUN" = 1 ] || "$@"
}

# Prints a command that only asks, and runs it.
ask() {
  show "$@"
  "$@"
}

# ---------------------------------------------------------------- settings

print_help() { # the script's own header, then what all scripts take
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
  cat <<'HELP'
Common flags:
  --env FILE     settings (default: tpu_scripts/pod.env; pod.env.example explains them)
  --KEY VALUE    overrides a setting: --project, --zone, --name, --type, --slices, --spot, --runtime, --bucket, ...
  --dry-run      print the commands, run none
  --help
HELP
}

is_setting() {
  local known
  for known in $SETTINGS; do [ "$1" = "$known" ] && return 0; done
  return 1
}

read_settings() { # file
  local line key value number=0
  while IFS= read -r line || [ -n "$line" ]; do
    number=$((number + 1))
    line=${line%%[[:space:]]#*}
    [ "${line#\#}" = "$line" ] && [ -n "${line//[[:space:]]/}" ] || continue
    key=${line%%=*}
    if [ "$key" = "$line" ] || ! is_setting "$key"; then
      die "$1, line $number: '$line' is no setting: write KEY=VALUE with one of $SETTINGS"
    fi
    value=${line#*=}
    value=${value%"${value##*[![:space:]]}"}
    value=${value#[\"\']}
    printf -v "$key" '%s' "${value%[\"\']}"
  done <"$1"
}

# Reads pod.env and the common flags; what is left of the arguments is in REST, what stands behind "--" in COMMAND.
parse() {
  local env_file="$HERE/pod.env" given=() key value i
  for key in $SETTINGS; do printf -v "$key" '%s' ''; done
  REST=() COMMAND=()
  while [ $# -gt 0 ]; do
    case $1 in
      --help | -h) print_help && exit 0 ;;
      --dry-run) DRY_RUN=1 ;;
      --env)
        [ $# -gt 1 ] || die "--env needs a file"
        env_file=$2
        [ -f "$env_file" ] || die "--env $env_file: no such file: copy tpu_scripts/pod.env.example and fill it in"
        shift
        ;;
      --)
        shift
        COMMAND=("$@")
        break
        ;;
      --*=*)
        key=$(flag_key "${1%%=*}")
        if is_setting "$key"; then given+=("$key" "${1#*=}"); else REST+=("$1"); fi
        ;;
      --*)
        key=$(flag_key "$1")
        if is_setting "$key"; then
          [ $# -gt 1 ] || die "$1 needs a value"
          given+=("$key" "$2")
          shift
        else
          REST+=("$1")
        fi
        ;;
      *) REST+=("$1") ;;
    esac
    shift
  done
  [ ! -f "$env_file" ] || read_settings "$env_file"
  for ((i = 0; i < ${#given[@]}; i += 2)); do
    key=${given[i]} value=${given[i + 1]}
    printf -v "$key" '%s' "$value"
  done
  NAME=${NAME:-gqe} SLICES=${SLICES:-1} SPOT=${SPOT:-1} PYTHON_VERSION=${PYTHON_VERSION:-3.11}
}

# Sets FORWARD: flags that give another script of this folder the settings of this one.
forward() {
  local key
  FORWARD=()
  for key in $SETTINGS; do FORWARD+=("--$(printf '%s' "$key" | tr 'A-Z_' 'a-z-')=${!key}"); done
  [ "$DRY_RUN" = 0 ] || FORWARD+=(--dry-run)
}

flag_key() { printf '%s' "${1#--}" | tr 'a-z-' 'A-Z_'; }

# Ends the script for arguments that it does not know, unless there are none left.
no_more() {
  [ ${#REST[@]} -eq 0 ] || die "unknown argument ${REST[0]}: see $(basename "$0") --help"
  [ ${#COMMAND[@]} -eq 0 ] || die "takes no command after --: see $(basename "$0") --help"
}

need() { # settings without which the script cannot go on
  local key flag
  for key in "$@"; do
    flag=--$(printf '%s' "$key" | tr 'A-Z_' 'a-z-')
    [ -n "${!key}" ] || die "$key is not set: give $flag, or set it in tpu_scripts/pod.env (pod.env.example explains it)"
  done
  case $SPOT in 0 | 1) ;; *) die "SPOT=$SPOT must be 1 (spot) or 0 (on demand)" ;; esac
  case $SLICES in '' | *[!0-9]* | 0) die "SLICES=$SLICES must be a positive number of slices" ;; esac
  case $NAME in
    [!a-z]* | *[!a-z0-9-]*) die "NAME=$NAME must begin with a letter and hold only a-z, 0-9 and -" ;;
  esac
  case $BUCKET in '' | gs://?*) ;; *) die "BUCKET=$BUCKET must begin with gs://" ;; esac
  case $PYTHON_VERSION in 3.1[1-9]) ;; *) die "PYTHON_VERSION=$PYTHON_VERSION must be 3.11 or newer" ;; esac
  if [ "$DRY_RUN" = 0 ] && ! command -v gcloud >/dev/null; then
    die "gcloud is not on the PATH: install the Google Cloud CLI, then gcloud auth login"
  fi
}

# ---------------------------------------------------------------- generations

# Sets GENERATION (also the name of its flag set), CHIPS of a slice, HOSTS of all slices, and RUNTIME where none is given.
# Runtime versions: cloud.google.com/tpu/docs/runtimes. Sizes: cloud.google.com/tpu/docs/<generation>.
read_type() {
  local size=${TYPE##*-} image sizes
  case $TYPE in
    v4-*) GENERATION=v4 image=tpu-ubuntu2204-base ;;
    v5litepod-*) GENERATION=v5e image=v2-alpha-tpuv5-lite ;;
    v5p-*) GENERATION=v5p image=v2-alpha-tpuv5 ;;
    v6e-*) GENERATION=v6e image=v2-alpha-tpuv6e ;;
    tpu7x*) die "TYPE=$TYPE: Google offers TPU7x through GKE only: use tpu_scripts/gke/jobset.yaml (docs/tpu_pods.md)" ;;
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
  HOSTS=$((HOSTS * SLICES))
  RUNTIME=${RUNTIME:-$image}
  FLAG_SET=${FLAG_SET:-$GENERATION}
  [ "$FLAG_SET" = none ] || [ -f "$HERE/xla_flags/$FLAG_SET.flags" ] ||
    die "FLAG_SET=$FLAG_SET: no such file in tpu_scripts/xla_flags: give a name without .flags, or none"
}

# ---------------------------------------------------------------- the pod

# Prints the state of the queued resource, or ABSENT. Any other failure of gcloud ends the script.
pod_state() {
  local answer command=(gcloud compute tpus queued-resources describe "$NAME" "--zone=$ZONE" "--project=$PROJECT"
    '--format=value(state.state)')
  show "${command[@]}" # not ask: what gcloud says on stderr is part of the answer
  if answer=$("${command[@]}" 2>&1); then
    printf '%s\n' "$answer" | tail -n 1
  elif [[ $answer == *NOT_FOUND* || $answer == *"not found"* ]]; then
    printf 'ABSENT\n'
  else
    printf '%s\n' "$answer" >&2
    die "cannot read the state of $NAME: gcloud's message is above (docs/tpu_pods.md: symptoms)"
  fi
}

# Runs a command on all workers of all slices.
on_workers() { # command, quoted for the remote shell
  # shellcheck disable=SC2086  # SSH_ARGS is a list
  run gcloud compute tpus queued-resources ssh "$NAME" "--zone=$ZONE" "--project=$PROJECT" --node=all --worker=all \
    $SSH_ARGS "--command=$1"
}

need_active() {
  [ "$DRY_RUN" = 0 ] || return 0
  local state
  state=$(pod_state)
  case $state in
    ACTIVE) ;;
    ABSENT) die "there is no pod $NAME in $ZONE: tpu_scripts/create.sh --wait" ;;
    FAILED | SUSPENDED) die "pod $NAME is $state: tpu_scripts/teardown.sh, then create.sh again; supervise.sh does both" ;;
    *) die "pod $NAME is $state, not ACTIVE: wait with tpu_scripts/create.sh --wait" ;;
  esac
}

# Prints a line for each worker: HOST running PID | HOST ended CODE | HOST idle. Fails where a worker is out of reach.
worker_states() {
  on_workers 'bash gqe_jax/tpu_scripts/worker/state.sh' | sed -n 's/^gqe-state: //p'
}
