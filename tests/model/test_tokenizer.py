# SPDX-License-Identifier: Apache-2.0

"""The native tokenizer against sentencepiece's own processor."""

import json
import re
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from examples.tiny_bases import SPECIAL_TOKENS, TinyLLM, write_tiny_llm
from gmai_xtuner.checkpoint.tokenizer import load_tokenizer
from gmai_xtuner.core.errors import ModelLoadError
from tests.tables import tables

TABLES = tables(__file__)

SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
SPECIAL = ("<unk>", "<s>", "</s>", *SPECIAL_TOKENS)
TEXTS = TABLES["TEXTS"]


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "dummy-prefix"])
def checkpoint(request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer") / "llm"
    write_tiny_llm(directory, TinyLLM(**SMALL, add_dummy_prefix=request.param), seed=0)
    return directory


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    write_tiny_llm(tmp_path / "llm", TinyLLM(**SMALL), seed=0)
    return tmp_path / "llm"


@pytest.fixture(scope="module")
def pair(checkpoint):
    processor = sentencepiece.SentencePieceProcessor(str(checkpoint / "tokenizer.model"))
    return load_tokenizer(str(checkpoint)), processor


def reference(processor, tokenizer, text: str) -> list[int]:
    """Sentencepiece on what lies between the special tokens."""
    ids = []
    for part in re.split(f"({'|'.join(map(re.escape, SPECIAL))})", text):
        if part in SPECIAL:
            ids.append(tokenizer.convert_tokens_to_ids(part))
        else:
            ids.extend(processor.encode(part))
    return ids


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("text", TEXTS)
def test_same_ids_as_sentencepiece(pair, text):
    tokenizer, processor = pair
    assert encode(tokenizer, text) == processor.encode(text)


@settings(max_examples=100)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
def test_same_ids_as_sentencepiece_on_any_text(pair, text):
    tokenizer, processor = pair
    assert encode(tokenizer, text) == reference(processor, tokenizer, text)


@settings(max_examples=100)
@given(
    parts=st.lists(
        st.sampled_from([*SPECIAL, " ", "  ", "\n", "lung", "肺", "可见结节", "The", "🩺", "user"])
    )
)
def test_same_ids_as_sentencepiece_around_special_tokens(pair, parts):
    tokenizer, processor = pair
    text = "".join(parts)
    assert encode(tokenizer, text) == reference(processor, tokenizer, text)


def test_bos_comes_first_only_with_special_tokens(pair):
    tokenizer, processor = pair
    assert tokenizer.encode("lung") == [1, *processor.encode("lung")]
    assert tokenizer.encode("lung", add_special_tokens=False) == processor.encode("lung")
    assert tokenizer.encode("") == [1]


def test_bos_and_eos_flags_can_be_set(checkpoint):
    neither = load_tokenizer(str(checkpoint), add_bos_token=False)
    both = load_tokenizer(str(checkpoint), add_eos_token=True)
    ids = neither("lung").input_ids
    assert 1 not in ids
    assert both("lung").input_ids == [1, *ids, 2]
    assert both("lung", "lung").input_ids == [1, *ids, 2, 1, *ids, 2]


@pytest.mark.parametrize("text", [text for text in TEXTS if "▁" not in text])
def test_decoding_gives_the_text_back(pair, text):
    tokenizer, _ = pair
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_names_and_settings_are_the_checkpoints(pair, checkpoint):
    tokenizer, _ = pair
    assert type(tokenizer) is PreTrainedTokenizerFast
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.unk_token_id == 0
    assert tokenizer.padding_side == "right"
    assert load_tokenizer(str(checkpoint), padding_side="left").padding_side == "left"
    assert tokenizer.name_or_path == str(checkpoint)
    assert len(tokenizer) == tokenizer.vocab_size == 1536
    assert set(SPECIAL) <= set(tokenizer.all_special_tokens)
    padded = tokenizer(["lung", "lung nodule"], padding=True)
    assert padded.input_ids[0][-1] == 2
    assert padded.attention_mask[0][-1] == 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"trust_remote_code": True},
        {"use_fast": False},
        {"trust_remote_code": True, "encode_special_tokens": True},  # as xtuner chat does
    ],
)
def test_what_is_saved_loads_anywhere_with_the_same_ids(pair, tmp_path, options):
    tokenizer, _ = pair
    tokenizer.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "auto_map" not in saved
    assert "name_or_path" not in saved
    for again in (
        AutoTokenizer.from_pretrained(tmp_path, **options),
        load_tokenizer(str(tmp_path), trust_remote_code=True),
    ):
        for text in (*TEXTS, "<|im_start|>user\n肺<|im_end|>\n"):
            assert again(text).input_ids == tokenizer(text).input_ids
            assert encode(again, text) == encode(tokenizer, text)
            assert again.decode(again.encode(text)) == tokenizer.decode(tokenizer.encode(text))
        assert again.chat_template == tokenizer.chat_template
        assert again.all_special_ids == tokenizer.all_special_ids


def test_tokenizer_json_beside_a_remote_class_is_used_without_the_class(pair, checkpoint, tmp_path):
    tokenizer, _ = pair
    tokenizer.save_pretrained(tmp_path)
    config = (checkpoint / "tokenizer_config.json").read_text()
    (tmp_path / "tokenizer_config.json").write_text(config)
    again = load_tokenizer(str(tmp_path))
    assert type(again) is PreTrainedTokenizerFast
    assert "auto_map" not in again.init_kwargs
    assert again("肺 lung").input_ids == tokenizer("肺 lung").input_ids
    without = load_tokenizer(str(tmp_path), add_bos_token=False)
    assert without("肺 lung").input_ids == tokenizer("肺 lung").input_ids[1:]


def test_tokenizer_model_alone_has_the_protos_special_tokens(copy):
    (copy / "tokenizer_config.json").unlink()
    (copy / "special_tokens_map.json").unlink()
    tokenizer = load_tokenizer(str(copy))
    assert tokenizer.encode("lung")[0] == tokenizer.bos_token_id == 1
    assert (tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token) == (
        "</s>",
        "<unk>",
        None,
    )
    assert encode(tokenizer, "[UNUSED_TOKEN_146]") == [1535]


def test_old_names_of_special_tokens_are_plain_text(copy):
    assert 1535 not in encode(load_tokenizer(str(copy)), "[UNUSED_TOKEN_146]")


def edit_proto(directory: Path, change) -> None:
    path = directory / "tokenizer.model"
    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    change(proto)
    path.write_bytes(proto.SerializeToString())


def squeeze(proto):
    proto.normalizer_spec.remove_extra_whitespaces = True


def prefix_and_squeeze(proto):
    squeeze(proto)
    proto.normalizer_spec.add_dummy_prefix = True
    for piece in proto.pieces:
        if piece.type == 4:
            piece.type = 1


def no_bytes(proto):
    proto.trainer_spec.byte_fallback = False
    for piece in proto.pieces:
        if piece.type == 6:
            piece.type = 1


def user_defined(proto):
    for index, name in enumerate(("——", "lung▁nodule", "zq7", "Ｅ")):
        proto.pieces[-20 - index].piece = name
        proto.pieces[-20 - index].type = 4


@pytest.mark.parametrize("change", [squeeze, prefix_and_squeeze, no_bytes, user_defined])
def test_other_flags_of_the_proto_are_followed(copy, change):
    edit_proto(copy, change)
    processor = sentencepiece.SentencePieceProcessor(str(copy / "tokenizer.model"))
    tokenizer = load_tokenizer(str(copy))
    extra = ("a  lung   nodule, one lung nodule ——— ＥＥ🩺🩺 zq7zq7", "  \n  肺  ")
    for text in (*TEXTS, *extra):
        assert encode(tokenizer, text) == processor.encode(text)


def test_folder_without_tokenizer_is_an_error(tmp_path):
    with pytest.raises(ModelLoadError, match=r"neither tokenizer.json nor tokenizer.model. Copy"):
        load_tokenizer(str(tmp_path))


def test_damaged_model_is_an_error(copy):
    path = copy / "tokenizer.model"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ModelLoadError, match="cut short"):
        load_tokenizer(str(copy))
    path.write_bytes(b"")
    with pytest.raises(ModelLoadError, match="no unknown piece"):
        load_tokenizer(str(copy))


def unigram(proto):
    proto.trainer_spec.model_type = 1


def suffix(proto):
    proto.trainer_spec.treat_whitespace_as_suffix = True


def unused(proto):
    next(piece for piece in proto.pieces if len(piece.piece) > 3 and piece.type == 1).type = 5


def prefix_and_user_defined(proto):
    proto.normalizer_spec.add_dummy_prefix = True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (unigram, "no BPE model"),
        (suffix, "marks words at their end"),
        (unused, "unused pieces"),
        (prefix_and_user_defined, "user-defined pieces and a dummy prefix"),
    ],
)
def test_model_that_can_not_be_exact_is_refused(copy, change, message):
    edit_proto(copy, change)
    with pytest.raises(ModelLoadError, match=message):
        load_tokenizer(str(copy))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"additional_special_tokens": ["<|new|>"]}, r"'<\|new\|>'.*have no id"),
        ({"bos_token": None, "added_tokens_decoder": {"9999": "<|far|>"}}, r"should have id 9999"),
        ({"added_tokens_decoder": {"1535": "<s>"}}, r"occur twice: \['<s>'\]"),
    ],
)
def test_special_tokens_that_do_not_fit_are_an_error(copy, changes, message):
    path = copy / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ModelLoadError, match=message):
        load_tokenizer(str(copy))
