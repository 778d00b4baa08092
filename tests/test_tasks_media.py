"""Pictures and sound: their rows, what chance does to them, that they are learned."""

import io
import json
import math
import shutil
import sys
import wave
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hf_ws.errors import DataError, DistillationError, PlanError
from hf_ws.training import TrainConfig, train
from hf_ws.training.augment import erased, mixed, random_crop
from hf_ws.training.corpora import CHARACTERS, dialtones, glyphs
from hf_ws.training.records import rows_of, split_rows
from hf_ws.training.sound import clip_of
from hf_ws.training.tasks import TASKS

SHORT = TrainConfig(steps=8, batch_size=8, learning_rate=3e-3, log_every=1, eval_every=4, progress=False)
CHANCE = 1 / len(CHARACTERS)
MARKS = ("startoftranscript", "en", "transcribe", "translate", "startofprev", "nocaptions", "notimestamps")


def vit(seed: int = 0, **changes) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes |= {"image_size": 32, "patch_size": 8, "num_channels": 1, "initializer_range": 0.15}
    return ViTForImageClassification(ViTConfig(**({"num_labels": len(CHARACTERS)} | sizes | changes)))


def whisper(seed: int = 0, **changes) -> PreTrainedModel:
    torch.manual_seed(seed)
    both = {"layers": 1, "ffn_dim": 96, "attention_heads": 4}
    sizes = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in both.items()}
    sizes |= {"d_model": 48, "num_mel_bins": 24, "max_source_positions": 50, "max_target_positions": 16}
    ids = {"decoder_start_token_id": 257, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256}
    config = WhisperConfig(**({"vocab_size": 264, "init_std": 0.1, **sizes, **ids} | changes))
    return WhisperForConditionalGeneration(config)


def listener(**changes) -> WhisperProcessor:
    vocabulary = {name: i for i, name in enumerate(bytes_to_unicode().values())}
    marks = [f"<|{name}|>" for name in MARKS]
    words = WhisperTokenizer(vocab=vocabulary, merges=[], additional_special_tokens=marks)
    return WhisperProcessor(
        WhisperFeatureExtractor(**({"feature_size": 24, "chunk_length": 1} | changes)), words
    )


@pytest.fixture(scope="module")
def drawn() -> dict[str, datasets.Dataset]:
    train_rows, held_out = split_rows(glyphs(1440))
    return {"train_blocks": train_rows, "eval_blocks": held_out.select(range(48))}


@pytest.fixture(scope="module")
def rung() -> dict[str, datasets.Dataset]:
    train_rows, held_out = split_rows(dialtones(count=300))
    return {"train_blocks": train_rows, "eval_blocks": held_out}


def tone(
    path: Path, rate: int = 16_000, width: int = 2, channels: int = 1, seconds: float = 0.5
) -> np.ndarray:
    """A file of sound, and what is in it [time]."""
    samples = 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate)
    whole = (samples * (2 ** (8 * width - 1) - 1)).astype(f"<i{width}") if width > 1 else None
    raw = whole if whole is not None else (samples * 127 + 128).astype(np.uint8)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(np.repeat(raw, channels).tobytes())
    return samples


class TestPictures:
    def test_they_come_as_the_models_own_processor_makes_them(self, drawn) -> None:
        own = ViTImageProcessor(
            size={"height": 24, "width": 20}, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]
        )
        model = vit(num_channels=3, image_size=(24, 20), patch_size=4)
        task = TASKS["image_classification"](SHORT, model.config, own)
        rows = task.ready(drawn["train_blocks"].select(range(4)))
        made = task.batch([rows[i] for i in range(4)])
        assert made["labels"].tolist() == drawn["train_blocks"][:4]["label"]
        for i, pixels in enumerate(made["pixel_values"]):
            picture = Image.open(io.BytesIO(rows[i]["image"]["bytes"])).convert("RGB").resize((20, 24), 2)
            scaled = (np.asarray(picture) / 255 - own.image_mean) / own.image_std
            assert pixels.numpy() == pytest.approx(scaled.transpose(2, 0, 1), abs=1e-5)

    def test_without_a_processor_size_and_channels_are_the_configs(self, drawn) -> None:
        task = TASKS["image_classification"](SHORT, vit(image_size=16).config)
        rows = task.ready(drawn["train_blocks"].select(range(4)))
        pixels = task.batch([rows[i] for i in range(4)])["pixel_values"]
        assert pixels.shape == (4, 1, 16, 16)
        assert -1 <= pixels.min() < -0.5 < 0.5 < pixels.max() <= 1
        config = ResNetConfig()
        with pytest.raises(DataError, match="names no image_size"):
            TASKS["image_classification"](SHORT, config)

    def test_chance_follows_from_seed_and_place_and_spares_what_is_held_out(self, drawn) -> None:
        config = replace(SHORT, crop=0.5, flip=True, erase=0.5, mixup=0.5, cutmix=0.5, label_smoothing=0.1)
        task = TASKS["image_classification"](config, vit().config)
        rows = task.ready(drawn["train_blocks"])

        def batch(places, task=task, **more):
            others = ({"other": rows[60 + p % 50]} if task.mixes else {} for p in places)
            return task.batch(
                [
                    {**rows[p % 50], "place": p, **other, **more}
                    for p, other in zip(places, others, strict=True)
                ]
            )

        first = batch(range(8), training=True)
        again = batch([5], training=True)
        assert torch.equal(again["pixel_values"][0], first["pixel_values"][5])
        assert torch.equal(again["soft_labels"][0], first["soft_labels"][5])
        assert not torch.equal(batch([55], training=True)["pixel_values"], again["pixel_values"])
        other = TASKS["image_classification"](replace(config, seed=1), vit().config)
        other.ready(drawn["train_blocks"])
        assert not torch.equal(batch([5], other, training=True)["pixel_values"], again["pixel_values"])
        held_out = batch(range(8), training=False)
        assert "soft_labels" not in held_out
        plain = TASKS["image_classification"](SHORT, vit().config)
        assert torch.equal(held_out["pixel_values"], batch(range(8), plain, training=True)["pixel_values"])

    def test_soft_labels_say_what_is_in_the_picture(self, drawn) -> None:
        task = TASKS["image_classification"](replace(SHORT, mixup=1.0, label_smoothing=0.1), vit().config)
        rows = task.ready(drawn["train_blocks"])
        row = {**rows[0], "place": 3, "training": True, "other": rows[1]}
        made = task.batch([row])
        ours, theirs = (task.batch([rows[i]])["pixel_values"] for i in (0, 1))
        where = (ours - theirs).abs() > 0.1
        share = ((made["pixel_values"] - theirs) / (ours - theirs))[where].mean().item()
        want = torch.full((len(CHARACTERS),), 0.1 / len(CHARACTERS))
        want[rows[0]["label"]] += 0.9 * share
        want[rows[1]["label"]] += 0.9 * (1 - share)
        assert made["soft_labels"][0] == pytest.approx(want, abs=1e-5)

    def test_cut_and_erased_parts_have_the_size_they_say(self) -> None:
        ones, zeros = torch.ones(2, 20, 30), torch.zeros(2, 20, 30)
        shares, gone = [], []
        for seed in range(200):
            draw = np.random.default_rng(seed)
            made, share = mixed(ones, zeros, draw, mixup=0.0, cutmix=1.0)
            assert made.mean().item() == pytest.approx(share, abs=1e-6)
            shares.append(share)
            gone.append((erased(ones, draw) != 1).float().mean().item())
            crop = random_crop(Image.new("L", (30, 20)), (7, 9), 0.3, draw)
            assert crop.size == (9, 7)
        assert 0.3 < np.mean(shares) < 0.9
        assert min(gone) > 0.015
        assert max(gone) < 0.36

    def test_the_loss_of_soft_labels_is_their_cross_entropy(self, drawn) -> None:
        config = replace(SHORT, label_smoothing=0.3, steps=1, warmup_steps=0, eval_every=0)
        model, before = vit(), vit()
        history = train(config, task="image_classification", model=model, **drawn)
        from hf_ws.training.job import prepare

        job = prepare(config, task="image_classification", model=before, **drawn)
        batch = job.task.batch([job.blocks[i] for i in job.order().tolist()])
        logits = before(pixel_values=batch["pixel_values"]).logits
        want = torch.nn.functional.cross_entropy(logits, batch["labels"], label_smoothing=0.3)
        assert history.rows[0]["loss"] == pytest.approx(want.item(), abs=1e-5)

    @pytest.mark.parametrize("processor", ["own", "none"])
    def test_a_teacher_sees_the_pictures_in_its_own_size_and_scale(self, drawn, processor: str) -> None:
        theirs = ViTImageProcessor(size={"height": 64, "width": 64}, image_mean=[0.2], image_std=[0.9])
        task = TASKS["image_classification"](SHORT, vit().config)
        task.taught_by(vit(image_size=64).config, theirs if processor == "own" else None)
        flat = torch.full((2, 1, 32, 32), 0.5)  # of 0.75 in the picture
        seen = task.for_teacher({"pixel_values": flat})["pixel_values"]
        assert seen.shape == (2, 1, 64, 64)
        assert seen.unique() == pytest.approx((0.75 - 0.2) / 0.9 if processor == "own" else 0.5)

    def test_a_teacher_of_other_labels_is_refused(self, drawn) -> None:
        task = TASKS["image_classification"](SHORT, vit().config)
        with pytest.raises(DistillationError, match="gives 10 labels"):
            task.taught_by(vit(num_labels=10).config)
        names = dict(enumerate(CHARACTERS))
        turned = names | {0: "1", 1: "0"}
        task = TASKS["image_classification"](SHORT, vit(id2label=names).config)
        with pytest.raises(DistillationError, match="label 0 is '1' to the teacher and '0'"):
            task.taught_by(vit(id2label=turned).config)


class TestPictureFiles:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        rows = glyphs(400)
        for i in range(400):
            place = tmp_path / "pictures" / CHARACTERS[rows[i]["label"]]
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{i}.png").write_bytes(rows[i]["image"]["bytes"])
        return tmp_path / "pictures"

    def config(self, *files: Path, **changes) -> TrainConfig:
        return replace(SHORT, train_files=[str(file) for file in files], **changes)

    def test_a_folder_a_class_and_parquet_give_the_same_rows(
        self, folder: Path, tmp_path: Path, monkeypatch
    ) -> None:
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        train_rows, held_out = rows_of(self.config(folder), ["image", "label"])
        assert len(train_rows) + len(held_out) == 400
        task = TASKS["image_classification"](SHORT, vit().config)
        row = task.ready(train_rows)[0]
        name = Path(row["image"]["path"])
        assert CHARACTERS.index(name.parent.name) == row["label"] or train_rows.features["label"].names
        glyphs(400).cast_column("label", datasets.Value("int64")).to_parquet(tmp_path / "table.parquet")
        others, held = rows_of(self.config(tmp_path / "table.parquet"), ["image", "label"])
        assert len(others) == len(train_rows)  # the same pictures are held out, whatever holds them
        assert len(held) == len(held_out)

    def test_names_of_classes_become_numbers(self, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        rows = glyphs(72)
        table = datasets.Dataset.from_dict(
            {"img": rows["image"][:], "kind": [CHARACTERS[i] for i in rows["label"]]}
        )
        config = replace(SHORT, image_column="img", label_column="kind")
        task = TASKS["image_classification"](config, vit().config)
        ready = task.ready(table)
        assert task.batch([ready[i] for i in range(36)])["labels"].tolist() == [*range(36)]
        with pytest.raises(DataError, match="row 1: label '!' is none of 0, 1, 2"):
            task.ready(datasets.Dataset.from_dict({"img": rows["image"][:2], "kind": ["7", "!"]}))

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            ([3, 36], "row 1: label 36, but the model has 36 labels"),
            ([-1, 0], "row 0: label -1, but"),
            ([0, None], "row 1: label None, but"),
            ([0.5, 1.0], "row 0: label 0.5, but"),
        ],
    )
    def test_a_label_that_the_model_has_not_is_named(self, labels: list, message: str) -> None:
        rows = datasets.Dataset.from_dict({"image": glyphs(2)["image"][:], "label": labels})
        with pytest.raises(DataError, match=message):
            train(SHORT, task="image_classification", model=vit(), train_blocks=rows)

    def test_labels_of_the_same_names_in_another_order_are_refused(self) -> None:
        model = vit(id2label=dict(enumerate(reversed(CHARACTERS))))
        with pytest.raises(DataError, match="label 0 is '0' in the data and 'Z' to the model"):
            train(SHORT, task="image_classification", model=model, train_blocks=glyphs(72))

    def test_what_is_no_picture_is_named(self, folder: Path, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        bad = folder / "7" / "bad.png"
        bad.write_text("no picture")
        with pytest.raises(DataError, match=r"row \d+: .*bad.png cannot be read as a picture"):
            train(self.config(folder), task="image_classification", model=vit())
        bad.unlink()
        whole = glyphs(1)[0]["image"]["bytes"]
        task = TASKS["image_classification"](SHORT, vit().config)
        cut = {"image": {"bytes": whole[: len(whole) // 2], "path": "cut.png"}, "label": 0}
        with pytest.raises(DataError, match=r"cut.png is damaged"):
            task.batch([cut])
        with pytest.raises(DataError, match=r"none\.parquet does not exist"):
            train(self.config(tmp_path / "none.parquet"), task="image_classification", model=vit())

    def test_missing_columns_and_settings_out_of_range_are_named(self, drawn) -> None:
        with pytest.raises(DataError, match="no column 'img', only image, label"):
            train(replace(SHORT, image_column="img"), task="image_classification", model=vit(), **drawn)
        with pytest.raises(PlanError, match=r"crop=0.*label_smoothing=2"):
            replace(SHORT, crop=0.0, label_smoothing=2.0)
        with pytest.raises(PlanError, match="eval_split is of a dataset"):
            replace(SHORT, eval_split="test")


class TestSound:
    @pytest.mark.parametrize(("width", "channels"), [(1, 1), (2, 1), (2, 2), (4, 1)])
    def test_wav_is_read_whatever_its_width(self, tmp_path: Path, width: int, channels: int) -> None:
        samples = tone(tmp_path / "a.wav", width=width, channels=channels)
        for value in (str(tmp_path / "a.wav"), {"bytes": (tmp_path / "a.wav").read_bytes(), "path": None}):
            read, rate = clip_of(value, "row 0")
            assert rate == 16_000
            assert read == pytest.approx(samples, abs=0.02 if width == 1 else 1e-4)
        near, _ = clip_of("a.wav", "row 0", tmp_path)
        assert np.array_equal(near, read)

    def test_arrays_are_taken_as_they_are(self) -> None:
        made, rate = clip_of({"array": [0, 16384, -32768], "sampling_rate": 8000}, "row 0")
        assert made.tolist() == [0.0, 0.5, -1.0]
        assert rate == 8000
        assert clip_of([0.25, -0.5], "row 0")[1] is None

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ("missing.wav", "row 4: missing.wav cannot be read: No such file"),
            ({"bytes": b"fLaC....", "path": "a.flac"}, "row 4: a.flac is no WAV.*pip install soundfile"),
            ({"bytes": None, "path": None}, "row 4: a clip without a name cannot be read"),
            (None, "row 4 holds no sound"),
            ([], "row 4 holds float64 of shape"),
            ([[[1.0]]], "row 4 holds float64 of shape"),
            ([math.nan, 0.0], "row 4 holds samples that are not finite"),
        ],
    )
    def test_what_is_no_sound_is_named(self, value, message: str, monkeypatch) -> None:
        monkeypatch.setitem(sys.modules, "soundfile", None)
        with pytest.raises(DataError, match=message):
            clip_of(value, "row 4")

    def test_labels_follow_the_start_token(self, rung) -> None:
        task = TASKS["speech"](SHORT, whisper().config, listener())
        rows = task.ready(rung["train_blocks"])
        made = task.batch([{**rows[i], "place": i} for i in range(6)])
        assert made["input_features"].shape == (6, 24, 100)
        words = task.words
        for labels, begun, text in zip(
            made["labels"], made["decoder_input_ids"], rows[:6]["text"], strict=True
        ):
            assert words.decode(labels[labels != -100], skip_special_tokens=True) == text
            assert begun[0] == 257
            assert torch.equal(begun[1:][labels[:-1] != -100], labels[:-1][labels[:-1] != -100])
            assert (labels == 256).sum() == 1
        said = TASKS["speech"](replace(SHORT, language="english"), whisper().config, listener())
        assert "<|en|>" in words.decode(said._ids("507"))
        with pytest.raises(DataError, match="language='klingon'"):
            TASKS["speech"](replace(SHORT, language="klingon"), whisper().config, listener())

    def test_what_the_model_cannot_take_is_left_out_with_the_count(self, tmp_path: Path, caplog) -> None:
        tone(tmp_path / "a.wav")
        tone(tmp_path / "long.wav", seconds=1.5)
        tone(tmp_path / "other.wav", rate=8000)
        name = str(tmp_path / "{}.wav").format
        table = {"audio": [name("a"), name("a"), name("long"), name("a")], "text": ["1", " ", "2", "3" * 40]}
        task = TASKS["speech"](SHORT, whisper().config, listener())
        assert len(task.ready(datasets.Dataset.from_dict(table))) == 1
        assert "of 4 clips 1 have no text, and 2 are longer" in caplog.text
        with pytest.raises(
            DataError, match="row 0: the sound has 8000 samples a second and the model takes 16000"
        ):
            task.ready(datasets.Dataset.from_dict({"audio": [name("other")], "text": ["1"]}))
        with pytest.raises(DataError, match="none has text"):
            task.ready(datasets.Dataset.from_dict({"audio": [name("long")], "text": ["1"]}))
        with pytest.raises(DataError, match="no column 'text', only audio"):
            task.ready(datasets.Dataset.from_dict({"audio": [name("a")]}))
        with pytest.raises(DataError, match="'text' holds int, not text"):
            task.ready(datasets.Dataset.from_dict({"audio": [name("a")], "text": [1]}))

    def test_what_does_not_fit_together_is_refused(self) -> None:
        task = TASKS["speech"](SHORT, whisper().config, listener())
        with pytest.raises(DistillationError, match="num_mel_bins 32, the student 24"):
            task.taught_by(whisper(num_mel_bins=32).config)
        with pytest.raises(DistillationError, match="vocabulary has 300 entries"):
            task.taught_by(whisper(vocab_size=300).config)
        with pytest.raises(DataError, match="makes 200 frames and the model takes 100"):
            TASKS["speech"](SHORT, whisper().config, listener(chunk_length=2))
        with pytest.raises(DataError, match="no processor of sound and text"):
            TASKS["speech"](SHORT, whisper().config)
        small = TASKS["speech"](SHORT, whisper(vocab_size=257).config, listener())
        with pytest.raises(DataError, match="row 0 holds token id 263, but the model's vocabulary has 257"):
            small.ready(dialtones(count=2))

    def test_a_table_of_paths_is_trained_on(self, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        rows = dialtones(count=60)
        for i in range(60):
            (tmp_path / f"{i}.wav").write_bytes(rows[i]["audio"]["bytes"])
        lines = [json.dumps({"file": f"{i}.wav", "said": rows[i]["text"]}) for i in range(60)]
        (tmp_path / "clips.jsonl").write_text("\n".join(lines))
        config = replace(SHORT, steps=2, train_files=[str(tmp_path / "clips.jsonl")], audio_column="file")
        history = train(
            replace(config, text_column="said"), task="speech", model=whisper(), tokenizer=listener()
        )
        assert history.final_loss < history.evaluations[0][1]


MAKERS = {"image_classification": vit, "speech": whisper}


@pytest.mark.parametrize("task", MAKERS)
class TestTraining:
    def run(self, task: str, drawn, rung, **changes):
        options = drawn if task == "image_classification" else rung | {"tokenizer": listener()}
        teacher = changes.pop("teacher", None)
        model = changes.pop("model", None) or MAKERS[task]()
        return train(replace(SHORT, **changes), task=task, model=model, teacher=teacher, **options)

    def test_learns_from_data_and_a_teacher(self, task: str, drawn, rung) -> None:
        history = self.run(task, drawn, rung, steps=30, eval_every=15, teacher=MAKERS[task](5), kd_weight=0.3)
        assert history.final_loss < history.evaluations[0][1] - 0.1
        assert {"ce_loss", "kd_loss"} <= history.rows[1].keys()

    def test_inner_states_are_compared(self, task: str, drawn, rung) -> None:
        losses = {"hidden_mse": 1.0, "attention_relation": 1.0}
        history = self.run(
            task, drawn, rung, teacher=MAKERS[task](5), kd_weight=0.9, kd_losses=losses, steps=20
        )
        kd = [row["kd_loss"] for row in history.rows if "kd_loss" in row]
        assert kd[-1] < kd[0]
        same = self.run(task, drawn, rung, teacher=MAKERS[task](), kd_losses=losses, steps=1, warmup_steps=0)
        assert same.rows[1]["kd_loss"] == pytest.approx(0.0, abs=1e-5)

    def test_resumes_bit_for_bit(self, task: str, tmp_path: Path, drawn, rung) -> None:
        chance = (
            {"mixup": 0.5, "erase": 0.5, "label_smoothing": 0.1, "randaugment": 9.0}
            if task == "image_classification"
            else {}
        )

        def rows(folder: str, **changes) -> list:
            place = str(tmp_path / folder)
            history = self.run(task, drawn, rung, output=place, save_every=3, **chance, **changes)
            keys = ("step", "loss", "eval_loss", "eval_accuracy")
            return [[row.get(key) for key in keys] for row in history.rows]

        whole = rows("whole")
        assert rows("again") == whole
        for part in ("model", "checkpoint-8", "checkpoint-6"):
            shutil.rmtree(tmp_path / "again" / part, ignore_errors=True)
        assert rows("again", resume=True) == whole
        files = (tmp_path / name / "model" / "model.safetensors" for name in ("whole", "again"))
        assert len({file.read_bytes() for file in files}) == 1
        assert list((tmp_path / "again" / "model").glob("*processor_config.json"))

    def test_batches_do_not_depend_on_how_they_are_cut(self, task: str, drawn, rung) -> None:
        chance = {"cutmix": 1.0, "flip": True, "crop": 0.5} if task == "image_classification" else {}

        def losses(size: int) -> list[float | None]:
            sizes = {"batch_size": size, "grad_accum": 8 // size, "eval_every": 0}
            return [row.get("loss") for row in self.run(task, drawn, rung, **sizes, **chance).rows]

        assert losses(8) == pytest.approx(losses(2), abs=2e-4)


def test_glyphs_are_recognised_far_above_chance() -> None:
    config = replace(SHORT, train_files=["glyphs"], steps=220, batch_size=32, eval_every=220, log_every=50)
    history = train(config, task="image_classification", model=vit())
    assert history.rows[0]["eval_accuracy"] < 4 * CHANCE
    assert history.rows[-1]["eval_accuracy"] > 7 * CHANCE
    assert "eval_perplexity" not in history.rows[-1]


def test_a_model_that_knows_no_cache_and_no_more_words_trains(drawn) -> None:
    sizes = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "num_channels": 1, "image_size": 32}
    model = ConvNextForImageClassification(ConvNextConfig(num_labels=len(CHARACTERS), **sizes))
    history = train(replace(SHORT, steps=2), task="image_classification", model=model, teacher=vit(), **drawn)
    assert math.isfinite(history.final_loss)
    assert not hasattr(model.config, "use_cache")


def test_workers_change_nothing(drawn) -> None:
    runs = [
        train(
            replace(SHORT, workers=workers, steps=3, mixup=1.0, eval_every=0),
            task="image_classification",
            model=vit(),
            **drawn,
        )
        for workers in (0, 1)
    ]
    assert [row["loss"] for row in runs[0].rows] == [row["loss"] for row in runs[1].rows]
