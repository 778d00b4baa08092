"""The command line: what it writes, what it refuses, and how it says so."""

from __future__ import annotations

import inspect
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_ws import AutoSubclone, Plan, hub
from hf_ws.cli import EXAMPLES, main, name_of
from hf_ws.cli.options import CALIBRATION_CHARACTERS, Flags, calibration_texts, layer_policy, pairs
from hf_ws.errors import CalibrationError, PlanError
from tests.tiny_checkpoints import digest, edit_config, make

COMMANDS = [name_of(command) for command in EXAMPLES]
HALF = ("--hidden", "12", "--method", "weight_selection")

# Run where hf_ws cannot be imported: the checkpoint must be an ordinary one.
STOCK_READER = """
import json, sys
sys.modules["hf_ws"] = None  # importing it now raises
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
inputs = tokenizer("w1 w2 w3", return_tensors="pt")
made = model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
print(json.dumps({"wrong": {k: sorted(map(str, v)) for k, v in info.items() if v}, "tokens": made[0].tolist(),
                  "hidden": model.config.hidden_size, "type": type(model).__name__}))
"""


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer, a licence in its card, and generation settings."""
    folder = make("llama", tmp_path_factory.mktemp("source"))
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(61)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", unk_token="w0").save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# Tiny\n")
    (folder / "generation_config.json").write_text('{"eos_token_id": 1, "top_k": 7, "do_sample": true}')
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    def run_here(*arguments: str | Path) -> Outcome:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Outcome(code, *capsys.readouterr())

    return run_here


def is_one_line(text: str) -> bool:
    return text.startswith("hf-ws: ") and text.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_has_an_example_and_no_colour(
    run: Callable[..., Outcome], command: str
) -> None:
    outcome = run(command, "--help")
    assert outcome.code == 0
    assert f"  hf-ws {command}" in outcome.out.partition("Example")[2]
    assert "\x1b" not in outcome.out


@pytest.mark.parametrize("arguments", [["--help"], ["subclone", "--help"], ["--version"], []], ids=str)
def test_help_starts_fast_and_imports_nothing_heavy(arguments: list[str]) -> None:
    script = (
        "import sys; from hf_ws.cli import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets', 'huggingface_hub'} & sys.modules.keys();"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    # The processor's time, not the clock's: the machine may be busy.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_env_is_what_a_report_needs_and_nothing_personal(
    run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("USER", "somebody")
    text, parsed = run("env").out, json.loads(run("env", "--json").out)
    for name in ("hf_ws", "python", "torch", "transformers", "accelerate", "datasets", "peft", "device"):
        assert f"- {name}: {parsed[name]}" in text
    assert "secret" not in text
    assert "somebody" not in text
    assert str(Path.home()) + "/" not in text
    assert os.uname().nodename not in text


def test_plan_reads_no_weights(run: Callable[..., Outcome], source: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    outcome = run("plan", tmp_path, *HALF, "--layers", "1")
    assert outcome.code == 0
    assert "hidden" in outcome.out
    assert "weight_selection" in outcome.out


def test_plan_as_json_says_what_the_table_says(run: Callable[..., Outcome], source: Path) -> None:
    parsed = json.loads(run("plan", source, *HALF, "--kv_heads", "1", "--layer-policy", "1", "--json").out)
    assert parsed["sizes"]["source"]["hidden"] == 24
    assert parsed["sizes"]["target"] | {"hidden": 12, "kv_heads": 1, "layers": 1} == parsed["sizes"]["target"]
    assert parsed["layers"] == {"layers": [1]}
    assert parsed["target_config"]["hidden_size"] == 12
    assert parsed["settled"] is True


def test_flags_reach_the_plan(run: Callable[..., Outcome], source: Path) -> None:
    given = ("--set", "rms_norm_eps=1e-3", "--method-arg", "selection=consecutive", "--seed", "5")
    parsed = json.loads(run("plan", source, *HALF, *given, "--json").out)
    assert parsed["target_config"]["rms_norm_eps"] == 1e-3
    assert parsed["method_args"] == {"selection": "consecutive"}
    assert parsed["seed"] == 5


def test_written_folder_is_a_stock_checkpoint_in_a_process_without_hf_ws(
    run: Callable[..., Outcome], source: Path, tmp_path: Path
) -> None:
    before = digest(source)
    output = tmp_path / "new" / "student"
    outcome = run("subclone", source, output, "--hidden", "12", "--layers", "1", "--dtype", "bfloat16")
    assert outcome.code == 0, outcome.err
    assert f"LlamaForCausalLM.from_pretrained('{output}')" in outcome.out
    done = subprocess.run(
        [sys.executable, "-c", STOCK_READER, str(output)],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    read = json.loads(done.stdout.splitlines()[-1])
    assert read["wrong"] == {}
    assert read["type"] == "LlamaForCausalLM"
    assert read["hidden"] == 12
    assert len(read["tokens"]) > 3
    assert json.loads((output / "generation_config.json").read_text())["top_k"] == 7
    assert (output / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert digest(source) == before
    assert [path.name for path in output.parent.iterdir()] == ["student"]  # no staging left


def test_what_is_written_names_no_place_on_this_machine(
    run: Callable[..., Outcome], source: Path, tmp_path: Path
) -> None:
    run("plan", source, *HALF, "--save", tmp_path / "plan.json")
    text = tmp_path / "text" / "calibration.txt"
    text.parent.mkdir()
    text.write_text("w5 w6 w7 " * 50)
    outputs = [tmp_path / "one", tmp_path / "two"]
    assert run("subclone", source, outputs[0], "--plan", tmp_path / "plan.json").code == 0
    assert run("subclone", source, outputs[1], "--hidden", "12", "--calibration", text).code == 0
    for output in outputs:
        for file in output.iterdir():
            content = file.read_bytes()
            assert str(tmp_path).encode() not in content, file.name
            assert str(source.parent).encode() not in content, file.name
    card = (outputs[1] / "README.md").read_text()
    assert "hf-ws subclone llama two --hidden 12 --calibration calibration.txt" in card
    assert "license: mit" in card
    assert "base_model" not in card


def test_saved_plan_gives_the_same_bytes(run: Callable[..., Outcome], source: Path, tmp_path: Path) -> None:
    wanted = ("--hidden", "12", "--layers", "1", "--seed", "3")
    assert run("subclone", source, tmp_path / "direct", *wanted).code == 0
    assert run("plan", source, *wanted, "--save", tmp_path / "plan.json").code == 0
    assert run("subclone", source, tmp_path / "saved", "--plan", tmp_path / "plan.json").code == 0
    again = tmp_path / "direct" / hub.PLAN_FILE
    assert run("subclone", source, tmp_path / "again", "--plan", again).code == 0
    for name in ("model.safetensors", "config.json", hub.PLAN_FILE):
        contents = {(tmp_path / folder / name).read_bytes() for folder in ("direct", "saved", "again")}
        assert len(contents) == 1, name


def test_max_shard_size_splits_the_weights(run: Callable[..., Outcome], source: Path, tmp_path: Path) -> None:
    assert run("subclone", source, tmp_path / "out", *HALF, "--max-shard-size", "8kb").code == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def test_full_output_is_refused_before_work_and_untouched(
    run: Callable[..., Outcome], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoSubclone, "from_pretrained", lambda *_, **__: pytest.fail("work was begun"))
    (tmp_path / "notes.txt").write_text("mine")
    before = digest(tmp_path)
    outcome = run("subclone", source, tmp_path, *HALF)
    assert outcome.code == 4
    assert is_one_line(outcome.err)
    assert "is not empty" in outcome.err
    assert digest(tmp_path) == before


REFUSED = {
    "size": (("--hidden", "13"), 2, "hidden=13"),
    "zero": (("--hidden", "0"), 2, "hidden"),
    "not a number": (("--hidden", "many"), 2, "--hidden"),
    "growth": (("--hidden", "48"), 2, "grow"),
    "option": (("--hiden", "12"), 2, "did you mean --hidden?"),
    "method": (("--method", "subclon"), 2, "did you mean 'subclone'"),
    "method option": (("--method", "subclone", "--method-arg", "rescal=1"), 2, "rescale"),
    "method option without method": (("--method-arg", "rescale=false"), 2, "rescale, and no method is named"),
    "method option's form": (("--method-arg", "rescale"), 2, "name=value"),
    "field": (("--set", "hiden_size=12"), 2, "hidden_size"),
    "field with a flag": (("--set", "hidden=12"), 2, "--hidden"),
    "layers": (("--layer-policy", "0,7"), 2, "0 to 1"),
    "calibration": (("--calibration", "no-such-file.txt"), 3, "no-such-file.txt"),
    "plan": (("--plan", "no-such-plan.json"), 2, "no-such-plan.json"),
    "shard size": (("--max-shard-size", "many"), 2, "5GB"),
    "dtype": (("--dtype", "float31"), 2, "float31"),
}


@pytest.mark.parametrize(("given", "code", "named"), REFUSED.values(), ids=REFUSED)
def test_bad_request_is_one_line_and_writes_nothing(
    run: Callable[..., Outcome], source: Path, tmp_path: Path, given: tuple[str, ...], code: int, named: str
) -> None:
    outcome = run("subclone", source, tmp_path / "out", *given)
    assert outcome.code == code
    assert is_one_line(outcome.err), outcome.err
    assert named in outcome.err
    assert outcome.out == ""
    assert list(tmp_path.iterdir()) == []


def test_plan_and_sizes_exclude_each_other(run: Callable[..., Outcome], source: Path, tmp_path: Path) -> None:
    run("plan", source, *HALF, "--save", tmp_path / "plan.json")
    outcome = run("subclone", source, tmp_path / "out", "--plan", tmp_path / "plan.json", "--kv-heads", "1")
    assert outcome.code == 2
    assert "--kv-heads" in outcome.err
    assert not (tmp_path / "out").exists()


def test_calibration_that_a_saved_plan_has_no_use_for_is_refused(
    run: Callable[..., Outcome], source: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("w5 w6 " * 50)
    given = ("--plan", tmp_path / "plan.json", "--calibration", tmp_path / "text.txt")
    run("plan", source, "--hidden", "12", "--save", tmp_path / "plan.json")
    outcome = run("subclone", source, tmp_path / "out", *given)
    assert outcome.code == 2
    assert "--calibration" in outcome.err
    ranked = ("--method", "subclone", "--method-arg", "score=activation")
    run("plan", source, "--hidden", "12", *ranked, "--save", tmp_path / "plan.json")
    assert run("subclone", source, tmp_path / "out", *given).code == 0


def test_bad_source_is_exit_3(run: Callable[..., Outcome], source: Path, tmp_path: Path) -> None:
    quantized = tmp_path / "quantized"
    quantized.mkdir()
    (quantized / "config.json").write_bytes((source / "config.json").read_bytes())
    edit_config(quantized, quantization_config={"quant_method": "gptq"})
    for bad in (tmp_path / "absent", quantized):
        outcome = run("plan", bad, *HALF)
        assert outcome.code == 3
        assert is_one_line(outcome.err)


def test_misspelt_command_gets_a_suggestion(run: Callable[..., Outcome]) -> None:
    outcome = run("subclon")
    assert outcome.code == 2
    assert "'subclone'" in outcome.err


def test_fault_of_ours_is_one_line_and_debug_shows_where(
    run: Callable[..., Outcome], source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(AutoSubclone, "plan", fail)
    outcome = run("plan", source)
    assert outcome.code == 1
    assert is_one_line(outcome.err)
    assert "RuntimeError: two lines" in outcome.err
    assert "--debug" in outcome.err
    for arguments in (("--debug", "plan", source), ("plan", source, "--debug")):
        assert "Traceback" in run(*arguments).err


def test_interrupt_is_silent_and_leaves_nothing(
    run: Callable[..., Outcome], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(hub, "_check_reload", interrupt)
    outcome = run("subclone", source, tmp_path / "out", *HALF)
    assert outcome == (130, "", "")
    assert list(tmp_path.iterdir()) == []


def test_closed_pipe_is_no_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    script = "import sys; from hf_ws.cli import main; sys.exit(main(['--help']))"
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert done.stderr == ""


def test_certify_proves_types_classes_and_folders(run: Callable[..., Outcome], source: Path) -> None:
    outcome = run("certify", "llama", "LlamaForCausalLM", source, "--json")
    assert outcome.code == 0, outcome.err
    verdicts = json.loads(outcome.out)
    assert [verdict["model_class"] for verdict in verdicts] == ["LlamaForCausalLM"] * 3
    for verdict in verdicts:
        assert verdict["verdict"] == "certified"
        assert 0 <= verdict["largest_error"] < 2e-5
        assert verdict["layouts"]["model.layers.*.mlp.down_proj.weight"] == "hidden <ffn"
    text = run("certify", "llama", "--layouts").out
    assert text.startswith("llama: certified")
    assert "model.layers.*.mlp.down_proj.weight: hidden <ffn" in text


def test_certify_exits_3_if_any_is_refused(run: Callable[..., Outcome]) -> None:
    outcome = run("certify", "llama", "no-such-model-type-")
    assert outcome.code == 3
    first, second = outcome.out.splitlines()
    assert first.startswith("llama: certified")
    assert second.startswith("no-such-model-type-: refused")
    assert run("certify").code == 2


def test_compare_trains_each_start_and_writes_table_and_picture(
    run: Callable[..., Outcome], source: Path, tmp_path: Path
) -> None:
    (tmp_path / "texts").mkdir()
    for number in range(40):
        (tmp_path / "texts" / f"{number:02}.txt").write_text(
            " ".join(f"w{(number + 3 * i) % 59 + 2}" for i in range(60))
        )
    given = (
        "--data",
        tmp_path / "texts",
        "--block",
        "16",
        "--batch-size",
        "2",
        "--steps",
        "2",
        "--methods",
        "random, subclone",
    )
    wanted = (
        "compare",
        source,
        "--hidden",
        "12",
        *given,
        "--train",
        "threads=1",
        "--output",
        tmp_path / "out",
    )
    outcome = run(*wanted)
    assert outcome.code == 0, outcome.err
    assert "| random |" in outcome.out
    assert "| subclone |" in outcome.out
    assert {"compare.md", "compare.png", "compare.json"} <= {
        file.name for file in (tmp_path / "out").iterdir()
    }
    again = run(*wanted, "--json")  # finds every run done
    assert set(json.loads(again.out)["methods"]) == {"random", "subclone"}


def test_race_names_the_best_of_starts_in_several_shapes(
    run: Callable[..., Outcome], source: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("\n".join(f"w{i % 59 + 2}" for i in range(4000)))
    given = ("--ratio", "0.7", "--shapes", "2", "--data", tmp_path / "text.txt", "--block", "16")
    given += ("--batch-size", "2", "--steps", "4", "--learning-rates", "1e-3", "--seeds", "0,1")
    starts = "subclone, subclone(rescale=false, score=magnitude)"
    outcome = run("compare", source, "--race", "--methods", starts, *given, "--output", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert "| start | learning rate | 2 steps | 4 steps |" in outcome.out
    rows = [line for line in outcome.out.splitlines() if line.startswith("| subclone")]
    assert sum(" @ hidden=" in row for row in rows) == len(rows) == 4
    assert sum("(rescale=false, score=magnitude) @" in row for row in rows) == 2
    assert "over 2 seeds and " in outcome.out
    assert {"race.md", "race.png", "race.json"} <= {file.name for file in (tmp_path / "out").iterdir()}
    again = run(
        "compare", source, "--race", "--methods", starts, *given, "--output", tmp_path / "out", "--json"
    )
    verdict = json.loads(again.out)["verdict"]
    assert f"{verdict['winner']}. Confidence {verdict['confidence']:.1%}" in outcome.out


def test_plan_searches_for_a_number_of_parameters(
    run: Callable[..., Outcome], source: Path, tmp_path: Path
) -> None:
    outcome = run("plan", source, "--ratio", "0.7", "--save", tmp_path / "plan.json")
    assert outcome.code == 0, outcome.err
    assert "* by the nearest to the goal and to the source's proportions." in outcome.out
    found = json.loads(run("plan", source, "--ratio", "0.7", "--json").out)
    chosen = found["search"]["shapes"][found["search"]["chosen"]]
    assert (
        chosen["parameters"]
        == found["parameters"]["target"]
        == Plan.load(tmp_path / "plan.json").parameters[1]
    )
    made = run("subclone", source, tmp_path / "student", "--params", str(chosen["parameters"]))
    assert made.code == 0, made.err
    assert "Chosen from these shapes:" in (tmp_path / "student" / "README.md").read_text()
    both = run("plan", source, "--ratio", "0.7", "--params", "5K")
    assert both.code == 2
    assert "give one of the two" in both.err


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (("--seeds", "0,a"), "'a' is not a whole number"),
        (("--learning-rates", "fast"), "'fast' is not a number"),
        (("--train", "shedule=constant"), "did you mean schedule?"),
        (("--train", "steps=3"), "no such setting"),
        (("--train", "schedule=sometimes"), "cosine, constant"),
        (("--methods", "subclon"), "did you mean 'subclone'"),
        (("--methods", "subclone(rescale=false"), "brackets do not match"),
        (("--methods", "subclone(gain=2)"), "its options are: rescale, score"),
        (("--seconds", "3"), "--seconds is of a race; add --race"),
        (("--race", "--search-steps", "1"), "--search-steps has no place in a race"),
        (("--race", "--seconds", "3"), "give one of the two"),
        (("--shapes", "2"), "more than one only with params= or ratio="),
        (("--method", "subclone"), "did you mean --methods?"),
        (("--hidden", "13"), "hidden=13"),
    ],
    ids=str,
)
def test_bad_comparison_is_refused_before_work(
    run: Callable[..., Outcome], source: Path, tmp_path: Path, given: tuple[str, ...], named: str
) -> None:
    (tmp_path / "text.txt").write_text("\n".join(f"w{i % 61}" for i in range(4000)))
    wanted = ("--hidden", "12", "--block", "16", "--steps", "2", "--data", tmp_path / "text.txt")
    outcome = run("compare", source, *wanted, "--output", tmp_path / "out", *given)
    assert outcome.code == 2
    assert is_one_line(outcome.err.splitlines(keepends=True)[-1])
    assert named in outcome.err
    assert not (tmp_path / "out").exists()


def test_pairs_are_typed_as_yaml() -> None:
    given = ["n=3", "x=1e6", "rescale=false", "ids=[1, 2]", "name=uniform", "empty=", "equals=a=b"]
    assert pairs("--set", given) == {
        "n": 3,
        "x": 1e6,
        "rescale": False,
        "ids": [1, 2],
        "name": "uniform",
        "empty": None,
        "equals": "a=b",
    }
    for wrong in (["n"], ["=3"], ["n=1", "n=2"], ["n=[1"]):
        with pytest.raises(PlanError, match="--set"):
            pairs("--set", wrong)


def test_layer_policy_is_a_name_or_numbers() -> None:
    assert layer_policy(None) is None
    assert layer_policy("middle_dropped") == "middle_dropped"
    assert layer_policy("0, 1,5") == [0, 1, 5]


def test_calibration_texts_are_a_spread_of_limited_length(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number:02}.txt").write_text(f"{number} " * 5000)
    texts = calibration_texts([str(tmp_path)])
    assert texts is not None
    assert sum(map(len, texts)) <= CALIBRATION_CHARACTERS
    assert sum(map(len, texts)) > CALIBRATION_CHARACTERS / 2
    assert int(texts[-1].split()[0]) > 20  # not only the first files
    with pytest.raises(CalibrationError, match="absent"):
        calibration_texts([str(tmp_path / "absent")])


def test_flags_are_the_arguments_of_the_library() -> None:
    known = set(inspect.signature(AutoSubclone.plan).parameters) - {
        "source",
        "token",
        "device",
        "config_fields",
    }
    assert set(Flags(set=["n_inner=3"]).arguments()) == known | {"n_inner"}
