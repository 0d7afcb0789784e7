# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch

from gmai_xtuner.core.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.data.collate import collate_packs

X = IGNORE_INDEX


def pack(
    input_ids: list[int],
    labels: list[int],
    lengths: list[int],
    *,
    images: int = 0,
) -> dict:
    """An item of the packed dataset; its pixel values are its first id."""
    return {
        "input_ids": torch.tensor(input_ids),
        "labels": torch.tensor(labels),
        "lengths": lengths,
        "pixel_values": torch.full((images, 3, 2, 2), float(input_ids[0])),
        "ids": [f"toy/{length}" for length in lengths],
        "num_tokens": sum(lengths),
        "capacity": 10,
    }


def drawing() -> list[dict]:
    """The module's drawing: context 1, 2, 3 of A, B, C; supervised 11, 12, 13."""
    return [
        pack([1, 11, 11, 2, 12], [X, 11, 11, X, 12], [3, 2]),
        pack([3, 3, 13], [X, X, 13], [3]),
    ]


def test_the_modules_drawing():
    data = collate_packs(drawing())["data"]
    assert data["input_ids"].tolist() == [[1, 11, 11, 2, 12, 3, 3, 13]]
    assert data["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert data["cu_seqlens"].tolist() == [0, 3, 5, 8]
    assert data["cu_seqlens"].dtype == torch.int32
    assert data["lengths"] == [3, 2, 3]
    assert data["label_positions"].tolist() == [0, 1, 3, 6]
    assert data["label_targets"].tolist() == [11, 11, 12, 13]
    assert (data["num_tokens"], data["capacity"]) == (8, 20)
    assert data["ids"] == ["toy/3", "toy/2", "toy/3"]


def test_first_label_of_each_conversation_is_masked():
    """Else the end of one conversation would be made to predict the beginning of the next."""
    packs = [pack([1, 11, 2, 12], [1, 11, 2, 12], [2, 2]), pack([3, 13], [3, 13], [2])]
    data = collate_packs(packs)["data"]
    assert data["label_targets"].tolist() == [11, 12, 13]
    assert data["label_positions"].tolist() == [0, 2, 4]  # each within its own conversation
    assert packs[0]["labels"].tolist() == [1, 11, 2, 12]  # the caller's are left alone
    assert packs[1]["labels"].tolist() == [3, 13]


def test_packs_of_the_caller_are_left_alone_even_a_single_one():
    alone = pack([1, 11], [1, 11], [2])
    collate_packs([alone])
    assert alone["labels"].tolist() == [1, 11]


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        ("token", [1, 1, 1, 1, 1, 1, 1]),
        ("micro_batch", [1, 1, 1, 1, 1, 1, 1]),
        ("sample", [0.25, 0.25, 0.25, 0.25, 1, 0.5, 0.5]),
        ("square", [0.5, 0.5, 0.5, 0.5, 1, 2**-0.5, 2**-0.5]),
    ],
)
def test_weights_of_conversations_with_4_1_and_2_supervised_tokens(weighting, expected):
    packs = [
        pack([1, 11, 11, 11, 11, 2, 12], [X, 11, 11, 11, 11, X, 12], [5, 2]),
        pack([3, 13, 13], [X, 13, 13], [3]),
    ]
    data = collate_packs(packs, weighting=weighting)["data"]
    assert data["label_targets"].tolist() == [11, 11, 11, 11, 12, 13, 13]
    assert data["label_weights"].tolist() == pytest.approx(expected)
    assert data["label_weights"].dtype == torch.float32


def test_images_stand_at_their_placeholders_in_the_order_of_the_packs():
    mark = IMAGE_TOKEN_INDEX
    packs = [
        pack([1, mark, mark, 11, 2, 12], [X, X, X, 11, X, 12], [4, 2], images=1),
        pack([5, 13], [X, 13], [2]),
        pack([3, mark, mark, mark, mark, 13], [X, X, X, X, X, 13], [6], images=2),
    ]
    data = collate_packs(packs)["data"]
    assert data["image_positions"].tolist() == [1, 2, 9, 10, 11, 12]
    assert data["pixel_values"].shape == (3, 3, 2, 2)
    assert data["pixel_values"][:, 0, 0, 0].tolist() == [1, 3, 3]


def test_a_batch_without_supervised_tokens_has_no_label():
    data = collate_packs([pack([1, 2], [X, X], [2])])["data"]
    assert data["label_targets"].tolist() == []
    assert data["label_weights"].tolist() == []
    assert data["label_positions"].tolist() == []


@pytest.mark.parametrize(
    ("labels", "lengths", "message"),
    [
        ([X, 11, 11], [2], "3 tokens, 3 labels and lengths of 2 in a batch"),
        ([X, 11], [3], "3 tokens, 2 labels and lengths of 3 in a batch"),
    ],
)
def test_boundaries_that_do_not_fit_are_an_error_with_all_numbers(labels, lengths, message):
    with pytest.raises(GMAIError, match=message):
        collate_packs([pack([1, 11, 11], labels, lengths)])


def test_unknown_weighting_is_refused():
    with pytest.raises(GMAIError, match="unknown weighting 'tokens'"):
        collate_packs(drawing(), weighting="tokens")
