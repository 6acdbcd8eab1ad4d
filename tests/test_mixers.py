"Both mixers: their equations, padding, mixing matrices and starts."

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from transformers.cache_utils import Cache, LinearAttentionLayer
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from heed_nb.mixers import MIXERS, GatedDeltaMixer, MixerConfig, init_transferred

torch.set_num_threads(1)
INITS = list(MixerConfig.INITS)
kinds = pytest.mark.parametrize("kind", MIXERS)

# The mixer


def mixer_of(kind, init="paper", heads=4, kv_heads=2, bias=False, eps=1e-6, scale=0.3, size=24, **fields):
    "A mixer of `size` channels, `scale` off its start so that every part of it matters."
    config = MIXERS[kind].config_class.for_init(init, **fields).__dict__
    mixer = MIXERS[kind](
        SimpleNamespace(
            hidden_size=size,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=6,
            attention_bias=bias,
            rms_norm_eps=eps,
            mixer_config=config,
        ),
        0,
    )
    generator = torch.Generator().manual_seed(0)
    mixer.init_new(init, generator)
    init_transferred(mixer, generator)
    with torch.no_grad():
        for p in mixer.parameters():
            p += scale * torch.randn(p.shape, generator=generator)
    return mixer


def inputs(batch=2, positions=11, seed=3):
    return torch.randn(batch, positions, 24, generator=torch.Generator().manual_seed(seed))


def cache_for():
    return Cache(layers=[LinearAttentionLayer()])


def plain(m, u):
    "The equations for one sequence [T, hidden_size], by position and head: the output, and each head's mixing matrix."
    T, H, R, P, K = len(u), m.num_heads, m.num_heads // m.num_kv_heads, m.head_dim, m.config.conv_kernel
    norm = lambda x, weight: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    q, k, v = (proj(u).view(T, -1, P) for proj in (m.q_proj, m.k_proj, m.v_proj))
    if m.config.qk_norm:
        q, k = norm(q, m.q_norm.weight), norm(k, m.k_norm.weight)
    assert m.conv_weight.shape == ((H + 2 * H // R) * P, K)  # key-value heads are repeated after the convolution
    channels = torch.cat([q.flatten(1), k.flatten(1), v.flatten(1)], 1)
    mixed = torch.stack(
        [sum(m.conv_weight[:, K - 1 - j] * channels[t - j] for j in range(min(K, t + 1))) for t in range(T)]
    )
    if m.config.conv_activation == "silu":
        mixed = mixed * mixed.sigmoid()
    q, k, v = (a.view(T, -1, P) for a in mixed.split([H * P, H // R * P, H // R * P], 1))
    gate, outputs, matrices = m.g_proj(u) * m.g_proj(u).sigmoid(), [], []
    for h in range(H):
        qs, ks, A = q[:, h], k[:, h // R], -m.A_log[h].exp()
        if isinstance(m, GatedDeltaMixer):
            qs, ks = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (qs, ks))
            dt, beta = torch.log1p((m.a_proj(u)[:, h] + m.dt_bias[h]).exp()), m.b_proj(u)[:, h].sigmoid()
            keep = [(dt[t] * A).exp() * (torch.eye(P) - beta[t] * torch.outer(ks[t], ks[t])) for t in range(T)]
            write, skip = beta, 0
        else:
            dt = torch.log1p((m.dt_proj(u)[:, h] + m.dt_bias[h]).exp())
            keep = [(dt[t] * A).exp() * torch.eye(P) for t in range(T)]
            write, skip = dt, m.D[h]
        rows = []  # what position i reads of v at j: q_i keep_i ... keep_{j+1} k_j write_j
        for i in range(T):
            row, reading = [torch.zeros(())] * T, qs[i]
            for j in range(i, -1, -1):
                row[j] = write[j] * (reading @ ks[j]) + (skip if i == j else 0)
                reading = reading @ keep[j]
            rows.append(torch.stack(row))
        y, g = torch.stack(rows) @ v[:, h // R], gate[:, h * P : (h + 1) * P]
        matrices.append(torch.stack(rows))
        outputs.append(
            {
                "norm_then_gate": lambda: norm(y, m.norm.weight) * g,
                "gate_then_norm": lambda: norm(y * g, m.norm.weight),
                "none": lambda: y * g,
            }[m.config.norm]()
        )
    return m.o_proj(torch.cat(outputs, 1)), torch.stack(matrices)


@kinds
@pytest.mark.parametrize(
    "fields",
    [
        *(dict(init=init) for init in INITS),
        dict(kv_heads=4),
        dict(conv_kernel=1),
        dict(conv_kernel=2, norm="gate_then_norm"),
        dict(conv_kernel=3, heads=6, kv_heads=1),
        dict(conv_activation="none", qk_norm=True),
        dict(gate_bias=True, norm="none"),
    ],
    ids=lambda fields: ",".join(f"{name}={value}" for name, value in fields.items()),
)
def test_mixer_and_its_matrix_are_the_equations(kind, fields):
    mixer, u = mixer_of(kind, **fields), inputs()
    outputs, matrices = map(torch.stack, zip(*(plain(mixer, row) for row in u)))
    assert_close(mixer(u)[0], outputs, atol=1e-4, rtol=1e-4)
    assert_close(mixer.mixing_matrix(u), matrices, atol=1e-4, rtol=1e-4)


def test_gated_deltanet_is_the_one_of_transformers():
    mixer, u = mixer_of("gdn", "mamba", kv_heads=4, eps=1e-12), inputs()
    peer = Qwen3NextGatedDeltaNet(
        SimpleNamespace(
            hidden_size=24,
            linear_num_value_heads=4,
            linear_num_key_heads=4,
            linear_key_head_dim=6,
            linear_value_head_dim=6,
            linear_conv_kernel_dim=4,
            hidden_act="silu",
            rms_norm_eps=1e-12,
            dtype=None,
            layer_types=["linear_attention"],
        ),
        0,
    )
    parts = lambda *projections: torch.cat([p.weight.view(4, -1, 24) for p in projections], 1)
    by_head = lambda *projections: parts(*projections).flatten(0, 1)  # theirs lies head by head
    with torch.no_grad():
        peer.in_proj_qkvz.weight.copy_(by_head(mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.g_proj))
        peer.in_proj_ba.weight.copy_(by_head(mixer.b_proj, mixer.a_proj))
        peer.conv1d.weight.copy_(mixer.conv_weight[:, None])
        for ours, theirs in (
            (mixer.dt_bias, peer.dt_bias),
            (mixer.A_log, peer.A_log),
            (mixer.norm.weight, peer.norm.weight),
            (mixer.o_proj.weight, peer.out_proj.weight),
        ):
            theirs.copy_(ours)
    assert_close(mixer(u)[0], peer(u), atol=1e-4, rtol=1e-4)


TURNS = [  # of a conversation of 12 positions, 1, among padding, 0
    ["0011000", "010", "1", "00", "000111110", "0", "0011100"],
    ["1101", "0100", "10", "00", "01010101", "0", "10011"],
    ["000" + 12 * "1"],
    [12 * "1" + 9 * "0"],
    ["00" + 12 * "1" + "0000"],
    ["0110111000011101110001"],
    ["1" + 9 * "0" + 10 * "1" + "01"],
    [12 * "10"],
]


@kinds
@pytest.mark.parametrize("init, kernel", zip(INITS, (4, 2, 1)))
def test_padding_and_pieces_leave_no_trace(kind, init, kernel):
    "Padding on either side and inside, a turn at a time: outputs, convolution and state as if there were neither."
    mixer, u = mixer_of(kind, init, bias=True, conv_kernel=kernel), inputs(1, 12)
    whole = cache_for()
    y = mixer(u, past_key_values=whole)[0]
    assert_close(y, mixer(u)[0])
    for turns in TURNS:
        cache, pieces, start = cache_for(), [], 0
        for turn in turns:
            mask = torch.tensor([[int(mark) for mark in turn]])
            piece = torch.full((1, len(turn), 24), 3.0)
            piece[mask.bool()] = u[0, start : start + mask.sum()]
            pieces.append(
                mixer(piece, past_key_values=cache, linear_attention_mask=None if mask.all() else mask)[0][mask.bool()]
            )
            start += mask.sum()
        close = dict.fromkeys(("atol", "rtol"), 1e-5 if len(turns) == 1 else 1e-4)
        assert_close(torch.cat(pieces), y[0], **close)
        assert_close(cache.get_conv_state(0), whole.get_conv_state(0))
        assert_close(cache.get_recurrent_state(0), whole.get_recurrent_state(0), **close)
        if len(turns) == 1:
            assert_close(mixer(piece, linear_attention_mask=mask)[0][mask.bool()], y[0], **close)


def outputs_and_gradients(mixer, f):
    mixer.zero_grad()
    y = f()
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return [y.detach(), *(p.grad.clone() for p in mixer.parameters())]


@kinds
def test_rows_with_other_holes(kind):
    "Outputs and gradients of a batch in which each row is padded in its own way are those of its rows alone."
    mixer, u = mixer_of(kind, bias=True), inputs(4, 13)
    masks = torch.tensor([[1] * 13, [0] * 4 + [1] * 9, [1] * 3 + [0] * 5 + [1] * 5, [0, 1, 0, 0] + [1, 0, 1] * 3])
    whole = lambda: mixer(u, linear_attention_mask=masks)[0][masks.bool()]
    alone = lambda: torch.cat([mixer(row[mask][None])[0][0] for row, mask in zip(u, masks.bool())])
    for a, b in zip(outputs_and_gradients(mixer, whole), outputs_and_gradients(mixer, alone)):
        assert_close(a, b, atol=1e-4, rtol=1e-3)


@kinds
def test_packed_sequences_equal_single_ones(kind):
    "With sequences shorter than the convolution, an empty one, and one that goes on in the next row."
    mixer, u, lengths = mixer_of(kind, bias=True), inputs(), [5, 1, 0, 2, 14]
    alone = [mixer(piece)[0] for piece in u.flatten(0, 1)[None].split(lengths, 1) if piece.shape[1]]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    assert_close(mixer(u, cu_seqlens=ends)[0], torch.cat(alone, 1).view(u.shape), atol=1e-5, rtol=1e-4)


# The mixing matrix


@kinds
def test_a_mixing_matrix_passes_padding_by(kind):
    mixer, u = mixer_of(kind, bias=True), inputs(1, 7)
    mask = torch.tensor([0] * 2 + [1] * 3 + [0] * 2 + [1] * 4 + [0] * 3).bool()
    padded = torch.full((1, 14, 24), 3.0)
    padded[:, mask] = u
    rows = mixer.mixing_matrix(padded, mask[None])[:, :, mask]
    assert_close(rows[..., mask], mixer.mixing_matrix(u), atol=1e-5, rtol=1e-4)
    assert rows[..., ~mask].abs().max() == 0


@kinds
def test_a_mixing_matrix_trains_what_makes_it(kind):
    "Its gradient is the recurrence's, and reaches all but v's projection, the gate, the norm and the output."
    mixer, u = mixer_of(kind, "mamba"), inputs()
    weights = torch.randn(2, 4, 11, 6, generator=torch.Generator().manual_seed(0))
    q, k, v, *rates = mixer.recurrence_inputs(u)

    def gradients(y):
        mixer.zero_grad()
        (y * weights).sum().backward(retain_graph=True)
        return {
            name: p.grad.clone()
            for name, p in mixer.named_parameters()
            if p.grad is not None and p.grad.abs().max() > 0
        }

    ours = gradients(mixer.mixing_matrix(u) @ v.detach().transpose(1, 2))
    expected = gradients(mixer.recurrence(q, k, v.detach(), *rates).transpose(1, 2))
    rates = {"dt_proj.weight", "D"} if kind == "mamba2" else {"a_proj.weight", "b_proj.weight"}
    assert (
        ours.keys() == expected.keys() == {"q_proj.weight", "k_proj.weight", "conv_weight", "A_log", "dt_bias"} | rates
    )
    for name in ours:
        assert_close(ours[name], expected[name], atol=1e-4, rtol=1e-3)


# The starts


@kinds
def test_paper_start(kind):
    mixer = mixer_of(kind, scale=0, size=4096)
    rates = [mixer.dt_proj] if kind == "mamba2" else [mixer.a_proj, mixer.b_proj]
    for p in (mixer.g_proj.weight, mixer.conv_weight, mixer.A_log, *(proj.weight for proj in rates)):
        assert 0 < p.abs().max() <= 0.04
    assert_close(mixer.g_proj.weight.std().item(), 0.02 * 0.8796, atol=1e-4, rtol=0)  # a normal cut at two sigma
    assert torch.equal(mixer.dt_bias, torch.zeros(4)) and torch.equal(mixer.norm.weight, torch.ones(6))
    assert kind == "gdn" or torch.equal(mixer.D, torch.zeros(4))


MAMBA = dict(mamba2=(1, "gate_then_norm"), gdn=(0.0099, "norm_then_gate"))  # the smallest -A, the norm


@kinds
def test_mamba_start(kind):
    mixer, (lowest, norm) = mixer_of(kind, "mamba", scale=0), MAMBA[kind]
    A, dt = mixer.A_log.exp(), F.softplus(mixer.dt_bias)
    assert ((lowest <= A) & (A <= 16)).all() and ((0.99e-3 <= dt) & (dt <= 0.101)).all() and mixer.config.norm == norm
    assert kind == "gdn" or torch.equal(mixer.D, torch.ones(4))


@kinds
def test_identity_start(kind):
    mixer, u = mixer_of(kind, "identity", scale=0), inputs()
    rates = mixer.rates(u)
    assert_close(mixer.log_decay(*rates), torch.full((2, 11, 4), -0.01))
    assert_close(rates[-1], torch.full_like(rates[-1], dict(mamba2=1, gdn=0.5)[kind]))


@kinds
def test_bad_mixer_fields(kind):
    with pytest.raises(ValueError, match="unknown init 'warm'; one of paper, mamba, identity"):
        mixer_of(kind).init_new("warm")
    with pytest.raises(ValueError, match="norm is 'layer'; it takes one of norm_then_gate, "):
        MIXERS[kind].config_class(norm="layer")
