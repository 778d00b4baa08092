"""Model cards, and folders that can be published."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from transformers import LlamaForCausalLM, PreTrainedModel

from hf_ws import AutoSubclone, OutputError, Plan, PlanError
from hf_ws.hub import CARD_FILE, PLAN_FILE, TASKS, card_facts, model_card, save
from hf_ws.methods import METHODS
from tests.hub_server import serve
from tests.tiny_checkpoints import make

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make("llama", tmp_path_factory.mktemp("source"))
    (folder / "LICENSE").write_text("Do as you like.")
    return folder


@pytest.fixture(scope="module")
def plan(source: Path) -> Plan:
    return AutoSubclone.plan(source, hidden=12)


@pytest.fixture
def student(source: Path) -> PreTrainedModel:
    return AutoSubclone.from_pretrained(source, hidden=12, layers=1)


def written(card: ModelCard) -> dict[str, Any]:
    """The metadata as a reader of the file gets it."""
    return ModelCard(str(card)).data.to_dict()


def test_card_of_a_hub_source_names_it_as_base_model(plan: Plan) -> None:
    card = model_card(replace(plan, source="somebody/tiny", revision=COMMIT), license="mit", language="en")
    assert written(card) == {
        "base_model": "somebody/tiny",
        "base_model_relation": "finetune",
        "language": "en",
        "library_name": "transformers",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["hf_ws", "pruned"],
    }
    assert str(replace(plan, source="somebody/tiny", revision=COMMIT)) in card.text


def test_card_of_a_local_source_has_no_base_model_and_no_path(plan: Plan, source: Path) -> None:
    assert plan.source == str(source)
    card = model_card(plan)
    assert "base_model" not in written(card)
    assert str(source.parent) not in str(card)
    assert "`llama`" in card.text


def test_card_of_a_random_start_claims_no_parent(source: Path) -> None:
    made = replace(
        AutoSubclone.plan(source, hidden=12, method="random"), source="somebody/tiny", revision=COMMIT
    )
    card = model_card(made)
    assert written(card)["tags"] == ["hf_ws"]
    assert "base_model" not in written(card)
    assert "every weight was drawn" in card.text


def test_card_says_what_a_reader_must_know(plan: Plan, source: Path) -> None:
    text = model_card(
        AutoSubclone.plan(source, hidden=12, vocab=50, method="subclone"),
        name="student",
        command="hf-ws subclone a b",
    ).text
    for part in (
        "# student",
        "LlamaForCausalLM.from_pretrained('student')",
        "hf-ws subclone a b",
        "Plan.load('hf_ws_plan.json').apply('llama')",
        "Layers 0, 1 of the source's 2",
        "arxiv.org/abs/2312.09299",
        "transformers ",
        "token ids below 50",
    ):
        assert part in text, part
    assert "More Information Needed" not in text


@pytest.mark.parametrize("method", [name for name in METHODS if name != "random"])
def test_every_published_method_is_cited(plan: Plan, method: str) -> None:
    assert "https://arxiv.org/abs/" in model_card(replace(plan, method=method, method_args={})).text


def test_tasks_are_told_by_the_end_of_a_class_name(plan: Plan) -> None:
    for name, task in {"GPT2LMHeadModel": "text-generation", "BertForMaskedLM": "fill-mask"}.items():
        assert written(model_card(replace(plan, model_class=name)))["pipeline_tag"] == task
    assert "pipeline_tag" not in written(model_card(replace(plan, model_class="BertForPreTraining")))
    assert list(TASKS)[-1] == "Model"  # every other ending that ends in it must come first


def test_facts_come_from_the_sources_card(tmp_path: Path) -> None:
    assert card_facts(None) == card_facts(tmp_path) == {}
    card = tmp_path / CARD_FILE
    card.write_text(
        "---\nlicense: other\nlicense_name: tiny\nlicense_link: LICENSE\nlanguage: [en, de]\ntags: [x]\n---\n"
    )
    assert card_facts(tmp_path) == {
        "license": "other",
        "license_name": "tiny",
        "license_link": "LICENSE",
        "language": ["en", "de"],
    }
    for broken in ("---\n[1\n---\n", "---\nlanguage: no\n---\n", "no metadata", "---\n- a list\n---\n"):
        card.write_text(broken)
        assert card_facts(tmp_path) == {}


def test_saved_folder_is_complete_and_its_plan_makes_it_again(
    student: PreTrainedModel, source: Path, tmp_path: Path
) -> None:
    folder = save(student, tmp_path / "student", source_folder=source)
    names = {"LICENSE", CARD_FILE, PLAN_FILE, "config.json", "generation_config.json", "model.safetensors"}
    assert {file.name for file in folder.iterdir()} == names
    again = Plan.load(folder / PLAN_FILE).apply(source)
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        folder / "model.safetensors"
    ).read_bytes()


def test_model_without_a_plan_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="carries no plan"):
        save(LlamaForCausalLM.from_pretrained(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_checkpoint_that_does_not_load_back_never_gets_its_name(
    student: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = type(student).save_pretrained

    def forgetful(model: PreTrainedModel, folder: Path, **options: Any) -> None:
        state = {name: tensor for name, tensor in model.state_dict().items() if "q_proj" not in name}
        stock(model, folder, state_dict=state, **options)

    monkeypatch.setattr(type(student), "save_pretrained", forgetful)
    with pytest.raises(OutputError, match=r"missing_keys.*q_proj"):
        save(student, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_from_the_hub_to_a_folder_that_names_its_parent(source: Path, tmp_path: Path) -> None:
    (source / CARD_FILE).write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    script = "import sys; from hf_ws.cli import main; sys.exit(main(sys.argv[1:]))"
    with serve({"somebody/tiny": source}) as hub:
        done = subprocess.run(
            [sys.executable, "-c", script, "subclone", "somebody/tiny", "student", "--hidden", "12"],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env={"PATH": "", "PYTHONPATH": str(Path.cwd()), **hub.environment(tmp_path / "home")},
        )
        commit = hub.commit("somebody/tiny")
    (source / CARD_FILE).unlink()
    assert done.returncode == 0, done.stderr
    facts = ModelCard.load(tmp_path / "student" / CARD_FILE).data.to_dict()
    assert facts["base_model"] == "somebody/tiny"
    assert facts["license"] == "apache-2.0"
    assert (tmp_path / "student" / "LICENSE").is_file()
    assert json.loads((tmp_path / "student" / PLAN_FILE).read_text())["revision"] == commit
    assert not any(str(tmp_path).encode() in file.read_bytes() for file in (tmp_path / "student").iterdir())
