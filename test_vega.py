"""The claims of the README, one a test. `pytest` runs the quick ones, `pytest -m ""` all."""

import argparse
import collections
import dataclasses
import filecmp
import functools
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import transformers
from PIL import Image, ImageColor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import data
import evaluate
import model as model_module
import train
from model import VEGA, EarlyFusion, VEGAConfig, VisionEncoder, newest_run, read_checkpoint, restore
from selection import RATIOS, VARIANTS, Selection, Stepwise, VISBlock, pixel_contrastive_loss

HERE = Path(__file__).parent
torch.set_num_threads(1)  # many threads on few and busy cores wait for each other
SMALL = {  # a few scenes, for the tests that only need some data
    "train": (16, ("attribute", "place", "relation")),
    "val": (6, ("attribute", "place", "relation")),
    "testA": (3, ("attribute", "attribute")),
    "testB": (5, ("place", "relation")),
}


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    """A data folder with a few scenes of shapes."""
    folder = tmp_path_factory.mktemp("small")
    data.generate_shapes(folder / "shapes", scenes=SMALL)
    return folder


def run(*command, nproc=1, cwd=HERE, **environment) -> subprocess.CompletedProcess:
    """Run a script as a person would, one thread a process."""
    start = (
        [sys.executable] if nproc == 1 else [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={nproc}"]
    )
    start += [] if nproc == 1 else ["--master_port=0", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    return subprocess.run(
        [*start, *map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=1800,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def tokenized(name: str, split: str, folder="data", image_size: int = 64, **settings) -> data.RefDataset:
    """A split with a tokenizer of its own words."""
    words = data.RefDataset(name, split, folder).expressions
    return data.RefDataset(name, split, folder, None, data.make_tokenizer(words), 21, image_size, **settings)


def random_batch(config: VEGAConfig, size: int = 2, words: tuple[int, ...] = (7, 4), seed: int = 0):
    """image, input_ids, attention_mask, with padding after the words."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(size, 3, config.image_size, config.image_size, generator=generator)
    ids = torch.randint(5, config.bert["vocab_size"], (size, config.max_tokens), generator=generator)
    mask = torch.tensor([[int(t < words[b % len(words)]) for t in range(config.max_tokens)] for b in range(size)])
    return image, ids, mask


# selection.py


def algorithm_1(block: VISBlock, F_v, Q_l, mask_l, ratio, variant="vega"):
    """The pseudocode of Appendix A as it is printed, repeats and all, with the block's own layers.

    variant: a row of Table 4 or one of ours, whose line takes the place of the pseudocode's.
    """
    B, N, D = F_v.shape
    T = Q_l.shape[1]
    X = block.proj_v(F_v)
    X = X / X.norm(dim=-1, keepdim=True)
    Y = block.proj_l(Q_l)
    Y = Y / Y.norm(dim=-1, keepdim=True)
    S = torch.matmul(Y, X.transpose(1, 2))
    rank_index = torch.topk(S, k=int(N * ratio), dim=-1).indices
    M = torch.zeros(B, T, N)
    for b in range(B):
        for t in range(T):
            M[b, t, rank_index[b, t]] = 1.0
    if variant == "sigmoid-threshold":
        M = (1 / (1 + torch.exp(-S)) > 0.5).float()
    M_hat = M * 1e4 - 1e4
    S_norm = torch.softmax(S + M_hat, dim=-1)
    if variant == "no-normalisation":
        S_norm = S
    if variant == "unmasked-softmax":
        S_norm = torch.exp(S) / torch.exp(S).sum(dim=-1, keepdim=True)
    if "sharp" in variant:
        S_norm = torch.softmax(S / torch.exp(block.log_tau) + M_hat, dim=-1)
    F_v_repeated = F_v.unsqueeze(1).repeat(1, T, 1, 1)
    E = (M.unsqueeze(-1) * S_norm.unsqueeze(-1) * F_v_repeated).sum(dim=2) / int(N * ratio)
    if variant == "sigmoid-threshold":  # divided by the number selected
        E = E * int(N * ratio) / M.sum(dim=-1, keepdim=True)
    if "sum-once" in variant:
        E = (M.unsqueeze(-1) * S_norm.unsqueeze(-1) * F_v_repeated).sum(dim=2)
    if variant == "no-similarity-weights":
        E = (M.unsqueeze(-1) * F_v_repeated).sum(dim=2) / int(N * ratio)
    Q_v = E if variant == "no-cross-attention" else block.cross_attention(E, F_v, M_hat)
    Q_v = block.self_attention(Q_v, Q_v, (mask_l[:, None] - 1) * 1e4)
    return torch.cat([Q_l, Q_v], dim=1), S, M


TABLE_4 = (
    "sigmoid-threshold", "no-similarity-weights", "no-normalisation", "unmasked-softmax", "no-cross-attention"
)  # fmt: skip
OURS = ("sum-once", "sharp", "sum-once-sharp")


@pytest.mark.parametrize(
    "variant, N, T, ratio",
    [
        *(("vega", *sizes) for sizes in [(64, 21, 0.3), (225, 21, 0.3), (50, 5, 0.1), (17, 1, 0.8), (225, 9, 0.5)]),
        *((variant, 64, 9, 0.3) for variant in TABLE_4 + OURS),
    ],
)
def test_vis_block_is_algorithm_1(variant, N, T, ratio):
    torch.manual_seed(N + T)
    block = VARIANTS[variant].block(32, num_heads=4, ratio=ratio)
    inputs = torch.randn(3, N, 32, requires_grad=True), torch.randn(3, T, 32, requires_grad=True)
    mask_l = torch.ones(3, T)
    mask_l[0, max(1, T - 3) :] = 0
    mask_l[1, 1:] = 0  # every word but [CLS] is padding
    weight = torch.randn(3, 2 * T, 32)
    results = []
    for function in (block, lambda *args: algorithm_1(block, *args, ratio, variant)):
        output = function(*inputs, mask_l)
        G, S, M = (output.G, output.S, output.M) if function is block else output
        gradients = torch.autograd.grad((G * weight).sum() + S.square().sum(), [*inputs, *block.parameters()])
        results.append((M, G, S, *gradients))
    assert torch.equal(results[0][0], results[1][0])  # selections before values
    for ours, literal in zip(*results):
        torch.testing.assert_close(ours, literal, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        output = block(*inputs, mask_l)
    assert torch.equal(output.M, results[1][0])
    torch.testing.assert_close(output.G.float(), results[1][1], rtol=1e-2, atol=1e-2)


def test_each_word_selects_its_k_most_similar_pixels():
    torch.manual_seed(0)
    selection = VISBlock(16, 2, ratio=0.3)(torch.randn(2, 225, 16), torch.randn(2, 4, 16), torch.ones(2, 4))
    assert (selection.M.sum(-1) == 67).all()
    worst_selected = selection.S.masked_fill(selection.M == 0, 2).amin(-1)
    best_left = selection.S.masked_fill(selection.M == 1, -2).amax(-1)
    assert (worst_selected >= best_left).all()


def test_no_tensor_of_words_times_pixels_times_channels():
    """The literal weighted sum makes tensors of B x T x N x D; ours makes none, forward or backward."""

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(output):
                self.size = max(self.size, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
            return output

    B, T, N, D = 2, 21, 225, 64
    F_v, Q_l = torch.randn(B, N, D, requires_grad=True), torch.randn(B, T, D, requires_grad=True)
    sizes = []
    for block in (VISBlock(D), LiteralVISBlock(D)):
        with Largest() as largest:
            block(F_v, Q_l, torch.ones(B, T)).G.sum().backward()
        sizes.append(largest.size)
    assert sizes[0] < B * T * N * D / 5 and sizes[1] >= B * T * N * D


def test_contrastive_loss_is_equation_5():
    """Worked pixel by pixel, and the gradient of tau against a finite difference."""
    torch.manual_seed(0)
    s, target = torch.rand(2, 4, 4) * 2 - 1, torch.rand(2, 4, 4) < 0.3

    def literal(tau):
        sigma = lambda x: 1 / (1 + math.exp(-x))
        terms = [
            -math.log(sigma(q / tau)) if z else -math.log(1 - sigma(q / tau))
            for q, z in zip(s.flatten().tolist(), target.flatten().tolist())
        ]
        return sum(terms) / len(terms)

    log_tau = torch.tensor(math.log(0.3), requires_grad=True)
    loss = pixel_contrastive_loss(s, target, log_tau.exp())
    assert loss.item() == pytest.approx(literal(0.3), rel=1e-5)
    loss.backward()
    difference = (literal(math.exp(math.log(0.3) + 1e-4)) - literal(math.exp(math.log(0.3) - 1e-4))) / 2e-4
    assert log_tau.grad.item() == pytest.approx(difference, rel=1e-4)


STEPWISE = {"vega": Stepwise}  # whose steps can be called one at a time


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_steps_of_the_ablations_are_algorithm_1_bit_for_bit(precision):
    torch.manual_seed(0)
    block, stepwise = VISBlock(16, 2, 0.3, dropout=0.5), Stepwise(16, 2, 0.3, dropout=0.5)
    stepwise.load_state_dict(block.state_dict())
    inputs = torch.randn(2, 20, 16, requires_grad=True), torch.randn(2, 7, 16, requires_grad=True)
    mask_l = torch.ones(2, 7)
    mask_l[1, 4:] = 0
    results = []
    for module in (block, stepwise):
        torch.manual_seed(1)
        with evaluate.autocast(torch.device("cpu"), precision):
            output = module(*inputs, mask_l)
        loss = output.G.float().square().sum() + output.S.sum()
        results.append([*output, *torch.autograd.grad(loss, [*inputs, *module.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def guide(name: str, F_v, Q_l, mask_l=None, D: int = 16):
    """A variant's block, at the weights that all variants share, and what it selects from these features."""
    torch.manual_seed(1)
    block = STEPWISE.get(name, VARIANTS[name].block)(D, 2, ratio=0.3)
    return block, block(F_v, Q_l, torch.ones(Q_l.shape[:2], dtype=torch.int64) if mask_l is None else mask_l)


def small_model(name: str, **overrides) -> VEGA:
    torch.manual_seed(0)
    bert = dict(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    sizes = dict(image_size=64, embed_dim=16, depths=(1, 1), num_heads=(2, 2), decoder_width=16, bert=bert)
    return VEGA(VEGAConfig.tiny(**{**sizes, "variant": name, **overrides})).eval()


def words_of(name, image=0, ids=0):
    """G of a small model for one of two images and one of two expressions of seven tokens."""
    model = small_model(name)
    image, (ids, mask) = random_batch(model.config, 1, (7,), image)[0], random_batch(model.config, 1, (7,), ids)[1:]
    return model(image, ids[:, :7], mask[:, :7])["selection"].G.detach()


F_V, OTHER_F_V, Q_L, OTHER_Q_L = torch.randn(4, 2, 20, 16, generator=torch.Generator().manual_seed(0)).split(1)
F_V, OTHER_F_V, Q_L, OTHER_Q_L = F_V[0], OTHER_F_V[0], Q_L[0, :, :7], OTHER_Q_L[0, :, :7]
N, T, K = 20, 7, 6


def visual(name, F_v=F_V, Q_l=Q_L):
    """The tokens of G that are not linguistic."""
    return guide(name, F_v, Q_l)[1].G[:, T:]


def pooled(name, scale=1.0, F_v=F_V):
    """E of a variant for similarities `scale` times as large; the selection stays."""
    block, (_, _, S, M) = guide(name, F_V, Q_L)
    return block.pool(M, block.normalise(scale * S, M * 1e4 - 1e4), F_v)


def same(a, b) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def selected_by_cls(name) -> bool:
    block, (G, *_) = guide(name, F_V, Q_L)
    X, Y = F_V @ block.proj_v.weight.T + block.proj_v.bias, Q_L[:, 0] @ block.proj_l.weight.T + block.proj_l.bias
    for b in range(2):
        cosines = [torch.cosine_similarity(Y[b], X[b, n], dim=0).item() for n in range(N)]
        best = sorted(sorted(range(N), key=lambda n: -cosines[n])[:K])
        if not same(G[b, T:], F_V[b, best]):
            return False
    return True


def loss_terms(name) -> set:
    model = small_model(name)
    return set(model.loss(model(*random_batch(model.config)), torch.zeros(2, 64, 64)))


WHAT_SETS_IT_APART = {  # true of the variant and false of vega
    "linguistic": lambda name: same(words_of(name, image=0), words_of(name, image=1)),
    "enhanced-linguistic": lambda name: words_of(name).shape[1] == T and not same(words_of(name), words_of(name, 1)),
    "all-pixels": lambda name: same(visual(name), F_V),
    "topk-pixels": lambda name: visual(name).shape[1] == K and selected_by_cls(name),
    "no-cues": lambda name: (
        same(visual(name), visual(name, Q_l=OTHER_Q_L)) and not same(visual(name), visual(name, OTHER_F_V))
    ),
    "local-only": lambda name: (
        visual(name).shape[1] == T - 1
        and same(visual(name), visual(name, Q_l=torch.cat([OTHER_Q_L[:, :1], Q_L[:, 1:]], 1)))
    ),
    "global-only": lambda name: (
        visual(name).shape[1] == 1
        and same(visual(name), visual(name, Q_l=torch.cat([Q_L[:, :1], OTHER_Q_L[:, 1:]], 1)))
    ),
    "sigmoid-threshold": lambda name: torch.equal(guide(name, F_V, Q_L)[1].M == 1, guide(name, F_V, Q_L)[1].S > 0),
    "no-contrastive": lambda name: loss_terms(name) == {"loss", "bce", "dice"},
    "no-similarity-weights": lambda name: same(pooled(name), pooled(name, 3.0)),
    "no-normalisation": lambda name: same(3 * pooled(name), pooled(name, 3.0)),
    "unmasked-softmax": lambda name: (K * pooled(name, F_v=torch.ones_like(F_V)) < 0.9).all(),  # the weights' sum
    "no-cross-attention": lambda name: same(
        visual(name), guide(name, F_V, Q_L)[0].self_attention(*[pooled(name)] * 2)
    ),
    "sum-once": lambda name: same(pooled(name), K * pooled("vega")),
    "sharp": lambda name: same(pooled(name), pooled("vega", 1 / 0.07)),
    "sum-once-sharp": lambda name: same(pooled(name), K * pooled("vega", 1 / 0.07)),
}


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "vega"])
def test_a_variant_differs_from_vega_as_its_row_says(name):
    assert WHAT_SETS_IT_APART[name](name) and not WHAT_SETS_IT_APART[name]("vega")


def test_variants_name_their_rows():
    """Tables 2, 3, 4 and 6, typed from the paper: mIoU and oIoU."""
    paper = {
        "2": {(75.16, 73.31), (76.06, 73.91), (76.28, 75.35)}, "3a": {(76.02, 74.16), (76.04, 74.58)},
        "3b": {(75.83, 73.84), (76.10, 74.86), (76.13, 74.93)}, "4a": {(76.15, 74.81)}, "4b": {(76.24, 74.92)},
        "4c": {(76.23, 75.05)}, "4d": {(76.18, 74.97), (76.22, 75.14)}, "4e": {(76.11, 74.23)}, "ours": {(None, None)},
    }  # fmt: skip
    assert {v.table for v in VARIANTS.values()} == set(paper)
    for table, rows in paper.items():
        assert {(v.mIoU, v.oIoU) for v in VARIANTS.values() if v.table == table} == rows
    mIoU = (76.11, 76.08, 76.27, 76.24, 76.22, 76.16, 76.08, 76.03)
    assert list(RATIOS) == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8] and [v for v, _ in RATIOS.values()] == list(mIoU)
    assert [oIoU for _, oIoU in RATIOS.values()] == [74.82, 75.02, 75.35, 75.28, 75.14, 75.12, 74.97, 74.80]
    for name, variant in VARIANTS.items():
        if name in OURS:
            assert "Ours, beyond the paper" in variant.block.__doc__
        elif variant.block is not VISBlock:
            assert f"Table {variant.table}" in variant.block.__doc__, name


def test_sharp_and_equation_5_share_one_temperature():
    model = small_model("sharp")
    assert model.vis.log_tau is model.log_tau
    assert [name for name, _ in model.named_parameters() if "log_tau" in name] == ["log_tau"]


def test_a_threshold_may_select_nothing():
    block = VARIANTS["sigmoid-threshold"].block(8, 2)
    torch.nn.init.eye_(block.proj_v.weight), torch.nn.init.eye_(block.proj_l.weight)
    torch.nn.init.zeros_(block.proj_v.bias), torch.nn.init.zeros_(block.proj_l.bias)
    F_v, Q_l = torch.rand(1, 12, 8) + 0.1, torch.rand(1, 3, 8) + 0.1
    Q_l[:, 1] *= -1  # its cosines are all negative
    output = block(F_v, Q_l.requires_grad_(), torch.ones(1, 3))
    assert output.M.sum(-1).tolist() == [[12, 0, 12]]
    M_hat = output.M * 1e4 - 1e4
    E = block.pool(output.M, block.normalise(output.S, M_hat), F_v)
    weights = [math.exp(s) for s in output.S[0, 0].tolist()]
    by_hand = sum(w / sum(weights) * F_v[0, n] for n, w in enumerate(weights)) / 12
    torch.testing.assert_close(E[0, 0], by_hand)
    assert (E[0, 1] == 0).all()
    hidden, open_ = block.cross_attention(E, F_v, M_hat), block.cross_attention(E, F_v)
    torch.testing.assert_close(hidden, open_, rtol=1e-3, atol=1e-3)  # no pixel is hidden from who selected none
    output.G.sum().backward()
    assert output.G.isfinite().all() and Q_l.grad.isfinite().all()


# model.py


def test_early_fusion_is_lavt_in_plain_loops():
    torch.manual_seed(0)
    B, N, C, T, D = 2, 9, 8, 5, 12
    fusion = EarlyFusion(C, D)
    x, words, mask = torch.randn(B, N, C), torch.randn(B, T, D), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])

    def normalise(v):  # [N, C], each channel over the pixels
        return torch.stack(
            [(v[:, c] - v[:, c].mean()) / (v[:, c].var(unbiased=False) + 1e-5).sqrt() for c in range(C)], 1
        )

    for b in range(B):
        real = [t for t in range(T) if mask[b, t]]
        query = normalise(fusion.query(x[b]))
        attended = torch.zeros(N, C)
        for n in range(N):
            scores = torch.stack([query[n] @ fusion.key(words[b, t]) * C**-0.5 for t in real])
            for weight, t in zip(scores.softmax(0), real):
                attended[n] += weight * fusion.value(words[b, t])
        attended = normalise(fusion.project_attended(attended))
        fused = F.gelu(fusion.project_fused(F.gelu(fusion.project_vision(x[b])) * attended))
        first, second = fusion.gate[0].weight, fusion.gate[2].weight
        onward = x[b] + torch.tanh(torch.relu(fused @ first.T) @ second.T) * fused
        ours = fusion(x, words, mask)
        torch.testing.assert_close(ours[0][b], fused, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours[1][b], onward, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", [16, 12, 11, 9])  # windows of 4 tile the first two; the others are padded to 12
def test_shifted_windows_in_plain_loops(side):
    torch.manual_seed(0)
    config = VEGAConfig.tiny(image_size=4 * side, embed_dim=8, depths=(2, 2), num_heads=(2, 2), window_size=4)
    for shift, block in zip((0, 2), VisionEncoder(config).swin.layers[0].blocks):
        assert block.shift_size == (shift, shift)
        attention, window = block.attn, 4
        torch.nn.init.normal_(attention.relative_position_bias_table)
        x = torch.randn(1, side, side, 8)
        padded = -(-side // window) * window
        canvas = torch.zeros(padded, padded, 8)
        canvas[:side, :side] = x[0]
        result = torch.zeros(padded, padded, 8)
        for top in range(0, padded, window):
            for left in range(0, padded, window):
                # where each place of the window comes from, and whether the shift wrapped it around the edge
                cells = [(top + i + shift, left + j + shift) for i in range(window) for j in range(window)]
                sources = [(y % padded, x_ % padded) for y, x_ in cells]
                wrapped = [(y >= padded, x_ >= padded) for y, x_ in cells]
                tokens = torch.stack([canvas[source] for source in sources])
                qkv = attention.qkv(tokens).reshape(len(cells), 3, 2, 4)
                heads = []
                for head in range(2):
                    query, key, value = qkv[:, 0, head], qkv[:, 1, head], qkv[:, 2, head]
                    scores = query @ key.T * 4**-0.5
                    for a in range(len(cells)):
                        for b in range(len(cells)):
                            dy, dx = a // window - b // window, a % window - b % window
                            entry = (dy + window - 1) * (2 * window - 1) + dx + window - 1
                            scores[a, b] = scores[a, b] + attention.relative_position_bias_table[entry, head]
                            if wrapped[a] != wrapped[b]:
                                scores[a, b] = -math.inf
                    heads.append(scores.softmax(-1) @ value)
                for source, token in zip(sources, attention.proj(torch.cat(heads, -1))):
                    result[source] = token
        torch.testing.assert_close(block._attn(x)[0], result[:side, :side], rtol=1e-5, atol=1e-5)


def test_windows_use_fused_attention_and_change_nothing():
    torch.manual_seed(0)
    swin = VisionEncoder(VEGAConfig.tiny(image_size=60, depths=(2, 2), num_heads=(2, 2), window_size=4)).swin
    attentions = [block.attn for stage in swin.layers for block in stage.blocks]
    assert all(attention.fused_attn for attention in attentions)
    results = []
    for fused in (True, False):
        for attention in attentions:
            attention.fused_attn = fused
        output = swin.layers(swin.patch_embed(torch.linspace(-2, 2, 3 * 60 * 60).view(1, 3, 60, 60).sin()))
        results.append([output, *torch.autograd.grad(output.square().sum(), list(swin.layers.parameters()))])
    for ours, plain in zip(*results):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5 * plain.abs().max().item())


def test_base_is_the_papers_model():
    torch.manual_seed(0)
    config = VEGAConfig.base()
    model = VEGA(config)
    image, ids, mask = random_batch(config, 1)
    output = model(image, ids, mask)
    assert output["logits"].shape == (1, 480, 480)
    assert output["selection"].S.shape == (1, 21, 225) and (output["selection"].M.sum(-1) == 67).all()
    assert output["selection"].G.shape == (1, 42, 768)
    assert {block.window_size for stage in model.vision.swin.layers for block in stage.blocks} == {(12, 12)}
    assert [fusion.gate is not None for fusion in model.vision.fusions] == [True, True, True, False]
    model.loss(output, torch.rand(1, 480, 480) < 0.1)["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    stated = re.search(r"base model has ([\d,]+) parameters", (HERE / "README.md").read_text())
    assert int(stated[1].replace(",", "")) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("overrides", [dict(image_size=62), dict(image_size=8), dict(ratio=0.0), dict(ratio=1.5),
                                       dict(bert={"hidden_size": 8, "vocab_size": 9, "_attn_implementation": "x"})])
def test_impossible_configs_are_refused(overrides):
    with pytest.raises(ValueError, match="must|names _attn_implementation"):
        VEGA(VEGAConfig.tiny(**overrides))


def test_padding_does_not_matter():
    torch.manual_seed(0)
    config = VEGAConfig.tiny()
    model = VEGA(config).eval()
    image, ids, mask = random_batch(config, words=(7, 4))
    with torch.no_grad():
        logits = model(image, ids, mask)["logits"]
        other = model(image, torch.where(mask == 1, ids, 63 - ids), mask)["logits"]
        cut = model(image, ids[:, :7], mask[:, :7])["logits"]
        words_matter = model(image, torch.where(mask == 1, 68 - ids, ids), mask)["logits"]
    torch.testing.assert_close(other, logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(cut, logits, rtol=0, atol=1e-4)
    assert (words_matter - logits).abs().max() > 1e-3


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_every_parameter_learns(stages):
    """So DDP needs no find_unused_parameters. Also with every word but [CLS] padded, under bf16."""
    torch.manual_seed(0)
    config = VEGAConfig.tiny(depths=(1,) * stages, num_heads=(2,) * stages)
    model = VEGA(config)
    image, ids, mask = random_batch(config, words=(1, 5))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(image, ids, mask)
    model.loss(output, torch.rand(2, 128, 128) < 0.1)["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_of_a_variant_learns(name):
    """Also with every word but [CLS] padded, under bf16; and what stands under padding changes nothing."""
    model = small_model(name)
    image, ids, mask = random_batch(model.config, words=(7, 4))
    target = torch.rand(2, 64, 64) < 0.1
    output = model(image, ids, mask)
    model.loss(output, target)["loss"].backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
        assert parameter.dim() < 2 or parameter.grad.abs().max() > 0, parameter_name
    other = model(image, torch.where(mask == 1, ids, 63 - ids), mask)["logits"]
    torch.testing.assert_close(other, output["logits"], rtol=0, atol=1e-5)
    mask = (torch.arange(21) == 0).long().expand(2, -1)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(image, ids, mask)
    model.loss(output, target)["loss"].backward()
    assert output["logits"].isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_each_head_starts_by_looking_at_a_place_near_the_pixel():
    """Its table is -|offset - place|^2 / 2 over the offsets of a window of 4: second differences of -1."""
    torch.manual_seed(0)
    for name, table in VisionEncoder(VEGAConfig.tiny()).swin.named_parameters():
        if name.endswith("relative_position_bias_table"):
            grid = table.detach().unflatten(0, (7, 7))  # [dy, dx, heads]
            for along in (grid, grid.transpose(0, 1)):
                assert torch.allclose(along.diff(n=2, dim=0), torch.tensor(-1.0), atol=1e-4)
            places = [divmod(best, 7) for best in table.argmax(0).tolist()]
            assert len(set(places)) > 1 and all(abs(y - 3) + abs(x - 3) <= 6 for y, x in places)


def test_coordinates_start_as_strong_as_the_patches():
    torch.manual_seed(0)
    vision = VisionEncoder(VEGAConfig.tiny())
    with torch.no_grad():
        patches = vision.swin.patch_embed(torch.randn(1, 3, 128, 128))
        places = vision.coordinates(torch.rand(1000, 2) * 2 - 1) - vision.coordinates.bias
    assert 0.7 < places.std() / patches.std() < 2  # at torch's own scale 0.33


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = small_model("vega", depths=(2, 2), drop_path=0.5).train()
        model.vision.swin.set_grad_checkpointing(checkpointing)
        image, ids, mask = random_batch(model.config, 4)
        torch.manual_seed(0)  # of drop path
        model.loss(model(image, ids, mask), image[:, 0] > 1)["loss"].backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert (gradients[1] - gradients[0]).norm() / gradients[0].norm() < 1e-5


def test_an_untrained_tiny_model_learns_one_batch(small):
    torch.manual_seed(0)
    dataset = tokenized("shapes", "train", small, image_size=128, training=True)
    batch = torch.utils.data.default_collate([dataset[(0, i)] for i in range(4)])
    model = VEGA(VEGAConfig.tiny())
    optimizer = train.make_optimizer(model, argparse.Namespace(lr=1e-3, bert_factor=1.0, beta2=0.999))
    for _ in range(200):
        output = model(*evaluate.model_inputs(batch, torch.device("cpu")))
        metrics = evaluate.Metrics()
        for logits, mask in zip(output["logits"], batch["mask"]):
            metrics.update(logits > 0, mask)
        ious = [sample["iou"] for sample in metrics.samples]
        if min(ious) > 0.9:
            return
        optimizer.zero_grad()
        model.loss(output, batch["mask"])["loss"].backward()
        optimizer.step()
    raise AssertionError(f"IoU after 200 steps: {ious}")


@pytest.mark.skipif(torch.__version__.startswith("2.6"), reason="torch 2.6 fakes no CUDA tensors without a driver")
@pytest.mark.parametrize("preset", ["tiny", "base"])
@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_stays_on_the_cpu_when_the_model_is_on_a_gpu(name, preset, monkeypatch):
    """Fake tensors know their device and shape only. A batch comes from the CPU, as the loader's do."""
    monkeypatch.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)
    model, fake = VEGA(getattr(VEGAConfig, preset)(variant=name)), FakeTensorMode()
    S, T = model.config.image_size, model.config.max_tokens
    batch = {
        "image": torch.zeros(2, 3, S, S, dtype=torch.uint8), "mask": torch.zeros(2, S, S, dtype=torch.bool),
        "input_ids": torch.zeros(2, T, dtype=torch.int64), "attention_mask": torch.ones(2, T, dtype=torch.int64),
    }  # fmt: skip
    batch = {key: fake.from_tensor(value) for key, value in batch.items()}
    with fake:
        model._apply(lambda tensor: fake.from_tensor(tensor).cuda())
        output = model(*evaluate.model_inputs(batch, torch.device("cuda")))
        mask = batch["mask"].to("cuda")
        losses = model.loss(output, mask)
        assert {tensor.device.type for tensor in (output["logits"], *losses.values())} == {"cuda"}
        assert output["logits"].shape == (2, S, S)
        with pytest.raises(DataDependentOutputException):  # all but reading the counts, which fake tensors don't have
            evaluate.Metrics().update(output["logits"][0] > 0, mask[0])


def microsoft(weights: dict) -> dict:
    """timm's Swin-B state dict -> the layout of Microsoft's swin_base_patch4_window12_384_22k.pth."""
    renamed = {}
    for name, value in weights.items():
        name = re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name)
        renamed[name.replace("head.fc.", "head.")] = value
    for stage, depth in enumerate((2, 2, 18, 2)):
        for block in range(depth):
            renamed[f"layers.{stage}.blocks.{block}.attn.relative_position_index"] = torch.zeros(
                144, 144, dtype=torch.int64
            )
            if block % 2 and stage < 3:
                renamed[f"layers.{stage}.blocks.{block}.attn_mask"] = torch.zeros(4, 144, 144)
    return {"model": renamed}


def test_swin_weights_load_from_every_format_or_not_at_all(tmp_path, monkeypatch):
    torch.manual_seed(0)
    full = timm.create_model("swin_base_patch4_window12_384", num_classes=21841).eval()
    weights = full.state_dict()
    assert "head.fc.weight" in weights and "layers.3.downsample.norm.weight" in weights
    safetensors.torch.save_file(weights, tmp_path / "timm.safetensors")
    torch.save(weights, tmp_path / "timm.pth")
    torch.save(microsoft(weights), tmp_path / "microsoft.pth")
    with torch.no_grad():
        image = torch.randn(1, 3, 384, 384)
        wanted = full.layers(full.patch_embed(image))  # 384 is tiled by windows of 12: timm's own order is right there
    config = VEGAConfig.base(image_size=384, bert=dict(vocab_size=10, hidden_size=8))
    for file in ("timm.safetensors", "timm.pth", "microsoft.pth"):
        swin = VisionEncoder(config).swin.eval()
        said = model_module.load_swin(swin, str(tmp_path / file), 12)
        assert file in said and "norm and head" in said
        with torch.no_grad():
            torch.testing.assert_close(swin.layers(swin.patch_embed(image)), wanted, rtol=1e-5, atol=1e-5)

    real = timm.create_model  # by name, as by default, but for the download
    overlay = {"pretrained_cfg_overlay": {"file": str(tmp_path / "timm.safetensors")}}
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: real(*a, **k, **overlay if k.get("pretrained") else {}))
    swin = VisionEncoder(config).swin.eval()
    model_module.load_swin(swin, model_module.PRETRAINED_SWIN, 12)
    with torch.no_grad():
        torch.testing.assert_close(swin.layers(swin.patch_embed(image)), wanted, rtol=1e-5, atol=1e-5)

    whole = (tmp_path / "timm.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.pth").write_bytes((tmp_path / "timm.pth").read_bytes()[:100_000_000])
    torch.save(timm.create_model("swin_tiny_patch4_window7_224").state_dict(), tmp_path / "tiny.pth")
    torch.save({k: v for k, v in weights.items() if k != "layers.2.blocks.7.mlp.fc1.weight"}, tmp_path / "missing.pth")
    torch.save({"model": Hostile(tmp_path / "ran")}, tmp_path / "hostile.pth")
    name = "layers.2.blocks.7.mlp.fc1.bias"
    torch.save({**weights, name: weights[name] / 0}, tmp_path / "nan.pth")
    before = {name: value.clone() for name, value in swin.state_dict().items()}
    for file, message in (
        ("cut.safetensors", "no Swin weights from"), ("cut.pth", "no Swin weights from"), ("tiny.pth", "another Swin"),
        ("missing.pth", "layers.2.blocks.7.mlp.fc1.weight is missing"), ("absent.pth", "no Swin weights from"),
        ("hostile.pth", "no Swin weights from"), ("nan.pth", "7.mlp.fc1.bias has values that are not finite"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            model_module.load_swin(swin, str(tmp_path / file), 12)
    assert all(torch.equal(value, before[name]) for name, value in swin.state_dict().items())
    assert not (tmp_path / "ran").exists()


def test_bert_loads_from_a_folder_of_any_size(small, tmp_path):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=64
    )
    bert = transformers.BertModel(config)
    bert.save_pretrained(tmp_path / "bert")
    data.make_tokenizer(["red blue left circle square"]).save_pretrained(tmp_path / "bert")
    command = [
        "--data", str(small), "--max-steps", "1", "--batch-size", "4", "--lr", "0", "--bert", str(tmp_path / "bert"),
    ]  # fmt: skip
    train.main([*command, "--out", str(tmp_path / "run")])
    model, tokenizer = restore(read_checkpoint(tmp_path / "run" / "best.pt"), torch.device("cpu"))
    for name, value in model.bert.state_dict().items():
        assert torch.equal(value, bert.state_dict()[name]), name
    assert (
        len(tokenizer) == 10
        and tokenizer("red circle")["input_ids"]
        == data.make_tokenizer(["red blue left circle square"])("red circle")["input_ids"]
    )
    for file in ("vocab.txt", "tokenizer.json"):
        (tmp_path / "bert" / file).rename(tmp_path / file) if (tmp_path / "bert" / file).exists() else None
    with pytest.raises(SystemExit, match="BERT"):
        train.main([*command, "--out", str(tmp_path / "other")])
    for file in ("vocab.txt", "tokenizer.json"):
        (tmp_path / file).rename(tmp_path / "bert" / file) if (tmp_path / file).exists() else None
    weights = safetensors.torch.load_file(tmp_path / "bert" / "model.safetensors")
    weights.pop("encoder.layer.1.output.dense.weight")
    safetensors.torch.save_file(weights, tmp_path / "bert" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit, match="encoder.layer.1.output.dense.weight"):
        train.main([*command, "--out", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()


def test_a_checkpoint_cuts_a_text_as_its_tokenizer_did(small, tmp_path):
    """A BERT that minds capitals, drops accents and leaves Chinese characters together; and our own, which does not."""
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] Red cafe \u4e2d\u6587 red".split()
    rules = dict(do_lower_case=False, strip_accents=True, tokenize_chinese_chars=False)
    transformers.BertTokenizer({word: i for i, word in enumerate(words)}, **rules).save_pretrained(tmp_path / "bert")
    sizes = dict(vocab_size=9, hidden_size=48, num_hidden_layers=1, num_attention_heads=3, intermediate_size=64)
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(tmp_path / "bert")
    command = ["--data", str(small), "--max-steps", "1", "--batch-size", "4", "--set", "image_size=64"]
    train.main([*command, "--bert", str(tmp_path / "bert"), "--out", str(tmp_path / "run")])
    _, tokenizer = restore(read_checkpoint(tmp_path / "run" / "last.pt"), torch.device("cpu"))
    assert tokenizer("Red caf\u00e9 \u4e2d\u6587 red")["input_ids"] == [2, 5, 6, 7, 8, 3]
    ours = data.make_tokenizer(["red cup"])
    assert ours("RED Cup")["input_ids"] == ours("red cup")["input_ids"] and 1 not in ours("RED Cup")["input_ids"]


def test_a_disk_that_fails_is_not_told_as_a_broken_checkpoint(trained, tmp_path, monkeypatch):
    """Or a person would delete a good one."""
    with pytest.raises(OSError, match="Input/output error"):
        read_checkpoint("/proc/self/mem")  # which can be opened, and not read from its start
    (best,) = (trained / "runs").glob("*/best.pt")
    for error in (PermissionError(13, "denied"), MemoryError("full"), RuntimeError("you tried to allocate 8 bytes")):
        def fails(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(torch, "load", fails)
        with pytest.raises(type(error), match=re.escape(str(error))):
            read_checkpoint(best)


def test_a_hostile_checkpoint_is_refused_and_nothing_runs(tmp_path):
    torch.save({"format": 1, "model": Hostile(tmp_path / "ran")}, tmp_path / "best.pt")
    with pytest.raises(SystemExit, match="can't be read as a checkpoint"):
        evaluate.main(["--checkpoint", str(tmp_path / "best.pt")])
    assert not (tmp_path / "ran").exists()


def test_a_broken_checkpoint_is_refused(trained, tmp_path):
    (best,) = (trained / "runs").glob("*/best.pt")
    for value, message in (
        (torch.full((1, 32), math.nan), "head.weight has values that are not finite"),
        ([0.0], "head.weight is missing"),
    ):
        checkpoint = read_checkpoint(best)
        checkpoint["model"]["decoder.head.weight"] = value
        torch.save(checkpoint, tmp_path / "best.pt")
        with pytest.raises(data.InputError, match=message):
            evaluate.load(tmp_path / "best.pt")
    torch.save({**read_checkpoint(best), "format": 99}, tmp_path / "best.pt")
    with pytest.raises(data.InputError, match="or of another version of it"):
        evaluate.load(tmp_path / "best.pt")
    (tmp_path / "best.pt").write_bytes(best.read_bytes()[:100_000])
    with pytest.raises(data.InputError, match="was cut short"):
        evaluate.load(tmp_path / "best.pt")


def test_a_checkpoint_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    calls = []
    for module, name in ((os, "fsync"), (Path, "replace")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, name=name, real=real: (calls.append(name), real(*a))[1])
    model_module.save_checkpoint(tmp_path / "last.pt", {"step": 1})
    assert calls == ["fsync", "replace"] and [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_a_full_disk_leaves_the_previous_checkpoint(small, tmp_path):
    out = tmp_path / "run"
    train.main([*RUN, "--data", str(small), "--max-steps", "2", "--out", str(out)])
    before = (out / "last.pt").read_bytes()
    (out / "last.pt.part").symlink_to("/dev/full")
    with pytest.raises(SystemExit, match="can't write .*last.pt .* any from before is whole. Make room, then --resume"):
        train.main(["--resume", "--resume-anyway", "--max-steps", "4", "--out", str(out), "--data", str(small)])
    assert (out / "last.pt").read_bytes() == before and not (out / "last.pt.part").exists()
    assert read_checkpoint(out / "last.pt")["step"] == 2


def test_a_model_of_words_learns_new_ones_and_one_of_berts_keeps_its_own(trained, tmp_path, monkeypatch, capsys):
    (best,) = (trained / "runs").glob("*/best.pt")
    write_own(tmp_path / "mugs", [OWN, {**OWN, "split": "val"}])
    monkeypatch.chdir(tmp_path)
    command = ["--dataset", "mugs", "--model", "tiny", "--batch-size", "1", "--max-steps", "1", "--lr", "0"]
    train.main([*command, "--init", str(best), "--out", "a"])
    assert f"1 words of the training expressions are new to {best}" in capsys.readouterr().out
    before, after = read_checkpoint(best), read_checkpoint("a/last.pt")
    known, table = before["tokenizer"]["vocab"], "bert.embeddings.word_embeddings.weight"
    assert after["tokenizer"]["vocab"] == {**known, "mug": len(known)}
    assert torch.equal(after["model"].pop(table)[:-1], before["model"].pop(table))
    assert all(torch.equal(value, after["model"][name]) for name, value in before["model"].items())
    pieces = read_checkpoint(best)
    pieces["tokenizer"]["vocab"] = {f"##{word}" if word == "star" else word: i for word, i in known.items()}
    torch.save(pieces, "pieces.pt")
    train.main([*command, "--init", "pieces.pt", "--out", "b"])
    assert read_checkpoint("b/last.pt")["tokenizer"]["vocab"] == pieces["tokenizer"]["vocab"]


# data.py


def random_polygon(rng) -> list[float]:
    kind = rng.integers(6)
    points = rng.uniform(-20, 60, (int(rng.integers(3, 12)), 2))  # crosses itself and leaves the image
    if kind == 1:
        points = rng.integers(-5, 50, points.shape).astype(float)  # whole and half pixels
        points += rng.choice([0, 0.5])
    if kind == 2:
        points = rng.uniform(10, 11.5, points.shape)  # less than a pixel
    if kind == 3:
        points = np.repeat(points, 2, axis=0)  # each point twice
    if kind == 4:
        points = np.array([[0, 0], [40, 0], [40, 30], [0, 30]]) + rng.choice([0, 0.1, -0.1], (4, 2))  # the image's edge
    if kind == 5:
        points[:, rng.integers(2)] = rng.uniform(0, 30)  # no area
    return points.ravel().tolist()


def test_masks_are_cocos_to_the_pixel():
    coco = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed; pip install pycocotools")
    rng = np.random.default_rng(0)
    height, width = 30, 40
    filled = 0
    for trial in range(1500):
        polygons = [random_polygon(rng) for _ in range(int(rng.integers(1, 4)))]
        theirs = coco.decode(coco.merge(coco.frPyObjects(polygons, height, width))).astype(bool)
        ours = data.rasterize(polygons + [[1.0, 1.0, 30.0, 30.0]], height, width)  # two points cover nothing
        assert np.array_equal(ours, theirs), polygons
        filled += theirs.any()
        rle = coco.encode(np.asfortranarray(theirs.astype(np.uint8)))
        assert np.array_equal(
            data.rasterize({"size": [height, width], "counts": rle["counts"].decode()}, height, width), theirs
        )
        flat = theirs.T.ravel()
        edges = np.flatnonzero(np.diff(np.concatenate([[False], flat, [not flat[-1]]]).astype(int)))
        counts = np.diff(np.concatenate([[0], edges])).tolist()
        assert np.array_equal(data.rasterize({"size": [height, width], "counts": counts}, height, width), theirs)
    assert filled > 1000


def test_a_list_of_rles_and_polygons_is_their_union():
    coco = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed; pip install pycocotools")
    rng, size = np.random.default_rng(0), [30, 40]
    for _ in range(100):
        encoded = [coco.merge(coco.frPyObjects([random_polygon(rng)], *size)) for _ in range(3)]
        theirs = coco.decode(coco.merge(encoded)).astype(bool)
        rles = [{"size": size, "counts": one["counts"].decode()} for one in encoded]
        assert np.array_equal(data.rasterize(rles, *size), theirs)
        polygon = random_polygon(rng)
        theirs |= coco.decode(coco.merge(coco.frPyObjects([polygon], *size))).astype(bool)
        assert np.array_equal(data.rasterize([*rles, polygon], *size), theirs)


def test_a_polygon_may_reach_far_out_of_the_image():
    coco = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed; pip install pycocotools")
    rng = np.random.default_rng(0)
    for reach in (100, 600, 5000, 50_000):
        for _ in range(20):
            polygon = rng.uniform(-reach, reach, int(rng.integers(3, 9)) * 2).tolist()
            theirs = coco.decode(coco.merge(coco.frPyObjects([polygon], 6, 35))).astype(bool)
            assert np.array_equal(data.rasterize([polygon], 6, 35), theirs), polygon


def test_a_wrong_rle_is_refused():
    for counts in ([3, 4], [5, -1, 8], "o" * 10**6 + "0", "04", "P", [2**63 - 1, 2**63 - 1, 14], [2**63, 1], [float("nan")], None):
        with pytest.raises(data.InputError, match="can't be drawn"):
            data.rasterize({"size": [3, 4], "counts": counts}, 3, 4)
    nan = float("nan")
    far = [0, 0, 2e6, 1, 2, 2]
    for polygons in ([[0, 0, nan, 1, 2, 2]], [[1e300] * 6], [far], [[0, 0, 1, 1, 2]], [["a"] * 6], [None], [1, 2, 3]):
        with pytest.raises(data.InputError, match="can't be drawn"):
            data.rasterize(polygons, 3, 4)


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def test_a_hostile_refs_pickle_is_refused_and_nothing_runs(tmp_path):
    for protocol in (0, 2, 4):
        (tmp_path / "refs.p").write_bytes(pickle.dumps([{"split": Hostile(tmp_path / "ran")}], protocol))
        with pytest.raises(data.InputError, match="refused"):
            data.read_refs(tmp_path / "refs.p")
    (tmp_path / "refs.p").write_bytes(b"cantigravity\nfly\n.")  # would only import
    with pytest.raises(data.InputError, match="antigravity"):
        data.read_refs(tmp_path / "refs.p")
    assert not (tmp_path / "ran").exists() and "antigravity" not in sys.modules
    bomb = []
    for _ in range(60):  # a kilobyte that would unfold to 10 ** 60 lists
        bomb = [bomb] * 10
    (tmp_path / "refs.p").write_bytes(pickle.dumps([{"split": bomb}], 2))
    with pytest.raises(data.InputError, match="is not a list of refs"):
        data.read_refs(tmp_path / "refs.p")


def python_2_pickle(value, protocol: int) -> bytes:
    """The opcodes that Python 2 wrote for numbers, byte strings (str there), unicode, lists and dicts."""

    def write(v) -> bytes:
        if isinstance(v, int):
            return b"I%d\n" % v if protocol == 0 else b"J" + v.to_bytes(4, "little", signed=True)
        if isinstance(v, bytes):
            if protocol == 0:
                return b"S" + repr(v)[1:].encode() + b"\n"
            return b"U" + bytes([len(v)]) + v if len(v) < 256 else b"T" + len(v).to_bytes(4, "little") + v
        if isinstance(v, str):
            encoded = v.encode("raw_unicode_escape" if protocol == 0 else "utf-8")
            return b"V" + encoded + b"\n" if protocol == 0 else b"X" + len(encoded).to_bytes(4, "little") + encoded
        if isinstance(v, list):
            items = [write(item) for item in v]
            return b"(l" + b"".join(item + b"a" for item in items) if protocol == 0 else b"](" + b"".join(items) + b"e"
        pairs = [(write(key), write(item)) for key, item in v.items()]
        if protocol == 0:
            return b"(d" + b"".join(key + item + b"s" for key, item in pairs)
        return b"}(" + b"".join(key + item for key, item in pairs) + b"u"

    return (b"\x80\x02" if protocol == 2 else b"") + write(value) + b"."


WORDS = ["man on the left".encode(), "caf\u00e9 table".encode(), "caf\u00e9 chair".encode("latin-1"), "\u732b on sofa"]


def write_refer(folder: Path, name: str, images: str, protocol: int, size=(80, 60), scenes: int = 4) -> Path:
    """A miniature of a REFER dataset in its exact layout: `scenes` images a split, two objects each."""
    refs_file, rng = folder / data.DATASETS[name][0], np.random.default_rng(0)
    refs_file.parent.mkdir(parents=True)
    (folder / images).mkdir(parents=True)
    width, height = size
    instances = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "thing"}]}
    refs = []
    for split in data.DATASETS[name][1]:
        for _ in range(scenes):
            image_id = 1000 + len(instances["images"])
            file = f"COCO_train2014_{image_id:012d}.jpg"
            Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / images / file)
            instances["images"].append({"id": image_id, "file_name": file, "height": height, "width": width})
            for k in range(2):
                ann_id = 5000 + len(instances["annotations"])
                left = k * width / 2
                polygon = [left + 2.5, 3, left + width / 3, 3, left + width / 3, height - 4.5, left + 2.5, height - 4.5]
                rle = {"size": [height, width], "counts": [300, 200, height * width - 500]}
                annotation = {"id": ann_id, "image_id": image_id, "category_id": 1, "segmentation": rle}
                if k:
                    annotation["segmentation"] = [polygon, [1.0, 1.0, 2.0, 2.0]]
                instances["annotations"].append(annotation)
                sentences = [
                    {b"sent_id": 10 * len(refs) + i, b"sent": b"x", b"raw": WORDS[(len(refs) + i) % 4], b"tokens": [b"x"]}
                    for i in range(2)
                ]
                refs.append({
                    b"ref_id": len(refs), b"ann_id": ann_id, b"image_id": image_id, b"category_id": 1, b"split": split.encode(),
                    b"file_name": file.replace(".jpg", f"_{k}.jpg").encode(), b"sent_ids": [s[b"sent_id"] for s in sentences], b"sentences": sentences,
                })  # fmt: skip
    refs_file.with_name("instances.json").write_text(json.dumps(instances))
    refs_file.write_bytes(python_2_pickle(refs, protocol))
    return folder


COCO_PLACES = ("images/train2014", "images/mscoco/images/train2014")
MINIATURE = ("--model", "tiny", "--set", "image_size=32", "--batch-size", "2")


@pytest.mark.parametrize(
    "name, images, protocol", [("refcoco", 0, 0), ("refcoco+", 1, 2), ("refcocog-umd", 0, 2), ("refcocog-google", 1, 0)]
)
def test_a_miniature_refcoco_trains_evaluates_and_is_checked(name, images, protocol, tmp_path, capsys):
    folder = write_refer(tmp_path / "data", name, COCO_PLACES[images], protocol)
    common = ["--dataset", name, "--data", str(folder)]
    scores = train.main([*common, *MINIATURE, "--workers", "0", "--max-steps", "2", "--out", str(tmp_path / "run")])
    assert list(scores) == list(data.DATASETS[name][1])[1:]
    assert all(row["samples"] == 16 for row in scores.values())
    last = list(scores)[-1]
    again = evaluate.main([*common, "--checkpoint", str(tmp_path / "run" / "best.pt"), "--split", last])
    assert again == {last: scores[last]}
    _, tokenizer = restore(read_checkpoint(tmp_path / "run" / "best.pt"), torch.device("cpu"))
    assert {"cafe", "left", "\u732b"} <= set(tokenizer.get_vocab())  # BERT strips accents

    capsys.readouterr()
    with pytest.raises(SystemExit):  # the sizes are not the real ones
        data.main(["--check", name, "--data", str(folder), "--all"])
    printed = capsys.readouterr().out
    assert printed.count("WRONG") == len(data.DATASETS[name][1]) and "image files missing" in printed
    some = sorted((folder / COCO_PLACES[images]).iterdir())
    some[0].unlink()
    some[1].write_bytes(some[1].read_bytes()[:200])
    with pytest.raises(SystemExit):
        data.main(["--check", name, "--data", str(folder), "--all"])
    printed = capsys.readouterr().out
    assert f"missing: {some[0].name}" in printed and f"{some[1].name} can't be read as an image" in printed


@pytest.mark.slow
def test_check_misses_no_ref_of_the_real_sizes(tmp_path, capsys, monkeypatch):
    """refcoco+ as large as the real one, on one small image under 19,992 names; then without one ref of each split."""
    monkeypatch.chdir(tmp_path)
    images, folder = tmp_path / "images" / "train2014", tmp_path / "refcoco+"
    images.mkdir(parents=True), folder.mkdir()
    Image.new("RGB", (8, 8)).save(images / "0.jpg")
    segmentation, refs = [[1, 1, 6, 1, 6, 6]], []
    for split, (objects, pictures) in data.DATASETS["refcoco+"][1].items():
        start = len({ref["image_id"] for ref in refs})
        sentences = [{"sent_id": 0, "raw": "thing", "sent": "thing", "tokens": ["thing"]}]
        refs += [{"ref_id": i, "ann_id": 0, "image_id": start + i % pictures, "split": split, "sentences": sentences} for i in range(objects)]  # fmt: skip
    names = sorted({ref["image_id"] for ref in refs})
    for i in names[1:]:
        (images / f"{i}.jpg").hardlink_to(images / "0.jpg")
    entries = [{"id": i, "file_name": f"{i}.jpg", "height": 8, "width": 8} for i in names]
    annotations = [{"id": 0, "image_id": 0, "segmentation": segmentation}]
    (folder / "instances.json").write_text(json.dumps({"images": entries, "annotations": annotations}))
    for without in (None, "train", "val", "testA", "testB"):
        lost = next((i for i, ref in enumerate(refs) if ref["split"] == without), len(refs))
        (folder / "refs(unc).p").write_bytes(pickle.dumps(refs[:lost] + refs[lost + 1 :], 2))
        data.read_dataset.cache_clear()
        assert data.check("refcoco+", str(tmp_path)) == (without is None)
        wrong = [line for line in capsys.readouterr().out.splitlines() if "WRONG" in line]
        assert [line.split(":")[0] for line in wrong] == [without] * (without is not None)


@pytest.mark.parametrize(
    "broken",
    [
        [{}], [{"ref_id": 1}], [1], {"a": 1}, [{"image_id": 1004, "ann_id": 5000, "split": "val", "sentences": [{}]}],
        [{"image_id": [], "ann_id": 5000, "split": "val", "sentences": ["x"]}],
        [{"image_id": 1004, "ann_id": 1, "split": "val", "sentences": ["x"]}],
        [{"image_id": 1004, "ann_id": 5000, "split": "val", "sentences": []}],
        [{"image_id": 1004, "ann_id": 5000, "split": "val", "sentences": [7]}],
        [{"image_id": 1004, "ann_id": 5000, "split": "val", "sentences": "text"}],
    ],
)  # fmt: skip
def test_check_tells_malformed_refs_in_one_line(broken, tmp_path, monkeypatch):
    folder = write_refer(tmp_path / "data", "refcoco", COCO_PLACES[0], 2)
    (folder / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(broken, 2))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        data.main(["--check", "refcoco", "--data", str(folder)])
    assert str(stopped.value.code).startswith("error: ") and len(stopped.value.code.splitlines()) == 1


def edit(folder: Path, key: str, value) -> None:
    """Set a key of every image or annotation of the miniature RefCOCO."""
    file = folder / "refcoco" / "instances.json"
    instances = json.loads(file.read_text())
    for entry in instances["annotations" if key == "segmentation" else "images"]:
        entry[key] = value
    file.write_text(json.dumps(instances))


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize(
    "break_it, message",
    [
        (lambda f: (f / "refcoco" / "refs(unc).p").unlink(), "refs(unc).p is missing"),
        (lambda f: (f / "refcoco" / "instances.json").write_text("{"), "instances.json is not JSON"),
        (lambda f: (f / "refcoco" / "instances.json").write_text("[]"), "not in REFER's format"),
        (lambda f: (f / "refcoco" / "refs(unc).p").write_bytes(b"\x80\x02]("), "is not a list of refs"),
        (lambda f: (f / "refcoco" / "refs(unc).p").write_bytes(b"\x80\x02]."), "has no split 'train'; it has none"),
        (lambda f: edit(f, "file_name", "../../secret.jpg"), "leads out of its folder"),
        (lambda f: edit(f, "height", None), "not in order"),
        (lambda f: edit(f, "height", 700), "its mask would not fit"),
        (lambda f: edit(f, "segmentation", [[0, 0, 1e300, 3, 3, 3]]), "can't be drawn"),
        (lambda f: edit(f, "segmentation", "x"), "can't be drawn"),
        (lambda f: edit(f, "segmentation", [[math.nan] * 6]), "a polygon is nan pixels long"),
        (lambda f: edit(f, "segmentation", [[1, 2, 3, 4, 5, 6, 7]]), "can't be drawn"),
        (lambda f: edit(f, "segmentation", {"size": [60, 80], "counts": [1, 2]}), "can't be drawn"),
        (lambda f: (f / COCO_PLACES[0]).rename(f / "elsewhere"), "no image folder"),
        (lambda f: [p.unlink() for p in (f / COCO_PLACES[0]).iterdir()], "there is no image"),
        (lambda f: [p.write_bytes(p.read_bytes()[:300]) for p in (f / COCO_PLACES[0]).iterdir()], "can't be read as an image"),
        (lambda f: [p.write_text("<html>") for p in (f / COCO_PLACES[0]).iterdir()], "can't be read as an image"),
    ],
)  # fmt: skip
def test_broken_data_is_told_in_one_line(break_it, message, workers, tmp_path, capfd):
    folder = write_refer(tmp_path / "data", "refcoco", COCO_PLACES[0], 2)
    break_it(folder)
    command = ["--dataset", "refcoco", "--data", str(folder), *MINIATURE]
    with pytest.raises(SystemExit) as stopped:
        train.main([*command, "--workers", workers, "--out", str(tmp_path / "run")])
    assert message in stopped.value.code and "Traceback" not in stopped.value.code
    assert len(stopped.value.code.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_missing_data_is_told_in_a_few_lines(tmp_path):
    done = run(HERE / "train.py", "--dataset", "refcoco", cwd=tmp_path)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "instances.json is missing" in done.stderr and "README" in done.stderr
    assert not list(tmp_path.iterdir())


def write_own(folder: Path, refs: list, images=("desk.jpg", "shelf.jpg"), entries=None) -> Path:
    """A folder with photographs of one size, instances.json and refs.json."""
    for image in images:
        (folder / "images" / image).parent.mkdir(parents=True, exist_ok=True)
        Image.linear_gradient("L").resize((120, 100)).save(folder / "images" / image)
    instances = {"images": entries or [{"file_name": image} for image in images]}
    (folder / "instances.json").write_text(json.dumps(instances))
    (folder / "refs.json").write_text(json.dumps(refs))
    return folder


def go_the_whole_way(folder: Path, tmp_path, monkeypatch, *flags, image="images/desk.jpg") -> dict:
    """Check, train, evaluate and segment through the command line, in tmp_path."""
    monkeypatch.chdir(tmp_path)
    data.main(["--check", str(folder)])
    assert Image.open(next(Path("runs").glob("check-*.png"))).width > 700
    scores = train.main(["--dataset", str(folder), *MINIATURE[:4], "--batch-size", "1", "--max-steps", "2", *flags])
    assert evaluate.main(["--split", *scores]) == scores
    evaluate.main(["--image", str(Path(folder).parent / image if Path(folder).is_file() else folder / image), "--expression", "red mug"])
    assert list(Path("runs").glob("*/photographs/*-red-mug.mask.png"))
    return scores


def test_the_readmes_own_data_runs_as_it_is_printed(tmp_path, monkeypatch):
    section = (HERE / "README.md").read_text().split("## Your own data")[1].split("\n## ")[0]
    assert len(section.splitlines()) <= 50  # one screen
    instances, refs = re.search(r"`({.*})`", section)[1], re.search(r"```json\n(.*?)```", section, re.DOTALL)[1]
    folder = write_own(tmp_path / "mugs", json.loads(refs))
    (folder / "instances.json").write_text(instances)
    (commands,) = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for line in commands.splitlines():
        _, script, *arguments = shlex.split(line, comments=True)
        {"data.py": data, "train.py": train, "evaluate.py": evaluate}[script].main(arguments)
    (out,) = Path("runs").glob("mugs-*")
    assert {"best.pt", "pictures-val.png", "shelf.jpg-sheet.png"} <= {path.name for path in out.rglob("*")}
    assert Image.open(out / "photographs" / "shelf.jpg-2-the-mug-on-the-left.mask.png").size == (120, 100)
    objects, _ = data.read_dataset("mugs", "data")
    (item,) = objects["val"]
    assert (item.height, item.width, item.ref_id, item.sent_ids) == (100, 120, 1, [2, 3])


def test_a_miniature_rrsis_d_trains_and_evaluates(tmp_path, monkeypatch):
    """Its layout: a pickle, images two folders down, each segmentation a list with one RLE; three splits."""
    coco = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed; pip install pycocotools")
    folder = write_own(tmp_path / "rrsisd", [], [f"rrsisd/JPEGImages/{i:05d}.jpg" for i in range(3)])
    mask = np.zeros((100, 120), dtype=np.uint8, order="F")
    mask[10:40, 20:70] = 1
    rle = {key: value.decode() if key == "counts" else value for key, value in coco.encode(mask).items()}
    images = [{"id": i, "file_name": f"{i:05d}.jpg", "height": 100, "width": 120} for i in range(3)]
    annotations = [{"id": 10 + i, "image_id": i, "segmentation": [rle], "bbox": [20, 10, 50, 30]} for i in range(3)]
    (folder / "instances.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    (folder / "refs.json").unlink()
    refs = [
        {b"ref_id": i, b"ann_id": 10 + i, b"image_id": i, b"category_id": 1, b"split": split, b"sent_ids": [i],
         b"file_name": b"x", b"sentences": [{b"sent_id": i, b"sent": b"a ship", b"raw": b"a ship", b"tokens": [b"a"]}]}
        for i, split in enumerate((b"train", b"val", b"test"))
    ]  # fmt: skip
    (folder / "refs(unc).p").write_bytes(python_2_pickle(refs, 2))
    scores = go_the_whole_way(folder, tmp_path, monkeypatch, image="images/rrsisd/JPEGImages/00001.jpg")
    assert set(scores) == {"val", "test"}
    assert np.array_equal(data.RefDataset(str(folder), "test").mask(0), mask)


def test_a_miniature_refcoco_m_trains_and_evaluates(tmp_path, monkeypatch):
    """Its kind of mask: one RLE a target. A second refs file beside it; the images are elsewhere."""
    rle = {"size": [100, 120], "counts": [500, 700, 10_800]}
    refs = [{"ann_id": i, "image_id": i, "split": split, "sentences": ["red mug"]} for i, split in enumerate(["train", "val"])]  # fmt: skip
    images = [{"id": i, "file_name": f"{name}.jpg", "height": 100, "width": 120} for i, name in enumerate(["desk", "shelf"])]  # fmt: skip
    annotations = [{"id": i, "image_id": i, "segmentation": rle} for i in range(2)]
    folder = write_own(tmp_path / "m", refs)
    (folder / "instances.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    (folder / "refs(other).p").write_bytes(pickle.dumps(refs, 2))
    with pytest.raises(data.InputError, match=r"several refs files; name one of them: .*refs\(other\).p, .*refs.json"):
        data.RefDataset(str(folder), "val")
    assert go_the_whole_way(folder / "refs.json", tmp_path, monkeypatch)["val"]["samples"] == 1
    (folder / "images").rename(tmp_path / "elsewhere")
    with pytest.raises(data.InputError, match="no image folder .*images: say where .* --images DIR"):
        data.RefDataset(str(folder / "refs(other).p"), "val")
    dataset = data.RefDataset(str(folder / "refs(other).p"), "val", images=str(tmp_path / "elsewhere"))
    assert dataset.image(0).size == (120, 100) and dataset.mask(0).sum() == 700


def test_a_text_of_broken_unicode_is_read(tmp_path):
    dataset = tokenized(str(write_own(tmp_path, [{**OWN, "sentences": ["\ud800 mug", " "]}])), "train")
    assert dataset.expressions == ["? mug", ""]


def test_check_counts_masks_without_a_pixel(tmp_path, monkeypatch, capsys):
    """A box where a polygon should be is the likeliest mistake: two points cover nothing."""
    monkeypatch.chdir(tmp_path)
    data.main(["--check", str(write_own(tmp_path / "mugs", [OWN, {**OWN, "segmentation": [[20, 30, 40, 50]]}]))])
    assert re.search(r"masks without a pixel +1\b", capsys.readouterr().out)


def test_an_image_lies_as_deep_as_its_name_says(tmp_path):
    folder = write_own(tmp_path, [{**OWN, "image_id": "a/b/desk.jpg"}, {**OWN, "image_id": "shelf.jpg"}], ["shelf.jpg", "a/b/desk.jpg"])  # fmt: skip
    dataset = data.RefDataset(str(folder), "train")
    assert [dataset.object(i).file_name for i in range(2)] == ["shelf.jpg", "a/b/desk.jpg"]  # as instances.json has them
    assert dataset.image(1).size == (120, 100)


OWN = {"image_id": "desk.jpg", "split": "train", "sentences": ["red mug"], "segmentation": [[20, 30, 60, 30, 60, 80]]}


@pytest.mark.parametrize(
    "break_it, message",
    [
        (lambda f: (f / "instances.json").unlink(), "instances.json is missing"),
        (lambda f: (f / "refs.json").unlink(), "refs.json is missing"),
        (lambda f: (f / "refs(a).p").write_bytes(b""), "holds several refs files; name one of them: "),
        (lambda f: write_own(f, {"refs": [OWN]}), "is not a list of refs"),
        (lambda f: write_own(f, [OWN, {**OWN, "split": "training"}]), "has no split 'val'; it has train, training"),
        (lambda f: write_own(f, [{**OWN, "split": "training"}]), "has no split 'train'; it has training"),
        (lambda f: write_own(f, [{**OWN, "sentences": [5]}]), "a list of one or more texts"),
        (lambda f: write_own(f, [{**OWN, "sentences": []}]), "a list of one or more texts"),
        (lambda f: write_own(f, [{**OWN, "sentences": "red mug"}]), "a list of one or more texts"),
        (lambda f: write_own(f, [{**OWN, "image_id": "sofa.jpg"}]), "there is no image 'sofa.jpg'"),
        (lambda f: write_own(f, [{**OWN, "split": "a/b"}]), "must be a name of letters and digits, not 'a/b'"),
        (lambda f: write_own(f, [{**OWN, "split": "--json"}]), "must be a name of letters and digits, not '--json'"),
        (lambda f: write_own(f, [{**OWN, "split": " train"}]), "must be a name of letters and digits, not ' train'"),
        (lambda f: write_own(f, [{**OWN, "split": None}]), "must be a name of letters and digits, not None"),
        (lambda f: write_own(f, [{**OWN, "sentences": {"a": 1}}]), "a list of one or more texts"),
        (lambda f: write_own(f, [{**OWN, "sentences": ["a", 5]}]), "a list of one or more texts"),
        (lambda f: write_own(f, [{**OWN, "segmentation": [20, 30, 60, 30, 60, 80]}, {**OWN, "split": "val"}]), "must be a list of polygons [x0"),
        (lambda f: write_own(f, [OWN], entries=[{"file_name": "desk.jpg", "width": 0, "height": 0}]), "cannot have 0 x 0 pixels"),
        (lambda f: write_own(f, [OWN], entries=[{"file_name": "desk.jpg", "width": 1e6, "height": 1e6}]), "cannot have 1000000 x 1000000 pixels"),
        (lambda f: write_own(f, [OWN], entries=[{"file_name": "desk.jpg", "width": math.inf, "height": 8}]), "OverflowError"),
        (lambda f: write_own(f, [OWN], entries=[{"file_name": "desk.jpg"}, {"file_name": "desk.jpg"}]), "two images of the same id"),
        (lambda f: (f / "instances.json").write_text("[" * 200_000), "is not JSON"),
        (lambda f: ((f / "images" / "desk.jpg").unlink(), os.mkfifo(f / "images" / "desk.jpg")), "there is no image"),
        (lambda f: write_own(f, [{**OWN, "segmentation": {"size": [200, 240], "counts": [48000]}}, {**OWN, "split": "val"}]), "does not fill an image of 100 x 120"),
        (lambda f: write_own(f, [{k: v for k, v in OWN.items() if k != "segmentation"}]), "no segmentation here or under its ann_id"),
        (lambda f: write_own(f, [{**OWN, "image_id": "../x.jpg"}], images=["desk.jpg", "../x.jpg"]), "leads out of its folder"),
        (lambda f: write_own(f, [{**OWN, "image_id": "/x.jpg"}], entries=[{"file_name": "/x.jpg"}]), "leads out of its folder"),
        (lambda f: ((f / "images" / "desk.jpg").unlink(), (f / "images" / "desk.jpg").symlink_to(HERE / "assets" / "shapes.png")), "leads out of its folder"),
        (lambda f: (f / "images" / "desk.jpg").write_text("<html>"), "desk.jpg can't be read as an image"),
    ],
)  # fmt: skip
def test_a_wrong_folder_is_told_in_one_line(break_it, message, tmp_path, monkeypatch):
    folder = write_own(tmp_path / "mugs", [OWN])
    break_it(folder)
    monkeypatch.chdir(tmp_path)
    data.read_dataset.cache_clear()
    with pytest.raises(SystemExit) as stopped:
        train.main(["--dataset", "mugs", *MINIATURE[:4], "--batch-size", "1", "--workers", "0", "--max-steps", "1"])
    assert message in stopped.value.code and len(stopped.value.code.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_a_split_holds_its_own_objects_sentences_and_masks(tmp_path):
    folder = write_refer(tmp_path, "refcoco", COCO_PLACES[0], 2)
    with pytest.raises(data.InputError, match="testC.*train, val, testA, testB"):
        data.RefDataset("refcoco", "testC", folder)
    dataset = data.RefDataset("refcoco", "val", folder)
    assert [number for number, _ in dataset.sentences] == [i // 2 for i in range(16)]
    assert dataset.objects[0].file_name == "COCO_train2014_000000001004.jpg"
    assert dataset.mask(0).sum() == 200 and dataset.expressions[0] == WORDS[0].decode()


def test_masks_lie_on_the_stored_pixels_and_photographs_are_shown_upright(tmp_path):
    folder = write_refer(tmp_path, "refcoco", COCO_PLACES[0], 2)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter to be seen
    for file in (folder / COCO_PLACES[0]).iterdir():
        Image.open(file).convert("RGB").save(file, exif=exif)
    dataset = data.RefDataset("refcoco", "val", folder)
    assert dataset.image(0).size == (80, 60) and dataset.mask(0).shape == (60, 80)
    assert data.open_image(file).size == (60, 80)


def test_a_blank_sentence_counts(tmp_path):
    folder = write_refer(tmp_path, "refcoco", COCO_PLACES[0], 2)
    refs = data.read_refs(folder / "refcoco" / "refs(unc).p")
    for ref in refs:
        ref["sentences"][0]["raw"] = " "
    (folder / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    dataset = tokenized("refcoco", "val", folder, image_size=32)
    assert len(dataset) == 16 and dataset[0]["attention_mask"].sum() == 2  # [CLS] and [SEP]


def test_training_sentences_depend_on_seed_epoch_and_object_alone(small):
    dataset = tokenized("shapes", "train", small, training=True, seed=3)
    drawn = [[dataset[(epoch, i)]["index"] for i in range(len(dataset))] for epoch in (0, 1, 0)]
    assert drawn[0] == drawn[2] != drawn[1]
    assert all(index // 2 == i for i, index in enumerate(drawn[0]))  # two sentences an object
    sampler = lambda rank, world: list(train.training_batches(len(dataset), 8, 0, 9, 3, rank, world))
    whole = sampler(0, 1)
    assert whole == [a + b for a, b in zip(sampler(0, 2), sampler(1, 2))]
    epoch = [number for batch in whole[: len(dataset) // 8] for _, number in batch]
    assert len(set(epoch)) == len(epoch) and {e for e, _ in whole[0]} == {0} and {e for e, _ in whole[8]} == {1}
    assert list(train.training_batches(len(dataset), 8, 5, 9, 3)) == whole[5:]


def test_the_sentences_of_an_image_decode_it_once(tmp_path, monkeypatch):
    folder = write_refer(tmp_path, "refcoco", COCO_PLACES[0], 2)
    dataset = tokenized("refcoco", "val", folder, image_size=32)
    opened = []
    real = data.open_image
    monkeypatch.setattr(data, "open_image", lambda path, **flags: opened.append(path) or real(path, **flags))
    assert len([dataset[index] for index in range(len(dataset))]) == 16 and len(opened) == 4


def test_shapes_are_what_the_design_asks_for(tmp_path):
    """From the files alone: annotations' attributes and polygons against what the sentences say."""
    data.RefDataset("shapes", "val", tmp_path)  # writes the dataset, as the first training run does
    folder = tmp_path / "shapes"
    instances = json.loads((folder / "instances.json").read_text())
    refs = pickle.loads((folder / "refs(shapes).p").read_bytes())
    scenes = collections.defaultdict(list)
    for annotation in instances["annotations"]:
        (polygon,) = annotation["segmentation"]
        x, y = np.array(polygon).reshape(-1, 2).T
        cross = x * np.roll(y, -1) - np.roll(x, -1) * y
        area = cross.sum() / 2
        center = ((x + np.roll(x, -1)) * cross).sum() / (6 * area), ((y + np.roll(y, -1)) * cross).sum() / (6 * area)
        scenes[annotation["image_id"]].append(
            {**annotation["attributes"], "id": annotation["id"], "center": center, "area": abs(area)}
        )

    attributes = {key: {o[key] for scene in scenes.values() for o in scene} for key in ("shape", "color", "size")}
    assert len(attributes["shape"]) >= 4 and len(attributes["color"]) >= 6 and attributes["size"] == {"small", "large"}
    assert {len(scene) for scene in scenes.values()} == {3, 4, 5, 6}
    areas = {
        size: [o["area"] for scene in scenes.values() for o in scene if o["size"] == size]
        for size in ("small", "large")
    }
    assert min(areas["large"]) > 1.5 * max(areas["small"])

    def named(scene, phrase):  # objects that fit "large red circle", "red thing", ..
        words = [word for word in phrase.split() if word not in ("the", "thing")]
        assert words and all(any(word in values for values in attributes.values()) for word in words), phrase
        return [o for o in scene if all(word in o.values() for word in words)]

    axes = {
        "left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "above": (0, -1), "over": (0, -1), "below":
        (0, 1), "under": (0, 1),
    }  # fmt: skip
    relation = re.compile(r"(.+?) (?:to the )?(left of|right of|above|over|below|under) the (.+)")
    place = re.compile(r"(?:(left|right|top|bottom) )?(.+?)(?: (?:on|at) the (left|right|top|bottom))?")
    margin = 10  # pixels of 128

    def along(o, word):
        return np.dot(o["center"], axes[word])

    kinds = collections.defaultdict(collections.Counter)
    targets = {ref["ann_id"]: ref for ref in refs}
    assert len(targets) == len(refs)
    for ref in refs:
        scene = scenes[ref["image_id"]]
        (target,) = [o for o in scene if o["id"] == ref["ann_id"]]
        for sentence in (s["raw"] for s in ref["sentences"]):
            if match := relation.fullmatch(sentence):
                phrase, word, landmark_phrase = match[1], match[2].split()[0], match[3]
                (landmark,) = named(scene, landmark_phrase)
                fits = [o for o in named(scene, phrase) if o is not landmark and along(o, word) > along(landmark, word)]
                assert len(named(scene, phrase)) > 1 and along(target, word) - along(landmark, word) >= margin, sentence
                kind = "relation"
            elif (match := place.fullmatch(sentence)) and (match[1] or match[3]):
                word = match[1] or match[3]
                ranked = sorted(named(scene, match[2]), key=lambda o: -along(o, word))
                assert len(ranked) > 1 and along(ranked[0], word) - along(ranked[1], word) >= margin, sentence
                fits, kind = ranked[:1], "place"
            else:
                fits, kind = named(scene, sentence), "attribute"
            assert fits == [target], sentence  # true of the target and of nothing else
            kinds[ref["split"]][kind] += 1

    for split in ("train", "val"):
        assert set(kinds[split].values()) == {sum(kinds[split].values()) // 3}  # equal thirds
    assert set(kinds["testA"]) == {"attribute"} and set(kinds["testB"]) == {"place", "relation"}
    image_area = instances["images"][0]["height"] * instances["images"][0]["width"]
    picked = [(o, scene) for scene in scenes.values() for o in scene if o["id"] in targets]
    assert np.median([o["area"] for o, _ in picked]) / image_area <= 0.04
    rivals = [
        any(p is not o and (p["shape"] == o["shape"] or p["color"] == o["color"]) for p in scene) for o, scene in picked
    ]
    assert np.mean(rivals) >= 2 / 3

    splits = collections.defaultdict(set)
    for ref in refs:
        splits[ref["split"]].add(ref["image_id"])
    assert sum(map(len, splits.values())) == len(instances["images"])  # no image in two splits
    content = {tuple((o["shape"], o["color"], o["size"], o["center"]) for o in scene) for scene in scenes.values()}
    assert len(content) == len(scenes)  # no scene twice
    pixels = np.asarray(Image.open(folder / "images" / instances["images"][0]["file_name"]).convert("RGB"), dtype=float)
    assert np.abs(np.diff(pixels[:8, :8], axis=1)).mean() > 3  # noise


def test_shapes_are_the_same_to_the_byte(small, tmp_path):
    data.generate_shapes(tmp_path / "shapes", scenes=SMALL)
    files = [path.relative_to(small) for path in small.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert filecmp.cmpfiles(small, tmp_path, files, shallow=False) == (files, [], [])


def test_shapes_are_a_folder_like_any_other(small, tmp_path):
    logs = []
    for name, flags in (("known", []), ("folder", ["--dataset", str(small / "shapes"), "--model", "tiny"])):
        train.main(["--data", str(small), *RUN, "--max-steps", "4", "--out", str(tmp_path / name), *flags])
        logs.append(log_of(tmp_path / name))
    assert logs[0] == logs[1]


@pytest.mark.slow
def test_a_dataset_of_refcocos_size_fits_in_memory(tmp_path, capsys):
    """20,000 images, 50,000 objects, 142,000 sentences. `pytest -m slow -k fits_in_memory -s` prints the figures."""
    rng, splits = np.random.default_rng(0), ("train",) * 17 + ("val", "testA", "testB")
    folder = tmp_path / "images" / "train2014"
    folder.mkdir(parents=True)
    (tmp_path / "refcoco").mkdir()
    noise = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
    noise.resize((640, 480), Image.Resampling.BICUBIC).save(folder / "0.jpg", quality=90)
    images, annotations, refs = [], [], []
    for i in range(20_000):
        if i:
            (folder / f"{i}.jpg").hardlink_to(folder / "0.jpg")
        images.append({"id": i, "file_name": f"{i}.jpg", "height": 480, "width": 640})
    for i in range(50_000):
        for extra in range(4):  # instances.json holds every object of the images, also those that nobody refers to
            angles = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(10, 60))))
            points = np.stack([320 + 150 * np.cos(angles), 240 + 150 * np.sin(angles)], 1).round(2)
            annotations.append({
                "id": 4 * i + extra, "image_id": i % 20_000, "category_id": 1, "iscrowd": 0, "area": 1.0, "bbox": [0.0, 0.0, 1.0, 1.0],
                "segmentation": [points.ravel().tolist()],
            })  # fmt: skip
        sentences = [
            {"sent_id": 3 * i + s, "raw": f"the thing number {i} on the left", "sent": "the thing", "tokens": ["the", "thing"]}
            for s in range(3 if i < 42_000 else 2)
        ]
        refs.append({
            "ref_id": i, "ann_id": 4 * i, "image_id": i % 20_000, "category_id": 1, "split": splits[i % 20],
            "sentences": sentences, "sent_ids": [s["sent_id"] for s in sentences], "file_name": "x",
        })  # fmt: skip
    (tmp_path / "refcoco" / "instances.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    (tmp_path / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    megabytes = (tmp_path / "refcoco" / "instances.json").stat().st_size / 2**20
    assert sum(len(ref["sentences"]) for ref in refs) == 142_000
    done = run("-c", SCALE, tmp_path)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    with capsys.disabled():
        print(f"\ninstances.json of {megabytes:.0f} MB: {figures}")
    assert figures["MB with 4 workers"] <= 1024
    assert figures["seconds to index"] <= 12 * figures["seconds of json.loads"]  # a ratio: machines differ


# train.py


@pytest.fixture(scope="session")
def trained(small, tmp_path_factory) -> Path:
    """A folder with one short run under runs/, made through the command line, and what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    done = run(
        HERE / "train.py", "--data", small, "--max-steps", 4, "--batch-size", 8, "--validate-every", 2, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    (folder / "printed").write_text(done.stdout)
    return folder


def test_training_leaves_what_the_readme_says(trained):
    (out,) = (trained / "runs").iterdir()
    views, splits = ("pictures", "words", "expressions", "ratios"), ("val", "testA", "testB")
    sheets = {f"{view}-{split}.png" for view in views for split in splits}
    assert {p.name for p in out.iterdir()} == {"best.pt", "last.pt", "log.jsonl", "metrics.json"} | sheets
    assert set(json.loads((out / "metrics.json").read_text())) == {"val", "testA", "testB"}
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [4] and all("step" in line for line in lines)
    assert Image.open(out / "pictures-val.png").width > 500


def test_variants_are_listed_by_table(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = capsys.readouterr().out
    places = [text.index(f"  {name:<22}{variant.table:<4}") for name, variant in VARIANTS.items()]
    assert places == sorted(places)
    with pytest.raises(SystemExit) as stopped:
        train.main(["--variant", "threshold"])
    assert all(name in stopped.value.code for name in VARIANTS)


@pytest.mark.parametrize("flag", [[], ["--gradient-checkpointing"]])
def test_the_flag_for_gradient_checkpointing_reaches_swin(flag, small, tmp_path, monkeypatch):
    calls, real = [], timm.models.swin_transformer.checkpoint_seq
    monkeypatch.setattr(
        timm.models.swin_transformer, "checkpoint_seq", lambda blocks, x: (calls.append(blocks), real(blocks, x))[1]
    )
    train.main(["--data", str(small), "--max-steps", "1", "--batch-size", "4", "--out", str(tmp_path / "run"), *flag])
    assert bool(calls) == bool(flag)


def test_training_tells_how_long_it_takes(small, tmp_path, monkeypatch, capsys):
    """A clock that gives each step 16 seconds: lines after 2, 4, 6, .. of 40 steps, with the minutes that are left."""
    clock = iter(range(10**6))
    monkeypatch.setattr(train.time, "perf_counter", lambda: 8.0 * next(clock))  # asked twice a step
    train.main([*RUN, "--data", str(small), "--max-steps", "40", "--validate-every", "40", "--out", str(tmp_path / "run")])
    lines = re.findall(r"step (\d+) of 40: loss \d\.\d+, (\d+) minutes left", capsys.readouterr().out)
    assert len(lines) > 10 and int(lines[0][0]) <= 3
    for step, left in lines:
        assert abs(int(left) - (40 - int(step)) * 16 / 60) <= 3


def test_one_seed_gives_one_training(trained, small, tmp_path):
    command = ["--data", small, "--max-steps", 3, "--batch-size", 4, "--log-every", 1, "--out"]
    logs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        done = run(HERE / "train.py", *command, tmp_path / name, "--seed", seed)
        assert done.returncode == 0, done.stderr
        logs.append(
            [
                {k: v for k, v in json.loads(line).items() if k != "seconds"}
                for line in open(tmp_path / name / "log.jsonl")
            ]
        )
    assert logs[0] == logs[1] != logs[2]


def test_init_starts_from_a_trained_model(trained, small, tmp_path):
    (best,) = (trained / "runs").glob("*/best.pt")
    scores = train.main([
        "--init", str(best), "--data", str(small), "--lr", "0", "--max-steps", "1", "--batch-size", "4", "--out", str(tmp_path / "run")
    ])  # fmt: skip
    assert scores == evaluate.main(
        ["--checkpoint", str(best), "--data", str(small), "--split", "val", "testA", "testB"]
    )


@pytest.mark.parametrize("left", ["best.pt", "last.pt", "metrics.json"])
def test_a_run_is_not_overwritten(left, small, tmp_path):
    (tmp_path / left).write_bytes(b"of a run")
    with pytest.raises(SystemExit, match="holds a run already: choose another --out, go on with --resume, or delete it"):
        train.main([*RUN, "--data", str(small), "--max-steps", "1", "--out", str(tmp_path)])
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [(left, b"of a run")]


def test_a_run_that_saved_nothing_starts_over(small, tmp_path):
    train.write_log(tmp_path, {"step": 1, "loss": 5.0})
    train.main([*RUN, "--data", str(small), "--max-steps", "1", "--out", str(tmp_path)])
    assert [line["step"] for line in log_of(tmp_path)] == [1, 1] and log_of(tmp_path)[0]["loss"] != 5


def test_resume_with_other_settings_must_be_wanted(small, tmp_path, capsys):
    out = tmp_path / "run"
    train.main([*RUN, "--data", str(small), "--max-steps", "1", "--out", str(out)])
    resume = ["--resume", "--out", str(out)]
    with pytest.raises(SystemExit, match="max_steps 1, not None"):
        train.main([*resume, "--epochs", "3"])
    others = ["--lr", "1e-5", "--max-steps", "3", "--set", "dice=0.5"]
    with pytest.raises(SystemExit) as refused:
        train.main([*resume, *others])
    assert "this run has max_steps 1, not 3; lr 0.001, not 1e-05; dice 1.0, not 0.5: " in str(
        refused.value
    )
    for flags in (["--model", "base"], ["--init", "x.pt"], ["--bert", "x"], ["--swin", "x"], ["--no-pretrained"]):
        with pytest.raises(SystemExit, match="start another run"):
            train.main(["--resume-anyway", "--out", str(out), *flags])
    train.main(["--resume-anyway", "--out", str(out), *others, "--batch-size", "6"])
    assert "on shapes: 48 objects" in capsys.readouterr().out.split("3 steps of 6")[0]  # --data is the run's
    # a twentieth of the steps warms up: one of step 1, and 0.15 of steps 2 and 3
    assert [line["lr"] for line in log_of(out) if "lr" in line] == [
        pytest.approx(1e-3 / 1.05), *(pytest.approx(1e-5 * (done / 2.85) ** 0.9) for done in (2.0, 1.0))
    ]  # fmt: skip
    groups = read_checkpoint(out / "last.pt")["optimizer"]["param_groups"]
    last = 1e-5 * (1.0 / 2.85) ** 0.9  # BERT's groups come first, at a twentieth
    assert [group["lr"] for group in groups] == [pytest.approx(share * last) for share in (0.05, 0.05, 1, 1)]
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0, 0.01, 0.0]
    assert read_checkpoint(out / "last.pt")["config"]["dice"] == 0.5
    with pytest.raises(SystemExit, match="has done 3 steps already, more than the 2"):
        train.main(["--resume-anyway", "--out", str(out), "--max-steps", "2"])
    capsys.readouterr()
    train.main(["--resume-anyway", "--out", str(out), "--epochs", "1", "--batch-size", "4"])
    assert "12 steps of 4" in capsys.readouterr().out


def children_of(pid: int) -> list[int]:
    """Processes below this one, without those that have ended."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == pid and state != "Z":
            found += [int(folder.name), *children_of(int(folder.name))]
    return found


@pytest.mark.parametrize(
    "number, nproc",
    [
        (signal.SIGTERM, 1),
        pytest.param(signal.SIGINT, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 2, marks=pytest.mark.slow),
    ],
)
def test_a_signal_stops_after_the_step_and_resume_goes_on(number, nproc, small, tmp_path):
    command = ["--data", small, *RUN, "--max-steps", 20 * nproc, "--log-every", 3, "--workers", nproc - 1]
    process = start(*command, "--out", tmp_path / "cut", nproc=nproc)
    wait_until(lambda: (tmp_path / "cut" / "log.jsonl").exists() and log_of(tmp_path / "cut"), process)
    os.kill(process.pid, number)  # torchrun hands it on to its processes
    printed = process.communicate(timeout=900)[0]
    assert process.returncode == (75 if nproc == 1 else 1) and 'train.py", line' not in printed, printed
    launch = "python" if nproc == 1 else "torchrun --nproc_per_node=2"
    step, hint = re.search(rf"stopped after step (\d+) of \d+; go on with: {launch} train.py (.*)", printed).groups()
    step = int(step)
    assert read_checkpoint(tmp_path / "cut" / "last.pt")["step"] == step
    for flags in (hint.split(), [*command, "--out", tmp_path / "whole"]):
        assert run(HERE / "train.py", *flags, nproc=nproc).returncode == 0
    assert step < 20 * nproc
    whole, cut = (read_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "cut"))
    assert all(torch.equal(value, cut["model"][name]) for name, value in whole["model"].items())
    if nproc == 1:
        assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_signal_in_a_validation_lets_it_finish(small, tmp_path, monkeypatch):
    """Also in the last one: the scores of the best checkpoint are left to the run that goes on."""
    out, real = tmp_path / "run", train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *a, **k: (os.kill(os.getpid(), signal.SIGTERM), real(*a, **k))[1])
    with pytest.raises(SystemExit) as stopped:
        train.main([*RUN, "--data", str(small), "--max-steps", "2", "--out", str(out)])
    assert stopped.value.code == 75 and not (out / "metrics.json").exists()
    assert [line["step"] for line in log_of(out) if line.get("split") == "val"] == [2]
    monkeypatch.undo()
    train.main(["--resume", "--out", str(out)])
    assert (out / "metrics.json").exists() and read_checkpoint(out / "last.pt")["step"] == 2


def test_only_a_second_ctrl_c_stops_at_once():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits another
    with pytest.raises(KeyboardInterrupt):
        with train.noted_signals() as received:
            for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
                os.kill(os.getpid(), number)
            assert received == ["SIGTERM", "SIGTERM", "SIGINT"]
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


RUN = ("--batch-size", "4", "--log-every", "1", "--set", "image_size=64", "dropout=0.1", "drop_path=0.1")


def start(*command, nproc=1) -> subprocess.Popen:
    """Like `run`, but goes on; its processes can be killed together."""
    torchrun = [] if nproc == 1 else ["-m", "torch.distributed.run", f"--nproc_per_node={nproc}", "--master_port=0",
                                      "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]  # fmt: skip
    return subprocess.Popen(
        [sys.executable, *torchrun, HERE / "train.py", *map(str, command)], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def wait_until(condition, process, seconds=900):
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline or process.poll() is not None:
            process.kill()
            pytest.fail(process.communicate(timeout=10)[0])
        time.sleep(0.001)


def log_of(out: Path) -> list[dict]:
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def assert_same_run(a: Path, b: Path) -> None:
    """Weights, optimiser and log are equal, bit for bit."""
    assert log_of(a) == log_of(b)
    for file in ("last.pt", "best.pt"):
        one, other = (read_checkpoint(out / file) for out in (a, b))
        assert one["step"] == other["step"] and one["best"] == other["best"]
        for name, value in one["model"].items():
            assert torch.equal(value, other["model"][name]), name
        for number, state in one["optimizer"]["state"].items():
            assert all(torch.equal(value, other["optimizer"]["state"][number][key]) for key, value in state.items())


@pytest.mark.slow
@pytest.mark.parametrize("nproc, kills", [(1, 10), (2, 2)])
def test_kill_9_at_any_moment_loses_nothing(nproc, kills, small, tmp_path):
    command = [
        "--data", small, *RUN, "--max-steps", 40, "--checkpoint-every", 3, "--validate-every", 20, "--log-every", 2,
    ]  # fmt: skip
    assert run(HERE / "train.py", *command, "--out", tmp_path / "whole", nproc=nproc).returncode == 0
    out, torn = tmp_path / "cut", 0
    for kill in range(kills):
        process = start(*(command if kill == 0 else ["--data", small, "--resume"]), "--out", out, nproc=nproc)
        before = (out / "last.pt").stat().st_mtime_ns if kill else 0
        if kill % 2:  # while a checkpoint is being written
            wait_until(lambda: (out / "last.pt.part").exists(), process)
        else:  # at some moment after one
            wait_until(lambda: (out / "last.pt").exists() and (out / "last.pt").stat().st_mtime_ns > before, process)
            time.sleep(0.05 * kill)
        family = [*children_of(process.pid), process.pid]  # torchrun's are in sessions of their own
        for child in family:
            os.kill(child, signal.SIGKILL)
        process.communicate()
        torn += (out / "last.pt.part").exists()
    assert torn > 0
    assert run(HERE / "train.py", "--data", small, "--resume", "--out", out, nproc=nproc).returncode == 0
    assert_same_run(tmp_path / "whole", out)


def test_the_log_is_cut_at_the_checkpoint(tmp_path):
    lines = ['{"step": 1}', '{"step": 2, "loss": 3.0}', '{"step": 3}', '{"step": 4, "lo']
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    train.cut_log(tmp_path / "log.jsonl", 2)
    assert (tmp_path / "log.jsonl").read_text() == "\n".join(lines[:2]) + "\n"
    (tmp_path / "log.jsonl").write_text("\n".join(lines[:2]))  # its last line was cut, even where it can be read
    train.cut_log(tmp_path / "log.jsonl", 2)
    assert (tmp_path / "log.jsonl").read_text() == lines[0] + "\n"
    (tmp_path / "log.jsonl").write_bytes(lines[0].encode() + b"\n" + bytes(80) + b"\n" + bytes(9))  # a power cut
    train.cut_log(tmp_path / "log.jsonl", 2)
    assert (tmp_path / "log.jsonl").read_text() == lines[0] + "\n"


def samples_of_step(small, batch_size, step, split=slice(None)) -> list:
    dataset = data.RefDataset("shapes", "train", small)
    order = list(train.training_batches(len(dataset.objects), batch_size, 0, step, 0))[step - 1][split]
    return [dataset.objects[number] for _, number in order]


def test_a_full_disk_stops_the_log(tmp_path):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(data.InputError, match=r"can't write .*log.jsonl \(No space left on device\). Make room"):
        train.write_log(tmp_path, {"step": 1})


@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_loss_that_is_not_finite_names_its_samples(nproc, small, tmp_path):
    """The third of four samples of step 3 gets a loss of infinity, in the process that has it."""
    script = f"""
        import sys
        import torch
        import model, train
        loss = model.VEGA.loss
        def broken(self, output, mask):
            losses = loss(self, output, mask)
            calls[0] += 1
            if calls[0] == {11 if nproc == 1 else 5} and train.rank() == {nproc - 1}:
                losses["loss"] = losses["loss"] * float("inf")
            return losses
        calls = [0]
        model.VEGA.loss = broken
        train.main(sys.argv[1:])
    """
    (tmp_path / "broken.py").write_text("\n".join(line[8:] for line in script.splitlines()))
    command = [*RUN, "--data", small, "--out", tmp_path / "run", "--micro-batch", 1, "--checkpoint-every", 2]
    done = run(tmp_path / "broken.py", *command, "--log-every", 5, "--max-steps", 10, nproc=nproc, PYTHONPATH=HERE)
    last = tmp_path / "run" / "last.pt"
    found = re.search(
        r"error: the loss is not finite at step 3; its ref_id/sent_id are (\d+)/(\d+); the last good checkpoint is (.*)",
        done.stderr,
    )
    assert done.returncode != 0 and found and found[3] == str(last), done.stderr
    (item,) = samples_of_step(small, 4, 3, slice(2, 3))
    assert int(found[1]) == item.ref_id and int(found[2]) in item.sent_ids
    checkpoint = read_checkpoint(last)
    assert checkpoint["step"] == 2 and all(value.isfinite().all() for value in checkpoint["model"].values())


def test_weights_that_are_not_finite_are_never_saved(small, tmp_path):
    command = [*RUN, "--data", str(small), "--out", str(tmp_path / "run"), "--lr", "1e39", "--checkpoint-every", "1"]
    with pytest.raises(SystemExit, match="the weights are not finite after step 1, .* there is no checkpoint yet"):
        train.main([*command, "--max-steps", "5"])
    assert not (tmp_path / "run" / "last.pt").exists()


@pytest.mark.slow
def test_the_script_of_the_readme_outlives_a_kill(small, tmp_path):
    (script,) = [
        block
        for block in re.findall(r"```bash\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
        if ".started" in block
    ]
    command = f"{sys.executable} {HERE / 'train.py'} --data DATA --max-steps 40 {' '.join(RUN)}"
    for ours, small_run in (
        ("torchrun --nproc_per_node=4 train.py", command),
        ("--dataset refcoco --checkpoint-every 500", "--checkpoint-every 2"),
    ):
        assert ours in script
        script = script.replace(ours, small_run)

    def begin(folder):
        return subprocess.Popen(
            ["bash", "-c", script.replace("DATA", str(folder))], cwd=tmp_path, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    (tmp_path / "file").touch()
    missing = begin(tmp_path / "file")  # where no data can be
    printed = missing.communicate(timeout=900)[0]
    assert missing.returncode == 1 and printed.count("error:") == 1 and not (tmp_path / "runs" / "refcoco").exists(), (
        printed
    )
    process, out = begin(small), tmp_path / "runs" / "refcoco"
    wait_until(lambda: (out / "last.pt").exists(), process)
    (child,) = children_of(process.pid)
    os.kill(child, signal.SIGKILL)
    saved = (out / "last.pt").stat().st_mtime_ns
    wait_until(lambda: (out / "last.pt").stat().st_mtime_ns > saved, process)  # it has gone on
    process.terminate()
    printed = process.communicate(timeout=900)[0]
    assert process.returncode == 75 and "stopped after step" in printed, printed
    process = begin(small)
    printed = process.communicate(timeout=900)[0]
    assert process.returncode == 0 and (out / "metrics.json").exists(), printed
    assert read_checkpoint(out / "last.pt")["step"] == 40


@pytest.mark.slow
def test_a_dead_process_takes_the_others_down(small, tmp_path):
    process = start(*RUN, "--data", small, "--max-steps", 500, "--out", tmp_path / "run", nproc=2)
    wait_until(lambda: (tmp_path / "run" / "log.jsonl").exists() and log_of(tmp_path / "run"), process)
    (victim,) = [
        child for child in children_of(process.pid) if b"RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes()
        and b"LOCAL_RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes()
    ]  # fmt: skip
    os.kill(victim, signal.SIGKILL)
    printed = process.communicate(timeout=900)[0]
    assert process.returncode != 0, printed
    assert printed.count("SIGKILL") >= 1 and 'train.py", line' not in printed, printed


def test_a_lost_connection_is_told_with_its_cause(monkeypatch):
    @data.command_line
    def main(argv):
        raise RuntimeError("NCCL error: unhandled system error\nError while creating shared memory: No space left on device")

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(SystemExit, match="another process has stopped(.|\n)*No space left on device"):
        main([])


@pytest.mark.slow
def test_one_two_and_four_processes_train_alike(small, tmp_path):
    """Ten steps without dropout and drop path: the losses agree to 1e-5, and then the logits.

    Not with seed 0: in its fourth step rounding moves a pixel across the edge of a selection, which shifts the loss by
    8e-5.
    """
    command = ["--data", small, "--batch-size", 8, "--log-every", 1, "--set", "image_size=64", "--max-steps", 10,
               "--lr", "1e-4", "--seed", 1]  # fmt: skip
    logs, logits = [], []
    for nproc, extra in ((1, ()), (1, ("--micro-batch", 2)), (2, ()), (4, ())):
        out = tmp_path / f"{nproc}{len(extra)}"
        done = run(HERE / "train.py", *command, "--out", out, *extra, nproc=nproc)
        assert done.returncode == 0, done.stderr
        logs.append([line["loss"] for line in log_of(out) if "loss" in line])
        model, _ = restore(read_checkpoint(out / "last.pt"), torch.device("cpu"))
        with torch.no_grad():
            logits.append(model(*random_batch(model.config))["logits"])
    assert len(logs[0]) == 10
    for other in logs[1:]:
        assert other == pytest.approx(logs[0], abs=1e-5)
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=1e-5, atol=1e-4)


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one(small, tmp_path):
    """After one step AdamW's first moment is a tenth of the gradient."""
    command = ["--data", small, "--batch-size", 8, "--epochs", 1, "--max-steps", 1]
    gradients = []
    for nproc, extra in ((1, ()), (2, ()), (1, ("--micro-batch", 2)), (2, ("--micro-batch", 1))):
        name = f"{nproc}{len(extra)}"
        done = run(HERE / "train.py", *command, "--out", tmp_path / name, *extra, nproc=nproc)
        assert done.returncode == 0, done.stderr
        state = read_checkpoint(tmp_path / name / "last.pt")["optimizer"]["state"]
        gradients.append(torch.cat([10 * state[i]["exp_avg"].flatten() for i in sorted(state)]).double())
    assert gradients[0].norm() > 0.1
    for other in gradients[1:]:
        assert (other - gradients[0]).norm() / gradients[0].norm() < 1e-5
    command = ["--data", small, "--batch-size", 8, "--epochs", 1, "--log-every", 1, "--out", tmp_path / "epoch"]
    done = run(HERE / "train.py", *command, nproc=2)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in open(tmp_path / "epoch" / "log.jsonl")]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_two_nodes_train_as_one_with_two_processes(small, tmp_path):
    """torchrun --nnodes=2, twice on this machine: as on two, but for the network between them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [HERE / "train.py", *RUN, "--data", small, "--max-steps", 3, "--workers", 0]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d",
                f"--rdzv_endpoint=127.0.0.1:{port}", "--local_addr=127.0.0.1"]  # fmt: skip
    nodes = [
        subprocess.Popen(
            list(map(str, [*torchrun, *command, "--out", tmp_path / "nodes"])), stdout=subprocess.PIPE, text=True,
            stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        ) for _ in range(2)
    ]  # fmt: skip
    printed = [node.communicate(timeout=900)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], printed
    assert sum(text.count("shapes          testB") for text in printed) == 1  # the one with rank 0
    whole = run(*command, "--out", tmp_path / "whole", nproc=2)
    assert whole.returncode == 0
    assert_same_run(tmp_path / "whole", tmp_path / "nodes")


@pytest.mark.slow
def test_swins_constants_are_not_sent_at_each_forward_pass(small, tmp_path):
    """21 MB in the base model."""
    script = """
        import sys
        import train
        class DDP(train.DistributedDataParallel):
            def __init__(self, *args):
                super().__init__(*args)
                wrapped.append(self)
        wrapped, train.DistributedDataParallel = [], DDP
        train.main(sys.argv[1:])
        assert len(wrapped[0].modules_buffers) > 0 and not wrapped[0].will_sync_module_buffers()
    """
    (tmp_path / "two.py").write_text("\n".join(line[8:] for line in script.splitlines()))
    done = run(tmp_path / "two.py", *RUN, "--data", small, "--max-steps", 2, "--out", tmp_path / "run", nproc=2, PYTHONPATH=HERE)
    assert done.returncode == 0, done.stderr


# evaluate.py


SCALE = """
import json, sys, time
import torch
import data, evaluate, train as training

def proportional(pid):  # MB of a process, shared pages counted in parts
    return sum(int(line.split()[1]) for line in open(f"/proc/{pid}/smaps_rollup") if line.startswith("Pss:")) / 1024

torch.set_num_threads(1)
started = time.perf_counter()
json.loads(open(f"{sys.argv[1]}/refcoco/instances.json", "rb").read())
loads = time.perf_counter() - started
before, started = proportional("self"), time.perf_counter()
tokenizer = data.make_tokenizer(["the thing number on the left"])
train, val = (data.RefDataset("refcoco", split, sys.argv[1], tokenizer=tokenizer, training=split == "train") for split in ("train", "val"))
seconds = time.perf_counter() - started
loader = lambda workers, steps: data.load_batches(train, training.training_batches(len(train), 16, 0, steps, 0), workers, torch.device("cpu"))
batches = loader(4, 200)
for _ in range(60):
    next(batches)
memory = proportional("self") + sum(proportional(worker.pid) for worker in batches._workers) - before
del batches
batches = loader(1, 40)
next(batches)
started = time.perf_counter()
for _ in range(30):
    next(batches)
speed = 30 * 16 / (time.perf_counter() - started)
print(json.dumps({"seconds to index": round(seconds, 1), "seconds of json.loads": round(loads, 2), "MB with 4 workers": round(memory), "samples/s of one worker": round(speed)}))
"""


def test_metrics_worked_by_hand():
    prediction, target = torch.zeros(5, 4, 5, dtype=torch.bool), torch.zeros(5, 4, 5, dtype=torch.bool)
    prediction[0, :2], target[0, :2] = True, True  # 10 of 10: IoU 1
    prediction[1, 0, :4], target[1, 0] = True, True  # 4 of 5: 0.8
    prediction[2, 0, :], target[2, :2] = True, True  # 5 of 10: 0.5
    target[3, 0, 0] = True  # nothing predicted, 0 of 1: 0
    # nothing predicted and nothing there: the union is empty, 0
    metrics = evaluate.Metrics()
    for one, other in zip(prediction, target):
        metrics.update(one, other)
    scores = metrics.compute()
    expected = {"P@0.5": 60, "P@0.6": 40, "P@0.7": 40, "P@0.8": 40, "P@0.9": 20}
    expected |= {"mIoU": 100 * (1 + 0.8 + 0.5) / 5, "oIoU": 100 * 19 / 26, "samples": 5}
    assert scores == pytest.approx(expected)
    with pytest.raises(ValueError, match="not the masks of one sample"):
        metrics.update(prediction, target)


def test_word_measures_worked_by_hand():
    """Two sentences, [CLS] a b [SEP] and [CLS] c [SEP] and padding; four pixels, of which each token selects two."""
    x, y = [1.0, 0.0], [0.0, 2.0]
    tokens = torch.tensor([[x, y, x, y], [x, x, [3.0, 0.0], [-9.0, 5.0]]])  # cosines 0 1 0 0 1 0; 1 1 1
    M = torch.tensor([[[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 1, 1], [1, 1, 0, 0]], [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]])  # fmt: skip
    output = {"tokens": tokens, "selection": Selection(None, None, None, M.float())}
    attention_mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    first, second = evaluate.word_measures(output, attention_mask)
    assert first == pytest.approx({"token cosine": 2 / 6, "pixels shared with CLS": (50 + 0) / 2})
    assert second == pytest.approx({"token cosine": 1, "pixels shared with CLS": 100})
    metrics = evaluate.Metrics()
    for index, measures in enumerate([first, second]):
        metrics.update(torch.ones(1, 1) > 0, torch.ones(1, 1) > 0, index, measures)
    assert metrics.compute()["pixels shared with CLS"] == pytest.approx(62.5)


class LeftQuarter(torch.nn.Module):
    """Says +1 in the first of four columns and -1 elsewhere."""

    def forward(self, image, input_ids, attention_mask):
        logits = -torch.ones(len(image), 4, 4)
        logits[:, :, 0] = 1
        return {"logits": logits, "tokens": input_ids[..., None].float(), "selection": Selection(None, None, None, None)}


def test_the_two_resolutions_differ_by_a_known_amount(tmp_path):
    """The target is the first 3 of 8 columns. Nearest to 4 columns keeps the 1st of columns 1, 3, 5, 7: IoU 1. At the
    original size the logits 1, -1 become 1, 0.5, -0.5, -1 by bilinear resizing: two columns of three."""
    folder = write_refer(tmp_path, "refcoco", COCO_PLACES[0], 2, size=(8, 4), scenes=1)
    file = folder / "refcoco" / "instances.json"
    instances = json.loads(file.read_text())
    for annotation in instances["annotations"]:
        annotation["segmentation"] = [[0, 0, 3, 0, 3, 4, 0, 4]]
    file.write_text(json.dumps(instances))
    dataset = tokenized("refcoco", "val", folder, image_size=4)
    scores = {
        resolution: evaluate.evaluate(LeftQuarter(), dataset, torch.device("cpu"), resolution=resolution).compute()[
            "mIoU"
        ]
        for resolution in ("input", "original")
    }
    assert scores == pytest.approx({"input": 100, "original": 200 / 3})


def test_evaluate_prints_the_row_that_training_printed(trained, small):
    done = run(HERE / "evaluate.py", "--split", "testB", "--data", small, cwd=trained)
    assert done.returncode == 0, done.stderr
    (row,) = [line for line in done.stdout.splitlines() if " testB " in line]
    assert row in (trained / "printed").read_text().splitlines()


def test_shuffled_expressions_come_from_another_image(small):
    dataset = tokenized("shapes", "val", small)
    before = list(dataset.sentences)
    image_of = lambda number: dataset.objects[number].image_id
    owners = collections.defaultdict(set)
    for number, expression in before:
        owners[expression].add(image_of(number))
    evaluate.shuffle_expressions(dataset)
    assert sorted(e for _, e in dataset.sentences) == sorted(e for _, e in before)
    for number, expression in dataset.sentences:
        assert owners[expression] != {image_of(number)}
    encoded = data.tokenize(data.make_tokenizer([e for _, e in before]), dataset.expressions, 21)
    assert all(torch.equal(encoded[name], values) for name, values in dataset.tokens.items())


@pytest.mark.slow
def test_evaluation_counts_the_same_in_any_number_of_processes(trained, small, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "shapes").mkdir()
    for file in ("images", "instances.json"):
        (folder / "shapes" / file).symlink_to(small / "shapes" / file)
    refs = [ref for ref in data.read_refs(small / "shapes" / "refs(shapes).p") if ref["split"] == "val"]
    refs[0]["sentences"].pop()  # 35 sentences: batches of 16, 16 and 3
    (folder / "shapes" / "refs(shapes).p").write_bytes(pickle.dumps(refs, protocol=2))
    results = []
    for nproc in (1, 2, 3):
        scores, samples = tmp_path / f"{nproc}.json", tmp_path / f"{nproc}.jsonl"
        done = run(
            HERE / "evaluate.py", "--data", folder, "--json", scores, "--per-sample", samples,
            nproc=nproc, cwd=trained,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        results.append((json.loads(scores.read_text()), samples.read_text()))
    assert results[0][0]["val"]["samples"] == 35
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_checkpoint_carries_its_variant(name, small, tmp_path, capsys):
    out = tmp_path / "run"
    command = ["--variant", name, "--data", str(small), "--max-steps", "2", "--batch-size", "4", "--log-every", "1",
               "--set", "image_size=64"]  # fmt: skip
    scores = train.main([*command, "--out", str(out)])
    again = evaluate.main(["--checkpoint", str(out / "best.pt"), "--data", str(small)])
    assert again["val"] == scores["val"]
    model, _ = restore(read_checkpoint(out / "last.pt"), torch.device("cpu"))
    assert model.config.variant == name and type(model.vis) is VARIANTS[name].block
    logged = [json.loads(line) for line in open(out / "log.jsonl")][0]
    assert ("contrastive" in logged) == ("tau" in logged) == VARIANTS[name].contrastive


class Fixed(torch.nn.Module):
    """Stands for a model: its logits are -1, and +1 in the first column of the second expression of a photograph."""

    config = VEGAConfig.tiny()

    def forward(self, image, input_ids, attention_mask):
        logits = -torch.ones(len(image), 8, 8)
        logits[1:, :, 0] = 1
        return {"logits": logits}


def test_photographs_get_masks_and_overlays(trained, tmp_path, monkeypatch, capsys):
    """A folder with a broken one in it, two expressions: masks, overlays, a sheet each; the broken one is named last."""
    (best,) = (trained / "runs").glob("*/best.pt")
    (tmp_path / "best.pt").write_bytes(best.read_bytes())
    folder = tmp_path / "holidays"
    folder.mkdir()
    for name in ("a.jpg", "c.png", "._c.png"):
        Image.new("RGB", (90, 61), "red").save(folder / name)
    (folder / "b.jpg").write_text("<html>")
    (folder / "notes.txt").write_text("no photograph")
    monkeypatch.setattr(evaluate, "restore", lambda *a, **k: (Fixed(), data.make_tokenizer(["red thing"])))
    command = ["--checkpoint", str(tmp_path / "best.pt"), "--expression", "red thing", "Left: thing!"]
    with pytest.raises(SystemExit, match=r"1 of 3 photographs were left out: .*b.jpg can't be read as an image"):
        evaluate.main([*command, "--image", str(folder)])
    printed = capsys.readouterr().out
    assert "never seen some word of 'Left: thing!'" in printed and "word of 'red thing'" not in printed
    assert "'red thing' covers 0.0 % of" in printed and "'Left: thing!' covers 12.2 % of" in printed
    folder = tmp_path / "photographs"
    masks = {path.name: np.asarray(Image.open(path)) for path in folder.glob("*.mask.png")}
    names = [f"{file}-{slug}" for file in ("a.jpg", "c.png") for slug in ("1-red-thing", "2-left-thing")]
    assert set(masks) == {f"{name}.mask.png" for name in names}
    assert all(mask.shape == (61, 90) for mask in masks.values()) and not masks["a.jpg-1-red-thing.mask.png"].any()
    left = masks["c.png-2-left-thing.mask.png"]
    assert set(np.unique(left)) == {0, 255} and (left[:, :11] == 255).all() and (left[:, 11:] == 0).all()
    assert Image.open(folder / "a.jpg-2-left-thing.png").size == (90, 61) and (folder / "c.png-sheet.png").exists()
    with pytest.raises(SystemExit, match="none may lie in .*photographs, where the masks go"):
        evaluate.main([*command, "--image", str(folder)])  # it would read its own masks and write over what it reads


def test_logits_of_several_expressions_are_those_of_each(trained):
    (best,) = (trained / "runs").glob("*/best.pt")
    segment, image = evaluate.load(best), Image.linear_gradient("L").resize((50, 40))
    expressions = ["red thing", "left square", "star below the blue circle"]
    logits = segment.logits(image, expressions)
    assert logits.shape == (3, 40, 50) and logits.dtype == np.float32
    for one, expression in zip(logits, expressions):
        np.testing.assert_allclose(one, segment.logits(image, [expression])[0], rtol=1e-4, atol=1e-4)
        assert np.array_equal(one > 0, segment(image, expression))


def test_photographs_honour_the_flags_of_the_model(trained, tmp_path, monkeypatch):
    """bf16 rounds the logits, here of an untrained model, by up to a tenth of their size."""
    (best,) = (trained / "runs").glob("*/best.pt")
    seen, real = [], evaluate.Segmenter.logits
    monkeypatch.setattr(evaluate.Segmenter, "logits", lambda *a: (seen.append(real(*a)), seen[-1])[1])
    checkpoint = read_checkpoint(best)
    torch.save(checkpoint, tmp_path / "best.pt")
    Image.linear_gradient("L").save(tmp_path / "photo.png")
    command = ["--checkpoint", str(tmp_path / "best.pt"), "--image", str(tmp_path / "photo.png"), "--expression", "red"]
    for flags in ([], ["--precision", "bf16"]):
        evaluate.main([*command, *flags])
    assert 0 < np.abs(seen[0] - seen[1]).max() < np.abs(seen[0]).max() / 2


def test_the_command_and_the_python_interface_give_one_mask(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(trained)
    Image.new("RGB", (90, 61), "red").save(tmp_path / "photo.jpg")
    done = run(HERE / "evaluate.py", "--image", tmp_path / "photo.jpg", "--expression", "red thing", cwd=trained)
    assert done.returncode == 0, done.stderr
    written = Path(re.search(r"the overlay is (\S+)", done.stdout)[1])
    assert Image.open(written).size == (90, 61)
    segment = evaluate.load(newest_run("best.pt"))
    mask = segment(tmp_path / "photo.jpg", "red thing")
    assert mask.shape == (61, 90) and mask.dtype == bool


def photograph(name: str) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (31, 47, 4), dtype=np.uint8)
    return {
        "one pixel": lambda: Image.new("RGB", (1, 1), "red"),
        "one row": lambda: Image.new("RGB", (300, 1), "red"),
        "grey": lambda: Image.fromarray(noise[..., 0]),
        "CMYK": lambda: Image.fromarray(noise, "CMYK"),
        "16 bit": lambda: Image.fromarray(noise[..., 0].astype(np.uint16) * 257),
        "transparent": lambda: Image.fromarray(noise, "RGBA"),
        "palette": lambda: Image.fromarray(noise[..., 0]).convert("P"),
    }[name]()


@pytest.mark.parametrize("name", ["one pixel", "one row", "grey", "CMYK", "16 bit", "transparent", "palette"])
def test_odd_photographs_are_segmented(name, trained, tmp_path):
    image = photograph(name)
    image.save(tmp_path / "photo.tiff")
    (best,) = (trained / "runs").glob("*/best.pt")
    segment = evaluate.load(best)
    mask = segment(tmp_path / "photo.tiff", "red thing")
    assert mask.shape == image.size[::-1] and mask.dtype == bool
    grey = Image.fromarray(np.full((8, 8), 40000, dtype=np.uint16))
    assert abs(np.asarray(data.to_rgb(grey)).astype(int) - 40000 / 257).max() <= 1  # scaled, not clipped at 255


@pytest.mark.parametrize("expression", ["thing " * 10_000, "\N{GRINNING FACE}", "左边的人", "x" * 5000, "a\0b\n\tc", "\udcff mug"])
def test_odd_expressions_are_segmented(expression, trained):
    (best,) = (trained / "runs").glob("*/best.pt")
    mask = evaluate.load(best)(Image.new("RGB", (20, 10)), expression)
    assert mask.shape == (10, 20)


def test_a_decompression_bomb_is_refused(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(trained)
    header = b"BM" + (54).to_bytes(4, "little") + bytes(4) + (54).to_bytes(4, "little") + (40).to_bytes(4, "little")
    header += (60_000).to_bytes(4, "little") * 2 + (1).to_bytes(2, "little") + (24).to_bytes(2, "little") + bytes(24)
    (tmp_path / "bomb.bmp").write_bytes(header)
    with pytest.raises(SystemExit, match="can't be read as an image .*decompression bomb"):
        evaluate.main(["--image", str(tmp_path / "bomb.bmp"), "--expression", "red thing"])


@pytest.mark.parametrize(
    "script, flags, message",
    [
        ("train.py", ["--lr", "-1"], "--lr is -1.0, but must be at least 0"),
        ("train.py", ["--device", "gpu"], "--device gpu can't be used here"),
        ("train.py", ["--batch-size", "0"], "must be at least 1"),
        ("train.py", ["--batch-size", "500"], "fewer than a batch of 500"),
        ("train.py", ["--batch-size", "16", "--micro-batch", "3"], "--batch-size 16 is no multiple of 1 process(es) x 3 images"),
        ("train.py", ["--epochs", "0"], "must be at least 1"),
        ("train.py", ["--seed", "-1"], "must be at least 0"),
        ("train.py", ["--ratio", "0"], "must lie in (0, 1]"),
        ("train.py", ["--ratio", "nan"], "must lie in (0, 1]"),
        ("train.py", ["--lr", "nan"], "--lr is nan, but must be at least 0"),
        ("train.py", ["--bert", "runs"], "no BERT from runs"),  # a folder: a name would ask the network
        ("train.py", ["--swin", "nowhere.pth"], "no Swin weights from nowhere.pth"),
        ("train.py", ["--init", "nowhere.pt"], "there is no checkpoint nowhere.pt"),
        ("train.py", ["--resume", "--out", "nowhere"], "there is no checkpoint nowhere"),
        ("train.py", ["--resume", "--variant", "linguistic"], "this run has variant vega, not linguistic"),
        (
            "train.py",
            ["--resume", "--resume-anyway", "--variant", "linguistic"],
            "the checkpoint does not fit the model",
        ),
        ("train.py", ["--dataset", "refcoco"], "instances.json is missing"),
        ("data.py", ["--check", "refcocog-umd"], "instances.json is missing"),
        ("train.py", ["--variant", "threshold"], "there is no variant 'threshold'; it must be one of vega, linguistic"),
        ("train.py", ["--set", "image_size=130"], "multiple of 4"),
        ("train.py", ["--set", "image_size=large"], "image_size can't be 'large'"),
        ("train.py", ["--set", "coordinates=1"], "coordinates can't be '1'"),
        ("train.py", ["--set", "sice=1"], "there is no 'sice'; it must be one of variant, ratio, image_size"),
        ("train.py", ["--set", "dice=-1"], "must be at least 0"),
        ("train.py", ["--set", "contrastive=nan"], "must be at least 0"),
        ("train.py", ["--resume", "--set", "dice=0"], "this run has dice 1.0, not 0.0"),
        ("train.py", ["--resume", "--set", "coordinates=false"], "this run has coordinates True, not False"),
        ("evaluate.py", ["--split", "tetsB"], "no split 'tetsB'; it has train, val, testA, testB"),
        ("evaluate.py", ["--pictures", "-1"], "must be at least 0"),
        ("evaluate.py", ["--json", "nowhere/x.json"], "there is no folder nowhere"),
        ("evaluate.py", ["--checkpoint", "runs"], "there is no checkpoint runs"),
        ("evaluate.py", ["--checkpoint", str(HERE / "README.md")], "can't be read as a checkpoint"),
        ("evaluate.py", ["--image", "absent.jpg", "--expression", "red"], "there is no image absent.jpg"),
        ("evaluate.py", ["--image", str(HERE / "README.md"), "--expression", "red"], "can't be read as an image"),
        ("evaluate.py", ["--image", str(HERE / "assets/shapes.png"), "--expression", "  "], "expression is empty"),
        ("evaluate.py", ["--image", "absent.jpg"], "--image and --expression go together"),
        ("evaluate.py", ["--image", "", "--expression", "red"], "there is no image"),
        ("evaluate.py", ["--image", "a.jpg", "--expression", "red", "--split", "val"], "--split does nothing with --image"),
        ("evaluate.py", ["--image", "a.jpg", "b/a.jpg", "--expression", "red"], "no two photographs may have one name"),
        ("evaluate.py", ["--image", "runs", "--expression", "red"], "there is no image runs"),
        ("evaluate.py", ["--device", "meta"], "it must be cpu or cuda"),
        ("train.py", ["--set", "drop_path=5"], "must lie in [0, 1)"),
    ],
)
def test_a_wrong_input_gets_one_clear_message(script, flags, message, trained, small, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    before = sorted(trained.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        {"train.py": train, "evaluate.py": evaluate, "data.py": data}[script].main([*flags, "--data", str(small)])
    assert stopped.value.code not in (0, None)
    assert message in str(stopped.value.code) + capsys.readouterr().err
    assert sorted(trained.rglob("*")) == before


def test_slow_bf16_is_told(monkeypatch, capsys):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    assert evaluate.resolve_precision("bf16", torch.device("cpu")) == "bf16"
    assert "many times slower in bf16" in capsys.readouterr().out
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    evaluate.resolve_precision("bf16", torch.device("cpu")), evaluate.resolve_precision("fp32", torch.device("cpu"))
    assert not capsys.readouterr().out


def test_cards_that_emulate_bf16_run_fp32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert evaluate.resolve_precision(None, torch.device("cuda:0")) == "fp32"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert evaluate.resolve_precision(None, torch.device("cuda:0")) == "bf16"


@pytest.fixture
def pretended_gpus(monkeypatch):
    """Two GPUs that only note what is asked of them."""
    noted, zeros = [], torch.zeros
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: noted.append(f"current {device}"))
    monkeypatch.setattr(torch, "zeros", lambda *a, device=None: (noted.append(f"zeros {device}"), zeros(*a))[1])
    return noted


def test_each_process_touches_its_own_gpu_alone(pretended_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert evaluate.start_processes(None) == torch.device("cuda:1")
    assert pretended_gpus == ["current cuda:1", "zeros cuda:1"]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(data.InputError, match="--device cuda:2 can't be used here .this machine has 2 GPUs"):
        evaluate.start_processes(None)
    monkeypatch.delenv("LOCAL_RANK")
    assert evaluate.pick_device("cuda:1") == torch.device("cuda:1")  # of the benchmark and of photographs
    assert pretended_gpus[2:] == ["current cuda:1", "zeros cuda:1"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cuda_trains_and_evaluates(precision, small, tmp_path):
    """Trains and evaluates on the GPU; in fp32 with the CPU's scores to a point."""
    command = ["--data", str(small), "--max-steps", "4", "--batch-size", "8", "--precision", precision]
    scores = train.main([*command, "--device", "cuda", "--out", str(tmp_path / "run")])
    on_cpu = evaluate.main(["--data", str(small), "--checkpoint", str(tmp_path / "run" / "best.pt"), "--device", "cpu"])
    assert scores["val"]["mIoU"] == pytest.approx(on_cpu["val"]["mIoU"], abs=1 if precision == "fp32" else 5)


PAPERS_TABLE_5 = """
refcoco val 86.70 83.69 78.28 67.11 37.24 76.27 75.35
refcoco testA 89.00 86.58 82.09 70.48 37.05 78.02 77.97
refcoco testB 82.41 79.00 73.17 63.14 37.45 73.02 71.94
refcoco+ val 76.75 73.63 68.64 59.17 32.48 67.74 66.70
refcoco+ testA 83.09 80.65 75.48 65.25 34.19 72.81 72.08
refcoco+ testB 67.78 64.45 58.83 49.68 29.37 60.82 59.85
refcocog-umd val 75.94 70.98 63.99 51.90 27.29 67.22 65.78
refcocog-umd test 76.13 71.31 64.60 53.25 27.87 67.45 66.93
refcocog-google val 73.22 68.79 63.00 52.77 27.96 65.36 63.49
"""  # typed from the paper


def test_the_papers_row_stands_under_a_base_models_scores(trained, tmp_path, capsys):
    paper = [row.split() for row in PAPERS_TABLE_5.split("\n") if row]
    table = [[*key, *(f"{score:.2f}" for score in row)] for key, row in evaluate.TABLE_5.items()]
    assert table == paper

    (best,) = (trained / "runs").glob("*/best.pt")
    checkpoint = read_checkpoint(best)
    folder = write_refer(tmp_path, "refcoco", COCO_PLACES[0], 2)
    flags = ["--checkpoint", str(tmp_path / "x.pt"), "--dataset", "refcoco", "--data", str(folder), "--split", "val", "testA"]

    def printed(model="base", variant="vega", ratio=0.3, *more) -> tuple[dict, list]:
        """The scores, and the printed lines below the heading; no base model is at hand, so a tiny one says that it is."""
        checkpoint["args"]["model"] = model
        checkpoint["config"].update(variant=variant, ratio=ratio)
        torch.save(checkpoint, tmp_path / "x.pt")
        capsys.readouterr()
        scores = evaluate.main([*flags, *more])
        return scores, [line.split() for line in capsys.readouterr().out.splitlines()[2:]]

    scores, lines = printed()
    assert [line[0] for line in lines] == ["refcoco", "paper", "-"] * 2
    assert lines[1][1:] == paper[0][2:] and lines[4][1:] == paper[1][2:]
    assert float(lines[2][-1]) == pytest.approx(scores["val"]["oIoU"] - 75.35, abs=0.006)
    assert float(lines[5][2]) == pytest.approx(scores["testA"]["P@0.5"] - 89.00, abs=0.006)
    for settings in (("unmasked-softmax", 0.3), ("vega", 0.5)):  # Table 4d and Table 6, of val alone
        _, lines = printed("base", *settings)
        assert lines[1] == ["paper", "76.22", "75.14"] and [line[0] for line in lines[2:]] == ["-", "refcoco"]
    for silent in (("tiny",), ("base", "unmasked-softmax", 0.5), ("base", "vega", 0.35),
                   ("base", "vega", 0.3, "--shuffle-expressions"), ("base", "vega", 0.3, "--resolution", "original")):  # fmt: skip
        assert [line[0] for line in printed(*silent)[1]] == ["refcoco"] * 2
    assert evaluate.of_paper(VEGAConfig(variant="sharp"), "refcoco", "val") == {}


def test_the_table_of_a_study_is_right(tmp_path):
    """Worked out by hand. vega 74, 75, 77; no-cues 73, 73, 76: differences -1, -2, -1, and all of one sign in 2 of 8."""
    for name, scores in {"vega": (74, 75, 77), "no-cues": (73, 73, 76), "ratio=0.1": (75, 70), "sharp": (80,)}.items():
        for seed, mIoU in enumerate(scores):
            (tmp_path / f"{name}-{seed}").mkdir()
            row = {"mIoU": mIoU, "oIoU": mIoU - 10 + (seed == 1 and name == "no-cues") * 5}
            (tmp_path / f"{name}-{seed}" / "metrics.json").write_text(json.dumps({"val": row, "testA": {}}))
    (tmp_path / "vega-3").mkdir()  # not done
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in study(tmp_path).splitlines()[2:]]
    assert rows == [
        ["2", "`vega`", "3", "75.33 (1.53)", "76.28", "", "", "65.33 (1.53)", "75.35", "", ""],
        # oIoU: differences -1, +3, -1, whose sum of 1 is reached by all but none of the 8: |1|, |3|, |5|
        ["3b", "`no-cues`", "3", "74.00 (1.73)", "75.83", "-1.33", "0.250", "65.67 (2.52)", "73.84", "+0.33", "1.000"],
        ["ours", "`sharp`", "1", "80.00", "", "+6.00", "1.000", "70.00", "", "+6.00", "1.000"],
        # +1 and -5: of sums 4, 4, 6, 6 all are as large
        ["6", "`ratio=0.1`", "2", "72.50 (3.54)", "76.11", "-2.00", "1.000", "62.50 (3.54)", "74.82", "-2.00", "1.000"],
    ]


def test_the_feature_map_shows_each_kind_in_its_colour():
    """2 x 2 pixels: one of the target, one of it missed, two others; two tokens and one of padding, twice."""
    F_v = torch.tensor([[[1.0, 0, 0], [0, 5, 0], [0, 5, 3], [9, 0, 3]]])
    Q_l = torch.tensor([[[3.0, 9, 0], [9, 9, 1], [7, 7, 7]]])
    selection = Selection(torch.cat([Q_l, Q_l + 2], 1), torch.tensor([[1, 1, 0] * 2]), None, None)
    target, logits = torch.zeros(8, 8, dtype=torch.bool), -torch.ones(1, 8, 8)
    target[:4], logits[0, :4, :4] = True, 1.0
    output = {"F_v": F_v, "tokens": Q_l, "selection": selection, "logits": logits}
    shown = np.asarray(evaluate.feature_map(output, target))
    expected = {"orange": 1, "limegreen": 1, "lightskyblue": 2, "purple": 2, "red": 2}
    for colour, count in expected.items():
        area = (shown == ImageColor.getrgb(colour)).all(-1).sum()
        one = math.pi * (5 if colour in ("orange", "limegreen", "lightskyblue") else 8) ** 2
        assert area == pytest.approx(count * one, rel=0.25), colour


@pytest.mark.slow
def test_the_study_of_the_readme_goes_on_where_it_was_killed(small, tmp_path):
    """Its command on three runs of 30 steps, killed when the first is done and another has a checkpoint."""
    (script,) = (
        block for block in re.findall(r"```bash\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL) if "xargs" in block
    )
    train_it = f"{HERE / 'train.py'} --data {small} --max-steps 30 --checkpoint-every 2 {' '.join(RUN)}"
    script = re.sub(r"rows=\$.*", 'rows="variant=vega variant=no-cues ratio=0.1"', script.replace("in 0 1 2", "in 0"))
    script = re.sub(r"python train\.py|(?<=\s)(python|pytest) ", lambda found: f"{sys.executable} " + {
        "python train.py": train_it, "python ": "", "pytest ": f"-m pytest {HERE / 'test_vega.py'} "}[found[0]], script)  # fmt: skip

    def begin():
        return subprocess.Popen(
            ["bash", "-c", script], cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip

    process, runs = begin(), tmp_path / "runs" / "study"
    wait_until(lambda: list(runs.glob("*/metrics.json")) and len(list(runs.glob("*/last.pt"))) > 1, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done = {file: file.stat().st_mtime_ns for out in runs.glob("*/metrics.json") for file in out.parent.iterdir()}
    printed = begin().communicate(timeout=900)[0]
    assert all(file.stat().st_mtime_ns == written for file, written in done.items())
    for name in ("vega-0", "no-cues-0", "ratio=0.1-0"):
        assert [line["step"] for line in log_of(runs / name) if "lr" in line] == list(range(1, 31)), name
    assert re.findall(r"^\| \w+ \| `([\w.=-]+)` \| 1 \|", printed, re.MULTILINE) == ["vega", "no-cues", "ratio=0.1"], printed


# Measurements: pytest -m benchmark -s


def chance_above(values: torch.Tensor, positive: torch.Tensor) -> float:
    """AUC: how often one of the positive values is above one of the others."""
    ranks = values.argsort().argsort()[positive].float() + 1
    n, others = len(ranks), len(values) - len(ranks)
    return ((ranks.sum() - n * (n + 1) / 2) / (n * others)).item()


def test_chance_above_by_hand():
    assert chance_above(torch.tensor([0.1, 0.9, 0.5, 0.7]), torch.tensor([False, True, True, False])) == 0.75


def target_is_named_by(expression: str) -> str:
    """"shape alone", "colour alone" or "more"; and how the sentence finds its target."""
    target = re.split(" (?:to the )?(?:left|right) of | above | over | below | under ", expression)
    kind = "relation" if len(target) > 1 else "place" if re.search("left|right|top|bottom", expression) else "attribute"
    words = set(target[0].split())
    shape, color, size = (bool(words & set(names)) for names in (data.SHAPES, data.COLORS, data.SIZES))
    by = "shape alone" if shape and not color and not size else "colour alone" if color and not shape else "more"
    return f"{kind}, {by}"


@pytest.mark.benchmark
def test_what_the_words_select():
    """Of each run in RUNS: what its words select on val, what the loss tells them, and what testB scores by its wording.

    "AUC": over the pixels of all things, the chance that a pixel of a thing of the word's colour (or shape) is more
    similar to the word than another, and the same for [CLS]. "gradient": the norm of the loss's gradient with respect
    to a row of S, of one sample at a time.
    """
    for run in os.environ.get("RUNS", "").split():
        checkpoint = read_checkpoint(Path(run) / "best.pt")
        model, tokenizer = restore(checkpoint, torch.device("cpu"))
        names, found, scores = {v: k for k, v in tokenizer.get_vocab().items()}, {}, {}
        folder = Path(checkpoint["args"]["data"]) / "shapes"
        things = {}
        for annotation in json.loads((folder / "instances.json").read_text())["annotations"]:
            things.setdefault(annotation["image_id"], []).append(annotation)
        for split in ("val", "testB"):
            dataset = data.RefDataset("shapes", split, folder.parent, None, tokenizer, 21, 128)
            for batch in torch.utils.data.DataLoader(dataset, 24):
                inputs = evaluate.model_inputs(batch, torch.device("cpu"))
                output = model(*inputs)
                S = output["selection"].S
                S.retain_grad()
                (24 * model.loss(output, batch["mask"])["loss"]).backward()
                hits, target = output["logits"] > 0, batch["mask"]
                ious = (hits & target).sum((1, 2)) / (hits | target).sum((1, 2))
                maps = F.interpolate(S.detach().unflatten(-1, output["similarity"].shape[1:]), (128, 128), mode="bilinear")
                for b, index in enumerate(batch["index"].tolist()):
                    length = int(batch["attention_mask"][b].sum())
                    wording = target_is_named_by(dataset.expressions[index])
                    scores.setdefault((split, wording), []).append(100 * ious[b].item())
                    if split == "testB":
                        continue
                    norms = S.grad[b].norm(dim=-1)
                    found.setdefault("gradient, [CLS]", []).append(norms[0].item())
                    found.setdefault("gradient, a word", []).extend(norms[1 : length - 1].tolist())
                    for measure, value in evaluate.word_measures(output, inputs[2])[b].items():
                        found.setdefault(measure, []).append(value)
                    here = things[dataset.object(index).image_id]
                    masks = torch.stack([torch.from_numpy(data.rasterize(a["segmentation"], 128, 128)) for a in here])
                    inside = masks.any(0)
                    for t in range(1, length - 1):
                        word = names[int(inputs[1][b, t])]
                        for kind, words in (("color", data.COLORS), ("shape", data.SHAPES)):
                            of_it = masks[[a["attributes"][kind] == word for a in here]].any(0)[inside]
                            if word in words and 0 < of_it.sum() < len(of_it):
                                for row, who in ((t, "the word"), (0, "[CLS]")):
                                    auc = chance_above(maps[b, row][inside], of_it)
                                    found.setdefault(f"AUC by {kind}, {who}", []).append(auc)
        print(f"\n{run}: {model.config.variant}, tau {model.log_tau.exp().item():.3f}")
        print(*(f"  {name:<24}{np.mean(values):.3g} ({len(values)})" for name, values in found.items()), sep="\n")
        print(*(f"  mIoU of {' '.join(key):<32}{np.mean(scores[key]):.1f} ({len(scores[key])})" for key in sorted(scores)),
              sep="\n")  # fmt: skip


def study(folder: Path) -> str:
    """The paper's ablations beside the runs FOLDER/NAME-SEED on val; NAME is a variant, or ratio=0.1 and so on.

    Of mIoU and oIoU: mean and standard deviation over the seeds, the paper's on RefCOCO, the mean difference to vega's
    run of the same seed, and its two-sided p by the exact permutation test of the differences' signs.
    """
    runs = {}  # name -> seed -> its mIoU and oIoU
    for file in sorted(folder.glob("*-*/metrics.json")):
        name, _, seed = file.parent.name.rpartition("-")
        scores = json.loads(file.read_text())["val"]
        runs.setdefault(name, {})[seed] = scores["mIoU"], scores["oIoU"]
    paper = {name: (v.table, v.mIoU, v.oIoU) for name, v in VARIANTS.items()}
    paper.update({f"ratio={ratio}": ("6", *scores) for ratio, scores in RATIOS.items()})
    columns = "".join(f" | {name} (sd) | paper | - vega | p" for name in ("mIoU", "oIoU"))
    lines = [f"| table | row | n{columns} |", "| --- " * 11 + "|"]
    for name in filter(runs.get, paper):
        line = f"| {paper[name][0]} | `{name}` | {len(runs[name])} |"
        for i in range(2):
            ours = [scores[i] for scores in runs[name].values()]
            sd = f" ({statistics.stdev(ours):.2f})" if len(ours) > 1 else ""
            theirs = paper[name][1 + i]
            line += f" {np.mean(ours):.2f}{sd} | {f'{theirs:.2f}' if theirs else ''} |"
            seeds = [] if name == "vega" else runs[name].keys() & runs.get("vega", {}).keys()
            change = [runs[name][seed][i] - runs["vega"][seed][i] for seed in seeds]
            line += f" {np.mean(change):+.2f} | {sign_test(change):.3f} |" if change else " | |"
        lines.append(line)
    return "\n".join(lines)


def sign_test(differences: list[float]) -> float:
    """The share of all ways to sign the differences whose sum is as far from zero as theirs."""
    sums = [sum(signed) for signed in itertools.product(*((d, -d) for d in differences))]
    return float(np.mean(np.abs(sums) >= abs(sum(differences)) - 1e-9))


@pytest.mark.benchmark
def test_the_study():
    """The table of the runs in STUDY."""
    if "STUDY" in os.environ:
        print("\n" + study(Path(os.environ["STUDY"])))


class Encoders(torch.nn.Module):
    """VEGA's own Swin and BERT without what VEGA adds: the least that an image and a sentence cost."""

    def __init__(self, model: VEGA):
        super().__init__()
        self.bert, self.swin = model.bert, model.vision.swin

    def forward(self, image, input_ids, attention_mask) -> tuple[torch.Tensor, torch.Tensor]:
        words = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return words, self.swin.forward_features(image)


class LiteralVISBlock(Stepwise):
    """Algorithm 1 with the weighted sum as the pseudocode has it, over tensors of [B, T, N, D]."""

    def pool(self, M, S_norm, F_v):
        F_v = F_v.unsqueeze(1).repeat(1, M.shape[1], 1, 1)  # [B, T, N, D]
        return (M.unsqueeze(-1) * S_norm.unsqueeze(-1) * F_v).sum(dim=2) / M.sum(-1, keepdim=True)


def random_inputs(config: VEGAConfig, batch_size: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """image, input_ids, attention_mask and mask of full length."""
    image = torch.randn(batch_size, 3, config.image_size, config.image_size, device=device)
    input_ids = torch.randint(5, config.bert["vocab_size"], (batch_size, config.max_tokens), device=device)
    return image, input_ids, torch.ones_like(input_ids), image[:, 0] > 1.5


def training_step(model: torch.nn.Module, inputs: tuple, precision: str):
    """A function that takes one step of AdamW; the gradients stay allocated, as they do under accumulation."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)
    *inputs, mask = inputs

    def step():
        optimizer.zero_grad(set_to_none=False)
        model.train()
        with evaluate.autocast(mask.device, precision):
            output = model(*inputs)
        loss = model.loss(output, mask)["loss"] if isinstance(output, dict) else sum(o.float().mean() for o in output)
        loss.backward()
        optimizer.step()

    return step


def seconds(functions: dict, repeats: int = 5) -> dict[str, float]:
    """The median time of each function, called in turn after a first call that is not counted."""
    times = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            times[name] += [time.perf_counter() - start] * (repeat > 0)
    return {name: statistics.median(values) for name, values in times.items()}


def step_memory(config: VEGAConfig, batch_size: int, device: torch.device, precision: str, checkpointing: bool) -> dict:
    """MB that a training step takes, in a process of its own: weights, gradients, optimiser, activations and peak.

    The activations are the peak less the rest. On the CPU the peak is the process's largest resident size less
    the size that it had before the model was built.
    """

    def resident(key: str) -> float:
        return float(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1e3

    before = resident("VmRSS") if device.type == "cpu" else 0.0
    model = VEGA(config).to(device)
    if checkpointing:
        model.vision.swin.set_grad_checkpointing()
    step = training_step(model, random_inputs(config, batch_size, device), precision)
    step(), step()
    peak = resident("VmHWM") - before if device.type == "cpu" else torch.cuda.max_memory_allocated(device) / 1e6
    weights = sum(p.nbytes for p in [*model.parameters(), *model.buffers()]) / 1e6
    gradients = sum(p.nbytes for p in model.parameters()) / 1e6
    return {"weights": weights, "gradients": gradients, "optimiser": 2 * gradients,
            "activations": peak - weights - 3 * gradients, "peak": peak}  # fmt: skip


@pytest.mark.benchmark
def test_benchmark(capsys):
    """Time and memory at random weights of VEGA beside its own two encoders, in one process; tiny unless told."""
    model, size, batch_size, precision = (os.environ.get("BENCHMARK", "tiny 128").split() + ["1", "fp32"])[:4]
    batch_size, device = int(batch_size), evaluate.pick_device(None)
    config = getattr(VEGAConfig, model)(image_size=int(size))
    torch.set_num_threads(os.cpu_count())
    # the VIS block beside the literal pseudocode, with the paper's four images of a card; before all else, since the
    # literal form is faster in a process whose heap already holds its [B, T, N, D] tensors
    N = math.ceil(config.image_size / 2 ** (len(config.depths) + 1)) ** 2  # pixels of the last stage
    T, D = config.max_tokens, config.bert["hidden_size"]
    F_v, Q_l, mask_l = (x.to(device) for x in (torch.randn(4, N, D), torch.randn(4, T, D), torch.ones(4, T)))
    arguments = D, config.attention_heads, config.ratio
    vis, literal = VISBlock(*arguments).to(device).eval(), LiteralVISBlock(*arguments).to(device).eval()
    with torch.inference_mode():
        _, _, S, M = vis(F_v, Q_l, mask_l)
        S_norm = literal.normalise(S, M * 1e4 - 1e4)
        vis_s = seconds({
            "VIS block": lambda: vis(F_v, Q_l, mask_l),
            "VIS block, literally": lambda: literal(F_v, Q_l, mask_l),
            "weighted sum": lambda: Stepwise.pool(literal, M, S_norm, F_v),
            "weighted sum, literally": lambda: literal.pool(M, S_norm, F_v),
        }, repeats=50)  # fmt: skip

    memory = {}
    for name in ("without checkpointing", "with checkpointing"):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            arguments = config, batch_size, device, precision, name == "with checkpointing"
            memory[name] = process.submit(step_memory, *arguments).result()

    vega, words_only = VEGA(config), VEGA(dataclasses.replace(config, variant="enhanced-linguistic"))
    words_only.bert, words_only.vision = vega.bert, vega.vision  # the same encoders for all three
    models = {"two encoders alone": Encoders(vega), "VEGA": vega, "VEGA without the visual expression": words_only}
    inputs = random_inputs(config, batch_size, device)

    def forward(one):
        with torch.inference_mode(), evaluate.autocast(device, precision):
            one(*inputs[:3])

    forwards = {name: functools.partial(forward, one.to(device).eval()) for name, one in models.items()}
    forward_s = seconds(forwards)
    step_s = seconds({name: training_step(one, inputs, precision) for name, one in models.items()})
    torch.set_num_threads(1)

    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} threads"
    lines = [f"\n{model} at {size} x {size}, batch {batch_size}, {precision}, {device.type}, {hardware}",
             f"{'':<36}{'forward':>10}{'ratio':>7}{'images/s':>10}{'step':>10}{'ratio':>7}{'images/s':>10}"]  # fmt: skip
    for name in models:
        lines.append(f"{name:<36}")
        for times in (forward_s, step_s):
            least = times["two encoders alone"]
            lines[-1] += f"{1e3 * times[name]:>7.0f} ms{times[name] / least:>7.2f}{batch_size / times[name]:>10.2f}"
    for name in ("VIS block", "weighted sum"):
        ours, theirs = 1e3 * vis_s[name], 1e3 * vis_s[f"{name}, literally"]
        lines.append(f"{name}, N = {N}, batch 4: {ours:.2f} ms, literally {theirs:.2f} ms, {theirs / ours:.1f} times as long")
    lines += [f"step {name}, MB: " + ", ".join(f"{part} {value:.0f}" for part, value in parts.items()) for name, parts in memory.items()]  # fmt: skip
    with capsys.disabled():
        print("\n".join(lines))
    parameters = sum(p.nbytes for p in VEGA(config).parameters()) / 1e6
    for parts in memory.values():
        assert parts["gradients"] == parameters and parts["optimiser"] == 2 * parameters and parts["activations"] > 0
        assert sum(parts.values()) == pytest.approx(2 * parts["peak"])
