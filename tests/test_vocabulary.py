"""A smaller vocabulary: the source's tokenizer is the oracle for every text, the source model for every logit."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import (
    AutoModel,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from benchmarks.sentence_encoder import encoder_folder
from hf_ws import (
    AutoSubclone,
    CalibrationError,
    PlanError,
    SizeError,
    Vocabulary,
    choose_vocabulary,
    trim_tokenizer,
)
from hf_ws.cli import main
from hf_ws.hub import save
from hf_ws.vocabulary import renumbered, token_ids
from tests import families
from tests.tokenizers_made import MADE, SPECIAL, corpus, tokenizer

DEMO = Path(__file__).parents[1] / "recipes" / "demo" / "source"
SIZE = 450
TEXTS = corpus()[::3]


@cache
def trimmed(name: str, size: int = SIZE) -> tuple[Vocabulary, PreTrainedTokenizerBase]:
    chosen = choose_vocabulary(tokenizer(name), TEXTS, size)
    return chosen, trim_tokenizer(tokenizer(name), chosen)


def ids(of: PreTrainedTokenizerBase, text: str) -> list[int]:
    return of(text, verbose=False)["input_ids"]


def check_text(name: str, text: str) -> None:
    """The two laws of one text."""
    source, (chosen, target) = tokenizer(name), trimmed(name)
    before, after = ids(source, text), ids(target, text)
    assert max(after, default=0) < len(chosen)
    assert target.decode(after) == source.decode(before)
    if {*before} <= {*chosen.kept}:
        assert source.convert_ids_to_tokens(before) == target.convert_ids_to_tokens(after)
    assert [chosen.kept[i] for i in ids(target, source.decode(before))]  # every id has an old one


# ------------------------------------------------------------------------------------------------ laws of any text


@pytest.mark.parametrize("name", MADE)
@given(st.text(max_size=60) | st.text(alphabet="abcdeht _.()", max_size=60))
def test_any_text_is_spelled_as_before(name: str, text: str) -> None:
    check_text(name, text)


@pytest.mark.parametrize("name", MADE)
def test_every_text_of_a_corpus_is_spelled_as_before(name: str) -> None:
    """Half of it was counted, half was not; some lines are of kept tokens alone, and some are not."""
    source, (chosen, _) = tokenizer(name), trimmed(name)
    lines = corpus()
    for line in lines:
        check_text(name, line)
    whole = [{*ids(source, line)} <= {*chosen.kept} for line in lines if line.strip()]
    assert 20 < sum(whole) < len(whole) - 20


@pytest.mark.parametrize("name", MADE)
def test_what_is_special_or_added_stays(name: str) -> None:
    source, (chosen, target) = tokenizer(name), trimmed(name)
    for token in [*SPECIAL, *source.get_added_vocab()]:
        assert chosen.kept[target.convert_tokens_to_ids(token)] == source.convert_tokens_to_ids(token)
    assert target.all_special_tokens == source.all_special_tokens
    assert target.pad_token_id == target.convert_tokens_to_ids("<pad>")
    assert ids(target, "")[:1] == [target.convert_tokens_to_ids("<s>")]
    assert [*target.get_vocab().values()].__len__() == len(chosen) == SIZE


@pytest.mark.parametrize("name", MADE)
def test_the_same_size_is_the_same_tokenizer(name: str) -> None:
    source = tokenizer(name)
    chosen = choose_vocabulary(source, TEXTS, len(source))
    assert chosen.kept == tuple(range(len(source)))
    assert chosen.coverage == 1.0
    same = trim_tokenizer(source, chosen)
    assert (
        json.loads(same.backend_tokenizer.to_str())["model"]
        == json.loads(source.backend_tokenizer.to_str())["model"]
    )


@pytest.mark.parametrize("name", MADE)
def test_what_a_text_uses_is_kept_before_what_it_does_not(name: str) -> None:
    """Counted on one text, that text takes fewer tokens than with a vocabulary counted on another."""
    source = tokenizer(name)
    other = ["SELECT customer, amount FROM ledger WHERE amount > 100 ORDER BY customer;"] * 5
    fitting, foreign = trimmed(name)[1], trim_tokenizer(source, choose_vocabulary(source, other, SIZE))
    assert sum(len(ids(fitting, t)) for t in TEXTS) < sum(len(ids(foreign, t)) for t in TEXTS)
    assert sum(len(ids(foreign, t)) for t in other) <= sum(len(ids(fitting, t)) for t in other)


def test_merging_stays_possible() -> None:
    """Of a BPE: whatever is kept is reached from single letters, as in the source."""
    for name in ("byte_level", "byte_fallback", "letters"):
        source, (chosen, target) = tokenizer(name), trimmed(name)
        model = target.backend_tokenizer.model
        for token in target.convert_ids_to_tokens(range(len(chosen))):
            if [t.value for t in source.backend_tokenizer.model.tokenize(token.removesuffix("</w>"))] == [
                token
            ]:
                assert [t.value for t in model.tokenize(token.removesuffix("</w>"))] == [token]


def test_a_dropped_letter_falls_to_its_bytes() -> None:
    source = tokenizer("byte_fallback")
    chosen = choose_vocabulary(source, ["plain words, and no others, for a plain model " * 4], 300)
    target = trim_tokenizer(source, chosen)
    assert "ï" in source.get_vocab()
    assert "ï" not in target.get_vocab()
    assert target.convert_ids_to_tokens(ids(target, "ï"))[1:] == ["<0xC3>", "<0xAF>"]
    assert target.decode(ids(target, "naïve"), skip_special_tokens=True) == "naïve"


def test_rows_without_a_token_go_first() -> None:
    """Many models have a few rows more than their tokenizer has tokens."""
    source = tokenizer("byte_level")
    config = LlamaConfig(vocab_size=len(source) + 40)
    chosen = choose_vocabulary(source, TEXTS, len(source), config=config)
    assert chosen == Vocabulary(tuple(range(len(source))), len(source) + 40, chosen.used, 1.0)
    more = choose_vocabulary(source, TEXTS, len(source) + 7, config=config)
    assert more.kept == tuple(range(len(source) + 7))
    assert trim_tokenizer(source, more).get_vocab() == source.get_vocab()


# ------------------------------------------------------------------------------------------------ models


def model_and_tokenizer(family: str, **changes: object) -> tuple:
    source = tokenizer("byte_level")
    return families.model(family, vocab_size=len(source) + 5, **changes), source


@pytest.mark.parametrize(
    "family", ["llama", "llama_tied", "gpt2", "gpt2_untied", "gemma2", "bert", "opt_350m"]
)
def test_of_kept_tokens_the_logits_are_what_they_were(family: str) -> None:
    source, words = model_and_tokenizer(family)
    chosen = choose_vocabulary(words, TEXTS, 400, config=source.config)
    target = AutoSubclone.from_pretrained(source, vocab=chosen)
    kept = torch.tensor(chosen.kept)
    tables = [m.get_input_embeddings().weight for m in (source, target)]
    assert torch.equal(tables[0][kept], tables[1])
    assert (target.get_output_embeddings().weight is tables[1]) == source.config.tie_word_embeddings
    new = torch.randint(0, 400, (2, 12), generator=torch.Generator().manual_seed(0))
    before, after = families.logits(source, kept[new]), families.logits(target, new)
    torch.testing.assert_close(after, before[..., kept], rtol=0, atol=1e-11)


def test_with_another_width_too() -> None:
    source, words = model_and_tokenizer("llama")
    chosen = choose_vocabulary(words, TEXTS, 400, config=source.config)
    narrow = AutoSubclone.from_pretrained(source, hidden=32, layers=2)
    both = AutoSubclone.from_pretrained(
        source, hidden=32, layers=2, vocab=chosen, method="subclone", method_args={"score": "magnitude"}
    )
    assert both.config.vocab_size == 400
    assert both.get_input_embeddings().weight.shape == (400, 32)
    assert narrow.get_input_embeddings().weight.shape == (len(words) + 5, 32)


@pytest.mark.parametrize("method", ["subclone", "weight_selection", "random"])
def test_a_saved_folder_is_stock_and_its_plan_replays(method: str, tmp_path: Path) -> None:
    source, words = model_and_tokenizer("llama")
    source.config.eos_token_id = source.generation_config.eos_token_id = [
        2,
        words.convert_tokens_to_ids("<|end|>"),
    ]
    source.generation_config.suppress_tokens = [len(words) - 9, 5]
    source.save_pretrained(tmp_path / "source")
    words.save_pretrained(tmp_path / "source")
    chosen = choose_vocabulary(words, TEXTS, 400, config=source.config)
    target = AutoSubclone.from_pretrained(tmp_path / "source", vocab=chosen, hidden=32, method=method)
    save(target, tmp_path / "made", source_folder=tmp_path / "source")
    script = (
        "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; import torch\n"
        "t, m = T.from_pretrained(sys.argv[1]), M.from_pretrained(sys.argv[1])\n"
        "x = t('def naïve(self): return 日本', return_tensors='pt')\n"
        "assert t.decode(x['input_ids'][0], skip_special_tokens=True) == 'def naïve(self): return 日本'\n"
        "y = m.generate(**x, max_new_tokens=8, do_sample=False)\n"
        "assert int(y.max()) < m.config.vocab_size == len(t) == 400 and 'hf_ws' not in sys.modules\n"
        "assert m.generation_config.eos_token_id == [t.eos_token_id, t.convert_tokens_to_ids('<|end|>')]\n"
        "print(m.generation_config.suppress_tokens)"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "made"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kept = {old: i for i, old in enumerate(chosen.kept)}
    assert json.loads(done.stdout) == [kept[i] for i in (len(words) - 9, 5) if i in kept]
    assert "Its tokenizer knows some of the source's tokens" in (tmp_path / "made" / "README.md").read_text()
    again = target.hf_ws_plan.apply(tmp_path / "source")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), target.parameters(), strict=True))
    assert again.generation_config.to_dict() == target.generation_config.to_dict()


def test_a_real_wordpiece_encoder_says_the_same(tmp_path: Path) -> None:
    """Every second word of English goes, and what is written with the rest has the very same embedding."""
    words = AutoTokenizer.from_pretrained(encoder_folder())
    texts = [
        "The cat sleeps on the warm windowsill.",
        "Borrowing money became more expensive this year: 日本 ϕ ü.",
    ]
    source = AutoModel.from_pretrained(encoder_folder())
    chosen = choose_vocabulary(words, [*texts, *corpus()], 15_000, config=source.config)
    target = AutoSubclone.from_pretrained(encoder_folder(), vocab=chosen)
    save(target, tmp_path / "made", source_folder=encoder_folder())
    short, model = (
        AutoTokenizer.from_pretrained(tmp_path / "made"),
        AutoModel.from_pretrained(tmp_path / "made"),
    )
    assert (len(short), model.config.vocab_size) == (15_000, 15_000)
    for text in texts:
        before, after = (t(text, return_tensors="pt") for t in (words, short))
        assert words.convert_ids_to_tokens(before["input_ids"][0]) == short.convert_ids_to_tokens(
            after["input_ids"][0]
        )
        with torch.no_grad():
            assert torch.equal(source(**before).last_hidden_state, model(**after).last_hidden_state)
    other = "Perestroika bewildered an unsuspecting xylophonist; ΔΣ, naïveté & żółw ☃."
    assert short.decode(short(other)["input_ids"]) == words.decode(words(other)["input_ids"])
    assert not (tmp_path / "made" / "vocab.txt").exists()


def test_the_command_trims_a_real_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("\n".join(corpus()))
    command = [
        "trim-vocab",
        str(DEMO),
        str(tmp_path / "made"),
        "--vocab",
        "1200",
        "--data",
        str(tmp_path / "text.txt"),
    ]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert re.search(r"^vocab +2,048 +1,200  1200 of 2048", said, re.M)
    assert "The text used 1," in said
    words, short = (AutoTokenizer.from_pretrained(place) for place in (DEMO, tmp_path / "made"))
    text = "\n".join(corpus())
    assert short.decode(ids(short, text)) == words.decode(ids(words, text)) == text
    assert len(ids(words, text)) <= len(ids(short, text)) < 1.15 * len(ids(words, text))
    card = (tmp_path / "made" / "README.md").read_text()
    assert "hf-ws trim-vocab source made --vocab 1200 --data text.txt" in card


# ------------------------------------------------------------------------------------------------ ids in configs


def test_ids_in_configs_follow() -> None:
    values = {
        "eos_token_id": [2, 7],
        "pad_token_id": None,
        "bos_token_id": -1,
        "image_token_index": 9,
        "visual_indicator_token_ids": [7, 9],
        "codec_bos_id": 2,
        "codebook_eos_token_id": 2,
        "num_image_tokens": 7,
        "use_mask_token": True,
        "suppress_tokens": [2, 3, 7],
        "bad_words_ids": [[2, 7], [3], [9]],
        "forced_decoder_ids": [[1, 7], [2, 9]],
        "lang_to_id": {"<|en|>": 9},
        "max_length": 7,
    }
    assert token_ids(values) == {2, 7, 9}
    assert renumbered(values, {2: 1, 7: 2, 9: 3}) == {
        "eos_token_id": [1, 2],
        "image_token_index": 3,
        "visual_indicator_token_ids": [2, 3],
        "suppress_tokens": [1, 2],
        "bad_words_ids": [[1, 2], [3]],
        "forced_decoder_ids": [[1, 2], [2, 3]],
        "lang_to_id": {"<|en|>": 3},
    }


def test_what_a_config_names_stays_whatever_its_count() -> None:
    source = tokenizer("byte_level")
    rare = [i for i in range(700, len(source)) if i not in trimmed("byte_level", 400)[0].kept][:3]
    config = LlamaConfig(vocab_size=len(source), eos_token_id=rare[0], pad_token_id=rare[1])
    generation = GenerationConfig(eos_token_id=[rare[0], rare[2]])
    chosen = choose_vocabulary(source, TEXTS, 400, config=config, generation_config=generation)
    assert {*rare} <= {*chosen.kept}
    assert chosen.fields(config)["eos_token_id"] == chosen.kept.index(rare[0])


# ------------------------------------------------------------------------------------------------ refusals


def test_a_bare_number_says_what_to_do_instead(caplog: pytest.LogCaptureFixture) -> None:
    source, _ = model_and_tokenizer("llama")
    with caplog.at_level(logging.WARNING):
        AutoSubclone.plan(source, vocab=400)
    assert "vocab=400 keeps the first ids, and the tokenizer stays as it is" in caplog.text
    assert "vocab=choose_vocabulary(tokenizer, texts, 400)" in caplog.text


@pytest.mark.parametrize(
    ("size", "texts", "error", "message"),
    [
        (200, TEXTS, SizeError, r"vocab=200 is too few: 2\d\d tokens must stay \(special and added ones"),
        (0, TEXTS, SizeError, r"vocab=0: wanted is a whole number from 1 to the source's 902"),
        (903, TEXTS, SizeError, r"vocab=903: wanted is a whole number from 1 to the source's 902"),
        (400, [], CalibrationError, r"hold no tokens; give some that the model is for"),
        (400, ["", ""], CalibrationError, r"hold no tokens"),
        (400, [b"a"], CalibrationError, r"a bytes came to choose a vocabulary by; wanted are texts"),
    ],
)
def test_what_cannot_be_chosen(size: int, texts: list, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        choose_vocabulary(tokenizer("byte_level"), texts, size)


def test_tokenizers_that_are_not_trimmed_are_named() -> None:
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, "<unk>"))
    )
    with pytest.raises(PlanError, match=r"is a WordLevel tokenizer; trimmed are BPE, Unigram, WordPiece"):
        choose_vocabulary(words, ["a"], 1)
    prefixed = models.BPE({"a": 0, "@@a": 1, "aa": 2}, [("a", "@@a")], continuing_subword_prefix="@@")
    with pytest.raises(PlanError, match=r"continuing_subword_prefix='@@', whose merges are not trimmed"):
        choose_vocabulary(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(prefixed)), ["aa"], 2)
    with pytest.raises(PlanError, match=r"has no tokenizer.json, and only such tokenizers are trimmed"):
        choose_vocabulary(object(), ["a"], 1)  # type: ignore[arg-type]


def test_a_vocabulary_of_another_source_is_refused() -> None:
    source, words = model_and_tokenizer("llama")
    with pytest.raises(
        PlanError, match=r"chosen among 902 ids, but the source's vocab is 907; choose it anew"
    ):
        AutoSubclone.plan(source, vocab=choose_vocabulary(words, TEXTS, 400))
    with pytest.raises(PlanError, match=r"kept ids must ascend within 0 to 6"):
        Vocabulary((0, 7), 7)
    with pytest.raises(PlanError, match=r"the tokenizer gives ids up to 901, the model has 800"):
        choose_vocabulary(words, TEXTS, 400, config=LlamaConfig(vocab_size=800))
    with pytest.raises(PlanError, match=r"the kept ids leave out 0, a special or added token"):
        trim_tokenizer(words, range(300, 800))
