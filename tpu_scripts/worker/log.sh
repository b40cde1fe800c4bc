#!/usr/bin/env bash
# On a worker: tail of the run's log (arguments are tail's), each line with the worker's name.

name=$(bash "$(dirname "${BASH_SOURCE[0]}")/name.sh")
exec tail "$@" "$HOME/gqe_run/log" | sed -u "s/^/$name: /"
