"""Copies a worker's log into the bucket, of a long one the last part: keep_log.py LOG gs://BUCKET/logs/POD/WORKER.log"""

import os
import sys

from etils import epath

LARGEST = 32 << 20  # bytes; each copy is a whole object

source, target = sys.argv[1:]
with open(source, "rb") as log:
    log.seek(max(0, os.fstat(log.fileno()).st_size - LARGEST))
    text = log.read()
epath.Path(target).parent.mkdir(parents=True, exist_ok=True)
epath.Path(target).write_bytes(text)
