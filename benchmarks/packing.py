# SPDX-License-Identifier: Apache-2.0

"""Soft packing at the size of the paper, against xtuner's packer and TRL's best-fit decreasing.

The lengths are drawn: which dataset, from the sizes and ratios of the mixture template; how long, from
the distribution of its category below; 576 tokens an image.
"""

from __future__ import annotations

import math
import os
import random
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from printing import REPOSITORY, find_trl, parser, peak_gib, quiet_stdout, show

TEMPLATE = REPOSITORY / "configs/gmai_vl/mixtures/gmai_vl_5_5m.yaml"
MAX_LENGTH = 2048
MAX_IMAGES = 16
IMAGE_TOKENS = 576
FRAME_TOKENS = 12
"""Tokens of the chat template around one question and answer."""

TEXT_LENGTHS = {
    # category: (median tokens of the text, sigma of its logarithm), and why. Lengths of text are close to
    # log-normal; a token is about 4.5 characters of English. These are stated, not measured: no dataset
    # of the mixture is read here.
    # Captions by GPT-4V: ShareGPT4V's authors count 942 characters on average.
    "General Captioning": (190, 0.35),
    # From one line under a figure (PMC-OA, QUILT-1M) to a paragraph (GMAI-MM-Caption, PubMedVision).
    "Medical Captioning": (90, 0.7),
    # Findings and impression of a chest X-ray: about 50 to 150 words.
    "Report Generation": (150, 0.5),
    # From one word about a chart to several turns of LLaVA-Instruct.
    "General Instruction": (120, 0.9),
    # Multiple choice, one-word VQA, and answers of a paragraph.
    "Medical Instruction": (130, 0.9),
    # Instructions with worked answers (Orca-Math, Open Hermes) and chats of several turns (UltraChat).
    "General Text": (350, 0.8),
    # Single questions with long answers, and dialogues.
    "Medical Text": (350, 0.8),
}
TWO_IMAGES = ("Medical-Diff-VQA",)  # a study and the one before it


def draw_lengths(samples: int, *, stage: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 ``[samples]`` tokens and images, in the order of the mixture."""
    from gmai_xtuner.core.mixture import load_mixture, select

    chosen = select(load_mixture(TEMPLATE, check_files=False), stage=stage)
    weights = np.array([(entry.size or 0) * ratio for entry, ratio in chosen])
    ends = np.rint(np.cumsum(weights) / weights.sum() * samples).astype(np.int64)
    tokens = np.empty(samples, dtype=np.int64)
    images = np.empty(samples, dtype=np.int64)
    rng = np.random.default_rng(seed)
    start = 0
    for (entry, _), end in zip(chosen, ends.tolist(), strict=True):
        median, sigma = TEXT_LENGTHS[entry.category or ""]
        text = np.rint(rng.lognormal(math.log(median), sigma, end - start)).astype(np.int64)
        has_image = not (entry.category or "").endswith("Text")
        images[start:end] = 0 if not has_image else 2 if entry.name in TWO_IMAGES else 1
        tokens[start:end] = text + FRAME_TOKENS
        start = end
    # What is longer is cut between turns by the token cache, to at most a pack.
    return np.clip(tokens + IMAGE_TOKENS * images, 1, MAX_LENGTH), images


def fill(tokens: np.ndarray, packs: int) -> float:
    return float(tokens.sum() / (packs * MAX_LENGTH))


def measure_ours(tokens: np.ndarray, images: np.ndarray, seed: int) -> dict[str, Any]:
    from gmai_xtuner.data.packing import pack

    wall, processor = time.perf_counter(), time.process_time()
    packs = pack(
        tokens, max_length=MAX_LENGTH, images=images, max_images=MAX_IMAGES, seed=[seed, 0]
    )
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - processor
    sums = np.add.reduceat(tokens[packs.items], packs.offsets[:-1])
    seen = np.zeros(len(tokens), dtype=bool)
    seen[packs.items] = True
    if sums.max() > MAX_LENGTH or len(packs.items) != len(tokens) or not seen.all():
        raise AssertionError("a pack is too full, or a conversation is missing")
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "packs": len(packs),
        "fill": fill(tokens, len(packs)),
        # No packing has fewer packs than all tokens fill whole: an upper bound on any fill.
        "best_fill": fill(tokens, -(-int(tokens.sum()) // MAX_LENGTH)),
    }


def measure_plan(tokens: np.ndarray, images: np.ndarray, seed: int) -> float:
    """Seconds for a whole epoch's plan as training makes it: sample, packs, totals, files."""
    from gmai_xtuner.data.plan import DataPlan

    counts = np.stack([tokens, tokens // 4, images], axis=1).astype(np.int32)

    class Cache(SimpleNamespace):
        def __len__(self) -> int:
            return len(self.counts)

    cache = Cache(counts=counts, folder=Path("benchmark"), meta={"content": str(seed)})
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        DataPlan(
            [cache],  # type: ignore[list-item]
            names=["benchmark"],
            ratios=[1.0],
            seed=seed,
            max_length=MAX_LENGTH,
            max_images=MAX_IMAGES,
            cache_dir=folder,
        ).epoch(0)
        return time.perf_counter() - started


def measure_xtuner(tokens: np.ndarray, seed: int) -> dict[str, Any]:
    """xtuner 0.2.0's SoftPackDataset as it is: shuffled next-fit."""
    from xtuner._lite.datasets.pack import SoftPackDataset

    class Lengths(SimpleNamespace):
        def __len__(self) -> int:
            return len(self.num_tokens)

    random.seed(seed)
    started = time.perf_counter()
    packed = SoftPackDataset([Lengths(num_tokens=tokens)], target=MAX_LENGTH)
    seconds = time.perf_counter() - started
    return {"xtuner_seconds": seconds, "xtuner_fill": fill(tokens, len(packed))}


def measure_trl(tokens: np.ndarray, work_dir: Path) -> dict[str, Any]:
    """TRL's ``pack_dataset(strategy="bfd")`` over all samples at once.

    It needs the tokens, not only their number, and writes them anew; they are bytes here instead of the
    usual four, which is to its advantage. Its default of 1,000 samples at a time would fill less.
    """
    if not find_trl(work_dir):
        return {"trl_seconds": None, "trl_fill": None}
    import datasets
    import pyarrow as pa
    from trl.data_utils import pack_dataset

    offsets = np.concatenate(([0], np.cumsum(tokens))).astype(np.int64)
    values = pa.array(np.zeros(offsets[-1], dtype=np.int8))
    column = pa.LargeListArray.from_arrays(pa.array(offsets), values)
    table = datasets.Dataset(pa.table({"input_ids": column}))
    started = time.perf_counter()
    packed = pack_dataset(table, MAX_LENGTH, "bfd", map_kwargs={"batch_size": len(table)})
    seconds = time.perf_counter() - started
    return {"trl_seconds": seconds, "trl_fill": fill(tokens, len(packed))}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--samples", type=int, default=15_700_000, help="of ours")
    options.add_argument(
        "--peer-samples", type=int, default=1_000_000, help="of the peers: a random part of ours"
    )
    options.add_argument(
        "--stage", default="stage3", help="whose ratios; stage 3 has every category"
    )
    arguments = options.parse_args()
    with quiet_stdout():
        core = min(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {core})  # one core, for all three
        tokens, images = draw_lengths(arguments.samples, stage=arguments.stage, seed=arguments.seed)
        result: dict[str, Any] = {
            "samples": len(tokens),
            "mean_tokens": float(tokens.mean()),
            "image_share": float((images > 0).mean()),
            **measure_ours(tokens, images, arguments.seed),
        }
        result["peak_gib"] = peak_gib()
        result["plan_seconds"] = measure_plan(tokens, images, arguments.seed)
        number = min(arguments.peer_samples, len(tokens))
        some = np.random.default_rng(arguments.seed).choice(len(tokens), number, replace=False)
        result |= {"xtuner_samples": number, **measure_xtuner(tokens[some], arguments.seed)}
        result |= {"trl_samples": number, **measure_trl(tokens[some], arguments.work_dir)}
        result["best_fill_bound"] = "all tokens over the packs that they fill whole (volume)"
    show(result, as_json=arguments.json)


if __name__ == "__main__":
    main()
