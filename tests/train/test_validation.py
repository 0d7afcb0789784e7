# SPDX-License-Identifier: Apache-2.0

import math
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

from gmai_xtuner.checkpoint.llava import GMAILLaVAModel
from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.data.dataset import SoftPackedDataset, collate_packs
from gmai_xtuner.data.sampler import MicroBatchSampler, PackSampler
from gmai_xtuner.train import validation
from gmai_xtuner.train.validation import HeldOutLoop, HeldOutLoss
from tests.model.test_llava import build_model, make_pack
from tests.toy import record

META = {"datasets": ["a", "a/b", "text"], "categories": ["Pictures", "Pictures", None]}


def metric(by: str | None = "category") -> HeldOutLoss:
    made = HeldOutLoss(by=by)
    made.dataset_meta = META
    return made


SAMPLES = [
    {"id": "a/one", "loss": 6.0, "tokens": 3},
    {"id": "a/b/two", "loss": 1.0, "tokens": 1},
    {"id": "text/three", "loss": 2.0, "tokens": 4},
    {"id": "text/filler", "loss": 0.0, "tokens": 0},
]


def test_every_token_counts_the_same():
    made = metric()
    made.process(None, SAMPLES[:2])
    made.process(None, SAMPLES[2:])
    assert made.evaluate(99) == {
        "val/loss": 9 / 8,
        "val/perplexity": pytest.approx(math.exp(9 / 8)),
        "val/loss/Pictures": 7 / 4,
        "val/loss/text": 2 / 4,  # a dataset without a category is one of its own
    }
    made.process(None, SAMPLES[:1])  # the next validation starts from nothing
    assert made.evaluate(99)["val/loss"] == 2.0


def test_losses_by_dataset_know_names_with_a_slash():
    made = metric("dataset")
    made.process(None, SAMPLES)
    values = made.evaluate(99)
    assert (values["val/loss/a"], values["val/loss/a/b"], values["val/loss/text"]) == (2, 1, 0.5)


def test_ranks_are_summed_before_anything_is_divided(monkeypatch):
    other = torch.tensor([[3.0, 1.0], [0.0, 4.0]], dtype=torch.float64)
    monkeypatch.setattr(validation, "all_reduce", lambda table: table.add_(other))
    made = metric()
    made.process(None, SAMPLES)
    assert made.evaluate(99)["val/loss"] == 12 / 13


def test_a_group_without_tokens_is_left_out():
    made = metric()
    made.process(None, SAMPLES[:2])
    assert set(made.evaluate(99)) == {"val/loss", "val/perplexity", "val/loss/Pictures"}
    assert set(metric(None).evaluate(99)) == {"val/loss", "val/perplexity"}


def test_an_unknown_grouping_is_refused():
    with pytest.raises(GMAIError, match="by must be 'category', 'dataset' or None, got 'stage'"):
        HeldOutLoss(by="stage")


# --- what the metric is fed -----------------------------------------------------------------------


@pytest.fixture
def dataset(build, make_corpus) -> SoftPackedDataset:
    records = [
        record(f"p{n}", f"<image>\nWhat is {n}?", "No. " * (1 + n % 4), image=f"{n % 10}.png")
        for n in range(40)
    ] + [record(f"t{n}", f"Why {n}?", "Yes. " * (1 + n % 6)) for n in range(40)]
    corpus = make_corpus({"toy": records}, images=[f"{n}.png" for n in range(10)])
    return build(corpus, held_out=0.3)


@pytest.fixture
def model(tiny_model) -> GMAILLaVAModel:
    return tiny_model.eval()


def batches(part: SoftPackedDataset, *, world: int, batch_size: int):
    for rank in range(world):
        sampler = MicroBatchSampler(PackSampler(part), batch_size, rank=rank, world_size=world)
        yield from DataLoader(part, batch_sampler=sampler, collate_fn=collate_packs)


@pytest.mark.parametrize(("world", "batch_size"), [(1, 5), (2, 4), (5, 1), (4, 8)])
def test_value_is_the_same_for_every_world_and_batch_size(dataset, model, world, batch_size):
    part = dataset.held_out_part()

    def value(world: int, batch_size: int) -> dict[str, float]:
        made = HeldOutLoss()
        made.dataset_meta = part.metainfo
        seen = []
        for batch in batches(part, world=world, batch_size=batch_size):
            with torch.no_grad():
                samples = model(**batch, mode="predict")
            seen += [sample["id"] for sample in samples if sample["tokens"]]
            made.process(batch, samples)
        assert len(seen) == len(set(seen)) == len(part.plan.samples)
        return made.evaluate(len(part))

    assert len(part) % (world * batch_size), "some place must be empty, or the test shows less"
    assert value(world, batch_size) == pytest.approx(value(1, 1), rel=1e-6)


def test_loss_of_a_conversation_is_what_training_would_sum(dataset, model):
    part = dataset.held_out_part()
    packed = next(batches(part, world=1, batch_size=4))
    samples = model(**packed, mode="predict")
    assert len(samples) > 4  # several conversations in a pack
    total = model(**packed)["weighted_sum"]
    assert sum(sample["loss"] for sample in samples) == pytest.approx(float(total), rel=1e-6)
    assert sum(sample["tokens"] for sample in samples) == len(packed["data"]["label_targets"])
    # The first alone, by way of plain logits.
    data = packed["data"]
    end = int(data["cu_seqlens"][1])
    own = data["label_positions"] < end
    logits = model(**packed, mode="tensor")[0, data["label_positions"][own]]
    expected = torch.nn.functional.cross_entropy(
        logits.float(), data["label_targets"][own], reduction="sum"
    )
    assert samples[0]["id"] == data["ids"][0]
    assert samples[0]["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert samples[0]["tokens"] == int(own.sum())


def test_a_token_that_follows_the_first_of_its_conversation_is_its_own():
    """Its position, from which it is predicted, is where the conversation before it ends."""
    batch = collate_packs([make_pack((0, 1, 2), (0, 1, 3))])
    assert batch["data"]["label_positions"].tolist() == [0, 1, 3, 4, 5]
    batch["data"]["ids"] = ["first", "second"]
    samples = build_model()(**batch, mode="predict")
    assert [(sample["id"], sample["tokens"]) for sample in samples] == [("first", 2), ("second", 3)]


# --- the loop -------------------------------------------------------------------------------------


def bare_runner(dataset) -> SimpleNamespace:
    return SimpleNamespace(
        train_loop=SimpleNamespace(dataloader=DataLoader(dataset)),
        visualizer=SimpleNamespace(dataset_meta="training's"),
        build_evaluator=lambda config: SimpleNamespace(dataset_meta=None),
        build_dataloader=build_dataloader,
    )


def build_dataloader(config, **_) -> DataLoader:
    sampler = PackSampler(config["dataset"])
    batch_sampler = MicroBatchSampler(sampler, 2) if config["batched"] else None
    return DataLoader(config["dataset"], batch_sampler=batch_sampler, collate_fn=collate_packs)


@pytest.fixture
def said(monkeypatch) -> list[str]:
    lines: list[str] = []
    for name in ("info", "warn"):
        monkeypatch.setattr(validation, name, lines.append)
    return lines


def build_loop(dataset, **options) -> HeldOutLoop:
    runner = bare_runner(dataset)
    runner._randomness_cfg = {}
    runner.seed = 0
    return HeldOutLoop(runner, {"batched": True, **options}, {}, at_most=7)


def test_loop_takes_the_held_out_part_and_leaves_the_training_s(dataset, said):
    loop = build_loop(dataset)
    assert len(loop.dataloader.dataset.plan.samples) == 7
    assert loop.dataloader.dataset.caches is dataset.caches
    assert loop.runner.visualizer.dataset_meta == "training's"
    assert loop.evaluator.dataset_meta["datasets"] == ["toy"]
    packs = len(loop.dataloader.dataset)
    assert said == [f"Validation: 7 held-out conversations in {packs} packs"]


def test_loop_without_anything_held_out_says_so_and_does_nothing(dataset, said):
    dataset.plan.held_out = 0.0
    loop = build_loop(dataset)
    assert loop.run() == {}
    (message,) = said
    assert message.startswith(
        "No validation: nothing is held out (train_dataloader.dataset.held_out=0"
    )


def test_a_share_that_holds_nothing_out_names_the_images_and_a_share_that_does(dataset, said):
    dataset.plan.held_out = 1e-9
    dataset.held_out_part = lambda at_most: None
    build_loop(dataset)
    (message,) = said
    assert "(train_dataloader.dataset.held_out=1e-09 of " in message
    assert "The smallest share that holds something out is 0." in message


def test_a_dataset_of_its_own_takes_tokenizer_and_vision_of_the_model(dataset, monkeypatch):
    class Enough(Exception):
        pass

    def build(self, runner, dataloader, evaluator):
        raise Enough(dataloader["dataset"])

    monkeypatch.setattr(validation.ValLoop, "__init__", build)
    runner = bare_runner(dataset)
    bases = {"llm": "the/llm", "visual_encoder": "the/tower"}
    runner.cfg = {
        "model": {part: {"pretrained_model_name_or_path": name} for part, name in bases.items()}
    }
    own = {"type": "SoftPackedDataset", "mixture": "own.yaml", "stage": "stage3"}
    with pytest.raises(Enough) as caught:
        HeldOutLoop(runner, {"dataset": own}, {})
    (built,) = caught.value.args
    assert built["vision"] == "the/tower"
    assert built["tokenizer"]["pretrained_model_name_or_path"] == "the/llm"
    assert built.items() >= own.items()


def test_a_sampler_that_repeats_packs_is_refused(dataset):
    with pytest.raises(GMAIError, match=r"needs batch_sampler=.*'MicroBatchSampler'"):
        build_loop(dataset, batched=False)
