# SPDX-License-Identifier: Apache-2.0

import json
import pickle
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import CLIPImageProcessor, PreTrainedTokenizerFast
from xtuner.dataset import llava as xtuner_llava
from xtuner.dataset.huggingface import process_hf_dataset
from xtuner.dataset.map_fns import llava_map_fn, template_map_fn_factory
from xtuner.registry import MAP_FUNC
from xtuner.utils import PROMPT_TEMPLATE

from gmai_xtuner.core.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from gmai_xtuner.core.conversation import Conversation, Turn, parse_raw
from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.core.records import RawRecord
from gmai_xtuner.data.tokenization import (
    ChatTemplate,
    ConversationTokenizer,
    fit,
    soft_packing_map_fn,
)
from gmai_xtuner.data.word_cache import WordCache
from tests.toy import record, write_corpus

INTERNLM2 = ChatTemplate.from_xtuner("internlm2_chat")


def conversation(*texts: str, images: tuple[str, ...] = (), system: str | None = None):
    turns = [Turn(("user", "assistant")[index % 2], text) for index, text in enumerate(texts)]
    if system is not None:
        turns.insert(0, Turn("system", system))
    return Conversation("c", tuple(turns), images)


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, so that a reader can count: <s> is 0, </s> 1, the marks 2 and 3."""
    characters = "\n" + "".join(map(chr, range(32, 127)))
    names = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", *characters]
    backend = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, "~"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )


@pytest.fixture(scope="module")
def by_character() -> ConversationTokenizer:
    return ConversationTokenizer.from_pretrained(character_tokenizer(), INTERNLM2)


def one(encode: ConversationTokenizer, *texts: str, **options):
    (tokenized,) = encode([conversation(*texts, **options)])
    return tokenized


# --- layout and labels, counted by hand -----------------------------------------------------------


def test_ids_and_labels_of_two_rounds_counted_by_hand(by_character):
    tokenized = one(by_character, "<image>\nHi?", "CT.", "Sure?", "Yes", images=("a.png",))
    text = by_character.tokenizer.decode(
        [token for token in tokenized.input_ids if token >= 0], skip_special_tokens=False
    )
    assert text.replace(" ", "") == (
        "<s><|im_start|>user\n\nHi?<|im_end|>\n<|im_start|>assistant\nCT.<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
    )
    # <s> 1, im_start 1, "user\n" 5: the image is token 7.
    assert np.flatnonzero(tokenized.input_ids == IMAGE_TOKEN_INDEX).tolist() == [7]
    # image 1, "\nHi?" 4, im_end 1, "\n" 1, im_start 1, "assistant\n" 10: the answer begins at 25.
    # "CT." and im_end are supervised, "\n" is not. 6 + 5 + 13 later the second answer begins.
    assert tokenized.label_spans.tolist() == [[25, 29], [54, 58]]
    assert tokenized.turn_ends == ((30, 1, 1), (59, 2, 1))
    assert len(tokenized.input_ids) == 59
    assert tokenized.num_labels == 8
    assert tokenized.num_tokens(576) == 59 + 575
    labels = tokenized.labels
    assert labels[24:30].tolist() == [IGNORE_INDEX, *tokenized.input_ids[25:29], IGNORE_INDEX]
    assert (labels != IGNORE_INDEX).sum() == 8


def test_system_turn_comes_first_and_is_not_supervised(by_character):
    with_system = one(by_character, "Hi?", "CT.", system="Be brief.")
    without = one(by_character, "Hi?", "CT.")
    # im_start 1, "system\n" 7, "Be brief." 9, im_end 1, "\n" 1, between <s> and the user.
    assert len(with_system.input_ids) == len(without.input_ids) + 19
    assert with_system.input_ids[20:].tolist() == without.input_ids[1:].tolist()
    assert (with_system.label_spans == without.label_spans + 19).all()


def test_marks_keep_their_places_and_order(by_character):
    tokenized = one(by_character, "a<image>bc<image>", "Two.", images=("a.png", "b.png"))
    assert np.flatnonzero(tokenized.input_ids == IMAGE_TOKEN_INDEX).tolist() == [8, 11]
    assert tokenized.images == ("a.png", "b.png")


def test_without_bos_everything_else_is_the_same(tokenizer, encode):
    bare = ConversationTokenizer.from_pretrained(
        tokenizer, ChatTemplate.from_xtuner("internlm2_chat", add_bos=False)
    )
    texts = ("What is shown?", "A chest X-ray.", "Is it normal?", "Yes.")
    with_bos, without = one(encode, *texts), one(bare, *texts)
    assert with_bos.input_ids[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in without.input_ids
    assert with_bos.input_ids[1:].tolist() == without.input_ids.tolist()
    assert (with_bos.label_spans - 1 == without.label_spans).all()


def test_the_first_token_of_a_conversation_never_learns():
    # A template without any context: the answer itself begins the conversation.
    bare = ChatTemplate("", "", "<|im_end|>", suffix_is_eos=True, separator="", add_bos=False)
    encode = ConversationTokenizer.from_pretrained(character_tokenizer(), bare)
    tokenized = one(encode, "Hi?", "CT.")
    assert len(tokenized.input_ids) == 4  # the case occurs: "CT." and im_end alone
    assert tokenized.label_spans.tolist() == [[1, 4]]


def test_answer_and_its_end_are_supervised_with_an_eos_template():
    template = ChatTemplate.from_xtuner("vicuna")
    assert not template.suffix_is_eos
    encode = ConversationTokenizer.from_pretrained(character_tokenizer(), template)
    tokenized = one(encode, "Hi?", "CT.", "Sure?", "Yes")
    # <s> 1 + "USER: Hi? ASSISTANT:" 20; "CT." </s>; "\n"; then again with <s> of its own.
    assert tokenized.label_spans.tolist() == [[21, 25], [49, 53]]
    assert tokenized.input_ids[[0, 24, 26, 52]].tolist() == [0, 1, 0, 1]


@given(
    st.lists(
        st.tuples(st.text("ab<> \n中", min_size=1), st.text("ab. \n影", min_size=1)),
        min_size=1,
        max_size=4,
    ),
    st.booleans(),
)
def test_supervised_tokens_decode_to_the_answers_and_their_ends(by_character, rounds, with_system):
    texts = [text for pair in rounds for text in pair]
    assert not any("<image>" in text for text in texts)
    tokenized = one(by_character, *texts, system="S" if with_system else None)
    assert len(tokenized.label_spans) == len(rounds)
    for (start, end), (_, answer) in zip(tokenized.label_spans, rounds, strict=True):
        expected = by_character.tokenizer.encode(answer + "<|im_end|>", add_special_tokens=False)
        assert tokenized.input_ids[start:end].tolist() == expected.ids
    assert tokenized.labels[0] == IGNORE_INDEX


@pytest.mark.parametrize("template", ["internlm2_chat", "vicuna", "chatglm2"])
@pytest.mark.parametrize(
    ("texts", "images"),
    [
        (("What is shown?", "A CT scan."), ()),
        (("<image>\nWhat is shown?", "A CT scan.", "Sure?", "Yes."), ("a.png",)),
        (("Compare <image> and <image>.", "They differ.", "<image>", "New."), ("a", "b", "c")),
    ],
)
def test_prompt_is_what_training_had_before_the_answer(tokenizer, template, texts, images):
    encode = ConversationTokenizer.from_pretrained(tokenizer, ChatTemplate.from_xtuner(template))
    item = conversation(*texts, images=images, system="Be brief.")
    (tokenized,) = encode([item])
    prompt = encode.encode_prompt(item.turns[:-1], images)
    assert prompt.tolist() == tokenized.input_ids[: tokenized.label_spans[-1, 0]].tolist()
    assert (prompt == IMAGE_TOKEN_INDEX).sum() == len(images)


# --- parity with xtuner ---------------------------------------------------------------------------

PARITY_RECORDS = [
    record("single", "<image>\nWhat is shown?", "A chest X-ray.", image="a.png"),
    record("mark-alone", "<image>", "A CT scan of the liver.", image="a.png"),
    record(
        "multi",
        "<image>\nWhat is shown?",
        "An MR image of the brain.",
        "Is there a  mass?",
        "No.\n\nThe brain is normal.",
        "Thanks",
        "You're welcome!",
        image="b.png",
    ),
    record("chinese", "<image>\n图中显示的是什么器官？", "这是肝脏的CT，未见异常。", image="a.png"),
    record("text", "What is glaucoma?", "A disease of the optic nerve: 视神经 🙂 µm ±2 %."),
    record("text-multi", "你好", "你好！", "Dose in mg/kg?", " 0.25 {x} to 1e-3 "),
]


@pytest.mark.parametrize("template", ["internlm2_chat", "vicuna", "chatglm2"])
def test_ids_and_labels_equal_xtuners_llava_dataset(
    tmp_path, monkeypatch, tokenizer, tiny_bases, template
):
    # Only the number of its worker processes is changed.
    monkeypatch.setattr(
        xtuner_llava, "process_hf_dataset", partial(process_hf_dataset, map_num_proc=None)
    )
    corpus = write_corpus(tmp_path / "corpus", {"toy": PARITY_RECORDS}, images=("a.png", "b.png"))
    theirs = xtuner_llava.LLaVADataset(
        image_folder=str(corpus.images),
        image_processor=CLIPImageProcessor.from_pretrained(tiny_bases / "vision"),
        data_path=str(corpus.annotations("toy")),
        tokenizer=tokenizer,
        dataset_map_fn=llava_map_fn,
        template_map_fn=template_map_fn_factory(PROMPT_TEMPLATE[template]),
        max_length=2048,
        pad_image_to_square=True,
    )
    assert len(theirs) == len(PARITY_RECORDS)  # it drops none
    encode = ConversationTokenizer.from_pretrained(tokenizer, ChatTemplate.from_xtuner(template))
    for index, item in enumerate(PARITY_RECORDS):
        (ours,) = encode([parse_raw(RawRecord(str(index), "", item), dataset="toy")])
        assert ours.id == theirs[index]["id"]
        assert ours.input_ids.tolist() == theirs[index]["input_ids"], ours.id
        assert ours.labels.tolist() == theirs[index]["labels"], ours.id


def ours(item, encode: ConversationTokenizer):
    (tokenized,) = encode([parse_raw(RawRecord("1", "", item), dataset="toy")])
    return tokenized


# --- the registered map function ------------------------------------------------------------------


def test_map_function_is_registered_and_equals_the_batch_path(tokenizer, encode):
    function = MAP_FUNC.get("soft_packing_map_fn")
    assert function is soft_packing_map_fn
    for item in PARITY_RECORDS:
        mapped = function(item, tokenizer=tokenizer, num_image_tokens=64)
        batched = ours(item, encode)
        assert mapped == {
            "id": item["id"],
            "input_ids": batched.input_ids.tolist(),
            "labels": batched.labels.tolist(),
            "num_tokens": batched.num_tokens(64),
            "num_labels": batched.num_labels,
            "images": [item["image"]] if item["image"] else [],
        }


def test_map_function_sees_tokens_that_are_added_later(tokenizer):
    fast = pickle.loads(pickle.dumps(tokenizer))
    item = record("r", "What is glioblastoma?", "A tumour.")
    before = soft_packing_map_fn(item, tokenizer=fast, num_image_tokens=64)["input_ids"]
    fast.add_tokens(["glioblastoma"])
    after = soft_packing_map_fn(item, tokenizer=fast, num_image_tokens=64)["input_ids"]
    assert len(after) < len(before)


# --- construction ---------------------------------------------------------------------------------


def test_unknown_template_is_refused_with_the_known_names():
    with pytest.raises(GMAIError, match=r"'internlm3_chat'.*internlm2_chat"):
        ChatTemplate.from_xtuner("internlm3_chat")


def test_tokenizer_without_the_end_of_turn_token_is_refused():
    base = character_tokenizer()
    template = ChatTemplate("", "{input}", "<end>", suffix_is_eos=True, separator="")
    with pytest.raises(GMAIError, match=r"no token '<end>' \(it becomes 5 tokens\)"):
        ConversationTokenizer.from_pretrained(base, template)


def test_tokenizer_without_bos_is_refused_unless_add_bos_is_off():
    base = character_tokenizer()
    base.bos_token = None
    with pytest.raises(GMAIError, match="add_bos=False"):
        ConversationTokenizer.from_pretrained(base, INTERNLM2)
    bare = ChatTemplate.from_xtuner("internlm2_chat", add_bos=False)
    assert len(one(ConversationTokenizer.from_pretrained(base, bare), "Hi?", "CT.").input_ids)


# --- fit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_length", "rounds"), [(62, 2), (61, 1), (33, 1), (32, 0)]
)  # of 59 and 30 ids; an image takes 4 tokens: 3 more than its mark
def test_cut_keeps_the_whole_turns_that_fit(by_character, max_length, rounds):
    texts = ("<image>\nHi?", "CT.", "Sure?", "Yes")
    both = one(by_character, *texts, images=("a.png",))
    fitted = fit(both, max_length=max_length, num_image_tokens=4, over_length="cut")
    if not rounds:
        assert fitted is None
        return
    shorter = one(by_character, *texts[: 2 * rounds], images=("a.png",))
    assert fitted is not None
    assert fitted.input_ids.tolist() == shorter.input_ids.tolist()
    assert fitted.label_spans.tolist() == shorter.label_spans.tolist()
    assert (fitted.images, fitted.turn_ends) == (shorter.images, shorter.turn_ends)
    assert fitted.num_tokens(4) <= max_length


def test_too_many_images_are_cut_with_their_turns(by_character):
    tokenized = one(by_character, "<image>", "CT.", "<image><image>", "Yes", images=("a", "b", "c"))
    options = {"max_length": 10_000, "num_image_tokens": 4}
    fitted = fit(tokenized, **options, over_length="cut", max_images=2)
    assert fitted is not None
    assert fitted.images == ("a",)
    assert (fitted.input_ids == IMAGE_TOKEN_INDEX).sum() == 1
    assert fit(tokenized, **options, over_length="drop", max_images=2) is None
    assert fit(tokenized, **options, over_length="cut", max_images=3) is tokenized
    assert fit(tokenized, **options, over_length="cut", max_images=0) is None


MARK = "\u2581"
WORDS = st.sampled_from(
    ["The", "lung", "lungs", "is", "clear.", "\n", "气胸", "a\n", "<|im_end|>", "5mm"]
)
TEXTS = st.one_of(
    st.text(max_size=30),
    st.lists(st.one_of(WORDS, st.just(""), st.text(max_size=4)), max_size=12).map(" ".join),
)


@pytest.fixture(scope="module")
def backend(tokenizer) -> Tokenizer:
    return Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())


@pytest.fixture(scope="module")
def cache(backend) -> WordCache:
    found = WordCache.of(backend)
    assert found is not None
    return found


def whole(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(TEXTS, max_size=6))
def test_ids_are_those_of_the_whole_text(cache, backend, texts):
    assert cache(texts) == whole(backend, texts)
    assert cache(texts) == whole(backend, texts)  # now from the cache


def small(merges: list[tuple[str, str]], letters: str = MARK + "ab.\n", **changes) -> Tokenizer:
    """A byte-pair tokenizer with these merges."""
    pieces = ["<unk>", *letters]
    pieces += [a + b for a, b in merges if a + b not in pieces]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", MARK)
    state = json.loads(made.to_str())
    state["model"].update(changes)
    return Tokenizer.from_str(json.dumps(state))


@pytest.mark.parametrize(
    ("tokenizer", "tokens", "texts"),
    [
        # a merge over a space; the first text shows that the case occurs
        (
            small([(MARK, "a"), (".", MARK + "a")]),
            ["b", "." + MARK + "a"],
            ["b. a", "b a. a b", ". .a"],
        ),
        (
            small([(MARK, MARK), (MARK + MARK, "a")]),
            ["b", MARK + MARK + "a"],
            ["b  a", "b   a", "  a ", "a  ", " a", " "],
        ),
        # unknown characters are fused; not even the mark is known
        (small([], letters="a"), ["<unk>"], ["z z", "zz a", "a zz", "z"]),
    ],
    ids=["merge", "spaces", "unknown"],
)
def test_words_that_a_tokenizer_joins_stay_together(tokenizer, tokens, texts):
    assert tokenizer.encode(texts[0]).tokens == tokens
    cache = WordCache.of(tokenizer)
    assert cache is not None
    assert cache(texts) == whole(tokenizer, texts)


def test_long_words_are_not_kept(backend):
    cache = WordCache.of(backend)
    assert cache is not None
    cache(["short " + "x" * 500])
    assert all(len(word) <= 40 for word in (*cache._first, *cache._later))


@pytest.mark.parametrize("change", ["pre_tokenizer", "normalizer", "ignore_merges", "added_token"])
def test_tokenizers_without_the_proof_are_refused(change):
    tokenizer = small([(MARK, "a")])
    assert WordCache.of(tokenizer) is not None
    if change == "pre_tokenizer":
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    elif change == "normalizer":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)]
        )
    elif change == "ignore_merges":
        tokenizer = small([(MARK, "a")], ignore_merges=True)
    else:
        tokenizer.add_tokens(["a b"])
    assert WordCache.of(tokenizer) is None
