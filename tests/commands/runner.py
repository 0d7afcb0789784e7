# SPDX-License-Identifier: Apache-2.0

"""Run ``xtuner`` as a user does. It exits 0 whatever happens, so the outcome is looked at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests import warm

ROOT = Path(__file__).parents[2]
TINY_RUN = ("train_dataloader.num_workers=0",)


class Xtuner:
    """``xtuner`` in the repository's root with ``GMAI_*`` set, in forks of :mod:`tests.warm`.

    Args:
        real: in a process of its own, as a user starts it.
        environment: additional variables.
    """

    def __init__(self, *, real: bool = False, **environment: str | Path) -> None:
        self.real = real
        self.environment = {
            **os.environ,
            # xtuner starts the `python` that it finds first.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            # Linear layers in bf16 multiply in fp32, where the CPU has no bf16 instructions.
            "GMAI_ALLOW_CPU": "1",
            **{key: str(value) for key, value in environment.items()},
        }

    @classmethod
    def tiny(cls, tiny_bases: Path, mixture: Path, cache: Path, **more: str | Path) -> Xtuner:
        """The command with tiny bases, a mixture and a folder for caches."""
        return cls(
            GMAI_LLM=tiny_bases / "llm",
            GMAI_VISION=tiny_bases / "vision",
            GMAI_MIXTURE=mixture,
            GMAI_CACHE=cache,
            **more,
        )

    def __call__(self, *arguments: str | Path, ranks: int = 1, stdin: str = "") -> str:
        """What the command printed, standard output and error together."""
        command = ["xtuner", *map(str, arguments)]
        environment = {**self.environment, "NPROC_PER_NODE": str(ranks)}
        if not self.real:
            return warm.run(
                command, environment=environment, folder=ROOT, stdin=stdin, merged=True
            ).stdout
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
            check=False,
        )
        return done.stdout

    def train(
        self,
        stage: str,
        work_dir: Path,
        *options: str,
        deepspeed: str | Path = "zero2",
        ranks: int = 1,
        resume: Path | None = None,
    ) -> str:
        """Train and return the output; fails the test if no checkpoint came out."""
        output = self(
            "train",
            f"configs/gmai_vl/{stage}.py",
            "--deepspeed",
            deepspeed,
            "--work-dir",
            work_dir,
            *(("--resume", resume) if resume else ()),
            "--cfg-options",
            *TINY_RUN,
            *options,
            ranks=ranks,
        )
        assert (work_dir / "last_checkpoint").is_file(), output[-4000:]
        return output

    def convert(self, stage: str, checkpoint: Path, out: Path, *options: str) -> str:
        output = self(
            "convert", "pth_to_hf", f"configs/gmai_vl/{stage}.py", checkpoint, out, *options
        )
        assert (out / "projector").is_dir(), output[-4000:]
        return output

    def chat(self, export: Path, image: Path, question: str, length: int) -> str:
        """What xtuner's own chat prints when it is asked once, greedily."""
        return self(
            "chat", export, "--llava", export, "--image", image, "--torch-dtype", "fp32",
            "--prompt-template", "internlm2_chat", "--temperature", "0",
            "--max-new-tokens", str(length), stdin=f"{question}\n\nEXIT\n\n",
        )  # fmt: skip


def scalars(work_dir: Path) -> list[dict[str, float]]:
    """What the newest run in a work dir logged, one dict a logged iteration."""
    newest = max(work_dir.glob("*/vis_data/scalars.json"))
    return [json.loads(line) for line in newest.read_text().splitlines()]


def last_checkpoint(work_dir: Path) -> Path:
    return Path((work_dir / "last_checkpoint").read_text().strip())
