#!/usr/bin/env bash
# On a worker: its short name, w-3, or s1-w-3 where there are several slices; the VM's own on Compute Engine.

name=$(hostname | sed 's/^t1v-.*-\(w-[0-9]*\)$/\1/')
slice=$(curl --silent --fail --max-time 2 -H 'Metadata-Flavor: Google' \
  http://metadata.google.internal/computeMetadata/v1/instance/attributes/tpu-env 2>/dev/null |
  sed -n "s/^MEGASCALE_SLICE_ID: *'\{0,1\}\([0-9]*\)'\{0,1\}$/s\1-/p")
echo "$slice$name"
