#!/usr/bin/env bash
# On a worker: tail of the run's log (arguments are tail's), each line with the worker's name.

exec tail "$@" "$HOME/gqe_run/log" | sed -u "s/^/$(hostname | sed 's/.*-\(w-[0-9]*\)$/\1/'): /"
