# SPDX-License-Identifier: Apache-2.0

"""The main path by the real commands, on every form of records that training reads."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from mmengine.config import Config
from PIL import Image
from transformers import AutoTokenizer, LlamaForCausalLM
from xtuner.registry import BUILDER

from gmai_xtuner.checkpoint.training import load_checkpoint_state
from gmai_xtuner.loading import load_model
from tests.commands.runner import Xtuner, last_checkpoint, scalars
from tests.model.exporting import predictor_of
from tests.toy import record, write_corpus

pytestmark = pytest.mark.slow

# Stage -> DeepSpeed name and ranks: other names than the quickstart's as well.
STAGES = {
    "stage1_shallow": ("zero1", 1),
    "stage2_deep": ("zero2", 2),
    "stage3_instruct": ("zero3_offload", 1),
}
SHORT = (
    "train_dataloader.batch_size=1",
    "train_dataloader.dataset.held_out=0",
    "default_hooks.logger.interval=1",
    "default_hooks.sample_answer.interval=0",
    "train_cfg.max_epochs=None",
    "train_cfg.max_iters=4",
)
LOSS_KEYS = {"loss", "lr", "grad_norm", "tokens_per_second", "pack_fill", "images_per_second"}


def write_mixture(folder: Path) -> Path:
    """JSONL, JSON and Parquet, both forms of records, one and two images, 8 and 16 bits, and text alone."""
    names = ["wide.png", "deep.png", "a.jpg", "b.tif"]
    once = [record(name, "<image>\nWhat is shown?", f"It is {name}.", image=name) for name in names]
    text = [record(f"t{n}", "Is it CT?", "No.", "Why?", f"Of {n}.") for n in range(40)]
    alone = {"image_root": None, "ratio": {"stage1": 0.0, "stage2": 0.0, "stage3": 1.0}}
    fields = {"once": {"ratio": 2.5, "category": "Medical Captioning"}, "text": alone}
    corpus = write_corpus(folder, {"once": once, "text": text}, images=names, fields=fields)
    grey = np.random.default_rng(0).integers(0, 4096, (30, 70), dtype=np.uint16)
    Image.fromarray(grey).save(corpus.images / "deep.png")
    Image.fromarray((grey >> 4).astype(np.uint8)).save(corpus.images / "wide.png")
    parts = [
        {"type": "image_url", "image_url": {"url": "wide.png"}},
        {"type": "text", "text": "数一数。"},
    ]
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    messages = [
        {"id": str(n), "messages": [*asked, {"role": "assistant", "content": f"共有{n}。"}]}
        for n in range(8)
    ]
    (folder / "messages.json").write_text(json.dumps(messages, ensure_ascii=False))
    pair = record("p", "First <image>, second <image>?", "They differ.", image=["a.jpg", "b.tif"])
    pq.write_table(pa.Table.from_pylist([pair] * 4), folder / "pairs.parquet")
    mixture = yaml.safe_load(corpus.mixture.read_text())
    for name in ("messages.json", "pairs.parquet"):
        mixture["datasets"][name.split(".")[0]] = {"annotations": name, "image_root": "images"}
    corpus.mixture.write_text(yaml.safe_dump(mixture, sort_keys=False))
    return corpus.mixture


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_bases):
    """Three stages, the second on two ranks: (folder, what each printed, the command)."""
    folder = tmp_path_factory.mktemp("three_stages")
    xtuner = Xtuner.tiny(
        tiny_bases, write_mixture(folder / "corpus"), folder / "cache",
        GMAI_STAGE1=folder / "stage1_shallow", GMAI_STAGE2=folder / "stage2_deep",
    )  # fmt: skip
    printed = {}
    for stage, (deepspeed, ranks) in STAGES.items():
        xtuner.real = ranks > 1  # by torchrun once
        printed[stage] = xtuner.train(
            stage, folder / stage, *SHORT, deepspeed=deepspeed, ranks=ranks
        )
    xtuner.real = False
    return folder, printed, xtuner


def test_every_stage_trains_on_every_dataset(trained):
    folder, printed, _ = trained
    for stage in STAGES:
        logged = scalars(folder / stage)
        assert len(logged) >= 2, printed[stage][-2000:]
        steps = [row for row in logged if "loss" in row]
        assert all(torch.isfinite(torch.tensor(row["loss"])) for row in steps)
        assert set(steps[-1]) >= LOSS_KEYS
        assert "eta:" in printed[stage]
        assert list((folder / stage).rglob("events.out.tfevents*")), "no TensorBoard file"
        for name in ("once", "messages", "pairs"):
            assert f"{name}: " in printed[stage]
        assert "conversations of a pack never see each other" in printed[stage]
    assert "text: 40 conversations" not in printed["stage1_shallow"]
    assert "text: 40 conversations x 1" in printed["stage3_instruct"]


def test_the_cache_is_made_once_and_read_by_the_later_stages(trained):
    _, printed, _ = trained
    assert "Tokenised messages: 8 of 8 records kept" in printed["stage1_shallow"]
    assert "Tokenised messages" not in printed["stage2_deep"] + printed["stage3_instruct"]


def test_a_checkpoint_holds_what_its_stage_trains(trained):
    folder, _, _ = trained
    parts = {}
    for stage in STAGES:
        parts[stage] = {key.split(".")[0] for key in load_checkpoint_state(folder / stage)}
    assert parts == {
        "stage1_shallow": {"projector"},
        "stage2_deep": {"projector", "visual_encoder"},
        "stage3_instruct": {"projector", "visual_encoder", "llm"},
    }


@pytest.fixture(scope="module")
def exports(trained):
    """Each stage in xtuner's layout."""
    folder, _, xtuner = trained
    exports = {stage: folder / f"{stage}-export" for stage in STAGES}
    for stage, out in exports.items():
        xtuner.convert(
            stage, last_checkpoint(folder / stage), out, "--fp32", "--safe-serialization"
        )
    return exports


def test_every_stage_converts_and_the_last_answers(trained, exports, tiny_bases):
    assert not (exports["stage1_shallow"] / "visual_encoder").exists()
    assert not (exports["stage2_deep"] / "config.json").exists()
    final = exports["stage3_instruct"]
    for file in ("model.safetensors", "tokenizer.json", "gmai_vl.json"):
        assert (final / file).is_file()
    for file in ("model.safetensors", "preprocessor_config.json"):
        assert (final / "visual_encoder" / file).is_file()
    assert not list(final.rglob("*.bin")), "--safe-serialization was not honoured"
    config = json.loads((final / "config.json").read_text())
    assert (config["architectures"], config["rope_scaling"]) == (["LlamaForCausalLM"], None)
    assert "gmai_attention" not in config

    # Stock transformers reads the parts, with none of our code.
    llm = LlamaForCausalLM.from_pretrained(final)
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert llm.config.vocab_size >= len(tokenizer)

    image = trained[0] / "corpus" / "images" / "b.tif"
    predictor = load_model(final)
    assert predictor.answer("What is shown?", [image], max_new_tokens=12)

    # Stages 1 and 2 need the bases that they did not train.
    early = load_model(
        exports["stage1_shallow"], llm=str(tiny_bases / "llm"), vision=str(tiny_bases / "vision")
    )
    assert isinstance(early.answer("What is shown?", [image], max_new_tokens=4), str)


def test_the_trained_model_its_export_and_xtuners_chat_answer_alike(trained, exports, tiny_bases):
    """The plain export, the servers and the page: ``test_convert``, ``test_serving``, ``tests/demo``."""
    folder, _, xtuner = trained
    stage = "stage3_instruct"
    # Eight bits of grey and not square: what every reader of files sees alike, and must pad alike.
    image = folder / "corpus" / "images" / "wide.png"
    assert (Image.open(image).mode, len(set(Image.open(image).size))) == ("L", 2)
    question, length = "Is this chest radiograph AP or PA?", 16

    cfg = Config.fromfile(folder / stage / f"{stage}.py")
    cfg.model.pretrained_pth = str(folder / stage)
    cfg.model.pretrained_parts = ["projector", "visual_encoder", "llm"]
    cfg.model.llm.torch_dtype = "float32"
    training = predictor_of(BUILDER.build(cfg.model), tiny_bases)
    answer = training.answer(question, [image], max_new_tokens=length)
    assert len(answer) > 4
    assert load_model(exports[stage]).answer(question, [image], max_new_tokens=length) == answer
    assert answer in xtuner.chat(exports[stage], image, question, length)


def test_training_without_deepspeed_is_refused_with_the_remedy(trained):
    folder, _, xtuner = trained
    printed = xtuner(
        "train", "configs/gmai_vl/stage1_shallow.py", "--work-dir", folder / "no_deepspeed"
    )
    assert "add --deepspeed zero2" in printed
