#!/usr/bin/env bash
# Puts this checkout, as it is now, and a Python environment for it on every worker.
#
#   setup.sh [common flags]
#
# Workers that have this very checkout are left alone. While a run is alive its code is not replaced.

# shellcheck source=tpu_scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
no_more
need_pod
git -C "$CHECKOUT" rev-parse --git-dir >/dev/null 2>&1 || die "$CHECKOUT is no git checkout: clone the repository"
need_active

# What git tracks or would track, as it stands in the working tree: its contents name the version.
files=$(mktemp) archive=$(mktemp -d)/gqe_jax.tar.gz
trap 'rm -rf "$files" "$(dirname "$archive")"' EXIT
cd "$CHECKOUT"
git ls-files --cached --others --exclude-standard | sort | while IFS= read -r file; do
  [ ! -f "$file" ] || printf '%s\n' "$file"
done >"$files"
version=$({ cat "$files" && git hash-object --no-filters --stdin-paths <"$files"; } | git hash-object --stdin)
tar -czf "$archive" -T "$files"

installed=
# shellcheck disable=SC2016  # for the worker's shell
[ "$DRY_RUN" = 1 ] || installed=$(on_workers "$ASKING" 'echo "gqe-version: $(cat gqe_jax/.version 2>/dev/null)"' |
  sed -n 's/^gqe-version: *//p' | sort -u)
if [ "$installed" = "$version $PYTHON_VERSION" ]; then
  say "all workers have this checkout ($version) and Python $PYTHON_VERSION already"
else
  road_copy "$archive" "$HERE/worker/install.sh"
  on_workers "$INSTALLING" "bash install.sh $version $PYTHON_VERSION"
fi
say "next: tpu_scripts/launch.sh -- gqe train --distributed --config gqe_250m --run gs://BUCKET/RUN"
