# SPDX-License-Identifier: Apache-2.0

"""Milliseconds of a tiny training step on the CPU, alone and beside a process that keeps one core busy.

    python benchmarks/busy_neighbour.py --json

``ours`` has imported ``gmai_xtuner.plugin``, as every config does; ``torch`` is the same step without it.
Each
measurement is a process of its own, the two sides take turns. The figure to look at is ``slowdown``, the mean
step beside the neighbour over the mean step alone: on two cores 1 to 2 is what the lost core costs.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from printing import parser, show

SIDES = ("torch", "ours")


def mean_step(side: str, steps: int) -> float:
    """Train a Llama of 2 M weights on 512 tokens; return the mean milliseconds of a step."""
    if side == "ours":
        importlib.import_module("gmai_xtuner.plugin")
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1536,
            hidden_size=128,
            intermediate_size=448,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(1536, (1, 512))
    took = []
    for _ in range(3 + steps):
        begun = time.perf_counter()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        took.append(time.perf_counter() - begun)
    return 1000 * statistics.fmean(took[3:])


@contextmanager
def busy_core(wanted: bool) -> Iterator[None]:
    """Keep one core busy by a process of its own, if wanted."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"])] if wanted else []
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def measure(side: str, steps: int) -> float:
    command = [sys.executable, __file__, "--measure", side, "--steps", str(steps)]
    ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(ran.stdout.split()[-1])


def main() -> None:
    options_of = parser(__doc__)
    options_of.add_argument("--steps", type=int, default=40)
    options_of.add_argument("--rounds", type=int, default=3)
    options_of.add_argument("--measure", choices=SIDES, help=argparse.SUPPRESS)
    options = options_of.parse_args()
    if options.measure:
        print(mean_step(options.measure, options.steps))
        return
    took: dict[tuple[str, bool], list[float]] = {}
    for _ in range(options.rounds):
        for side in SIDES:
            for neighbour in (False, True):
                with busy_core(neighbour):
                    took.setdefault((side, neighbour), []).append(measure(side, options.steps))
    rows: list[dict[str, Any]] = []
    for side in SIDES:
        alone, beside = (statistics.median(took[side, busy]) for busy in (False, True))
        rows.append(
            {
                "side": side,
                "alone_ms": round(alone, 1),
                "beside_ms": round(beside, 1),
                "slowdown": round(beside / alone, 2),
            }
        )
    show({"steps": options.steps, "rounds": options.rounds, "rows": rows}, as_json=options.json)


if __name__ == "__main__":
    main()
