"The toy teachers of the repository: one a family, of the size and the bar that they promise, read and converted."

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from heed_nb.data import collate
from heed_nb.evaluate import evaluate
from heed_nb.files import check_sums
from heed_nb.runs import read_run
from heed_nb.teachers import FAMILIES, family_of, load_teacher
from heed_nb.toy_teachers import TOYS, train_teacher, write_energy
from heed_nb.toyworld import Documents, world_of

FOLDERS = sorted(path.parent for path in (Path(__file__).parent.parent / "outputs/teachers").glob("*/config.json"))
folders = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


def test_there_is_one_of_each_family_and_a_roomy_one():
    types = [json.loads((folder / "config.json").read_text())["model_type"] for folder in FOLDERS]
    worlds = [folder.name.split("-")[0] for folder in FOLDERS]
    crowded = [kind for kind, world in zip(types, worlds) if world == "toy"]
    assert sorted(crowded) == sorted(TOYS) and len(TOYS) == len(FAMILIES) and worlds.count("roomy") == 1


@folders
def test_size_and_bar(folder):
    check_sums(folder)
    hashed = {line.split("  ")[1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
    assert {
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    } == hashed
    with safe_open(folder / "model.safetensors", "pt") as f:
        shapes = {name: f.get_slice(name) for name in f.keys()}
    assert {s.get_dtype() for s in shapes.values()} == {"BF16"}
    parameters = sum(torch.Size(s.get_shape()).numel() for s in shapes.values())
    numbers = read_run(folder / "teacher.json")["numbers"]
    assert parameters == numbers["parameters"] <= 4.5e6
    assert min(numbers["means"].values()) >= 95


@pytest.mark.parametrize("model_type", TOYS)
def test_a_teacher_of_each_family_trains(model_type, tmp_path):
    steps = dict(read_steps=1, answer_steps=1, settle_steps=1, batch_size=2)
    numbers = train_teacher(tmp_path / "teacher", model_type=model_type, **steps)
    assert load_teacher(tmp_path / "teacher")[0].num_parameters() == numbers["parameters"]


@folders
def test_its_world_and_how_little_its_layers_change_the_residual_stream(folder):
    model, processor = load_teacher(folder)
    assert world_of(model.config) == ("roomy" if folder.name.startswith("roomy-") else "crowded")
    documents, family = Documents(split="test", world=world_of(model.config)), family_of(model)
    batch = collate([documents[i] for i in range(8)], processor)
    with torch.no_grad():
        inputs = family.language_inputs(model, batch.model_inputs).kwargs
        attention, mlps = write_energy(family, model, inputs, batch["attention_mask"])[0]
    assert mlps.max() < 0.5 and mlps.mean() < 0.2  # 0.6 to 59 and 0.24 to 15 after the answer phase
    if documents.world == "roomy":
        assert len(mlps) == 8 and attention.max() < 0.5 and attention.mean() < 0.2


@folders
def test_reads_through_the_harness(folder, tmp_path):
    scores = evaluate(folder, benchmarks=["docvqa", "ai2d", "mmstar"], questions=20, batch_size=20, out=tmp_path)[
        "scores"
    ]
    assert min(scores.values()) >= 80


def test_a_teacher_goes_on_with_its_own_arguments_alone(tmp_path):
    given = dict(read_steps=1, answer_steps=1, settle_steps=1, batch_size=2, checkpoint_every=1)
    train_teacher(tmp_path, **given)
    for name, other in dict(lr=1e-3, model_type="glm4v").items():
        message = rf"checkpoint is of a teacher with {name} = .*, this one has .*{other}.*; remove it$"
        with pytest.raises(ValueError, match=message):
            train_teacher(tmp_path, **given | {name: other})
    assert train_teacher(tmp_path, **given)["history"] == []


def test_an_interrupt_while_it_is_saved_leaves_the_earlier_teacher(tmp_path, monkeypatch):
    given = dict(read_steps=1, answer_steps=1, settle_steps=1, batch_size=2)
    content = lambda: {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    train_teacher(tmp_path, **given)
    earlier = content()
    shutil.rmtree(tmp_path / "checkpoint")

    def torn(model, folder):
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PreTrainedModel, "save_pretrained", torn)
        train_teacher(tmp_path, **given, seed=1)
    assert content() == earlier
    train_teacher(tmp_path, **given, seed=1)  # goes on from its checkpoint
    assert content().keys() == earlier.keys() and content() != earlier
