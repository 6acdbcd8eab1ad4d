"A wrong field of a condition or of the settings is refused in one line."

from dataclasses import fields

import pytest

from heed_nb.conditions import Condition, TrainSettings


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(weights="mask"), "mask_share is 0.0 with weights 'mask'"),
        (dict(weights="density", mask_share=0.1), "mask_share is 0.1 with weights 'density'"),
        (dict(weights="random_mask", mask_share=1.5), "mask_share is 1.5; it takes a number from 0 to 1"),
        (dict(tau=1.0), "tau is 1.0 with weights 'uniform'; only density, text_boost, shuffled take one"),
        (dict(weights="mask", mask_share=0.1, text_boost=4.0), "text_boost is 4.0 with weights 'mask'"),
        (dict(weights="density", tau=0.0), "tau is 0.0; it takes a number above 0, or nothing"),
        (dict(weights="shuffled", text_boost=-1.0), "text_boost is -1.0; it takes a number of 0 or more, or nothing"),
        (dict(alignment="head_output", weights="gradient"), "are gradients of residuals; alignment is 'head_output'"),
        (dict(alignment="logits"), "alignment is 'logits'; it takes one of None, head_output"),
    ],
)
def test_a_condition_that_means_nothing_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Condition("x", "x", **{"alignment": "residual"} | given)


NAN, INF, HUGE = float("nan"), float("inf"), 10**400
WRONG = (NAN, INF, -1, HUGE, True, None, "", "some words", b"x", [], [NAN], ["a", []], {}, {"some": "words"}, {1: NAN})


def taken(call):
    "Which of WRONG a call takes, as they print. It refuses the others with a ValueError of one line."
    found = []
    for value in WRONG:
        try:
            call(value)
        except ValueError as error:
            assert str(error) and len(str(error).splitlines()) == 1
        else:
            found.append(repr(value))
    return found


def test_settings_take_their_own_kind_of_value_alone():
    given = {
        f.name: taken(lambda value: TrainSettings(**{"token_budget": 1000, f.name: value}))
        for f in fields(TrainSettings)
    }
    paths = {name: ["None", "'some words'"] for name in ("density_cache", "gradient_cache")}
    assert {name: values for name, values in given.items() if values} == {"threads": ["None"]} | paths


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(lr=0.0), "lr is 0.0; it takes a number above 0"),
        (dict(kl_weight=-1), "kl_weight is -1; it takes a number of 0 or more"),
        (dict(warmup=2), "warmup is 2; it takes a number from 0 to 1"),
        (dict(batch_size=2.5), "batch_size is 2.5; it takes a whole number above 0"),
        (dict(seed=2**32), "seed is 4294967296; it takes a whole number from 0 to 4294967295"),
        (dict(threads=0), "threads is 0; it takes a whole number from 1 to 1024, or nothing"),
        (dict(stages=(0.5, 0.5)), "stages is (0.5, 0.5); it takes 3 numbers from 0 to 1"),
        (dict(stages=(0.5, 0.5, 0.5)), "stages is (0.5, 0.5, 0.5); three shares that add up to 1"),
        (dict(betas=(0.9, 1.0)), "betas is (0.9, 1.0); two numbers below 1"),
    ],
)
def test_settings_are_kept_in_range(given, message):
    with pytest.raises(ValueError) as error:
        TrainSettings(1000, **given)
    assert str(error.value) == message
