"""Text to packed blocks: nothing wasted, nothing guessed, the same on every machine."""

import hashlib
import sysconfig
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from hf_ws.errors import DataError
from hf_ws.training.data import (
    Document,
    check_ids,
    load_text,
    pack,
    split_held_out,
    text_files,
    warn_of_repeats,
)
from hf_ws.training.records import usable

END = "<|endoftext|>"
TEXTS = [f"def f{i}(x):\n    return x + {i}\n" for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(TEXTS, vocab_size=280, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=END, eos_token=END)


def test_packing_keeps_every_token_but_the_remainder(tokenizer) -> None:
    packed = pack(["", *TEXTS, "  \n"], tokenizer, 16, progress=False)
    stream = [i for text in TEXTS for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    ids = packed.dataset[:]["input_ids"]
    assert ids.flatten().tolist() == stream[: packed.tokens]
    assert ids.dtype.is_signed
    assert ids.shape == (len(packed), 16)
    assert packed.dropped_tokens == len(stream) - packed.tokens < 16
    assert packed.dropped_texts == 2
    assert packed.bytes_per_token == pytest.approx(len("".join(TEXTS).encode()) / len(stream))
    labels = packed.dataset[:]["labels"]
    assert (labels[:, 0] == -100).all()
    assert (labels[:, 1:] == ids[:, 1:]).all()


def test_odd_text_is_packed_too(tokenizer) -> None:
    odd = ["\x00 nul", "\ufeffbom\r\n", "lone \ud800 surrogate", "é" * 500]
    assert pack(odd, tokenizer, 8, progress=False).tokens > 500


@pytest.mark.parametrize(
    ("texts", "block", "message"),
    [
        ([], 8, "0 texts came and none has any text"),
        (["", " \n"], 8, "2 texts came and none has any text"),
        (["short"], 1000, r"1 texts of \d+ tokens came, less than one block of 1000"),
        (["short"], 1, "a block needs at least 2"),
    ],
)
def test_too_little_text_is_refused(tokenizer, texts: list[str], block: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        pack(texts, tokenizer, block, progress=False)


def test_a_tokenizer_without_an_end_is_refused(tokenizer) -> None:
    with pytest.raises(DataError, match="no end-of-text token"):
        pack(TEXTS, PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer), 8)


def test_ids_beyond_the_vocabulary_are_named() -> None:
    rows = datasets.Dataset.from_dict({"input_ids": [[1, 2], [3, 9], [0, -1]]})
    with pytest.raises(DataError, match=r"row 1 holds token id 9, but the model's vocabulary has 9"):
        check_ids(rows, 9)
    with pytest.raises(DataError, match="row 2 holds token id -1"):
        check_ids(rows, 10)


def write(folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "a.py").write_text("print(1)\n")
    (folder / "deep" / "b.txt").write_bytes(b"caf\xe9")
    (folder / "c.bin").write_text("not text")
    (folder / "d.jsonl").write_text('{"text": "one"}\n\n{"text": null}\n{"text": "two"}\n')
    datasets.Dataset.from_dict({"text": ["three", "four"]}).to_parquet(folder / "e.parquet")


def test_folders_globs_and_files(tmp_path) -> None:
    write(tmp_path)
    found = {document.name: document.text for document in load_text(str(tmp_path))}
    assert found == {
        "a.py": "print(1)\n",
        "d.jsonl:1": "one",
        "d.jsonl:3": "",
        "d.jsonl:4": "two",
        "deep/b.txt": "caf\ufffd",
        "e.parquet:0": "three",
        "e.parquet:1": "four",
    }
    assert [d.text for d in text_files([tmp_path / "c.bin", tmp_path / "*.py"])] == ["not text", "print(1)\n"]
    assert [d.name for d in text_files([tmp_path], suffixes=[".py"])] == ["a.py"]
    assert [d.text for d in load_text([tmp_path / "a.py"])] == ["print(1)\n"]
    # What a text is held out by does not depend on where the files lie.
    assert [d.name for d in load_text(str(tmp_path / "**" / "[ab].*"))] == ["a.py", "deep/b.txt"]


def test_texts_and_datasets() -> None:
    assert [d.text for d in load_text(["one", "two"])] == ["one", "two"]
    rows = datasets.Dataset.from_dict({"body": ["one", None], "n": [1, 2]})
    assert [d.text for d in load_text(rows, column="body")] == ["one", ""]
    with pytest.raises(DataError, match="no column 'text', only body, n"):
        load_text(rows)
    with pytest.raises(DataError, match="row 0: column 'n' holds int"):
        load_text(rows, column="n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        ('{"txt": "a"}\n', "line 1: no key 'text', only txt"),
        ('{"text": 3}\n', "line 1: no text under 'text'"),
        ("\n", r"no text in \d documents; give some that have text"),
        ("", r"no text in \d documents; give some that have text"),
        (f'{{"text": "a", "n": {"9" * 5000}}}\n', "line 1: not JSON .*digits"),
        ("[" * 100_000, "line 1: not JSON .nested too deep"),
    ],
    ids=["half", "key", "type", "blank", "empty", "digits", "deep"],
)
def test_bad_json_lines_name_file_and_line(tmp_path, content: str, message: str) -> None:
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        load_text(tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./nowhere/at/all", "neither a file or folder here nor a dataset's Hub name"),
        (Path("nowhere.txt"), "nowhere.txt does not exist"),
        ("*.nothing-like-it", "does not exist"),
        ([], "no text in 0 documents"),
        ([1, 2], "a list of int came"),
        ([" ", ""], "no text in 2 documents"),
    ],
)
def test_what_is_not_there_is_refused(source, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_text(source)


def test_files_of_other_systems_are_read(tmp_path) -> None:
    """A byte order mark is no part of a table, and lines may end as on Windows."""
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one\\r\\n"}\r\n{"text": "\\ud800"}\r\n')
    assert [document.text for document in load_text(tmp_path)] == ["one\r\n", "\ud800"]
    (tmp_path / "x.jsonl").write_bytes(b"a\r\nb\x00\r\n")
    (tmp_path / "x.jsonl").rename(tmp_path / "x.txt")
    assert [document.text for document in load_text(tmp_path)] == ["a\nb\x00\n"]


def test_bad_rows_are_skipped_and_counted_where_that_is_asked_for(tmp_path, caplog) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"text": "good"}\n{"text": \n{"txt": 1}\n[1]\n{"text": 5}\n')
    assert [document.text for document in load_text(file, skip_bad=True)] == ["good"]
    assert f"4 bad rows are skipped, the first: {file}, line 2: not JSON" in caplog.text
    with pytest.raises(
        DataError, match=r"x.jsonl, line 2: not JSON .*mend or remove it, or set skip_bad_rows"
    ):
        load_text(file)


def test_tables_without_the_column_or_a_row_are_refused(tmp_path) -> None:
    rows = pyarrow.table(
        {"body": pyarrow.array([], pyarrow.string()), "n": pyarrow.array([], pyarrow.int64())}
    )
    parquet.write_table(rows, tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x.parquet has no column 'text', only body, n; name its text"):
        load_text(tmp_path)
    with pytest.raises(DataError, match="no text in 0 documents"):
        load_text(tmp_path, column="body")
    with pytest.raises(DataError, match="the dataset: no text in 0 documents"):
        load_text(datasets.Dataset.from_dict({"text": []}))


def test_a_row_of_a_million_characters_is_packed_whole(tokenizer) -> None:
    text = "x + 1, " * 150_000
    packed = pack([text], tokenizer, 64, progress=False)
    assert packed.dropped_tokens < 64
    read = tokenizer.decode(packed.dataset[:]["input_ids"].flatten())
    assert text.startswith(read.removesuffix(END))
    assert len(read) >= len(text) - 64 * 8


def test_a_damaged_parquet_file_is_named(tmp_path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(DataError, match=r"x\.parquet cannot be read as Parquet"):
        load_text(tmp_path)


def test_repeated_texts_are_counted(caplog) -> None:
    train = [Document(f"{i}", f"text number {i}, and so on") for i in range(20)]
    held_out = [Document(f"h{i}", f"held out {i}, and so on...") for i in range(5)]
    warn_of_repeats(train, held_out)
    warn_of_repeats([*train, Document("a", ""), Document("b", " ")], [*held_out, Document("c", "")])
    assert not caplog.text
    warn_of_repeats([*train, Document("again", train[3].text + "\n"), train[3]], held_out)
    assert "2 of 22 training texts (8.9 % of the characters) come more than once" in caplog.text
    caplog.clear()
    warn_of_repeats(train, [*held_out, Document("other name", train[0].text)])
    (record,) = caplog.records
    assert record.getMessage().startswith("1 of 6 held-out texts (16.")
    assert record.getMessage().endswith("are in the training text too")
    caplog.clear()
    warn_of_repeats(train, [*held_out, train[0]], share=0.5)
    assert not caplog.text


@pytest.mark.parametrize(
    ("labels", "shifts", "kept"),
    [
        ([[-100, 1, -100], [-100] * 3, [5, -100, -100], [5, 6, 7]], True, [0, 3]),
        ([[-100, 1, -100], [-100] * 3, [5, -100, -100], [5, 6, 7]], False, [0, 2, 3]),
        ([[1, 1, 1]] * 4, True, [0, 1, 2, 3]),
    ],
)
def test_rows_that_predict_nothing_are_dropped_and_counted(labels, shifts, kept, caplog) -> None:
    rows = datasets.Dataset.from_dict(
        {"input_ids": [[i, i, i] for i in range(4)], "labels": labels, "text": ["a"] * 4}
    )
    found = usable(rows.with_format("torch"), shifts=shifts)
    assert found[:]["input_ids"][:, 0].tolist() == kept
    assert found.column_names == ["input_ids", "labels"]
    assert (f"{4 - len(kept)} of 4 rows are dropped" in caplog.text) == (len(kept) < 4)


@pytest.mark.parametrize(
    ("ids", "labels", "message"),
    [
        ([[1, 2], [3, 4]], [[-100, -100]] * 2, "2 rows came and in none a label is predicted"),
        ([[1], [3]], [[1], [3]], "in none a label is predicted: all are -100, or rows are too short"),
        ([[], []], [[], []], "in none a label is predicted"),
        (
            [[1, 2], [3, 4], [5]],
            [[1, 2], [3, 4], [5]],
            "row 2 has 1 tokens and 1 labels, the rows before have 2",
        ),
        ([[1, 2], [3, 4]], [[1, 2], [3]], "row 1 has 2 tokens and 1 labels"),
    ],
)
def test_rows_without_an_aim_or_of_several_lengths_are_refused(ids, labels, message) -> None:
    rows = datasets.Dataset.from_dict({"input_ids": ids, "labels": labels}).with_format("torch")
    with pytest.raises(DataError, match=message):
        usable(rows, shifts=True)


def test_an_empty_folder_is_refused(tmp_path) -> None:
    with pytest.raises(DataError, match=r"holds no .txt, .md"):
        load_text(tmp_path)


def test_the_split_follows_names_not_order() -> None:
    documents = [Document(f"{i}.py", f"text {i}") for i in range(200)]
    train, held_out = split_held_out(documents)
    assert sorted(map(id, train + held_out)) == sorted(map(id, documents))
    assert 2 <= len(held_out) <= 25
    again, held_again = split_held_out(documents[::-2])
    assert set(held_again) <= set(held_out)
    assert set(again) <= set(train)


def test_one_document_is_cut_at_a_line() -> None:
    text = "".join(f"line {i}\n" for i in range(100))
    (head,), (tail,) = split_held_out([Document("a", text)])
    assert head.text + tail.text == text
    assert head.text.endswith("\n")
    assert len(tail.text) < 0.1 * len(text)


def test_the_standard_library_is_split_by_paths() -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    train, held_out = split_held_out(load_text("stdlib"))
    for documents, held in ((train, False), (held_out, True)):
        assert len(documents) > 20
        for document in documents[:20]:
            assert (int(hashlib.sha256(document.name.encode()).hexdigest(), 16) % 20 == 0) == held
            assert document.text == (root / document.name).read_text(encoding="utf-8", errors="replace")
    assert np.all(["site-packages" not in document.name for document in train])


def test_a_package_of_the_standard_library_is_split_as_in_the_whole() -> None:
    whole = [{document.name for document in side} for side in split_held_out(load_text("stdlib"))]
    part = [{document.name for document in side} for side in split_held_out(load_text("stdlib:email"))]
    assert "email/mime/text.py" in part[0] | part[1]
    for own, all_of_it in zip(part, whole, strict=True):
        assert own == {name for name in all_of_it if name.startswith("email/")}
    assert len(text_files(["stdlib:json", "stdlib:email"])) > len(part[0] | part[1])
    for name in ("stdlib:emial", "stdlib:../json"):
        with pytest.raises(
            DataError, match=rf"{name}: the standard library has no such package; .*, email, "
        ):
            load_text(name)
