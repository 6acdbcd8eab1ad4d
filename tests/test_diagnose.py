"The diagnosis against whole models run by hand, rows fitted by other libraries, and what can't be diagnosed."

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from torch.testing import assert_close

import tiny
from heed_nb.batch import run_notebook
from heed_nb.data import Sample, collate
from heed_nb.drift import (
    COLUMNS,
    answer_importance,
    answer_score,
    decile_groups,
    decile_means,
    density_deciles,
    hide,
    one_by_one,
    token_measures,
    token_table,
)
from heed_nb.hybrid import to_hybrid
from heed_nb.losses import predicts_answer, record_outputs
from heed_nb.regression import ImageMoments, bootstrap_counts, decile_curve, diagnose, interval, regress
from heed_nb.runs import read_run
from heed_nb.teachers import family_of

families = pytest.mark.parametrize("family", tiny.TINY)
PREDICTORS = ("density", "visual", "depth", "attention")


@cache
def models(family="qwen3_vl"):
    "The teacher, its untrained hybrid and the processor of a family."
    teacher = tiny.teacher(family)
    return teacher, to_hybrid(teacher), tiny.processor(family)


def documents(n, seed=0):
    turns = lambda i: [("read it", f"{i} and {7 * i}"), ("again?", "no")][: 1 + i % 2]
    return [Sample(f"page-{i}", [tiny.page(48, 64, seed + i)], turns(i)) for i in range(n)]


@cache
def measured(family="qwen3_vl"):
    "A batch of three documents and what `token_measures` says of it."
    teacher, student, processor = models(family)
    batch = collate(documents(3), processor)
    return batch, token_measures(teacher, student, batch)


# Tokens


def near(ours, theirs, rtol=1e-4, atol=1e-4):
    np.testing.assert_allclose(ours, np.asarray(theirs), rtol=rtol, atol=atol)


@families
def test_measures_are_those_of_the_whole_models(family):
    "Each sample alone, its residuals read by hooks and its sensitivity the gradient of the model's own loss."
    teacher, student, processor = models(family)
    kind = family_of(teacher)
    for tokens, document in zip(measured(family)[1], documents(3)):
        batch = collate([document], processor)
        inputs = batch.model_inputs
        with record_outputs(kind.layers(teacher)) as of_teacher, record_outputs(kind.layers(student)) as of_student:
            loss = teacher(**inputs, labels=batch.labels).loss
            student(**inputs)
        s = torch.stack([g[0].square().sum(-1) for g in torch.autograd.grad(loss, of_teacher)])
        near(tokens.sensitivity, s, 1e-3, 1e-6 * s.max().item())
        visual = batch["input_ids"][0] == processor.image_token_id
        density = kind.density(kind.language_inputs(teacher, inputs))[0]
        near(tokens.visual, visual)
        near(tokens.density, torch.where(visual, density, 2 * density[visual].mean()), 1.3e-6, 1e-5)
        for layer, (t, s) in enumerate(zip(of_teacher, of_student)):
            distance = (s - t).detach()[0].square().sum(-1).sqrt()
            near(tokens.drift[layer], distance)
            near(tokens.relative[layer], distance / t.detach()[0].norm(dim=-1))


@families
@torch.no_grad()
def test_attention_is_what_the_model_returns(family):
    batch, measures = measured(family)
    eager = tiny.teacher(family)
    eager.set_attn_implementation("eager")
    attentions = eager(**batch.model_inputs, output_attentions=True).attentions
    for i, tokens in enumerate(measures):
        n = int(batch["attention_mask"][i].sum())
        asking = [p for p in range(n - 1) if batch.labels[i, p + 1] != -100]
        for layer, weights in enumerate(attentions):
            A = weights[i, :, :n, :n].double()
            near(tokens.attention[layer], A[:, asking].mean((0, 1)), atol=1e-5)
            entropy = [-(a * a.clamp(min=1e-30).log()).sum().item() / len(A) for a in A.transpose(0, 1)]  # by position
            near(tokens.concentration[layer], [0] + [1 - entropy[p] / np.log(p + 1) for p in range(1, n)], 1e-3)


def test_a_student_may_be_of_another_precision_or_no_hybrid():
    (teacher, _, _), (batch, measures) = models(), measured()
    others = token_measures(teacher, tiny.teacher("qwen3_vl", seed=1), batch)
    assert all((tokens.drift[0] > 0).all() for tokens in others)
    half, full = token_measures(teacher, to_hybrid(teacher).bfloat16(), batch)[0].drift, measures[0].drift
    assert half.dtype == np.float32 and 0 < np.abs(half - full).max() < 0.2 * full.max()


def test_token_table_holds_every_position_and_layer():
    measures = measured()[1]
    table = token_table(measures, layers=[2, 0])
    assert tuple(table.columns[3:]) == (*COLUMNS, "sensitivity")
    assert len(table) == sum(2 * len(tokens.density) for tokens in measures)
    row, tokens = table[(table.image == 1) & (table.depth == 2) & (table.position == 5)].iloc[0], measures[1]
    assert (row.drift, row.attention, row.density) == (tokens.drift[2, 5], tokens.attention[2, 5], tokens.density[5])
    assert row.sensitivity == tokens.sensitivity[2, 5] > 0


# Importance


@families
@torch.no_grad()
def test_hidden_positions_might_as_well_not_be_there(family):
    teacher, batch = models(family)[0], measured(family)[0]
    inputs, labels = family_of(teacher).language_inputs(teacher, batch.model_inputs), batch.labels
    where = inputs.visual_mask & (torch.arange(labels.shape[1]) % 3 == 0)
    hidden = answer_score(teacher, hide(inputs, where), labels)
    assert (hidden - answer_score(teacher, inputs, labels)).abs().min() > 1e-4
    head, decoder, given = family_of(teacher).lm_head(teacher), family_of(teacher).decoder(teacher), inputs.kwargs
    per_sample = inputs.visual_mask.sum(1).tolist()
    for i in range(3):
        keep, one = ~where[i] & batch["attention_mask"][i].bool(), slice(i, i + 1)
        visual, places = keep[inputs.visual_mask[i]], torch.arange(len(keep))[None, keep]
        kwargs = dict(inputs_embeds=given["inputs_embeds"][one, keep], attention_mask=torch.ones_like(places))
        kwargs["position_ids"] = given["position_ids"][..., one, keep] if "position_ids" in given else places
        if "visual_pos_masks" in given:
            levels = [level.split(per_sample)[i][visual] for level in given["deepstack_visual_embeds"]]
            kwargs |= dict(visual_pos_masks=inputs.visual_mask[one, keep], deepstack_visual_embeds=levels)
        log_p = head(decoder(**kwargs, use_cache=False).last_hidden_state)[0].log_softmax(-1)
        answers = labels[i, keep]
        score = torch.stack([log_p[p - 1, token] for p, token in enumerate(answers.tolist()) if token != -100]).mean()
        assert_close(hidden[i], score, rtol=1e-4, atol=1e-4)


def test_importance_of_what_the_answer_can_not_see():
    batch = measured()[0]
    last = torch.stack([torch.arange(row.numel()) > row.nonzero().max() for row in predicts_answer(batch.labels)])
    for ablate in (None, 0, 2):
        after, before = answer_importance(models()[0], batch, lambda visual: [last, visual], ablate=ablate).T
        assert np.abs(after).max() < 1e-5 and np.abs(before).min() > 1e-4


def test_groups_take_each_visual_position_once():
    teacher, student, processor = models()
    pages = [Sample(str(size), [tiny.page(*size)], [("a", "b")]) for size in ((96, 64), (48, 64))]
    batch = collate(pages, processor)
    visual = batch["input_ids"] == processor.image_token_id
    for groups in (decile_groups(token_measures(teacher, student, batch))(visual), list(one_by_one(visual))):
        assert torch.equal(sum(group.int() for group in groups), visual.int())
    assert max(int(group.sum(1).max()) for group in one_by_one(visual)) == 1


# Deciles


def test_equal_density_is_not_put_in_raster_order():
    density = np.append(np.zeros(2000), 1.0)
    deciles = density_deciles(density, np.ones(2001, dtype=bool))
    assert abs(np.corrcoef(deciles[:-1], np.arange(2000))[0, 1]) < 0.1


def test_curve_is_the_mean_over_images_with_the_slow_bootstraps_interval():
    images = np.random.default_rng(0).gamma(2, 1, (15, 10))
    counts = bootstrap_counts(15, draws=300, seed=3)
    curve = decile_curve(images, counts)
    resampled = np.array([np.repeat(images, k, axis=0).mean(0) for k in counts[1:]])
    np.testing.assert_allclose(curve["mean"], images.mean(0))
    np.testing.assert_allclose([curve["low"], curve["high"]], interval(resampled))
    for name, draws in (
        ("ratio", resampled[:, 9] / resampled[:, 0]),
        ("difference", resampled[:, 9] - resampled[:, 0]),
    ):
        np.testing.assert_allclose([curve[name][k] for k in ("low", "high")], interval(draws))
    with pytest.raises(ValueError, match="NaN or infinity"):
        decile_curve(np.full((15, 10), np.nan), counts)


# Regression


def made_images(images=9, rows=60, seed=0):
    r = np.random.default_rng(seed)
    for _ in range(images):
        n = rows + int(r.integers(30))
        density, visual = r.gamma(2, 0.3, n), (r.random(n) < 0.7) * 1.0
        depth, attention = r.integers(0, 6, n) * 1.0, r.exponential(1, n) + 0.8 * density  # which share variance
        drift = 5 + density - 0.4 * visual + 0.1 * depth + 0.2 * r.standard_normal(n)
        yield dict(density=density, visual=visual, depth=depth, attention=attention, drift=drift)


def moments_of(images):
    moments = ImageMoments((*PREDICTORS, "drift"))
    for image in images:
        moments.add(image)
    return moments


def explained(images, names):
    "R^2 of least squares on the rows."
    X = np.stack([np.concatenate([image[name] for image in images]) for name in names], 1)
    y = np.concatenate([image["drift"] for image in images])
    X = np.column_stack([np.ones(len(y)), X])
    return 1 - ((y - X @ np.linalg.lstsq(X, y)[0]) ** 2).sum() / ((y - y.mean()) ** 2).sum()


def test_interval_narrows_with_images_and_covers():
    share = lambda images: regress(moments_of(images), "drift", PREDICTORS)["predictors"]["density"]["semi_partial"]
    truth, few = share(made_images(400, seed=100)), [share(made_images(20, seed=s)) for s in range(40)]
    assert truth["high"] - truth["low"] < 0.4 * np.mean([f["high"] - f["low"] for f in few])
    covered = sum(f["low"] <= truth["value"] <= f["high"] for f in few)
    assert covered >= 32  # 95 % of 40 is 38; percentile intervals of 20 images fall short of it


def test_a_resample_without_variation_is_an_error():
    images = list(made_images())
    images = [image | dict(visual=0 * image["visual"] + (i == 0)) for i, image in enumerate(images)]  # in one alone
    with pytest.raises(ValueError, match="visual is the same in every row of a resample"):
        regress(moments_of(images), "drift", PREDICTORS)


# All of it


def test_diagnosis_agrees_with_its_own_table():
    teacher, student, processor = models()
    small = [Sample("small", [tiny.page(32, 32)], [("read", "it")])]  # four visual tokens make no deciles
    pages = [*documents(4), Sample("text", [], [("read", "it")]), *small, *documents(4, seed=9)]
    how = dict(batch_size=3, table_images=99, one_by_one_images=7, ablate=1)
    numbers, table = diagnose(teacher, student, processor, pages, **how)
    assert numbers["images"] == 8 and numbers["left_out"] == dict(text_only=1, nothing_to_rank=1)
    assert numbers["layers"] == [0, 1, 2]
    fitted, ranks, by_hand = numbers["regressions"]["drift"], [], []
    assert fitted["rows"] == len(table)
    images = [
        {name: image[name].to_numpy(float) for name in (*PREDICTORS, "drift")} for _, image in table.groupby("image")
    ]
    joint = explained(images, PREDICTORS)
    near(fitted["r2"]["value"], joint, 0, 1e-9)
    for name in PREDICTORS:
        unique = joint - explained(images, [n for n in PREDICTORS if n != name])
        near(fitted["predictors"][name]["semi_partial"]["value"], unique, 0, 1e-9)
    for _, image in table[table.visual == 1].groupby("image"):
        token = image.groupby("position")[["density", "drift"]].mean()
        deciles = density_deciles(token.density.to_numpy(), np.ones(len(token), dtype=bool))
        by_hand.append(decile_means(token.drift.to_numpy(), deciles))
        sensitivity = image.pivot(index="position", columns="depth", values="sensitivity")
        ranks.append([spearmanr(sensitivity[a], sensitivity[b]).statistic for a, b in ((0, 1), (0, 2), (1, 2))])
    near(numbers["deciles"]["drift"]["mean"], np.mean(by_hand, 0), 1e-5, 0)
    for name in ("importance", "ablation", "importance, one by one", "relative drift", "drift, text included"):
        assert len(numbers["deciles"][name]["mean"]) == 10
    found = numbers["correlations"]["layers"]
    expected = [np.mean(ranks), *np.sort(np.mean(ranks, 0))[[0, -1]]]
    near([found[name] for name in ("value", "least", "most")], expected, 1e-7, 1e-6)


def test_decile_importance_does_not_depend_on_the_batch():
    teacher, student, processor = models()
    first, second = (
        diagnose(teacher, student, processor, documents(7), batch_size=size)[0]["deciles"]["importance"]["mean"]
        for size in (1, 4)
    )
    np.testing.assert_allclose(first, second, atol=1e-4)


@pytest.mark.parametrize(
    "family, layers, message",
    [
        ("qwen3_vl", 8, "the student's num_hidden_layers is 8, the teacher's 4; they must be the same"),
        ("glm4v", 4, "the student is a glm4v, the teacher a qwen3_vl; they must be of one family"),
    ],
)
def test_models_that_can_not_be_compared(family, layers, message):
    teacher, _, processor = models()
    with pytest.raises(ValueError, match=message):
        diagnose(teacher, tiny.teacher(family, layers), processor, documents(7))


def test_what_can_not_be_diagnosed_is_named():
    teacher, student, processor = models()
    text = Sample("text", [], [("a", "b")])
    with pytest.raises(ValueError, match="6 images are too few"):
        diagnose(teacher, student, processor, [*documents(6), text])
    with pytest.raises(ValueError, match="sample 'text' has no visual tokens"):
        token_measures(teacher, student, collate([*documents(1), text], processor))
    with pytest.raises(ValueError, match="sample 'page-0' has no answer tokens"):
        batch = collate(documents(1), processor)
        token_measures(teacher, student, replace(batch, labels=torch.full_like(batch.labels, -100)))
    broken = to_hybrid(teacher)
    with torch.no_grad():
        next(p for name, p in broken.named_parameters() if "layers.1.mlp" in name).fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN or infinity"):
        diagnose(teacher, broken, processor, documents(7))


@pytest.mark.parametrize(
    "given", [dict(images=12), dict(teacher="outputs/teachers/toy-glm4v"), dict(ablate=-1), dict(dtype="bfloat16")]
)
def test_another_diagnosis_than_the_scales_takes_a_folder_of_its_own(given, root, monkeypatch):
    monkeypatch.chdir(root)
    ((name, value),) = given.items()
    message = rf"^{name} {value!r} makes another diagnosis than scale toy's: give its folder as `out`$"
    with pytest.raises(ValueError, match=message):
        run_notebook("nbs/runs/diagnose.ipynb", dict(scale="toy") | given)


def test_run_of_two_models_on_disk(root, tmp_path, monkeypatch):
    monkeypatch.chdir(root)
    teacher, student, processor = models()
    for name, model in (("teacher", teacher), ("student", student)):
        for part in (model, processor):
            part.save_pretrained(tmp_path / name)
    lines = []
    for i, sample in enumerate(documents(7)):
        sample.images[0].save(tmp_path / f"{i}.png")
        lines.append(json.dumps(dict(key=sample.key, images=[f"{i}.png"], turns=sample.turns)))
    (tmp_path / "samples.jsonl").write_text("\n".join(lines))
    given = dict(teacher="teacher", student="student", samples="samples.jsonl", out="out")
    given = {name: str(tmp_path / file) for name, file in given.items()}
    run_notebook("nbs/runs/diagnose.ipynb", given | dict(images=7, one_by_one_images=0))
    run, table = read_run(tmp_path / "out/diagnose.json"), pd.read_parquet(tmp_path / "out/tokens.parquet")
    numbers, expected = diagnose(teacher, student, processor, documents(7), batch_size=10, ablate=1, table_images=7)
    assert run["kind"] == "diagnose" and run["numbers"]["images"] == 7
    near(table[list(COLUMNS)].to_numpy(float), expected[list(COLUMNS)].to_numpy(float), 1e-3, 1e-3)
    for name, curve in numbers["deciles"].items():
        near(run["numbers"]["deciles"][name]["mean"], curve["mean"], 1e-3, 1e-3)
