"Density and weights against the equations, in float64."

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from heed_nb.density import patch_density, position_weights


def density(features, radius=1):  # [h, w, D] -> [h, w], Eq. 2
    unit = F.normalize(features.double(), dim=-1).permute(2, 0, 1)
    padded, side = F.pad(unit, 4 * [radius], mode="reflect"), 2 * radius + 1
    neighbours = padded.unfold(1, side, 1).unfold(2, side, 1)  # [D, h, w, side, side]
    return 1 - (unit[..., None, None] * neighbours).sum(0).mean((-2, -1))


def weights(density, visual, present, tau, text_boost, normalize_over):  # [T] each -> [T], Algorithm 1
    present = present.bool()
    seen = visual & present
    if not seen.any():
        return present.double()
    rho = torch.where(visual, density.double(), text_boost * density[seen].double().mean())
    low, high = rho[present if normalize_over == "all" else seen].aminmax()
    w = ((rho - low) / (high - low)).clamp(0, 1).div(tau).exp() * present
    return w * present.sum() / w.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "shape, radius", [((2, 2, 3), 1), ((2, 7, 5), 1), ((6, 3, 4), 2), ((4, 5, 16), 3), ((9, 4, 8), 1)]
)
def test_density_is_its_definition(shape, radius, dtype):
    torch.manual_seed(0)
    pages = torch.randn(3, 2, *shape, dtype=dtype) + torch.tensor([0.0, 1, 3], dtype=dtype).view(3, 1, 1, 1, 1)
    result = patch_density(pages, radius=radius)
    assert result.dtype == dtype and result.shape == pages.shape[:-1]
    expected = torch.stack([torch.stack([density(page, radius) for page in pair]) for pair in pages])
    assert_close(result.double(), expected, atol=5e-7 if dtype == torch.float32 else 1e-14, rtol=0)


def test_density_keeps_its_digits_on_a_nearly_blank_page():
    torch.manual_seed(0)
    page = torch.ones(6, 6, 32, dtype=torch.float64) + 1e-4 * torch.randn(6, 6, 32, dtype=torch.float64)
    exact = density(page)
    assert exact.max() < 1e-7  # below what one minus a cosine resolves in float32
    assert_close(patch_density(page.float()).double(), exact, rtol=2e-3, atol=0)


def test_density_of_a_view_leaves_the_features_alone():
    torch.manual_seed(0)
    features = torch.randn(8, 5, 6)
    before = features.clone()
    assert_close(patch_density(features.permute(1, 2, 0)), patch_density(features.permute(1, 2, 0).contiguous()))
    assert torch.equal(features, before)


@pytest.mark.parametrize("normalize_over", ["all", "visual"])
@pytest.mark.parametrize("tau, text_boost", [(0.5, 2.0), (0.1, 0.0), (1.0, 1.0), (3.0, 7.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_are_algorithm_1(dtype, tau, text_boost, normalize_over):
    torch.manual_seed(0)
    rho = torch.rand(6, 23, dtype=dtype)
    visual = torch.rand(6, 23) < 0.5
    visual[2] = False  # text alone
    present = torch.ones(6, 23, dtype=torch.long)
    present[0, :7] = 0
    present[1, -9:] = 0
    present[2, :3] = 0
    present[3] = 0  # left, right, and nothing but padding
    result = position_weights(
        rho, visual, attention_mask=present, tau=tau, text_boost=text_boost, normalize_over=normalize_over
    )
    expected = torch.stack([weights(*row, tau, text_boost, normalize_over) for row in zip(rho, visual, present)])
    assert result.dtype == dtype
    assert_close(result.double(), expected, atol=3e-5 if dtype == torch.float32 else 1e-12, rtol=0)
    assert_close(result.sum(-1), present.sum(-1).to(dtype))


def test_half_precision_and_hard_temperatures_stay_finite():
    torch.manual_seed(0)
    rho, visual = torch.rand(2, 30), torch.ones(2, 30).bool()
    assert position_weights(rho.bfloat16(), visual).dtype == torch.float32
    hard = position_weights(rho, visual, tau=1e-6)
    assert_close(hard.amax(-1), torch.full((2,), 30.0))
    assert_close(hard.argmax(-1), rho.argmax(-1))


def test_bad_density_is_named_only_where_it_counts():
    rho, visual = torch.rand(1, 6), torch.tensor([[False, True, True, True, False, True]])
    for place, bad in ((1, torch.nan), (3, torch.inf)):
        broken = rho.clone()
        broken[0, place] = bad
        with pytest.raises(ValueError, match="^density holds NaN or infinity at a visual position$"):
            position_weights(broken, visual)
    broken = rho.clone()
    broken[0, 0] = torch.nan
    assert torch.equal(position_weights(broken, visual), position_weights(rho, visual))
