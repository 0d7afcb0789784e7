# SPDX-License-Identifier: Apache-2.0

"""Workarounds for torch: what goes wrong, and until when each is needed."""

from __future__ import annotations

import os
import threading

import torch

_idle_team: list[threading.Thread] = []


def sleep_while_waiting_for_threads() -> None:
    """On the CPU, threads that wait for each other sleep, so that one busy neighbour does not stop them.

    torch's OpenMP runtime (libgomp) lets a thread spin for some milliseconds at the end of each parallel
    operator. Where another process has one of the cores, the thread that spins takes the core that the
    thread it waits for needs, and a step takes three to ten times as long. The runtime reads
    ``OMP_WAIT_POLICY`` when torch is loaded, which is before any code of ours; but it spins for a moment
    only while the process has more threads than cores (``do_spin`` in libgomp's ``config/linux/wait.h``). A
    second team of threads that never works again makes it so.

    Sleeping costs too: where nothing else runs, a step of 2 M weights takes half as long again
    (``benchmarks/busy_neighbour.py``), one of the quickstart no longer. ``OMP_WAIT_POLICY`` and
    ``GOMP_SPINCOUNT`` overrule it. Until torch waits so by itself; with a GPU it does not matter.
    """
    if (
        torch.cuda.is_available()
        or torch.get_num_threads() == 1
        or _idle_team
        or {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys()
    ):
        return
    ready = threading.Event()

    def hold_a_team() -> None:
        torch.ones(1 << 20).exp_()  # large enough to be shared among threads
        ready.set()
        threading.Event().wait()

    _idle_team.append(threading.Thread(target=hold_a_team, name="idle OpenMP team", daemon=True))
    _idle_team[0].start()
    ready.wait()
