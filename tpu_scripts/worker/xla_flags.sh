#!/usr/bin/env bash
# Prints the flags of a set in one line, for LIBTPU_INIT_ARGS: xla_flags.sh v5p
# The files of ../xla_flags have one flag a line and above it, behind #, its reason; "none" is the empty set.

set -euo pipefail
[ "$1" = none ] || sed '/^ *#/d' "$(dirname "${BASH_SOURCE[0]}")/../xla_flags/$1.flags" | xargs
