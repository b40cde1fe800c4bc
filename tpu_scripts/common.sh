# shellcheck shell=bash
# What the scripts of this folder share: settings, errors, printing and running of commands, state of the pod.
# Settings come from pod.env and are overridden by flags. Runs on bash 3.2 too, which macOS still has.
# shellcheck disable=SC2034  # what is set here is used by the scripts

set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CHECKOUT=$(dirname "$HERE")
SETTINGS="ROAD PROJECT ZONE NAME TYPE SLICES CAPACITY RESERVATION MAX_RUN DISK_GB SERVICE_ACCOUNT RUNTIME BUCKET"
SETTINGS+=" PYTHON_VERSION FLAG_SET CREATE_ARGS SSH_ARGS"
DRY_RUN=0

# ---------------------------------------------------------------- messages

say() { printf '%s: %s\n' "$(basename "$0")" "$*"; }

die() { # what another try would not change: exit code 2
  printf '%s: error: %s\n' "$(basename "$0")" "$*" >&2
  exit 2
}

give_up() { # what the cloud did: another try may succeed
  printf '%s: error: %s\n' "$(basename "$0")" "$*" >&2
  exit 1
}

show() { # the command, quoted so that it can be pasted
  local word line='+'
  for word in "$@"; do line+=" $(printf '%q' "$word")"; done
  printf '%s\n' "$line" >&2
}

# Runs a command for at most so many seconds; then it, and what it started, is killed, and the exit code is 124.
# A call of gcloud can wait for ever on a connection, beside a pod that is paid for; macOS has no timeout.
bounded() { # seconds, command
  local limit=${GQE_CALL_SECONDS:-$1} began=$SECONDS child watcher traps code=0
  shift
  traps=$(trap -p INT TERM)
  set -m # each in a process group of its own: its children, such as ssh, end with it
  "$@" </dev/null & # a question of gcloud gets no answer
  child=$!
  { sleep "$limit"; kill -TERM -- "-$child"; sleep 2; kill -KILL -- "-$child"; } >/dev/null 2>&1 </dev/null &
  watcher=$!
  set +m
  # shellcheck disable=SC2064  # these two, not what the names mean later
  trap "kill -TERM -- -$child -$watcher 2>/dev/null; exit 130" INT TERM
  { wait "$child" || code=$?; } 2>/dev/null
  trap - INT TERM
  eval "$traps"
  kill -KILL -- "-$watcher" 2>/dev/null && { wait "$watcher" || true; } 2>/dev/null
  if [ "$code" -gt 128 ] && [ $((SECONDS - began)) -ge "$limit" ]; then
    printf 'no answer within %s s: given up\n' "$limit" >&2
    code=124
  fi
  return "$code"
}

ASKING=120 CHANGING=900 INSTALLING=1800 # seconds that a call may take

# Prints a command and runs it, unless this is a dry run.
run() { # seconds, command
  local limit=$1
  shift
  show "$@"
  [ "$DRY_RUN" = 1 ] || bounded "$limit" "$@"
}

# Prints a command that only asks, and runs it.
ask() {
  show "$@"
  bounded "$ASKING" "$@"
}

# ---------------------------------------------------------------- settings

print_help() { # the script's own header, then what all scripts take
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
  cat <<'HELP'
Common flags:
  --env FILE     settings (default: tpu_scripts/pod.env; pod.env.example explains them)
  --KEY VALUE    overrides a setting: --project, --zone, --name, --type, --slices, --capacity, --runtime, --bucket, ...
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
  ROAD=${ROAD:-queued} NAME=${NAME:-gqe} SLICES=${SLICES:-1} CAPACITY=${CAPACITY:-spot} PYTHON_VERSION=${PYTHON_VERSION:-3.11}
  case $ROAD in queued | compute) ;; *) die "ROAD=$ROAD must be queued or compute (docs/tpu_pods.md)" ;; esac
  # shellcheck source=tpu_scripts/roads/queued.sh
  . "$HERE/roads/$ROAD.sh"
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
  case $CAPACITY in
    spot | on-demand | flex-start) ;;
    reserved)
      [ "$ROAD" = queued ] || [ -n "$RESERVATION" ] ||
        die "CAPACITY=reserved needs RESERVATION=projects/PROJECT/reservations/NAME"
      ;;
    *) die "CAPACITY=$CAPACITY must be spot, on-demand, flex-start or reserved" ;;
  esac
  MAX_RUN=${MAX_RUN:-168h}
  case $MAX_RUN in *[!0-9hm]* | [hm]*) die "MAX_RUN=$MAX_RUN must be hours or minutes, such as 24h" ;; esac
  case $DISK_GB in *[!0-9]* | 0*) die "DISK_GB=$DISK_GB must be a number of gigabytes" ;; esac
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

# The settings by which a pod is found. On Compute Engine its type says whether it is one VM or a group.
need_pod() {
  need PROJECT ZONE
  [ "$ROAD" = queued ] || { need TYPE && read_type; }
}

# Ends the script for a command that no pod of this size could run: before anything is created.
check_command() { # command
  case $1 in gqe) ;; *) return 0 ;; esac
  [ "$HOSTS" -gt 1 ] || return 0
  case " $* " in
    *" --distributed "* | *" --coordinator"*) ;;
    *) die "$TYPE has $HOSTS hosts, and without --distributed each would train alone: add it to the gqe command" ;;
  esac
  case " $* " in
    *" train "*" --run gs://"* | *" train "*" --run=gs://"*) ;;
    *" train "*) die "--run must be a directory that all $HOSTS hosts share: gs://BUCKET/RUN" ;;
  esac
}

# ---------------------------------------------------------------- generations

# Sets GENERATION (also the name of its flag set), CHIPS of a slice, HOSTS of all slices, and what the road needs.
# Sizes: docs.cloud.google.com/tpu/docs/v5p, /v5e, /v6e, /tpu7x
read_type() {
  road_type
  HOSTS=$((HOSTS * SLICES))
  FLAG_SET=${FLAG_SET:-$GENERATION}
  [ "$FLAG_SET" = none ] || [ -f "$HERE/xla_flags/$FLAG_SET.flags" ] ||
    die "FLAG_SET=$FLAG_SET: no such file in tpu_scripts/xla_flags: give a name without .flags, or none"
}

# ---------------------------------------------------------------- the pod

# Prints the state of the pod, or ABSENT: WAITING..., ACTIVE, SUSPENDED (taken away), FAILED. Any other failure of gcloud
# ends the script with exit code 1.
pod_state() {
  local answer code=0
  answer=$(road_state 2>&1) || code=$?
  grep '^+ ' <<<"$answer" >&2 || true
  if [ "$code" = 0 ]; then
    printf '%s\n' "$answer" | tail -n 1
  elif [[ $answer == *NOT_FOUND* || $answer == *"not found"* ]]; then
    printf 'ABSENT\n'
  else
    printf '%s\n' "$answer" >&2
    give_up "cannot read the state of $NAME: gcloud's message is above (docs/tpu_pods.md: symptoms)"
  fi
}

need_active() {
  [ "$DRY_RUN" = 0 ] || return 0
  local state
  state=$(pod_state)
  case $state in
    ACTIVE) ;;
    ABSENT) give_up "there is no pod $NAME in $ZONE: tpu_scripts/create.sh --wait" ;;
    FAILED | SUSPENDED)
      give_up "pod $NAME is $state: tpu_scripts/teardown.sh, then create.sh again; supervise.sh does both"
      ;;
    *) give_up "pod $NAME is $state, not ACTIVE: wait with tpu_scripts/create.sh --wait" ;;
  esac
}

# Runs a command on all workers of all slices.
on_workers() { # seconds, command, quoted for the remote shell
  road_ssh "$1" "$2"
}

# Prints a line for each worker: HOST running PID | HOST ended CODE | HOST idle. Fails where a worker is out of reach.
worker_states() {
  on_workers "$ASKING" 'bash gqe_jax/tpu_scripts/worker/state.sh' | sed -n 's/^gqe-state: //p'
}
