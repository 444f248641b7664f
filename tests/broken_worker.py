"""What tests/fuzz.py must outlive: a process that dies at seed 1 and hangs at seed 3. It imports nothing slow."""

from __future__ import annotations

import os
import time
from multiprocessing.connection import Connection


def broken_worker(seeds: range, to_parent: Connection) -> None:
    for seed in seeds:
        to_parent.send((seed, None))
        if seed == 1:
            os._exit(11)
        if seed == 3:
            time.sleep(600)
    to_parent.send((seeds.stop, None))
