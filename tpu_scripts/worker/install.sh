#!/usr/bin/env bash
# On a worker: unpacks ~/gqe_jax.tar.gz to ~/gqe_jax and makes ~/gqe_venv, a Python that runs it. setup.sh calls it.
#
#   install.sh VERSION PYTHON_VERSION
#
# The images have Python 3.10 or 3.12; uv brings the one asked for, with the versions that constraints.txt names.

set -euo pipefail
version=$1 python=$2
cd "$HOME"
mkdir -p gqe_run
if ! flock -n gqe_run/lock true; then
  if [ "$(cat gqe_jax/.version 2>/dev/null)" = "$version $python" ]; then exit 0; fi
  echo "$(hostname): a run is alive, its code is not replaced: tpu_scripts/stop.sh first" >&2
  exit 3
fi
rm -rf gqe_jax
mkdir gqe_jax
tar -xzf gqe_jax.tar.gz -C gqe_jax
uv=$(command -v uv || echo "$HOME/.local/bin/uv")
[ -x "$uv" ] || python3 -m pip --version >/dev/null 2>&1 || # Compute Engine's images come without pip
  { sudo apt-get -qq update && sudo apt-get -qq install --yes python3-pip; }
[ -x "$uv" ] || python3 -m pip install --user --quiet uv
if [ "$(gqe_venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" != "$python" ]; then
  rm -rf gqe_venv
  "$uv" venv --quiet --python "$python" gqe_venv
fi
"$uv" pip install --quiet --python gqe_venv/bin/python --constraint gqe_jax/constraints.txt \
  --editable 'gqe_jax[tpu,gcs,tokenizers,tensorboard]'
echo "$version $python" >gqe_jax/.version # last: a half-done installation has none
echo "$(hostname): installed $version, $(gqe_venv/bin/python --version)"
