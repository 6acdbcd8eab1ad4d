"The weight cache under flipped bits, cuts, kills and two builders, and training from one."

import copy
import io
import json
import multiprocessing
import os
import pickle
import random
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

import tiny
from heed_nb import cached_weights, checkpoints, schedule, trainer
from heed_nb.conditions import CONDITIONS, TrainSettings
from heed_nb.data import collate
from heed_nb.density import position_weights
from heed_nb.files import locked
from heed_nb.hybrid import to_hybrid
from heed_nb.losses import record_outputs
from heed_nb.streams import pair_with_teacher, unpair
from heed_nb.teachers import LanguageInputs, family_of, load_teacher
from heed_nb.toyworld import Documents
from heed_nb.weight_cache import WeightCache, build, dequantize, quantize, sample_key, write_shard
from heed_nb.weights import GRADIENTS

processes = multiprocessing.get_context("fork")
IDENTITY = {"tower": "0123abcd", "reduce": "mean"}
LENGTHS = (36, 1, 0, 100, 2, 37, 250, 3, 64, 7, 8, 33)


def records(lengths=LENGTHS, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {f"{i:024x}": (torch.rand(n, generator=g) ** 3).numpy() for i, n in enumerate(lengths)}


def write(folder, content, identity=IDENTITY):
    folder.mkdir()
    (folder / "identity.json").write_text(json.dumps(identity))
    return write_shard(folder, 0, content)


# Records


def test_what_is_stored_is_the_values_within_half_a_step(tmp_path):
    content = records() | {"f" * 24: np.array([-3e38, 3e38, 0, 1e-45], np.float32)}
    write(tmp_path / "cache", content)
    cache = WeightCache(tmp_path / "cache", IDENTITY)
    assert list(cache) == list(content)
    for key, values in content.items():
        stored = cache[key].double().numpy()
        assert len(stored) == len(values)
        if len(values):
            half = (values.max().astype(float) - values.min()) / 30
            assert np.abs(stored - values).max() <= half * (1 + 1e-6) + 1e-45
            assert (stored.min(), stored.max()) == (values.min(), values.max())


@pytest.mark.parametrize("tau", [0.1, 0.5, 2.0])
def test_the_error_of_a_weight_has_a_closed_bound(tau):
    "Two weights' ratio is off by exp(2 / 30 tau) at most."
    rho = torch.rand(8, 400, generator=torch.Generator().manual_seed(0)) ** 4
    stored = torch.stack([torch.from_numpy(dequantize(*quantize(row.numpy()), 400)) for row in rho])
    everywhere = torch.ones(8, 400, dtype=torch.bool)
    w, w4 = (position_weights(of, everywhere, tau=tau).double().log() for of in (rho, stored))
    ratios = (w4 - w)[:, :, None] - (w4 - w)[:, None]
    assert 0 < ratios.abs().max() <= 2 / (30 * tau) * (1 + 1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_every_type_of_number_is_stored_as_its_float32(tmp_path, dtype):
    values = (torch.rand(50) * 9).to(dtype)
    cache = build(tmp_path / "cache", [page(1)], lambda pages: [values], IDENTITY, progress=False)
    expected = dequantize(*quantize(values.float().numpy()), 50)
    assert next(iter(cache.values())).tolist() == expected.tolist()


@pytest.mark.parametrize(
    "values, message",
    [
        (torch.tensor([1.0, torch.nan]), "hold NaN or infinity"),
        (torch.rand(2, 3), r"must be numbers \[positions\], got float32 \[2, 3\]"),
        (np.array(["a"]), "must be numbers"),
    ],
)
def test_what_cannot_be_stored_is_refused(tmp_path, values, message):
    with pytest.raises(ValueError, match=f"the values of 'page-1' {message}.*, in sample page-1$"):
        build(tmp_path / "cache", [page(1)], lambda pages: [values], IDENTITY, progress=False)


# Damage


def test_any_one_flipped_bit_and_any_cut_is_noticed(tmp_path):
    shard = write(tmp_path / "cache", records())
    content, r = shard.read_bytes(), random.Random(0)
    bits = {*range(0, 64), *r.sample(range(8 * len(content)), 400)}
    damaged = [content[:n] for n in (0, 7, 100, len(content) - 1)] + [content + b"\0"]
    for bit in bits:
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(flipped))
    for bad in damaged:
        shard.write_bytes(bad)
        with pytest.raises(ValueError, match=f"^{shard} is damaged or cut: its checksum does not match"):
            WeightCache(tmp_path / "cache")


def test_other_folders_and_identities_are_refused(tmp_path):
    with pytest.raises(ValueError, match="^no weight cache at "):
        WeightCache(tmp_path)
    write(tmp_path / "cache", records())
    for identity, message in (
        (IDENTITY | {"tower": "ffff"}, "tower '0123abcd', not 'ffff'"),
        ({"tower": "0123abcd"}, "reduce 'mean', not None"),
        (IDENTITY | {"more": "x"}, "more None, not 'x'"),
    ):
        with pytest.raises(ValueError, match=f"was made with {message}; choose another path or remove it"):
            WeightCache(tmp_path / "cache", identity)
    (tmp_path / "cache" / "identity.json").write_text("{")
    with pytest.raises(ValueError, match="identity.json is damaged"):
        WeightCache(tmp_path / "cache")


def test_a_cache_travels_to_another_process(tmp_path):
    write(tmp_path / "cache", records())
    cache = WeightCache(tmp_path / "cache")
    assert all(pickle.loads(pickle.dumps(cache))[key].equal(cache[key]) for key in cache)


# Building


def page(i):
    return SimpleNamespace(key=f"page-{i}", images=[Image.new("L", (5, 4), i % 200)])


def ramp(pages):
    "Two values for each page."
    for at in pages:
        if at.key == "page-13":
            raise ValueError("page 13 can't be read")
    return [torch.tensor([at.images[0].getpixel((0, 0)), 300.0]) for at in pages]


def key_of(i):
    return sample_key(page(i).images, IDENTITY)


def test_a_failing_sample_is_named_and_what_was_computed_stays(tmp_path):
    pages = [page(i) for i in range(60)]
    with pytest.raises(ValueError, match="^page 13 can't be read, in sample page-13$"):
        build(tmp_path / "cache", pages, ramp, IDENTITY, batch_size=4, progress=False)
    assert set(WeightCache(tmp_path / "cache")) == {key_of(i) for i in range(12)}
    computed = []

    def counting(pages):
        computed.extend(at.key for at in pages)
        return ramp(pages)

    rest = [i for i in range(60) if i != 13]
    cache = build(tmp_path / "cache", pages, counting, IDENTITY, indices=rest, batch_size=4, progress=False)
    assert len(cache) == 59 and computed == [f"page-{i}" for i in rest[12:]]
    assert all(cache[key_of(i)].tolist() == [i, 300] for i in rest)


def test_a_sample_that_cannot_be_read_is_named(tmp_path):
    class Broken:
        def __len__(self):
            return 3

        def __getitem__(self, i):
            return page(i) if i < 2 else {}["missing"]

    with pytest.raises(ValueError, match="^KeyError: 'missing', in sample 2$"):
        build(tmp_path / "cache", Broken(), ramp, IDENTITY, progress=False)


def test_an_image_that_cannot_be_decoded_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as lmms-eval sets it
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "PNG")
    pages = [page(i) for i in range(12)]
    pages[6].images = [Image.open(io.BytesIO(buffer.getvalue()[:2000]))]
    with pytest.raises(ValueError, match="in sample page-6$"):
        build(tmp_path / "cache", pages, ramp, IDENTITY, batch_size=4, progress=False)
    assert len(WeightCache(tmp_path / "cache")) == 4


def test_what_only_samples_together_do_wrong_names_them_all(tmp_path):
    def pairs_fail(pages):
        if len(pages) > 1:
            raise ValueError("out of memory")
        return [torch.rand(3)]

    with pytest.raises(ValueError, match="^out of memory, in samples page-0, page-1$"):
        build(tmp_path / "cache", [page(0), page(1)], pairs_fail, IDENTITY, batch_size=2, progress=False)


def test_a_second_builder_is_refused(tmp_path):
    with locked(tmp_path / "cache"), pytest.raises(ValueError, match="another process builds "):
        build(tmp_path / "cache", [page(0)], ramp, IDENTITY, progress=False)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_killed_build_is_completed(tmp_path, monkeypatch, at):
    "SIGKILL at the third batch, with shards of two batches: at most one shard's records are computed again."
    monkeypatch.setattr("heed_nb.weight_cache.SHARD", 8)
    pages, path = [page(i) for i in range(12)], tmp_path / "cache"

    def dies(given):
        if given[0].key == f"page-{4 * at}":
            os.kill(os.getpid(), signal.SIGKILL)
        return ramp(given)

    process = processes.Process(
        target=build, args=(path, pages, dies, IDENTITY), kwargs=dict(batch_size=4, progress=False)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(WeightCache(path, IDENTITY)) == (8 if at == 2 else 0)
    assert len(build(path, pages, ramp, IDENTITY, batch_size=4, progress=False)) == 12


def test_the_key_covers_what_is_seen():
    noise = tiny.page(20, 12)
    other = noise.copy()
    other.putpixel((3, 4), (1, 2, 3))
    turned = noise.copy()
    turned.getexif()[0x0112] = 6
    given = [[noise], [other], [noise, noise], [noise.resize((12, 20))], [turned]]
    assert len({sample_key(images, IDENTITY) for images in given}) == len(given)
    assert sample_key([noise], IDENTITY) != sample_key([noise], IDENTITY | {"reduce": "max"})
    ids = torch.tensor([1, 2, 3])
    assert len({sample_key([noise], IDENTITY, tokens) for tokens in ((), (ids,), (ids, ids), (ids[:2],))}) == 4


# Training from a cache


class FewPages(Documents):
    "Eight pages of the toy world, one of them text alone."

    def __len__(self):
        return 8

    def __getitem__(self, i):
        sample = super().__getitem__(i)
        return replace(sample, images=[]) if i == 5 else sample


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    "The toy teacher, its processor, its collate, and a cache of the pages."
    torch.set_num_threads(1)
    teacher, processor = load_teacher(Path(__file__).parent.parent / "outputs/teachers/toy-qwen3vl")
    collated = partial(collate, processor=processor)
    path = tmp_path_factory.mktemp("toy") / "cache"
    cache = cached_weights.build_density_cache(
        path, teacher, FewPages(), collated, processor, SETTINGS, batch_size=3, progress=False
    )
    return SimpleNamespace(teacher=teacher, processor=processor, collate=collated, path=path, cache=cache)


SETTINGS = TrainSettings(token_budget=1500, lr=3e-4, batch_size=4, stages=(0.2, 0.8, 0.0), threads=1)


def distilled(toy, out, condition="C4", settings=SETTINGS, teacher=None, data=FewPages()):
    teacher = teacher or toy.teacher
    trainer.distill(
        to_hybrid(teacher),
        teacher,
        data,
        toy.collate,
        CONDITIONS[condition],
        settings,
        out,
        processor=toy.processor,
        progress=False,
    )
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_cached_density_is_the_towers_within_half_a_step(toy):
    documents = [FewPages()[i] for i in range(8)]
    batch = toy.collate(documents)
    inputs = family_of(toy.teacher).language_inputs(toy.teacher, batch.model_inputs)
    exact = family_of(toy.teacher).density(inputs)
    keys = cached_weights.with_cache_keys(toy.collate, toy.cache.identity, documents).cache_keys
    kept = cached_weights.cached_values(toy.cache, keys, batch.keys, None, inputs.visual_mask)
    assert len(toy.cache) == 8 and kept[5].eq(0).all() and not kept[~inputs.visual_mask].any()
    for row, near, visual in zip(exact, kept, inputs.visual_mask):
        if visual.any():
            assert 0 < (near - row)[visual].abs().max() <= (row[visual].max() - row[visual].min()) / 30 + 1e-5


@pytest.mark.parametrize("condition, budget", [("C4", 3500), ("C4-shuffled", 900)])
def test_training_from_the_cache_is_nearly_the_same(toy, tmp_path, condition, budget):
    settings = replace(SETTINGS, token_budget=budget)
    computed = distilled(toy, tmp_path / "computed", condition, settings)
    cached = distilled(toy, tmp_path / "cached", condition, replace(settings, density_cache=str(toy.path)))
    uniform = distilled(toy, tmp_path / "uniform", "C3", replace(settings, token_budget=1))
    differences = [abs(a["loss"] / b["loss"] - 1) for a, b in zip(cached, computed, strict=True)]
    assert len(differences) > 1 and 0 < max(differences) < 0.005
    assert abs(uniform[0]["loss"] / computed[0]["loss"] - 1) > 5 * max(differences)


def test_the_last_stage_needs_no_cache(toy, tmp_path):
    few = cached_weights.build_density_cache(
        tmp_path / "few",
        toy.teacher,
        FewPages(),
        toy.collate,
        toy.processor,
        SETTINGS,
        progress=False,
        indices=schedule.batch_indices(8, 4, 0, 0),
    )
    settings = replace(SETTINGS, token_budget=2000, stages=(0.0, 0.01, 0.99), density_cache=str(few.path))
    assert [line["stage"] for line in distilled(toy, tmp_path / "run", settings=settings)][:3] == [2, 3, 3]
    with pytest.raises(ValueError) as error:
        distilled(toy, tmp_path / "other", settings=replace(settings, stages=(0.0, 1.0, 0.0)))
    lost = next(i for i in schedule.batch_indices(8, 4, 0, 1) if i != 5)
    assert f"sample 'toy-train-0-{lost:06d}' is not in the cache: {few.path} has no record" in str(error.value)
    assert "step 2 (stage 2)" in str(error.value) and "\n" not in str(error.value)


def test_a_cache_that_is_not_the_teachers_is_refused_before_any_step(toy, tmp_path):
    settings = replace(SETTINGS, density_cache=str(toy.path))
    other = copy.deepcopy(toy.teacher)
    with torch.no_grad():
        next(p for n, p in other.named_parameters() if "visual" in n)[0] += 1e-3
    for changed, message in (
        (dict(teacher=other), f"^{toy.path} was made with tower '"),
        (dict(settings=replace(settings, reduce="max")), f"^{toy.path} was made with reduce 'features', not 'max'"),
        (dict(settings=replace(settings, density_cache=str(tmp_path / "none"))), "^no weight cache at "),
    ):
        with pytest.raises(ValueError, match=message):
            distilled(toy, tmp_path / "run", **dict(settings=settings) | changed)
        assert not (tmp_path / "run").exists()
    processor = copy.deepcopy(toy.processor)
    processor.image_processor.size = {"longest_edge": 4096, "shortest_edge": 1024}
    with pytest.raises(ValueError, match="was made with processor.size '{.*262144.*}', not '{.*4096.*}'"):
        WeightCache(toy.path, cached_weights.density_identity(toy.teacher, processor, SETTINGS))
    with pytest.raises(ValueError, match="to check it, distill needs the teacher's processor"):
        trainer.distill(
            to_hybrid(toy.teacher), toy.teacher, FewPages(), toy.collate, CONDITIONS["C4"], settings, tmp_path / "run"
        )
    short = replace(SETTINGS, token_budget=1, density_cache=str(tmp_path / "none"))
    assert distilled(toy, tmp_path / "uniform", "C3", short)  # it weighs nothing by density
    for name in ("density_cache", "gradient_cache"):
        with pytest.raises(ValueError, match=f"{name} is 7; it takes a text that is not empty, or nothing"):
            replace(SETTINGS, **{name: 7})


def test_the_identity_is_the_students_too_and_not_its_mixers(toy):
    identity = cached_weights.density_identity(toy.teacher, toy.processor, SETTINGS)
    assert (
        identity
        == toy.cache.identity
        == cached_weights.density_identity(
            to_hybrid(toy.teacher, seed=3), toy.processor, replace(SETTINGS, seed=3, tau=1.0)
        )
    )


def identities(teacher, processor):
    return cached_weights.density_identity(teacher, processor, SETTINGS), cached_weights.gradient_identity(
        teacher, processor, CONDITIONS["C5"], LAYERS
    )


def identities_there(folder):
    "What another process makes of a saved teacher."
    return identities(*load_teacher(folder))


def test_an_identity_is_that_of_the_saved_teacher_in_another_process(tmp_path):
    found = {}
    for family in tiny.TINY:
        teacher, processor = tiny.teacher(family), tiny.processor(family)
        for part in (teacher, processor):
            part.save_pretrained(tmp_path / family)
        found[family] = identities(teacher, processor)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(identities_there, [tmp_path / family for family in found]) == list(found.values())


@pytest.mark.parametrize("family", tiny.TINY)
def test_an_identity_is_the_teachers_in_its_pair_too(family):
    teacher, processor = tiny.teacher(family), tiny.processor(family)
    density, gradient = found = identities(teacher, processor)
    teacher.set_attn_implementation("eager")
    teacher.config.get_text_config().use_cache = False
    student = to_hybrid(teacher)
    pair_with_teacher(student, teacher)
    assert (
        identities(teacher, processor) == found
        and cached_weights.density_identity(student, processor, SETTINGS) == density
    )
    unpair(student)
    assert identities(teacher, processor) == found


@pytest.mark.parametrize(
    "part, name, value",
    [
        ("vision_config", "num_heads", 2),
        ("vision_config", "hidden_act", "silu"),
        ("vision_config", "rope_parameters", {"rope_theta": 100.0, "rope_type": "axial"}),
        (
            "text_config",
            "rope_parameters",
            dict(rope_type="default", rope_theta=100.0, mrope_section=[6, 5, 5], mrope_interleaved=True),
        ),
        ("text_config", "rms_norm_eps", 0.1),
    ],
)
def test_the_same_weights_under_another_config_are_another_teacher(toy, gradients, part, name, value):
    config = copy.deepcopy(toy.teacher.config)
    setattr(getattr(config, part), name, value)
    other = type(toy.teacher)(config).eval()
    other.load_state_dict(toy.teacher.state_dict())
    density, gradient = identities(other, toy.processor)
    with pytest.raises(
        ValueError, match=rf"^{gradients('C5').path} was made with {part}\.{name} .*, not .*; choose another path"
    ):
        WeightCache(gradients("C5").path, gradient)
    if part == "text_config":
        assert density == toy.cache.identity
    else:
        with pytest.raises(
            ValueError, match=rf"^{toy.path} was made with {part}\.{name} .*, not .*; choose another path"
        ):
            WeightCache(toy.path, density)


def test_masks_are_made_of_what_the_tower_sees_where_a_cache_is_named_too(toy, tmp_path):
    settings = replace(SETTINGS, token_budget=900)
    computed = distilled(toy, tmp_path / "computed", "mask-25", settings)
    named = distilled(toy, tmp_path / "named", "mask-25", replace(settings, density_cache=str(toy.path)))
    assert [line["loss"] for line in named] == [line["loss"] for line in computed]


# Gradient weights

LAYERS = (0, 1, 2)  # what to_hybrid replaces in a toy teacher


@pytest.fixture(scope="module")
def gradients(toy, tmp_path_factory):
    "A function: the gradient cache of a condition, by batches of three."
    folder, made = tmp_path_factory.mktemp("gradients"), {}

    def make(condition):
        if condition not in made:
            made[condition] = cached_weights.build_gradient_cache(
                folder / condition,
                toy.teacher,
                FewPages(),
                toy.collate,
                toy.processor,
                CONDITIONS[condition],
                LAYERS,
                batch_size=3,
                progress=False,
            )
        return made[condition]

    return make


def sensitivities(toy, documents, condition):
    "The teacher's own, by autograd on the outputs of whole layers; unpadded, one document at a time."
    found = []
    toy.teacher.requires_grad_()  # a run freezes it
    for document in documents:
        batch = toy.collate([document])
        with record_outputs(family_of(toy.teacher).layers(toy.teacher)[i] for i in LAYERS) as outputs:
            loss = toy.teacher(**batch.model_inputs, labels=batch.labels).loss
        sensitivity = torch.stack([g.square().sum(-1) for g in torch.autograd.grad(loss, outputs)])
        found.append(GRADIENTS[condition.weights](sensitivity)[..., 0, :])
    return found


@pytest.mark.parametrize("name", ["C5", "+LD", "+SL"])
@pytest.mark.parametrize("temper", [1, 0.25])
def test_cached_gradient_weights_are_the_teachers_within_half_a_level(toy, gradients, name, temper):
    documents, condition, cache = [FewPages()[i] for i in range(8)], CONDITIONS[name], gradients(name)
    batch = cached_weights.with_cache_keys(toy.collate, cache.identity, documents)
    mask, settings = batch["attention_mask"], replace(SETTINGS, temper=temper)
    cached = partial(cached_weights.cached_values, cache, batch.cache_keys, batch.keys, 3 if name == "+LD" else None)
    weights = trainer.alignment_weights(condition, settings, None, LanguageInputs({}, mask > 2, []), batch, cached)
    assert weights[..., mask == 0].abs().sum() == 0 and torch.allclose(weights.sum(-1), mask.sum(-1).float())
    for i, s in enumerate(sensitivities(toy, documents, condition)):
        kept, there = weights[..., i, :][..., mask[i] > 0], (s / s.amax(-1, keepdim=True)).pow(1 / 6)
        half = (there.max() - there.min()) / 30 + 1e-4
        low, high = ((there + sign * half).clamp(0, 1).pow(6 * temper) for sign in (-1, 1))
        near = kept / kept.amax(-1, keepdim=True)
        assert ((low - 1e-5 <= near) & (near <= high + 1e-5)).all()


@pytest.mark.parametrize("name", ["C5", "+LD"])
def test_training_from_a_gradient_cache_is_nearly_the_same_and_takes_no_backward_pass_of_the_teacher(
    toy, gradients, tmp_path, monkeypatch, name
):
    settings = replace(SETTINGS, token_budget=1500, temper=0.5)
    computed = distilled(toy, tmp_path / "computed", name, settings)
    uniform = distilled(toy, tmp_path / "uniform", "C3", replace(settings, token_budget=1))
    settings = replace(settings, gradient_cache=str(gradients(name).path))
    monkeypatch.setattr(trainer, "residual_sensitivity", None)
    cached = distilled(toy, tmp_path / "cached", name, settings)
    differences = [abs(a["loss"] / b["loss"] - 1) for a, b in zip(cached, computed, strict=True)]
    assert len(differences) > 1 and 0 < max(differences) < 0.05
    assert abs(uniform[0]["loss"] / computed[0]["loss"] - 1) > 3 * max(differences)


def test_a_run_from_a_gradient_cache_resumes_with_the_same_bits(toy, gradients, tmp_path):
    settings = replace(SETTINGS, token_budget=1500, gradient_cache=str(gradients("C5").path), checkpoint_every=1)

    class Interrupted(FewPages):
        read = 0

        def __getitem__(self, i):
            self.read += 1
            if self.read > 7:
                raise KeyboardInterrupt
            return super().__getitem__(i)

    distilled(toy, tmp_path / "whole", "C5", settings)
    with pytest.raises(KeyboardInterrupt):
        distilled(toy, tmp_path / "run", "C5", settings, data=Interrupted())
    assert len(checkpoints.checkpoints(tmp_path / "run")) == 1
    distilled(toy, tmp_path / "run", "C5", settings)
    assert (tmp_path / "run/student/model.safetensors").read_bytes() == (
        tmp_path / "whole/student/model.safetensors"
    ).read_bytes()


def test_an_interrupted_gradient_cache_is_completed(toy, gradients, tmp_path, monkeypatch):
    build = partial(
        cached_weights.build_gradient_cache,
        tmp_path / "cache",
        toy.teacher,
        FewPages(),
        toy.collate,
        toy.processor,
        CONDITIONS["C5"],
        LAYERS,
        batch_size=3,
        progress=False,
    )
    whole = {key: values.tolist() for key, values in gradients("C5").items()}
    build(indices=range(6))
    computed = []
    monkeypatch.setattr(
        cached_weights,
        "sample_sensitivities",
        lambda *given, of=cached_weights.sample_sensitivities: computed.extend(s.key for s in given[-1]) or of(*given),
    )
    assert {key: values.tolist() for key, values in build().items()} == whole
    assert computed == [FewPages()[i].key for i in (6, 7)]


def test_a_gradient_cache_of_anything_else_is_refused_before_any_step(toy, gradients, tmp_path):
    path = gradients("C5").path
    other = copy.deepcopy(toy.teacher)
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1e-3
    hybrid = to_hybrid(toy.teacher, attention_layers=[0])
    for message, condition, given in (
        (f"^{path} was made with content 'gradient', not 'layer_gradient'", "+LD", {}),
        (f"^{path} was made with teacher '", "C5", dict(teacher=other)),
        (f"^{path} was made with layers '.0, 1, 2.', not '.1, 2, 3.'", "C5", dict(student=hybrid)),
        (f"^{toy.path} was made with content 'density', not 'gradient'", "C5", dict(gradient_cache=toy.path)),
        (f"^{path} was made with content 'gradient', not 'density'", "C4", dict(density_cache=path)),
        ("^gradient_cache is .*; to check it, distill needs the teacher's processor", "C5", dict(processor=None)),
        ("^no weight cache at ", "C5", dict(gradient_cache=tmp_path / "none")),
    ):
        teacher = given.get("teacher", toy.teacher)
        settings = replace(
            SETTINGS, **{name: str(given.get(name, path)) for name in ("gradient_cache", "density_cache")}
        )
        with pytest.raises(ValueError, match=message):
            trainer.distill(
                given.get("student") or to_hybrid(teacher),
                teacher,
                FewPages(),
                toy.collate,
                CONDITIONS[condition],
                settings,
                tmp_path / "run",
                processor=given.get("processor", toy.processor),
                progress=False,
            )
        assert not (tmp_path / "run").exists()
    with pytest.raises(
        ValueError, match="condition 'C4' has the weights 'density'; a gradient cache is for gradient weights"
    ):
        cached_weights.build_gradient_cache(
            tmp_path / "run", toy.teacher, FewPages(), toy.collate, toy.processor, CONDITIONS["C4"], LAYERS
        )


def test_another_question_or_answer_is_another_record(toy, gradients, tmp_path):
    document = FewPages()[0]
    (question, answer), *rest = document.turns
    changed = [
        replace(document, turns=turns)
        for turns in ([(question, answer + " 1"), *rest], [("So: " + question, answer), *rest], rest)
    ]
    keys = cached_weights.with_cache_keys(
        toy.collate, gradients("C5").identity, [document, *changed, replace(document, key="renamed")]
    ).cache_keys
    assert (
        len(set(keys)) == 4
        and keys[0] == keys[4]
        and [key in gradients("C5") for key in keys] == [True, False, False, False, True]
    )
    unasked = lambda samples: replace(batch := toy.collate(samples), labels=batch.labels.clamp(max=-100))
    [key] = cached_weights.with_cache_keys(unasked, gradients("C5").identity, [document]).cache_keys
    assert key not in gradients("C5")

    class Changed(FewPages):
        def __getitem__(self, i):
            return changed[0]

    settings = replace(SETTINGS, gradient_cache=str(gradients("C5").path))
    with pytest.raises(
        ValueError, match=f"^sample '{document.key}' is not in the cache: .* has no record .* among its 8, at step 1"
    ):
        distilled(toy, tmp_path / "run", "C5", settings, data=Changed())
