# SPDX-License-Identifier: Apache-2.0

"""Annotation file -> token ids and labels, against xtuner's LLaVADataset, with the same fast tokenizer.

Ours is timed the whole way, as in training: from the JSON file to the published token cache, on all
cores. xtuner's is timed from the JSON file to the dataset in memory, once in its own process and once
with as many workers as there are cores; its better one counts. (Left alone it starts 32, whatever the
machine.)
"""

from __future__ import annotations

import json
import os
import random
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from printing import parser, quiet_stdout, show

MAX_LENGTH = 2048
IMAGE_TOKENS = 576
VOCABULARY = 32_000
SPECIAL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
TRAINING_CHARACTERS = 8_000_000

MODALITIES = (
    "chest radiograph", "axial CT slice", "T2-weighted MR image", "fundus photograph",
    "dermoscopic image", "H&E stained section", "abdominal ultrasound frame", "endoscopic view",
    "mammogram", "OCT B-scan",
)  # fmt: skip
PLACES = (
    "right upper lobe", "left lower lobe", "liver", "left kidney", "pancreatic head", "optic disc",
    "temporal macula", "posterior fossa", "third lumbar vertebra", "sigmoid colon", "mediastinum",
    "femoral neck", "gallbladder wall", "thyroid isthmus",
)  # fmt: skip
FINDINGS = (
    "a well-defined hypodense lesion", "patchy ground-glass opacity", "a small pleural effusion",
    "mild cardiomegaly", "scattered microaneurysms", "an irregular pigmented network",
    "a hyperintense focus without restricted diffusion", "dense lymphocytic infiltration",
    "a non-displaced fracture line", "circumferential wall thickening", "no focal abnormality",
    "calcified granulomas", "loss of the normal corticomedullary differentiation",
)  # fmt: skip
READINGS = (
    "which is most consistent with a benign process",
    "so that infection should be considered first",
    "a pattern that is typical of chronic disease",
    "for which follow-up in three months is recommended",
    "although artefact by motion can't be excluded",
    "with no sign of acute haemorrhage",
)
QUESTIONS = (
    "What does this {modality} show?",
    "Is there any abnormality in the {place}?",
    "Describe the findings in the {place} in detail and give your impression.",
    "Which modality is this, and which part of the body?",
    "What would you recommend next, given {finding}?",
    "Choose the right answer. A: {finding}. B: {other}. C: neither of the two.",
)


SYLLABLES = (
    "car", "di", "o", "pul", "mon", "ne", "phro", "hepa", "to", "gas", "tro", "en", "ce", "pha", "lo",
    "myo", "os", "teo", "chon", "dro", "fi", "bro", "lym", "pho", "ma", "scle", "ro", "sis", "itis",
    "pathy", "ectasia", "oma",
)  # fmt: skip


def rare_term(rng: random.Random) -> str:
    """A word out of about a million: no text consists of frequent words alone."""
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 4)))


def conversation(rng: random.Random, number: int) -> dict[str, Any]:
    """One record in LLaVA form: one to three turns, about three quarters with an image."""

    def sentence() -> str:
        size = rng.randint(3, 48)
        # About every hundredth word is new, as in a long text.
        rare = f"; compare {rare_term(rng)}" if rng.random() < 0.25 else ""
        return (
            f"The {rng.choice(MODALITIES)} shows {rng.choice(FINDINGS)} in the {rng.choice(PLACES)}, "
            f"about {size} mm, {rng.choice(READINGS)}{rare}."
        )

    turns = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        question = rng.choice(QUESTIONS).format(
            modality=rng.choice(MODALITIES),
            place=rng.choice(PLACES),
            finding=rng.choice(FINDINGS),
            other=rng.choice(FINDINGS),
        )
        answer = " ".join(sentence() for _ in range(rng.choice((1, 1, 2, 4, 8))))
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    record: dict[str, Any] = {"id": f"case-{number}", "conversations": turns}
    if rng.random() < 0.75:
        record["image"] = f"{number % 1000:03d}/{number}.png"
        turns[0]["value"] = "<image>\n" + turns[0]["value"]
    else:
        record["image"] = None
    return record


def write_corpus(path: Path, samples: int, seed: int) -> None:
    rng = random.Random(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.write("[\n")
        for number in range(samples):
            file.write(",\n" * (number > 0) + json.dumps(conversation(rng, number)))
        file.write("\n]\n")


def load_tokenizer(path: str | None, work_dir: Path) -> Any:
    """The fast tokenizer of a folder, or one of 32,000 ids, trained once on Python's own sources.

    Its pieces are sentencepiece's (words with a mark before them, unknown bytes spelt out), as InternLM2's.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if path:
        return AutoTokenizer.from_pretrained(path, use_fast=True)
    folder = work_dir / f"tokenizer-{VOCABULARY}"
    if not folder.is_dir():
        from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
        every_byte = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=[*SPECIAL, *every_byte], show_progress=False
        )
        tokenizer.train_from_iterator(_installed_text(), trainer)
        # Words are split for training alone: InternLM2's tokenizer merges over the whole text.
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
        made = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
        )
        made.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _installed_text() -> Iterator[str]:
    """The sources of Python's standard library, and sentences of the corpus."""
    rng = random.Random(1)
    for number in range(5000):
        yield from (turn["value"] for turn in conversation(rng, number)["conversations"])
    characters = 0
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")) + sorted(
        Path(sysconfig.get_paths()["stdlib"]).glob("[a-rt-z]*/*.py")
    ):
        text = file.read_text(encoding="utf-8", errors="replace")
        yield from text.splitlines()
        characters += len(text)
        if characters > TRAINING_CHARACTERS:
            return


def measure_ours(path: Path, tokenizer: Any, folder: Path) -> tuple[float, Any]:
    """Seconds, and the cache."""
    from gmai_xtuner.core.imaging.images import MAX_PIXELS
    from gmai_xtuner.core.mixture import DatasetEntry
    from gmai_xtuner.data.token_cache import CacheOptions, open_cache
    from gmai_xtuner.data.tokenization import ChatTemplate, ConversationTokenizer

    entry = DatasetEntry(
        name="benchmark",
        annotations=(path,),
        image_root=path.parent,
        category=None,
        quality=None,
        ratios={},
        over_length="cut",
        on_bad_sample="raise",
        size=None,
    )
    options = CacheOptions(
        max_length=MAX_LENGTH,
        num_image_tokens=IMAGE_TOKENS,
        max_images=16,
        over_length="cut",
        on_bad_sample="raise",
        check_images="none",  # xtuner looks at no image either
        max_pixels=MAX_PIXELS,
    )
    started = time.perf_counter()
    template = ChatTemplate.from_xtuner("internlm2_chat")
    batched = ConversationTokenizer.from_pretrained(tokenizer, template)
    cache = open_cache(entry, batched, options, cache_dir=folder)
    return time.perf_counter() - started, cache


def measure_xtuner(path: Path, tokenizer: Any, processes: int | None) -> tuple[float, Any]:
    """Seconds, and the dataset."""
    from xtuner.dataset import LLaVADataset, llava
    from xtuner.dataset.huggingface import process_hf_dataset
    from xtuner.dataset.map_fns import llava_map_fn, template_map_fn_factory
    from xtuner.utils import PROMPT_TEMPLATE

    # LLaVADataset does not hand the number of processes on.
    llava.process_hf_dataset = partial(process_hf_dataset, map_num_proc=processes)
    started = time.perf_counter()
    dataset = LLaVADataset(
        image_folder=str(path.parent),
        image_processor=None,
        data_path=str(path),
        tokenizer=tokenizer,
        dataset_map_fn=llava_map_fn,
        template_map_fn=template_map_fn_factory(PROMPT_TEMPLATE.internlm2_chat),
        max_length=MAX_LENGTH - IMAGE_TOKENS,
    )
    return time.perf_counter() - started, dataset


def same_ids(cache: Any, dataset: Any) -> bool:
    """Whether ids and labels of the first conversations are those of xtuner."""
    for row in range(min(200, len(cache), len(dataset))):
        ours, theirs = cache[row], dataset.text_data[row]
        if ours.input_ids.tolist() != theirs["input_ids"]:
            return False
        # xtuner's own first label is masked in the loss, not in the data
        if ours.labels.tolist()[1:] != theirs["labels"][1:]:
            return False
    return True


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--samples", type=int, default=100_000, help="of ours")
    options.add_argument("--peer-samples", type=int, default=20_000, help="of xtuner's")
    options.add_argument("--annotations", type=Path, help="a LLaVA JSON list instead of drawn text")
    options.add_argument("--tokenizer", help="folder of a fast tokenizer with InternLM2's marks")
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="tokenizing-") as folder, quiet_stdout():
        # xtuner maps through Hugging Face datasets, whose cache would answer a second run. They are
        # imported later, and read this then.
        os.environ["HF_DATASETS_CACHE"] = folder
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
        result = measure(arguments, Path(folder))
    show(result, as_json=arguments.json)


def measure(arguments: Any, folder: Path) -> dict[str, Any]:
    tokenizer = load_tokenizer(arguments.tokenizer, arguments.work_dir)
    cores = len(os.sched_getaffinity(0))
    if arguments.annotations:
        records = json.loads(arguments.annotations.read_text(encoding="utf-8"))
        ours_file, peer_file = folder / "ours.json", folder / "peer.json"
        for file, number in (
            (ours_file, arguments.samples),
            (peer_file, arguments.peer_samples),
        ):
            # Repeated up to the number, under ids of their own.
            repeated = [{**records[i % len(records)], "id": f"record-{i}"} for i in range(number)]
            file.write_text(json.dumps(repeated), encoding="utf-8")
    else:
        ours_file, peer_file = (
            arguments.work_dir / "conversations" / f"{number}-{arguments.seed}.json"
            for number in (arguments.samples, arguments.peer_samples)
        )
        for file, number in ((ours_file, arguments.samples), (peer_file, arguments.peer_samples)):
            if not file.is_file():
                write_corpus(file, number, arguments.seed)

    seconds, cache = measure_ours(ours_file, tokenizer, folder / "cache")
    ours = arguments.samples / seconds
    xtuner: dict[str, float] = {}
    dataset = None
    for processes in (None, cores) if cores > 1 else (None,):
        taken, dataset = measure_xtuner(peer_file, tokenizer, processes)
        xtuner[f"{processes or 'no'} worker processes"] = arguments.peer_samples / taken
    best = max(xtuner.values())
    return {
        "samples": arguments.samples,
        "mean_tokens": float(cache.counts[:, 0].mean()),
        "mean_text_tokens": float(
            (cache.counts[:, 0] - (IMAGE_TOKENS - 1) * cache.counts[:, 2]).mean()
        ),
        "vocabulary": len(tokenizer),
        "cores": cores,
        "ours_seconds": seconds,
        "ours_per_second": ours,
        "xtuner_samples": arguments.peer_samples,
        "xtuner_per_second": best,
        "xtuner_per_second_by_processes": xtuner,
        "ratio": ours / best,
        "same_ids": same_ids(cache, dataset),
    }


if __name__ == "__main__":
    main()
