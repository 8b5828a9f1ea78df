"""The claims of the README, one a test. `pytest` runs the quick ones, `pytest -m ""` all."""

import base64
import collections
import filecmp
import http.server
import itertools
import json
import math
import os
import pickle
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import transformers
from PIL import Image, ImageDraw
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import data
import evaluate
import model as model_module
import train
from model import TINY, VEGA, EarlyFusion, VEGAConfig, VisionEncoder, load_model, read_about
from selection import RATIOS, VARIANTS, Selection, Stepwise, VISBlock, pixel_contrastive_loss
from studies import study, things, words

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


def launcher(nproc: int, *flags) -> list:
    """How a command line begins that runs a script in one process, or under torchrun on a free port."""
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={nproc}", "--master_port=0", "--rdzv_backend=c10d",
                "--rdzv_endpoint=localhost:0", *flags]  # fmt: skip
    return [sys.executable, *(torchrun if nproc > 1 else [])]


def printed_by(*command, nproc=1, cwd=HERE) -> str:
    """Run a script as a person would, one thread a process; it must end well."""
    process = start(*launcher(nproc), *command, cwd=cwd)
    printed = process.communicate(timeout=1800)[0]
    assert process.returncode == 0, printed
    return printed


def start(*command, cwd=HERE) -> subprocess.Popen:
    """Like `printed_by`, but goes on."""
    return subprocess.Popen(
        list(map(str, command)), cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def tokenized(name: str, split: str, folder="data", image_size: int = 64, **settings) -> data.RefDataset:
    """A split with a tokenizer of its own words."""
    expressions = data.RefDataset(name, split, folder).expressions
    return data.RefDataset(name, split, folder, None, data.make_tokenizer(expressions), 21, image_size, **settings)


def tiny(**overrides) -> VEGAConfig:
    return VEGAConfig(**{**TINY, **overrides})


def random_batch(config: VEGAConfig, size: int = 2, lengths: tuple[int, ...] = (7, 4), seed: int = 0):
    """image, input_ids, attention_mask, with padding after the words."""
    generator = torch.Generator().manual_seed(seed)
    shape = size, 3, config.image_size, config.image_size
    image = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    ids = torch.randint(5, config.bert_config["vocab_size"], (size, config.max_tokens), generator=generator)
    mask = torch.tensor([[int(t < lengths[b % len(lengths)]) for t in range(config.max_tokens)] for b in range(size)])
    return image, ids, mask


def small_model(name: str, **overrides) -> VEGA:
    torch.manual_seed(0)
    bert = dict(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    sizes = dict(image_size=64, embed_dim=16, depths=(1, 1), swin_heads=(2, 2), decoder_width=16, bert_config=bert)
    return VEGA(tiny(**{**sizes, "variant": name, **overrides})).eval()


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


# selection.py


def algorithm_1(block: VISBlock, F_v, Q_l, mask_l, ratio, variant) -> Selection:
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
    if variant == "no-similarity-weights":
        S_norm = torch.ones(B, T, N)
    F_v_repeated = F_v.unsqueeze(1).repeat(1, T, 1, 1)
    E = (M.unsqueeze(-1) * S_norm.unsqueeze(-1) * F_v_repeated).sum(dim=2) / int(N * ratio)
    if variant == "sigmoid-threshold":  # divided by the number selected, or zero
        E = E * int(N * ratio) / M.sum(dim=-1, keepdim=True).clamp(min=1)
    if "sum-once" in variant:
        E = E * int(N * ratio)
    Q_v = E if variant == "no-cross-attention" else block.cross_attention(E, F_v, M_hat)
    Q_v = block.self_attention(Q_v, Q_v, (mask_l[:, None] - 1) * 1e4)
    return Selection(torch.cat([Q_l, Q_v], dim=1), None, S, M)


# A variant of your own: name it here, and give the line of Algorithm 1 that it changes in `algorithm_1`
TABLE_4 = ("sigmoid-threshold", "no-similarity-weights", "no-normalisation", "unmasked-softmax", "no-cross-attention")
OURS = ("sum-once", "sharp", "sum-once-sharp")


@pytest.mark.parametrize(
    "variant, N, T, ratio",
    [
        *(("vega", *sizes) for sizes in [(64, 21, 0.3), (225, 21, 0.3), (50, 5, 0.1), (17, 1, 0.8), (225, 9, 0.5)]),
        *((variant, 64, 9, 0.3) for variant in TABLE_4 + OURS),
        ("sigmoid-threshold", 3, 21, 0.5),  # some words select nothing
    ],
)
def test_a_block_is_algorithm_1_with_the_lines_of_its_row(variant, N, T, ratio):
    torch.manual_seed(N + T)
    block = VARIANTS[variant].block(32, num_heads=4, ratio=ratio)
    inputs = torch.randn(3, N, 32, requires_grad=True), torch.randn(3, T, 32, requires_grad=True)
    mask_l = torch.ones(3, T)
    mask_l[0, max(1, T - 3) :] = 0
    mask_l[1, 1:] = 0  # every word but [CLS] is padding
    weight = torch.randn(3, 2 * T, 32)
    results = []
    for function in (block, lambda *args: algorithm_1(block, *args, ratio, variant)):
        G, _, S, M = function(*inputs, mask_l)
        gradients = torch.autograd.grad((G * weight).sum() + S.square().sum(), [*inputs, *block.parameters()])
        results.append((M, G, S, *gradients))
    assert torch.equal(results[0][0], results[1][0])  # selections before values
    for ours, literal in zip(*results):  # fp32 keeps 24 bits, and a gradient sums over a thousand terms that cancel
        torch.testing.assert_close(ours, literal, rtol=1e3 * 2**-24, atol=1e3 * 2**-24)
    with torch.autocast("cpu", torch.bfloat16):
        output = block(*inputs, mask_l)
    assert torch.equal(output.M, results[1][0])
    bound = 8 * 2**-8 * results[1][1].abs().max().item()  # bf16 keeps 8 bits, and each of the eight layers rounds
    torch.testing.assert_close(output.G.float(), results[1][1], rtol=0, atol=bound)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_steps_of_the_ablations_are_algorithm_1_bit_for_bit(precision):
    torch.manual_seed(0)
    block, stepwise = VISBlock(16, 2, 0.3, dropout=0.5), Stepwise(16, 2, 0.3, dropout=0.5)
    stepwise.load_state_dict(block.state_dict())
    inputs = torch.randn(2, 20, 16, requires_grad=True), torch.randn(2, 7, 16, requires_grad=True)
    results = []
    for module in (block, stepwise):
        torch.manual_seed(1)
        with evaluate.autocast(torch.device("cpu"), precision):
            output = module(*inputs, torch.tensor([[1] * 7, [1] * 4 + [0] * 3]))
        loss = output.G.float().square().sum() + output.S.sum()
        results.append([*output, *torch.autograd.grad(loss, [*inputs, *module.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_contrastive_loss_is_equation_5():
    """As it is printed, and the gradient of tau against a finite difference."""
    torch.manual_seed(0)
    s, target = torch.rand(2, 4, 4) * 2 - 1, torch.rand(2, 4, 4) < 0.3

    def literal(log_tau):
        sigma = 1 / (1 + np.exp(-s.double().numpy() / math.exp(log_tau)))
        return np.where(target, -np.log(sigma), -np.log(1 - sigma)).mean()

    log_tau = torch.tensor(math.log(0.3), requires_grad=True)
    loss = pixel_contrastive_loss(s, target, log_tau.exp())
    assert loss.item() == pytest.approx(literal(log_tau.item()), rel=1e-5)
    loss.backward()
    difference = (literal(log_tau.item() + 1e-4) - literal(log_tau.item() - 1e-4)) / 2e-4
    assert log_tau.grad.item() == pytest.approx(difference, rel=1e-4)


F_V, OTHER_F_V = torch.randn(2, 2, 20, 16, generator=torch.Generator().manual_seed(0))
Q_L, OTHER_Q_L = torch.randn(2, 2, 7, 16, generator=torch.Generator().manual_seed(1))
T, K = 7, 6


def guide(name, F_v=F_V, Q_l=Q_L) -> Selection:
    """What a variant's block makes of these features, at the weights that all variants share."""
    torch.manual_seed(1)
    return VARIANTS[name].block(16, 2, ratio=0.3)(F_v, Q_l, torch.ones(Q_l.shape[:2]))


def visual(name, F_v=F_V, Q_l=Q_L):
    """The tokens of G that are not linguistic."""
    return guide(name, F_v, Q_l).G[:, T:]


def words_of(name, image=0):
    """G of a small model for one of two images and an expression of seven tokens."""
    model = small_model(name)
    image, (ids, mask) = random_batch(model.config, 1, seed=image)[0], random_batch(model.config, 1)[1:]
    return model(image, ids[:, :7], mask[:, :7])["selection"].G


def same(a, b) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-6)


WHAT_SETS_IT_APART = {  # true of the variant and false of vega
    "linguistic": lambda name: same(words_of(name), words_of(name, image=1)),
    "enhanced-linguistic": lambda name: words_of(name).shape[1] == T and not same(words_of(name), words_of(name, 1)),
    "all-pixels": lambda name: same(visual(name), F_V),
    "topk-pixels": lambda name: same(visual(name), F_V[guide("vega").M[:, 0] == 1].unflatten(0, (2, K))),
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
    "no-contrastive": lambda name: small_model(name).log_tau is None,
    "contrastive-only": lambda name: same(guide(name).G, Q_L) and same(guide(name).S, guide("vega").S[:, :1]),
    "local-only-eq5": lambda name: (
        same(visual(name), visual("local-only")) and same(guide(name).S, guide("vega").S)
    ),
}


@pytest.mark.parametrize("name", WHAT_SETS_IT_APART)
def test_a_variant_differs_from_vega_as_its_row_says(name):
    assert WHAT_SETS_IT_APART[name](name) and not WHAT_SETS_IT_APART[name]("vega")


def test_variants_name_their_rows():
    """Tables 2, 3, 4 and 6, typed from the paper: mIoU and oIoU."""
    paper = {
        "2": {(75.16, 73.31), (76.06, 73.91), (76.28, 75.35)}, "3a": {(76.02, 74.16), (76.04, 74.58)},
        "3b": {(75.83, 73.84), (76.10, 74.86), (76.13, 74.93)}, "4a": {(76.15, 74.81)}, "4b": {(76.24, 74.92)},
        "4c": {(76.23, 75.05)}, "4d": {(76.18, 74.97), (76.22, 75.14)}, "4e": {(76.11, 74.23)}, "ours": {(None, None)},
    }  # fmt: skip
    rows = {(v.table, v.mIoU, v.oIoU) for v in VARIANTS.values()}
    assert rows == {(table, *scores) for table, found in paper.items() for scores in found}
    assert {*VARIANTS} == {"vega", *WHAT_SETS_IT_APART, *TABLE_4, *OURS}  # each is held to its row above
    mIoU = (76.11, 76.08, 76.27, 76.24, 76.22, 76.16, 76.08, 76.03)
    oIoU = (74.82, 75.02, 75.35, 75.28, 75.14, 75.12, 74.97, 74.80)
    assert RATIOS == dict(zip((0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8), zip(mIoU, oIoU)))


# model.py


def test_early_fusion_is_lavt_in_plain_steps():
    torch.manual_seed(0)
    fusion, x, tokens = EarlyFusion(8, 12), torch.randn(2, 9, 8), torch.randn(2, 5, 12)
    ours = fusion(x, tokens, torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]))

    def normalise(v):  # [N, C], each channel over the pixels
        return (v - v.mean(0)) / (v.var(0, unbiased=False) + 1e-5).sqrt()

    for b, length in enumerate((5, 2)):
        key, value = fusion.key(tokens[b, :length]), fusion.value(tokens[b, :length])
        query = normalise(fusion.query(x[b]))
        attended = normalise(fusion.project_attended((query @ key.T * 8**-0.5).softmax(-1) @ value))
        fused = F.gelu(fusion.project_fused(F.gelu(fusion.project_vision(x[b])) * attended))
        gate = torch.tanh(torch.relu(fused @ fusion.gate[0].weight.T) @ fusion.gate[2].weight.T)
        torch.testing.assert_close(ours[0][b], fused, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours[1][b], x[b] + gate * fused, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", [16, 12, 11, 9])  # windows of 4 tile the first two; the others are padded to 12
def test_windows_are_padded_then_shifted_then_masked(side):
    """Against one attention over the whole map: a pixel sees those of its window that the shift did not wrap around."""
    torch.manual_seed(0)
    config = tiny(image_size=4 * side, embed_dim=8, depths=(2, 2), swin_heads=(2, 2), window_size=4)
    padded = -(-side // 4) * 4
    place = torch.cartesian_prod(torch.arange(padded), torch.arange(padded))  # [P, 2], y and x of each pixel
    for shift, block in zip((0, 2), VisionEncoder(config).swin.layers[0].blocks):
        attention = block.attn
        assert attention.fused_attn  # a GPU stores no attention maps then
        torch.nn.init.normal_(attention.relative_position_bias_table)
        x = torch.randn(2, side, side, 8)
        canvas = torch.zeros(padded, padded, 8)
        canvas[:side, :side] = x[1]
        window, wrapped = (place - shift) % padded // 4, place < shift
        visible = ((window[:, None] == window) & (wrapped[:, None] == wrapped)).all(-1)  # [P, P]
        offset = (place[:, None] - place + 3).clamp(0, 6)  # 0 to 6 within a window
        bias = attention.relative_position_bias_table[7 * offset[..., 0] + offset[..., 1]]  # [P, P, heads]
        query, key, value = attention.qkv(canvas.view(-1, 8)).view(-1, 3, 2, 4).permute(1, 2, 0, 3)
        scores = query @ key.mT * 4**-0.5 + bias.permute(2, 0, 1)
        attended = scores.masked_fill(~visible, -math.inf).softmax(-1) @ value  # [heads, P, 4]
        result = attention.proj(attended.transpose(0, 1).flatten(1)).view(padded, padded, 8)
        torch.testing.assert_close(block._attn(x)[1], result[:side, :side], rtol=1e-5, atol=1e-5)


def test_base_is_the_papers_model():
    torch.manual_seed(0)
    config = VEGAConfig()
    model = VEGA(config)
    image, ids, mask = random_batch(config, 1)
    output = model(image, ids, mask)
    assert output["logits"].shape == (1, 480, 480)
    assert output["selection"].S.shape == (1, 21, 225) and (output["selection"].M.sum(-1) == 67).all()
    assert output["selection"].G.shape == (1, 42, 768)
    assert {block.window_size for stage in model.vision.swin.layers for block in stage.blocks} == {(12, 12)}
    model.loss(output, torch.rand(1, 480, 480) < 0.1)["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    stated = re.search(r"base model has ([\d,]+) parameters", (HERE / "README.md").read_text())
    assert int(stated[1].replace(",", "")) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", VARIANTS)
def test_padding_does_not_matter_and_words_do(name):
    model = small_model(name)
    image, ids, mask = random_batch(model.config, lengths=(7, 4))
    with torch.no_grad():
        logits = model(image, ids, mask)["logits"]
        other_padding = model(image, torch.where(mask == 1, ids, 63 - ids), mask)["logits"]
        less_padding = model(image, ids[:, :7], mask[:, :7])["logits"]
        other_words = model(image, torch.where(mask == 1, 68 - ids, ids), mask)["logits"]
    torch.testing.assert_close(other_padding, logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(less_padding, logits, rtol=0, atol=1e-4)
    assert (other_words - logits).abs().max() > 1e-3


@pytest.mark.parametrize("name, stages", [*((name, 2) for name in VARIANTS), ("vega", 3), ("vega", 4)])
def test_every_parameter_learns(name, stages):
    """So DDP needs no find_unused_parameters. Under bf16, with every word but [CLS] padded, gradients are finite."""
    model = small_model(name, depths=(1,) * stages, swin_heads=(2,) * stages)
    assert getattr(model.vis, "log_tau", model.log_tau) is model.log_tau  # one temperature for `sharp` and Eq. 5
    for lengths, precision in (((7, 4), "fp32"), ((1, 1), "bf16")):
        model.zero_grad()
        with evaluate.autocast(torch.device("cpu"), precision):
            output = model(*random_batch(model.config, lengths=lengths))
        model.loss(output, torch.rand(2, 64, 64) < 0.1)["loss"].backward()
        assert output["logits"].isfinite().all()
        for parameter_name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
            assert precision == "bf16" or parameter.dim() < 2 or parameter.grad.any(), parameter_name


@pytest.mark.skipif(torch.__version__.startswith("2.6"), reason="torch 2.6 fakes no CUDA tensors without a driver")
@pytest.mark.parametrize("preset", ["tiny", "base"])
@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_stays_on_the_cpu_when_the_model_is_on_a_gpu(name, preset, monkeypatch):
    """Fake tensors know their device and shape only."""
    monkeypatch.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)
    with torch.device("meta"):  # no weights, so no time
        model = VEGA(VEGAConfig(**{**(TINY if preset == "tiny" else {}), "variant": name}))
    fake = FakeTensorMode()
    S, T = model.config.image_size, model.config.max_tokens
    batch = {"image": torch.zeros(2, 3, S, S, dtype=torch.uint8), "mask": torch.zeros(2, S, S, dtype=torch.bool)}
    batch |= {key: torch.ones(2, T, dtype=torch.int64) for key in ("input_ids", "attention_mask")}
    batch = {key: fake.from_tensor(value) for key, value in batch.items()}
    with fake:
        model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda"))
        with Copies() as copies:
            batch = {key: values.to("cuda") for key, values in batch.items()}
            assert copies.count == len(batch)
            output = model(batch["image"], batch["input_ids"], batch["attention_mask"])
            losses = model.loss(output, batch["mask"])
            assert copies.count == len(batch)  # none but the batch's own, in forward or loss
        mask = batch["mask"]
        assert {tensor.device.type for tensor in (output["logits"], *losses.values())} == {"cuda"}
        with pytest.raises(DataDependentOutputException):  # all but reading the counts, which fake tensors don't have
            evaluate.Metrics().update(output["logits"] > 0, mask, [0, 1])


@pytest.mark.slow
def test_a_compiled_model_is_one_graph_and_learns_the_same():
    model = small_model("vega").train()
    target, gradients = torch.rand(2, 64, 64) < 0.2, []
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)):
        model.zero_grad()
        loss = model.loss(call(*random_batch(model.config)), target)["loss"]
        loss.backward()
        gradients.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    (loss, gradient), (compiled_loss, compiled) = gradients
    assert compiled_loss == pytest.approx(loss, rel=1e-6) and (compiled - gradient).norm() < 1e-4 * gradient.norm()


class Copies(TorchDispatchMode):
    """Counts the tensors that are copied from the processor to a GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [one for one in (*args, *(kwargs or {}).values()) if isinstance(one, torch.Tensor)]
        if "copy" in function.__name__ and result.is_cuda:
            self.count += any(one.is_cpu for one in tensors)
        return result


def microsoft(weights: dict) -> dict:
    """timm's Swin-B state dict -> the layout of Microsoft's swin_base_patch4_window12_384_22k.pth."""
    renamed = {}
    for name, value in weights.items():
        name = re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name)
        renamed[name.replace("head.fc.", "head.")] = value
        if name.endswith("attn.qkv.weight"):
            renamed[name.replace("qkv.weight", "relative_position_index")] = torch.zeros(144, 144, dtype=torch.int64)
            renamed[name.replace("attn.qkv.weight", "attn_mask")] = torch.zeros(4, 144, 144)
    return {"model": renamed}


def test_swin_weights_load_from_every_format_or_not_at_all(tmp_path, monkeypatch):
    torch.manual_seed(0)
    full = timm.create_model("swin_base_patch4_window12_384", num_classes=21841).eval()
    weights, file = full.state_dict(), tmp_path / "timm.safetensors"
    safetensors.torch.save_file(weights, file)
    torch.save(microsoft(weights), tmp_path / "microsoft.pth")
    image = torch.randn(1, 3, 384, 384)

    @torch.no_grad()
    def features(swin):  # 384 is tiled by windows of 12: timm's own order is right there
        return swin.layers(swin.patch_embed(image))

    real = timm.create_model  # by name, as by default, but for the download
    overlay = {"pretrained_cfg_overlay": {"file": str(file)}}
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: real(*a, **k, **overlay if k.get("pretrained") else {}))
    config = VEGAConfig(image_size=384, bert_config=dict(vocab_size=10, hidden_size=8))
    for source in (file, tmp_path / "microsoft.pth", model_module.PRETRAINED_SWIN):
        swin = VisionEncoder(config).swin.eval()
        said = model_module.load_swin(swin, str(source), 12)
        assert str(source) in said and "norm and head" in said
        torch.testing.assert_close(features(swin), features(full), rtol=1e-5, atol=1e-5)

    before = features(swin)
    name = "layers.2.blocks.7.mlp.fc1.bias"
    broken = tmp_path / "broken.pth"
    for content, message in (
        (timm.create_model("swin_tiny_patch4_window7_224").state_dict(), "another Swin"),
        ({key: value for key, value in weights.items() if key != name}, f"{name} is missing"),
        ({**weights, name: weights[name] / 0}, f"{name} has values that are not finite"),
        ({"model": Hostile(tmp_path / "ran")}, "no Swin weights from"),
    ):
        torch.save(content, broken)
        with pytest.raises(data.InputError, match=message):
            model_module.load_swin(swin, str(broken), 12)
    os.truncate(file, 100_000_000)
    with pytest.raises(data.InputError, match="no Swin weights from"):
        model_module.load_swin(swin, str(file), 12)
    assert torch.equal(features(swin), before) and not (tmp_path / "ran").exists()


def test_bert_and_its_tokenizer_come_from_a_folder_and_go_into_the_checkpoint(small, tmp_path):
    """A BERT of another size that minds capitals, drops accents and leaves Chinese characters together."""
    torch.manual_seed(0)
    folder = tmp_path / "bert"
    vocabulary = "[PAD] [UNK] [CLS] [SEP] [MASK] Red cafe \u4e2d\u6587 red".split()
    rules = dict(do_lower_case=False, strip_accents=True, tokenize_chinese_chars=False)
    transformers.BertTokenizer({word: i for i, word in enumerate(vocabulary)}, **rules).save_pretrained(folder)
    sizes = dict(vocab_size=40, hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=64)
    bert = transformers.BertModel(transformers.BertConfig(**sizes))
    bert.save_pretrained(folder)
    command = [*RUN, "--data", str(small), "--max-steps", "1", "--lr", "0", "--bert", str(folder), "--out"]
    train.main([*command, str(tmp_path / "run")])
    model, tokenizer = load_model(tmp_path / "run")
    for name, value in model.bert.state_dict().items():
        assert torch.equal(value, bert.state_dict()[name]), name
    assert tokenizer("Red caf\u00e9 \u4e2d\u6587 red")["input_ids"] == [2, 5, 6, 7, 8, 3]
    ours = data.make_tokenizer(["red cup"])
    assert ours("RED Cup")["input_ids"] == ours("red cup")["input_ids"] and 1 not in ours("RED Cup")["input_ids"]

    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights.pop("encoder.layer.1.output.dense.weight")
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit, match="encoder.layer.1.output.dense.weight"):
        train.main([*command, str(tmp_path / "other")])
    for file in ("vocab.txt", "tokenizer.json"):
        (folder / file).unlink(missing_ok=True)
    with pytest.raises(SystemExit, match="no BERT from|has a vocabulary of"):
        train.main([*command, str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()


def test_a_model_is_one_file(train_here, tmp_path):
    """A copy, with nothing else of the run there: the weights bit for bit, the tokenizer, what the run was."""
    train_here("--max-steps", 1)
    copy, run = tmp_path / "copy.safetensors", tmp_path / "run"
    copy.write_bytes((run / "best.safetensors").read_bytes())
    model, tokenizer = load_model(copy)
    last = torch.load(run / "last.pt", weights_only=True)
    assert last["model"].keys() == model.state_dict().keys()
    assert all(torch.equal(value, last["model"][name]) for name, value in model.state_dict().items())
    assert model_module.tokenizer_rules(tokenizer) == last["tokenizer"]
    about = read_about(copy)
    assert about["settings"] == json.loads((run / "settings.json").read_text()) and about["settings"]["batch_size"] == 4
    assert about["scores"]["val"].items() <= log_of(run)[-1].items() and about["step"] == 1
    assert load_model(run, ratio=0.5)[0].vis.ratio == 0.5
    assert (run / "best.safetensors").stat().st_mode == (run / "last.pt").stat().st_mode  # readable by the same people


def test_a_broken_or_hostile_model_file_is_refused_and_nothing_runs(best, tmp_path):
    whole, about, name = safetensors.torch.load_file(best), read_about(best), "decoder.head.weight"
    config, file = about["config"], tmp_path / "best.safetensors"
    for weights, change, message in (
        ({**whole, name: whole[name] / 0}, {}, f"{name} has values that are not finite"),
        ({**whole, name: whole[name][:, :3]}, {}, f"{name} is .* in it"),
        ({key: value for key, value in whole.items() if key != name}, {}, f"{name} is missing"),
        (whole, {"config": {**config, "image_size": 12}}, "--image-size is 12, but must be"),
        (whole, {"config": {**config, "ratio": 2}}, "--ratio can't be 2"),
        (whole, {"config": {**config, "bert_config": {"_attn_implementation": "x"}}}, "BERT's config has no _attn"),
        (whole, {"config": {"x": 1}}, "does not fit this program"),
        (whole, {"tokenizer": 3}, "does not fit this program"),
    ):
        header = {key: json.dumps(value) for key, value in {**about, **change}.items()}
        safetensors.torch.save_file(weights, file, header)
        with pytest.raises(data.InputError, match=message):
            evaluate.load(file)
    safetensors.torch.save_file(whole, file)
    with pytest.raises(data.InputError, match="holds no model of this program"):
        evaluate.load(file)
    os.truncate(file, 100_000)
    with pytest.raises(data.InputError, match="was cut short"):
        evaluate.load(file)
    torch.save({"model": Hostile(tmp_path / "ran")}, file)
    with pytest.raises(data.InputError, match="holds no model of this program"):
        evaluate.load(file)
    assert not (tmp_path / "ran").exists()


def test_a_file_takes_the_place_of_the_last_when_it_is_whole_and_on_the_disk(tmp_path, monkeypatch):
    calls, file = [], tmp_path / "last.pt"
    for module, name in ((os, "fsync"), (Path, "replace")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, name=name, real=real: (calls.append(name), real(*a))[1])
    with model_module.whole_file(file) as unfinished:
        torch.save({"step": 1}, unfinished)
    assert calls == ["fsync", "replace"]
    for state in ({"step": 2}, {"model": torch.zeros(10**6)}):
        (tmp_path / "last.pt.unfinished").symlink_to("/dev/full")
        with pytest.raises(data.InputError, match="can't write .* an earlier file there is whole. Free some space"):
            with model_module.whole_file(file) as unfinished:
                torch.save(state, unfinished)
    assert torch.load(file) == {"step": 1} and [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_a_trained_model_starts_another_with_its_words_and_sizes(best, tmp_path, monkeypatch):
    folder = write_own(tmp_path / "mugs", [OWN, {**OWN, "split": "val"}])
    monkeypatch.chdir(tmp_path)
    flags = ["--dataset", str(folder), "--batch-size", "1", "--max-steps", "1", "--lr", "0", "--out", "a"]
    train.main([*flags, "--init", str(best.parent)])
    (before, words_before), (after, words_after) = load_model(best), load_model("a")
    assert words_after.get_vocab() == words_before.get_vocab() and after.config == before.config
    assert all(torch.equal(value, after.state_dict()[name]) for name, value in before.state_dict().items())
    assert read_about("a")["settings"]["bert_factor"] == 0.05  # the recipe of its preset


# data.py


def random_polygon(rng) -> list[float]:
    points = rng.uniform(-20, 60, (int(rng.integers(3, 12)), 2))  # crosses itself and leaves the image
    kinds = (
        points,
        points.round() + rng.choice([0, 0.5]),  # whole and half pixels
        points % 1.5 + 10,  # less than a pixel
        np.repeat(points, 2, axis=0),  # each point twice
        np.array([[0, 0], [40, 0], [40, 30], [0, 30]]) + rng.choice([0, 0.1, -0.1], (4, 2)),  # the image's edge
        points * rng.permutation([0, 1]) + rng.uniform(0, 30),  # no area
        points * 10 ** rng.uniform(0, 3),  # far out of the image
    )
    return kinds[rng.integers(len(kinds))].ravel().tolist()


def test_masks_are_cocos_to_the_pixel():
    """Polygons, RLEs as text and as numbers, and the union of some of each."""
    coco = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed; pip install pycocotools")
    rng, size = np.random.default_rng(0), [30, 40]
    for _ in range(1000):
        polygons = [random_polygon(rng) for _ in range(int(rng.integers(1, 4)))]
        encoded = coco.frPyObjects(polygons, *size)
        theirs = coco.decode(coco.merge(encoded)).astype(bool)
        runs = [(value, len(list(group))) for value, group in itertools.groupby(theirs.T.ravel())]
        counts = [0] * bool(runs[0][0]) + [length for _, length in runs]  # background first
        texts = [{"size": size, "counts": rle["counts"].decode()} for rle in [coco.merge(encoded), *encoded]]
        polygons.append([1.0, 1.0, 30.0, 30.0])  # two points cover nothing
        for ours in (polygons, {"size": size, "counts": counts}, texts[0], [*texts[1:], polygons[0]]):
            assert np.array_equal(data.rasterize(ours, *size), theirs), ours


def test_what_can_not_be_drawn_is_refused(tmp_path):
    overflow = [2**63 - 1, 2**63 - 1, 120 * 100 + 2]
    counts = [[3, 4], [5, -1, 11996], "o" * 10**6 + "0", "04", "P", overflow, [2**63, 1], [math.nan], None]
    polygons = [[[0, 0, math.nan, 1, 2, 2]], [[0, 0, 1, 1, 2]], [["a"] * 6], [None], [1, 2], "x"]
    wrong = [*({"size": [100, 120], "counts": one} for one in counts), *polygons]
    folder = write_own(tmp_path / "mugs", [{**OWN, "segmentation": one} for one in wrong])
    dataset = data.RefDataset(str(folder), "train")
    assert len(dataset) == len(wrong)
    for index in range(len(wrong)):
        with pytest.raises(data.InputError, match=f"ref {index} of .*mugs is no list of polygons"):
            dataset.mask(index)


def test_a_hostile_or_broken_refs_pickle_is_refused_and_nothing_runs(tmp_path):
    hostile = [{"split": Hostile(tmp_path / "ran")}]
    for content, message in (
        *((pickle.dumps(hostile, protocol), "refused, since it names") for protocol in (0, 2, 4)),
        (b"cantigravity\nfly\n.", "refused, since it names antigravity"),  # would only import
        (pickle.dumps([{}], 2)[:-2], "is not a list of refs, or not whole"),
    ):
        (tmp_path / "refs.p").write_bytes(content)
        with pytest.raises(data.InputError, match=message):
            data.read_refs(tmp_path / "refs.p")
    assert not (tmp_path / "ran").exists() and "antigravity" not in sys.modules


class Python2Pickler(pickle._Pickler):
    """Writes byte strings, and text of ASCII, by the opcodes that Python 2 had for its str."""

    def save_str(self, value):
        if isinstance(value, str) and not value.isascii():
            return super().save_str(value)
        content = value.encode() if isinstance(value, str) else value
        binary = b"U" + bytes([len(content)]) + content
        self.write(b"S" + repr(content)[1:].encode() + b"\n" if self.proto == 0 else binary)
        self.memoize(value)

    dispatch = {**pickle._Pickler.dispatch, str: save_str, bytes: save_str}


WORDS = ["man on the left", "caf\u00e9 table".encode(), "caf\u00e9 chair".encode("latin-1"), "\u732b on sofa"]
COCO_PLACES = ("images/train2014", "images/mscoco/images/train2014")
MINIATURE = ("--model", "tiny", "--image-size", "32", "--batch-size", "2", "--max-steps", "2")


def write_refs(file: Path, refs: list, protocol: int = 2) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "wb") as stream:
        Python2Pickler(stream, protocol).dump(refs)


def write_images(folder: Path, files, size) -> None:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        Image.linear_gradient("L").resize(size).save(folder / file)


def write_refer(folder: Path, name: str, images: str, protocol: int, size=(80, 60), scenes: int = 4) -> Path:
    """A miniature of a REFER dataset in its exact layout: `scenes` images a split, two objects each."""
    width, height = size
    rle = {"size": [height, width], "counts": [300, 200, height * width - 500]}
    polygons = [[width / 2, 3, width - 2.5, 3, width - 2.5, height - 4.5], [1.0, 1.0, 2.0, 2.0]]
    entries, annotations, refs = [], [], []
    for number, (split, _) in enumerate(itertools.product(data.DATASETS[name][1], range(scenes)), 1000):
        file = f"COCO_train2014_{number:012d}"
        entries.append({"id": number, "file_name": f"{file}.jpg", "height": height, "width": width})
        for k, segmentation in enumerate((rle, polygons)):
            ref = len(refs)
            ids = {"image_id": number, "category_id": 1}
            annotations.append({"id": 5000 + ref, **ids, "segmentation": segmentation})
            sentences = [
                {"sent_id": 10 * ref + i, "sent": "x", "raw": WORDS[(ref + i) % 4], "tokens": ["x"]} for i in range(2)
            ]
            ids |= {"ref_id": ref, "ann_id": 5000 + ref, "sent_ids": [sentence["sent_id"] for sentence in sentences]}
            refs.append({**ids, "split": split, "file_name": f"{file}_{k}.jpg", "sentences": sentences})
    write_images(folder / images, [entry["file_name"] for entry in entries], size)
    refs.sort(key=lambda ref: ref["ann_id"] % 2)  # those of an image stand apart, as in the real ones
    write_refs(folder / data.DATASETS[name][0], refs, protocol)
    instances = {"images": entries, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (folder / data.DATASETS[name][0]).with_name("instances.json").write_text(json.dumps(instances))
    return folder


@pytest.mark.parametrize(
    "name, images, protocol", [("refcoco", 0, 0), ("refcoco+", 1, 2), ("refcocog-umd", 0, 2), ("refcocog-google", 1, 0)]
)
def test_a_miniature_refcoco_trains_and_evaluates(name, images, protocol, tmp_path):
    common = ["--dataset", name, "--data", str(write_refer(tmp_path / "data", name, COCO_PLACES[images], protocol))]
    scores = train.main([*common, *MINIATURE, "--workers", "0", "--out", str(tmp_path / "run")])
    _, *tests = data.DATASETS[name][1]
    assert {split: row["samples"] for split, row in scores.items()} == dict.fromkeys(tests, 16)
    best, last = str(tmp_path / "run"), tests[-1]
    assert evaluate.main([*common, "--checkpoint", best, "--split", last]) == {last: scores[last]}
    texts = data.RefDataset(name, last, tmp_path / "data").expressions
    assert set(texts) == {"man on the left", "caf\u00e9 table", "caf\u00e9 chair", "\u732b on sofa"}


def test_check_misses_nothing(tmp_path, capsys, monkeypatch):
    """A miniature that is said to be the real one; then without a ref of each split, an image, half an image."""
    folder = write_refer(tmp_path, "refcoco", COCO_PLACES[0], 2)
    file, sizes = data.DATASETS["refcoco"]
    monkeypatch.setitem(data.DATASETS, "refcoco", (file, dict.fromkeys(sizes, (8, 4))))
    monkeypatch.chdir(tmp_path)

    def check(*lost) -> str:
        write_refs(folder / file, [ref for ref in refs if ref not in lost])
        data.read_dataset.cache_clear()
        data.check("refcoco", str(folder), every_image=True)
        return capsys.readouterr().out

    refs = data.read_refs(folder / file)
    assert "nothing wrong was found" in check()
    for split in sizes:
        assert re.findall("(.*): WRONG", check(next(ref for ref in refs if ref["split"] == split))) == [split]
    some = sorted((folder / COCO_PLACES[0]).iterdir())
    some[0].unlink()
    os.truncate(some[1], 200)
    printed = check()
    assert f"missing: {some[0].name}" in printed and f"{some[1].name} can't be read as an image" in printed


OWN = {"image_id": "desk.jpg", "split": "train", "sentences": ["red mug"], "segmentation": [[20, 30, 60, 30, 60, 80]]}


def write_own(folder: Path, refs: list, images=("desk.jpg", "shelf.jpg"), entries=None, annotations=()) -> Path:
    """A folder with images of one size, instances.json and refs.json."""
    write_images(folder / "images", images, (120, 100))
    instances = {"images": entries or [{"file_name": image} for image in images], "annotations": annotations}
    (folder / "instances.json").write_text(json.dumps(instances))
    (folder / "refs.json").write_text(json.dumps(refs))
    return folder


def assert_one_clear_line(message: str, folder: Path) -> None:
    """Training says it and ends, whether it or a loader process meets it, and leaves nothing."""
    out = folder.parent / "run"
    command = ["--dataset", str(folder), *MINIATURE, "--batch-size", "1", "--out", str(out), "--workers"]
    for workers in ("0", "1"):
        with pytest.raises(SystemExit) as stopped:
            train.main([*command, workers])
        said = stopped.value.code
        assert said.startswith("error: ") and message in said and len(said.splitlines()) == 1
        assert not out.exists()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(sentences=[]), "a list of one or more texts"),
        (dict(sentences="red mug"), "a list of one or more texts"),
        (dict(split="training"), "has no split 'train'; it has training, val"),
        (dict(split="a/b"), "must be a short name such as 'val', not 'a/b'"),
        (dict(image_id="sofa.jpg"), "there is no image 'sofa.jpg'"),
        (dict(image_id=[]), "not in REFER's format"),
        (dict(segmentation=None), "no segmentation here or under its ann_id"),
        (dict(segmentation=[20, 30, 60, 30, 60, 80]), "ref 0 of"),
        (dict(segmentation={"size": [200, 240], "counts": [48000]}), "does not fill an image of (100, 120)"),
        (dict(id="shelf.jpg"), "two images of the same id"),
        (dict(width=0, height=0), "cannot have 0 x 0 pixels"),
        (dict(width=120, height=700), "its mask would not fit"),
    ],
)
def test_a_wrong_value_is_told_in_one_line(change, message, tmp_path):
    """In a ref, or in an image's entry; neither minds the other's keys."""
    refs = [{**OWN, **change}, {**OWN, "split": "val"}]
    entries = [{"id": "desk.jpg", "file_name": "desk.jpg", **change}, {"file_name": "shelf.jpg"}]
    assert_one_clear_line(message, write_own(tmp_path / "mugs", refs, entries=entries))


@pytest.mark.parametrize(
    "file, break_it, message",
    [
        ("instances.json", Path.unlink, "instances.json is missing: see docs/data.md"),
        ("instances.json", lambda file: file.write_text("{"), "is not JSON"),
        ("refs.json", lambda file: file.write_text('{"refs": []}'), "is not a list of refs"),
        ("refs.json", lambda file: file.write_text("[]"), "has no split 'train'; it has none"),
        ("images/desk.jpg", lambda file: file.write_text("<html>"), "its image desk.jpg is not in order"),
        ("images/desk.jpg", lambda file: os.truncate(file, 300), "its image desk.jpg is not in order"),
    ],
)
def test_a_wrong_file_is_told_in_one_line(file, break_it, message, tmp_path):
    folder = write_own(tmp_path / "mugs", [OWN, {**OWN, "split": "val"}])
    break_it(folder / file)
    assert_one_clear_line(message, folder)


def test_the_readmes_own_data_runs_as_it_is_printed(tmp_path, monkeypatch):
    section = (HERE / "README.md").read_text().split("## Your own data")[1].split("\n## ")[0]
    instances, refs = re.search(r"`({.*})`", section)[1], re.search(r"```json\n(.*?)```", section, re.DOTALL)[1]
    folder = write_own(tmp_path / "mugs", json.loads(refs))
    (folder / "instances.json").write_text(instances)
    (commands,) = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for line in commands.splitlines():
        _, script, *arguments = shlex.split(line, comments=True)
        {"data.py": data, "train.py": train, "evaluate.py": evaluate}[script].main(arguments)
    (out,) = Path("runs").glob("mugs-*")
    assert {"best.safetensors", "pictures-val.png", "shelf.jpg-all.png"} <= {path.name for path in out.rglob("*")}
    assert Image.open(out / "masks" / "shelf.jpg-2-the-left-mug.mask.png").size == (120, 100)
    assert Image.open("runs/check-mugs.png").width > 700
    (item,) = data.RefDataset("mugs", "val").objects
    assert (item.height, item.width, item.ref_id, item.sent_ids) == (100, 120, 1, [2, 3])


def test_the_python_in_the_readme_and_the_docs_runs(monkeypatch, capsys):
    monkeypatch.chdir(HERE)
    names = {"math": math, "torch": torch, "Tensor": torch.Tensor, "Stepwise": Stepwise}
    for page in ("README.md", "docs/extending.md"):
        for block in re.findall(r"```python\n(.*?)```", (HERE / page).read_text(), re.DOTALL):
            exec(block, names)
            shapes = re.search(r"# (\[.*\])\n$", block)
            printed = capsys.readouterr().out.replace("torch.Size(", "").replace(")", "")
            assert not shapes or printed.split() == shapes[1].replace("],", "]").split()
    M = names["OnePerRow"](16, 2)(F_V.repeat(1, 5, 1)[:, :64], Q_L, torch.ones(2, T)).M
    assert (M.unflatten(-1, (8, 8)).sum(-1) == 1).all()


def test_a_folder_of_coco_and_refer_files_trains_and_evaluates(tmp_path, monkeypatch):
    """As RRSIS-D: a pickle, images two folders down, each segmentation a list of one RLE, three splits.

    As RefCOCO-M: each segmentation an RLE, a second refs file beside the first, images elsewhere.
    """
    monkeypatch.chdir(tmp_path)
    rle = {"size": [100, 120], "counts": [500, 700, 10_800]}
    entries, annotations, refs = [], [], []
    files = ["00000.jpg", "00001.jpg", "deep/00002.jpg"]  # below a folder that is found
    for i, (split, segmentation) in enumerate({"train": [rle], "val": rle, "test": [rle]}.items()):
        entries.append({"id": i, "file_name": files[i], "height": 100, "width": 120})
        annotations.append({"id": 10 + i, "image_id": i, "segmentation": segmentation})
        sentences = [{"sent_id": i, "sent": "a ship", "raw": "a ship", "tokens": ["a"]}]
        refs.append({"ref_id": i, "ann_id": 10 + i, "image_id": i, "split": split, "sentences": sentences})
    folder = write_own(tmp_path / "own", refs, [f"rrsisd/JPEGImages/{file}" for file in files], entries, annotations)
    write_refs(folder / "refs(unc).p", refs)
    with pytest.raises(data.InputError, match=r"one refs file, or name one of them; .*refs\(unc\).p, .*refs.json"):
        data.RefDataset(str(folder), "val")
    (folder / "refs.json").unlink()
    data.main(["--check", str(folder)])
    scores = train.main(["--dataset", str(folder), *MINIATURE, "--batch-size", "1"])
    assert evaluate.main(["--split", "val", "test"]) == scores and set(scores) == {"val", "test"}
    (folder / "images").rename("elsewhere")
    name = str(folder / "refs(unc).p")
    with pytest.raises(data.InputError, match="no folder of images .*: say where .* --image-folder DIR"):
        data.RefDataset(name, "val")
    for split in ("train", "val"):
        dataset = data.RefDataset(name, split, image_folder="elsewhere/rrsisd/JPEGImages")
        assert dataset.image(0).size == (120, 100)
        assert dataset.mask(0)[:, 5:12].all() and dataset.mask(0).sum() == 700


def test_blank_sentences_broken_unicode_and_boxes_are_read_and_counted(tmp_path, monkeypatch, capsys):
    """A box where a polygon should be is the likeliest mistake: two points cover nothing."""
    refs = [{**OWN, "sentences": ["\ud800 mug", " "]}, {**OWN, "segmentation": [[20, 30, 40, 50]]}]
    dataset = tokenized(str(write_own(tmp_path / "mugs", refs)), "train")
    assert dataset.expressions == ["? mug", "", "red mug"]
    assert dataset[1]["attention_mask"].sum() == 2  # [CLS] and [SEP]
    monkeypatch.chdir(tmp_path)
    assert not data.check("mugs")  # val is missing
    assert re.search(r"blank sentences: 1\n(.|\n)*masks without a pixel: 1\n", capsys.readouterr().out)


def test_a_split_holds_its_own_objects_sentences_and_masks(tmp_path):
    """Its sentences stand image by image, so that each image is decoded once."""
    folder = write_refer(tmp_path, "refcoco", COCO_PLACES[0], 2)
    with pytest.raises(data.InputError, match="testC.*train, val, testA, testB"):
        data.RefDataset("refcoco", "testC", folder)
    dataset = tokenized("refcoco", "val", folder, image_size=32)
    assert dataset.object_of(0).file_name == "COCO_train2014_000000001004.jpg"
    assert dataset.mask(0).sum() == 200 and dataset.expressions[0] == WORDS[0]
    assert [dataset.ids(i)["sent_id"] for i in range(16)] == [10 * ref + i for ref in range(8, 16) for i in range(2)]
    with mock.patch.object(data, "open_image", side_effect=data.open_image) as opened:
        assert len([dataset[index] for index in range(len(dataset))]) == 16 and opened.call_count == 4


def test_masks_lie_on_the_stored_pixels_and_ones_own_images_are_shown_upright(tmp_path):
    folder = write_own(tmp_path, [OWN])
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter to be seen
    Image.linear_gradient("L").resize((120, 100)).save(folder / "images" / "desk.jpg", exif=exif)
    dataset = data.RefDataset(str(folder), "train")
    assert dataset.image(0).size == (120, 100) and dataset.mask(0).shape == (100, 120)
    assert data.open_image(folder / "images" / "desk.jpg").size == (100, 120)


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


@pytest.fixture(scope="session")
def all_shapes(tmp_path_factory) -> Path:
    """A data folder with the whole shapes dataset, written as the first training run does."""
    folder = tmp_path_factory.mktemp("all_shapes")
    data.RefDataset("shapes", "val", folder)
    return folder


def test_shapes_are_what_the_design_asks_for(all_shapes):
    """From the files alone: annotations' attributes and polygons against what the sentences say."""
    folder = all_shapes / "shapes"
    instances = json.loads((folder / "instances.json").read_text())
    refs = pickle.loads((folder / "refs(shapes).p").read_bytes())
    objects, scenes = {}, collections.defaultdict(list)
    for annotation in instances["annotations"]:
        x, y = np.reshape(annotation["segmentation"], (-1, 2)).T
        area = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
        item = {**annotation["attributes"], "center": (x.mean(), y.mean()), "area": area}
        objects[annotation["id"]] = item
        scenes[annotation["image_id"]].append(item)
    values = {key: {item[key] for item in objects.values()} for key in ("shape", "color", "size")}
    assert [len(found) for found in values.values()] == [5, 6, 2] and len(scenes) == 4200
    assert {len(scene) for scene in scenes.values()} == {3, 4, 5, 6}
    areas = {size: [item["area"] for item in objects.values() if item["size"] == size] for size in values["size"]}
    assert min(areas["large"]) > 1.5 * max(areas["small"])

    def named(scene, phrase):  # objects that fit "large red circle", "red thing", ..
        words = set(phrase.split()) - {"the", "thing"}
        assert words and words <= set.union(*values.values()), phrase
        return [item for item in scene if words <= {item["shape"], item["color"], item["size"]}]

    ways = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
    ways |= {"above": (0, -1), "over": (0, -1), "below": (0, 1), "under": (0, 1)}
    relation = re.compile(r"(.+?) (?:to the )?(left|right|above|over|below|under) (?:of )?the (.+)")
    place = re.compile(r"(?:(left|right|top|bottom) )?(.+?)(?: (?:on|at) the (left|right|top|bottom))?")

    def ahead(item, other, word) -> float:  # pixels by which the item lies further that way
        return np.dot(np.subtract(item["center"], other["center"]), ways[word])

    kinds = collections.defaultdict(collections.Counter)
    for ref, sentence in ((ref, one["raw"]) for ref in refs for one in ref["sentences"]):
        scene, target = scenes[ref["image_id"]], objects[ref["ann_id"]]
        if related := relation.fullmatch(sentence):
            kind, phrase, word, (landmark,) = "relation", related[1], related[2], named(scene, related[3])
            behind = [item for item in named(scene, phrase) if item is not target and item is not landmark]
            assert behind and ahead(target, landmark, word) >= 10, sentence
            assert all(ahead(item, landmark, word) <= 0 for item in behind), sentence
        else:
            before, phrase, after = place.fullmatch(sentence).groups()
            kind = "place" if before or after else "attribute"
            rivals = [item for item in named(scene, phrase) if item is not target]
            assert bool(rivals) == (kind == "place"), sentence
            assert all(ahead(target, item, before or after) >= 10 for item in rivals), sentence
        assert target in named(scene, phrase), sentence
        kinds[ref["split"]][kind] += 1
    assert set(kinds["train"].values()) == {7200} and set(kinds["val"].values()) == {400}  # equal thirds
    assert set(kinds["testA"]) == {"attribute"} and set(kinds["testB"]) == {"place", "relation"}

    targets = [(objects[ref["ann_id"]], scenes[ref["image_id"]]) for ref in refs]
    assert len({ref["ann_id"] for ref in refs}) == len(refs)
    alike = [[o["shape"] == t["shape"] or o["color"] == t["color"] for o in scene].count(True) for t, scene in targets]
    assert np.mean(np.array(alike) > 1) >= 2 / 3  # most have a rival of the same shape or colour
    assert len({(ref["split"], ref["image_id"]) for ref in refs}) == len(scenes)  # no image in two splits
    content = {tuple((o["shape"], o["color"], o["size"], o["center"]) for o in scene) for scene in scenes.values()}
    assert len(content) == len(scenes) == len(instances["images"])  # no scene twice
    assert {Image.open(folder / "images" / image["file_name"]).size for image in instances["images"]} == {(128, 128)}


def test_shapes_are_the_same_to_the_byte(small, tmp_path):
    data.generate_shapes(tmp_path / "shapes", scenes=SMALL)
    files = [path.relative_to(small) for path in small.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert filecmp.cmpfiles(small, tmp_path, files, shallow=False) == (files, [], [])


# train.py


RUN = ("--batch-size", "4", "--log-every", "1", "--image-size", "64", "--dropout", "0.1", "--drop-path", "0.1")
CPU = ("--device", "cpu")  # where a result is the same bit for bit, and where no process needs a GPU of its own


@pytest.fixture(scope="session")
def trained(small, tmp_path_factory) -> Path:
    """A folder with one short run under runs/, made through the command line."""
    folder = tmp_path_factory.mktemp("trained")
    flags = ["--data", small, "--max-steps", 4, "--batch-size", 8, "--validate-every", 2]
    printed_by(HERE / "train.py", *flags, cwd=folder)
    return folder


@pytest.fixture(scope="session")
def best(trained) -> Path:
    (file,) = (trained / "runs").glob("*/best.safetensors")
    return file


@pytest.fixture
def train_here(small, tmp_path, monkeypatch):
    """A function that trains in this process, in a folder of tmp_path, and returns the scores; pictures if asked."""

    def train_it(*flags, out="run", pictures=False) -> dict:
        with monkeypatch.context() as patch:
            if not pictures:
                patch.setattr(evaluate, "draw_pictures", mock.Mock())
            return train.main([*RUN, "--data", str(small), "--out", str(tmp_path / out), *map(str, flags)])

    return train_it


def log_of(out: Path) -> list[dict]:
    """The lines of a run's log, without the clock; of two lines of one step the later."""
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    lines = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
    return list({(line["step"], line.get("split")): line for line in lines}.values())


FILES = ("best.safetensors", "last.pt", "metrics.json")


def test_training_leaves_what_the_readme_says(trained):
    (out,) = (trained / "runs").iterdir()
    views, splits = ("pictures", "words", "expressions", "ratios"), ("val", "testA", "testB")
    sheets = {f"{view}-{split}.png" for view in views for split in splits}
    assert {p.name for p in out.iterdir()} == {*FILES, "log.jsonl", "settings.json"} | sheets
    assert set(json.loads((out / "metrics.json").read_text())) == set(splits)
    lines = log_of(out)
    assert [line["step"] for line in lines if "loss" in line] == [4]
    assert [line["step"] for line in lines if line.get("split") == "val"] == [2, 4]
    assert Image.open(out / "pictures-val.png").width > 500


def test_the_flag_for_gradient_checkpointing_reaches_swin(train_here):
    swin = timm.models.swin_transformer
    with mock.patch.object(swin, "checkpoint_seq", side_effect=swin.checkpoint_seq) as used:
        train_here("--max-steps", 1, "--gradient-checkpointing")
    assert used.called


def test_one_seed_gives_one_training(train_here, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(ord(name))  # what was drawn before must not matter
        train_here(*CPU, "--max-steps", 3, "--seed", seed, out=name)
    a, b, c = (log_of(tmp_path / name) for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("left", FILES)
def test_a_run_is_overwritten_only_if_it_saved_nothing(left, train_here, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / left).write_bytes(b"of a run")
    with pytest.raises(SystemExit, match="a run already: choose another --out, go on with --resume, or delete it"):
        train_here("--max-steps", 1)
    assert [(file.name, file.read_bytes()) for file in out.iterdir()] == [(left, b"of a run")]
    if left != "last.pt":  # a model whose last.pt is gone
        (out / "settings.json").write_text("{}")
        with pytest.raises(SystemExit, match="a run already"):
            train_here("--max-steps", 1, "--resume")
        (out / "settings.json").unlink()
    (out / left).unlink()
    (out / "log.jsonl").write_text('{"step": 1, "loss": 0}\n')
    train_here("--max-steps", 1)
    assert [line["loss"] > 0 for line in log_of(out) if "loss" in line] == [True]


def test_resume_may_change_little(train_here, tmp_path, capsys):
    """Also with the command line of the start, which begins the run where there is nothing yet."""
    out, start = tmp_path / "run", ["--max-steps", 1, *CPU, "--resume"]
    train_here(*start)
    train_here(*start)
    assert [line["step"] for line in log_of(out) if "loss" in line] == [1]
    for flags in (["--lr", "1e-5"], ["--variant", "sharp"], ["--init", "x"], ["--no-pretrained"]):
        name = flags[0].removeprefix("--").removeprefix("no-").replace("-", "_")
        with pytest.raises(SystemExit, match=f"the run in .*run has {name} .*, not .*: leave such flags out"):
            train.main(["--resume", "--out", str(out), *flags])
    changes = ["--validate-every", "2", "--checkpoint-every", "1", "--log-every", "2", "--workers", "1"]
    train.main(["--resume", "--out", str(out), "--max-steps", "3", *changes])
    assert torch.load(out / "last.pt")["step"] == 3  # --data is the run's
    with pytest.raises(SystemExit, match="has done 3 steps already, more than the 2"):
        train.main(["--resume", "--out", str(out), "--max-steps", "2"])
    train.main(["--resume", "--out", str(out), "--epochs", "0.5"])
    settings = json.loads((out / "settings.json").read_text())
    assert torch.load(out / "last.pt")["step"] == 6 and settings["max_steps"] is None and settings["epochs"] == 0.5


def test_the_learning_rate_rises_then_decays_and_gradients_are_clipped(train_here, tmp_path):
    """A twentieth of the steps warms up: of one step 0.05, of three 0.15, the rest decays. Gradients have norm 1."""
    train_here("--max-steps", 1)
    moments = torch.load(tmp_path / "run" / "last.pt")["optimizer"]["state"].values()  # a tenth of the gradient
    assert torch.cat([moment["exp_avg"].flatten() for moment in moments]).norm().item() == pytest.approx(0.1, rel=1e-3)
    train_here("--resume", "--max-steps", 3)
    rates = [line["lr"] for line in log_of(tmp_path / "run") if "lr" in line]
    assert rates == pytest.approx([1e-3 / 1.05, 1e-3 * (2 / 2.85) ** 0.9, 1e-3 * (1 / 2.85) ** 0.9])
    groups = torch.load(tmp_path / "run" / "last.pt")["optimizer"]["param_groups"]
    assert [group["lr"] / rates[2] for group in groups] == pytest.approx([0.05, 0.05, 1, 1])  # BERT's come first
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0, 0.01, 0.0]


def wait_until(condition, process, seconds=900):
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline or process.poll() is not None:
            process.kill()
            pytest.fail(process.communicate(timeout=10)[0])
        time.sleep(0.001)


def written(file: Path) -> int:
    """When a file was last written, 0 where there is none."""
    return file.stat().st_mtime_ns if file.exists() else 0


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def assert_same_run(a: Path, b: Path) -> None:
    """Weights, optimiser and log are equal, bit for bit."""
    assert log_of(a) == log_of(b)
    one, other = (torch.load(out / "last.pt") for out in (a, b))
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    one, other = (safetensors.torch.load_file(out / "best.safetensors") for out in (a, b))
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert read_about(a)["scores"] == read_about(b)["scores"]


@pytest.mark.slow
def test_kill_9_at_any_moment_loses_nothing(small, tmp_path):
    """At 20 moments, half of them while a file is being written; one command line starts the run and goes on."""
    every = ["--checkpoint-every", 2, "--validate-every", 20]
    flags = [HERE / "train.py", "--data", small, *RUN, *CPU, "--max-steps", 120, *every, "--resume", "--out"]
    printed_by(*flags, tmp_path / "whole")
    out, torn = tmp_path / "cut", 0
    for kill in range(20):
        before = written(out / "last.pt")
        process = start(sys.executable, *flags, out)
        if kill % 2:
            wait_until((out / "last.pt.unfinished").exists, process)
        else:  # at some moment after one was written
            wait_until(lambda: written(out / "last.pt") > before, process)
            time.sleep(0.02 * kill)
        process.kill()
        process.communicate()
        torn += (out / "last.pt.unfinished").exists()
    assert torn > 0
    printed_by(*flags, out)
    assert_same_run(tmp_path / "whole", out)


@pytest.mark.slow
def test_torchrun_restarts_a_run_whose_process_was_killed(small, tmp_path):
    """One of two processes, twice."""
    flags = [HERE / "train.py", "--data", small, *RUN, *CPU, "--max-steps", 40, "--checkpoint-every", 2, "--resume"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=2"]
    printed_by(*flags, "--out", tmp_path / "whole", nproc=2)
    out = tmp_path / "cut"
    process = start(*torchrun, f"--master_port={free_port()}", *flags, "--out", out)
    steps = lambda: (out / "log.jsonl").exists() and (out / "log.jsonl").read_text().count('"loss"')
    for kill in range(2):
        before = steps() + 4  # a dying process may still write a line
        wait_until(lambda: steps() > before, process)
        environment = {child: Path(f"/proc/{child}/environ").read_bytes() for child in children_of(process.pid)}
        (victim,) = (child for child, names in environment.items() if b"\0LOCAL_RANK=1\0" in names)
        os.kill(victim, signal.SIGKILL)
    printed = process.communicate(timeout=900)[0]
    assert process.returncode == 0 and (out / "metrics.json").exists(), printed
    assert_same_run(tmp_path / "whole", out)


def test_what_is_not_finite_is_never_saved(train_here, tmp_path):
    """A learning rate of 1e15 leaves finite weights in step 1, and with them step 2 has no finite loss."""
    flags = ["--checkpoint-every", 1, "--max-steps", 9]
    with pytest.raises(SystemExit, match="a weight is not finite after step [23]; .*run keeps what it had"):
        train_here("--lr", 1e15, *flags)
    model = torch.load(tmp_path / "run" / "last.pt")["model"]
    assert all(value.isfinite().all() for value in model.values())
    with pytest.raises(SystemExit, match="not finite after step 1"):
        train_here("--lr", 1e39, *flags, out="other")
    assert not (tmp_path / "other" / "last.pt").exists()


@pytest.mark.parametrize("error, message", [
    (data.InputError("there is no image x.jpg"), "error: there is no image x.jpg\n"),
    (RuntimeError("NCCL error: unhandled system error"), "Traceback"),
])  # fmt: skip
def test_an_error_in_one_of_several_processes_ends_it_at_once(error, message, monkeypatch, capsys):
    """Without the interpreter's end, where NCCL can wait for the other processes."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(os, "_exit", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        data.command_line(mock.Mock(side_effect=error))()
    os._exit.assert_called_once_with(1)
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.slow
def test_processes_nodes_and_micro_batches_train_as_one_process_does(small, tmp_path):
    """Ten steps without dropout and drop path: the same losses, gradients (as AdamW keeps their mean) and logits.

    Every pixel is selected. Else rounding could move a pixel across the edge of a selection, and the loss with it.
    """
    address = f"127.0.0.1:{free_port()}"
    node = launcher(2, "--nproc_per_node=1", "--nnodes=2", f"--rdzv_endpoint={address}", "--local_addr=127.0.0.1")
    flags = ["--data", small, "--batch-size", 8, "--log-every", 1, "--image-size", 64, "--max-steps", 10,
             "--lr", 1e-4, "--ratio", 1, *CPU]  # fmt: skip
    runs = []
    for name, launches, extra in (
        ("one", [launcher(1)], []),
        ("one, in parts", [launcher(1)], ["--micro-batch", 2]),
        ("two, in parts", [launcher(2)], ["--micro-batch", 2]),
        ("four", [launcher(4)], []),
        ("two nodes", [node, node], []),  # both on this machine
        ("two, compiled", [launcher(2)], ["--micro-batch", 2, "--compile", "aot_eager"]),
    ):
        out = tmp_path / name
        processes = [start(*launch, HERE / "train.py", *flags, *extra, "--out", out) for launch in launches]
        printed = [process.communicate(timeout=900)[0] for process in processes]
        assert not any(process.returncode for process in processes), printed
        assert sum(text.count("shapes          testB") for text in printed) == 1  # by rank 0 alone
        last = torch.load(out / "last.pt")
        model, _ = load_model(out)
        model.load_state_dict(last["model"])
        moments = last["optimizer"]["state"].values()
        lines = [line for line in log_of(out) if "loss" in line]
        runs.append({
            "epochs": [line["epoch"] for line in lines],
            "losses": [line["loss"] for line in lines],
            "gradients": torch.cat([moment["exp_avg"].flatten() for moment in moments]).double(),
            "logits": model(*random_batch(model.config))["logits"].detach(),
        })  # fmt: skip
    whole, *others = runs
    assert whole["epochs"] == [step / 6 for step in range(1, 11)]  # 48 objects
    for other in others:
        assert other["epochs"] == whole["epochs"]
        assert other["losses"] == pytest.approx(whole["losses"], abs=1e-5)
        assert (other["gradients"] - whole["gradients"]).norm() < 1e-3 * whole["gradients"].norm()
        torch.testing.assert_close(other["logits"], whole["logits"], rtol=1e-5, atol=1e-4)


# evaluate.py


def test_metrics_worked_by_hand():
    prediction, target = torch.zeros(5, 4, 5, dtype=torch.bool), torch.zeros(5, 4, 5, dtype=torch.bool)
    prediction[0, :2], target[0, :2] = True, True  # 10 of 10: IoU 1
    prediction[1, 0, :4], target[1, 0] = True, True  # 4 of 5: 0.8
    prediction[2, 0, :], target[2, :2] = True, True  # 5 of 10: 0.5
    target[3, 0, 0] = True  # nothing predicted, 0 of 1: 0
    # nothing predicted and nothing there: the union is empty, 0
    metrics = evaluate.Metrics()
    metrics.update(prediction, target, range(5))
    expected = {"P@0.5": 60, "P@0.6": 40, "P@0.7": 40, "P@0.8": 40, "P@0.9": 20}
    expected |= {"mIoU": 100 * (1 + 0.8 + 0.5) / 5, "oIoU": 100 * 19 / 26, "samples": 5}
    assert metrics.compute() == pytest.approx(expected)


def test_what_the_words_select_worked_by_hand():
    """Two sentences, [CLS] a b [SEP] and [CLS] c [SEP] and padding; four pixels, of which each token selects two."""
    x, y = [1.0, 0.0], [0.0, 2.0]
    tokens = torch.tensor([[x, y, x, y], [x, x, [3.0, 0.0], [-9.0, 5.0]]])  # cosines 0 1 0 0 1 0; 1 1 1
    left, right, even = [1.0, 1, 0, 0], [0.0, 0, 1, 1], [1.0, 0, 1, 0]
    M = torch.tensor([[left, even, right, left], [left, left, right, right]])
    mask_l = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    assert words.token_cosine(tokens, mask_l).tolist() == pytest.approx([2 / 6, 1])
    shared = lambda M: words.shared_with_cls(Selection(None, None, None, M), mask_l).tolist()
    assert shared(M) == pytest.approx([(50 + 0) / 2, 100])
    assert shared(0 * M) == [0, 0]  # a threshold that no pixel passes
    assert words.ranking(torch.tensor([3.0, 1, 2, 0]), torch.tensor([True, True, False, False])) == 0.75
    for text, named in (("left red star", "colour and shape"), ("small thing over the red star", "size")):
        assert words.named_by(text) == named


class FirstColumn(torch.nn.Module):
    """Stands for a model: its logits are -1, and +1 in the first of four columns, but for a batch's first sample."""

    config, mean = tiny(), torch.zeros(1)

    def forward(self, image, input_ids, attention_mask):
        logits = -torch.ones(len(image), 4, 4)
        logits[1:, :, 0] = 1
        return {"logits": logits}


def test_the_two_resolutions_differ_by_a_known_amount(tmp_path):
    """Four samples; the target is the first 3 of 8 columns. Nearest to 4 columns keeps the 1st of columns 1, 3, 5, 7:
    IoU 1. At the original size the logits 1, -1 become 1, 0.5, -0.5, -1 by bilinear resizing: two columns of three."""
    folder = write_refer(tmp_path, "refcoco", COCO_PLACES[0], 2, size=(8, 4), scenes=1)
    file = folder / "refcoco" / "instances.json"
    instances = json.loads(file.read_text())
    for annotation in instances["annotations"]:
        annotation["segmentation"] = [[0, 0, 3, 0, 3, 4, 0, 4]]
    file.write_text(json.dumps(instances))
    dataset = tokenized("refcoco", "val", folder, image_size=4)
    for resolution, mIoU in (("input", (0 + 3 * 100) / 4), ("original", (0 + 3 * 200 / 3) / 4)):
        metrics = evaluate.evaluate(FirstColumn(), dataset, torch.device("cpu"), resolution=resolution)
        assert metrics.compute()["mIoU"] == pytest.approx(mIoU), resolution


def test_shuffled_expressions_come_from_another_image(small):
    dataset = tokenized("shapes", "val", small)
    before, owners = dataset.expressions, collections.defaultdict(set)
    for index, expression in enumerate(before):
        owners[expression].add(dataset.object_of(index).image_id)
    evaluate.shuffle_expressions(dataset)
    assert sorted(dataset.expressions) == sorted(before)
    for index, expression in enumerate(dataset.expressions):
        assert owners[expression] != {dataset.object_of(index).image_id}
    encoded = data.tokenize(data.make_tokenizer(before), dataset.expressions, 21)
    assert all(torch.equal(encoded[name], values) for name, values in dataset.tokens.items())


@pytest.mark.slow
def test_evaluation_counts_the_same_in_any_number_of_processes(best, small, tmp_path):
    """36 sentences are three batches, of 16, 16 and 4: one of two processes has more, and one of four has none."""
    results = []
    for nproc in (1, 2, 4):
        files = [tmp_path / f"{nproc}.json", tmp_path / f"{nproc}.jsonl"]
        flags = ["--checkpoint", best, "--data", small, *CPU, "--json", files[0], "--per-sample", files[1]]
        printed_by(HERE / "evaluate.py", *flags, nproc=nproc)
        results.append([file.read_text() for file in files])
    assert json.loads(results[0][0])["val"]["samples"] == len(results[0][1].splitlines()) == 36
    assert results[0] == results[1] == results[2]


QUICK = ("vega", "linguistic", "topk-pixels", "local-only", "sharp")


@pytest.mark.parametrize("name", [pytest.param(v, marks=[pytest.mark.slow] * (v not in QUICK)) for v in VARIANTS])
def test_a_model_carries_its_variant_and_its_data(name, train_here, tmp_path):
    scores = train_here("--variant", name, "--max-steps", 2, pictures=True)
    out = tmp_path / "run"
    assert evaluate.main(["--checkpoint", str(out)])["val"] == scores["val"]
    model, _ = load_model(out)
    assert model.config.variant == name and type(model.vis) is VARIANTS[name].block
    assert ("contrastive" in log_of(out)[0]) == ("tau" in log_of(out)[0]) == VARIANTS[name].eq5
    assert (out / "ratios-val.png").exists() == (model.vis.selectors != "none")


@pytest.fixture
def first_column(monkeypatch):
    """Stands for a trained model; see FirstColumn."""
    stand_in = FirstColumn(), data.make_tokenizer(["red thing"])
    monkeypatch.setattr(evaluate, "load_model", lambda source: stand_in)


def test_ones_own_images_get_masks_and_overlays(best, first_column, tmp_path, capsys):
    """A folder with a broken one and a decompression bomb, which are named last, and two expressions."""
    for file in ("best.safetensors", "settings.json"):  # which make it a run's folder
        (tmp_path / file).write_bytes(best.with_name(file).read_bytes())
    folder, out = tmp_path / "holidays", tmp_path / "masks"
    folder.mkdir()
    for name in ("a.jpg", "c.png", "._c.png"):
        Image.new("RGB", (90, 61), "red").save(folder / name)
    (folder / "b.jpg").write_text("<html>")
    Image.new("1", (14_000, 14_000)).save(folder / "d.png")
    (folder / "notes.txt").write_text("no image")
    command = ["--checkpoint", str(tmp_path), "--expression", "red thing", "Left: thing!", "--image"]
    with pytest.raises(SystemExit, match="2 of 4 images were left out: .*b.jpg can't .*\n.*d.png can't .* bomb"):
        evaluate.main([*command, str(folder)])
    printed = capsys.readouterr().out
    assert "never seen some word of 'Left: thing!'" in printed and "word of 'red thing'" not in printed
    assert "'red thing' covers 0.0 % of" in printed and "'Left: thing!' covers 24.4 % of" in printed
    names = [f"{file}-{slug}" for file in ("a.jpg", "c.png") for slug in ("1-red-thing", "2-left-thing")]
    files = {f"{name}{end}" for name in names for end in (".png", ".mask.png")} | {"a.jpg-all.png", "c.png-all.png"}
    assert {file.name for file in out.iterdir()} == files
    assert Image.open(out / "a.jpg-2-left-thing.png").size == (90, 61)
    nothing, left = (np.asarray(Image.open(out / f"{name}.mask.png")) for name in names[:2])
    assert nothing.shape == (61, 90) and not nothing.any()
    assert (left[:, :22] == 255).all() and (left[:, 22:] == 0).all()  # a quarter of 90 pixels
    with pytest.raises(SystemExit, match="or one lies in .*masks, where the masks go"):
        evaluate.main([*command, str(out)])  # it would read its own masks and write over what it reads


def test_the_command_and_python_give_one_mask(best, tmp_path, monkeypatch):
    """The logits of expressions that share a pass are each one's own; bf16 changes them by its rounding at most."""
    image, expressions = tmp_path / "photo.png", ["red thing", "left square"]
    Image.linear_gradient("L").resize((50, 40)).save(image)
    model, tokenizer = load_model(best)
    middle = np.median(evaluate.load(best).logits(image, expressions))
    model.decoder.head.bias.data -= float(middle)  # so that masks hold half of the pixels
    model_module.save_model(tmp_path / "half.safetensors", model, tokenizer)
    monkeypatch.chdir(tmp_path)
    seen, real = [], evaluate.Segmenter.logits
    monkeypatch.setattr(evaluate.Segmenter, "logits", lambda *a: (seen.append(real(*a)), seen[-1])[1])
    command = ["--checkpoint", "half.safetensors", "--image", str(image), "--expression", *expressions]
    evaluate.main([*command, "--precision", "bf16"])
    evaluate.main(command)
    (bf16, fp32), segment = seen, evaluate.load("half.safetensors")
    layers = sum(isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) for module in model.modules())
    assert fp32.shape == (2, 40, 50) and 0 < np.abs(bf16 - fp32).max() < layers * 2**-8 * np.abs(fp32).max()
    for together, expression, slug in zip(fp32, expressions, ("1-red-thing", "2-left-square")):
        mask = np.asarray(Image.open(f"runs/half/masks/photo.png-{slug}.mask.png")) > 0
        assert 0.2 < mask.mean() < 0.8 and (mask == segment(image, expression)).mean() > 0.99
        np.testing.assert_allclose(together, seen[-1][0], rtol=1e-4, atol=1e-4)


NOISE = np.random.default_rng(0).integers(0, 256, (31, 47, 4), dtype=np.uint8)
ODD_IMAGES = {
    "one pixel": Image.new("RGB", (1, 1), "red"),
    "grey": Image.fromarray(NOISE[..., 0]),
    "CMYK": Image.fromarray(NOISE).convert("RGB").convert("CMYK"),
    "16 bit": Image.fromarray(NOISE[..., 0].astype(np.uint16) * 257),
    "transparent": Image.fromarray(NOISE),
}
ODD_EXPRESSIONS = ["thing " * 10_000, "\N{GRINNING FACE}", "左边的人", "x" * 5000, "a\0b\n\tc", "\udcff mug"]


@pytest.mark.parametrize(
    "kind, expression", [(kind, "red thing") for kind in ODD_IMAGES] + [("grey", odd) for odd in ODD_EXPRESSIONS]
)
def test_odd_images_and_odd_expressions_are_segmented(kind, expression, best, tmp_path):
    image = ODD_IMAGES[kind]
    image.save(tmp_path / "photo.tiff")
    mask = evaluate.load(best)(tmp_path / "photo.tiff", expression)
    assert mask.shape == image.size[::-1] and mask.dtype == bool
    as_rgb = (data.to_rgb(ODD_IMAGES[kind]).tobytes() for kind in ("grey", "16 bit"))
    assert next(as_rgb) == next(as_rgb)  # scaled, not clipped at 255


WRONG_INPUTS = [
    (train, ["--lr", "-1"], "--lr can't be -1.0"),
    (train, ["--ratio", "0"], "--ratio can't be 0.0"),
    (train, ["--batch-size", "many"], "argument --batch-size: invalid int value: 'many'"),
    (train, ["--batch-size", "500"], "only 48 objects to train on: lower --batch-size, which is 500"),
    (train, ["--batch-size", "16", "--micro-batch", "3"], "--batch-size 16 does not divide among 1 process(es)"),
    (train, ["--device", "gpu"], "--device gpu can't be used here"),
    (train, ["--compile", "nonsense"], "--compile can't be nonsense"),
    (train, ["--out", str(HERE / "README.md")], "README.md is a file, not a folder"),
    (train, ["--init", "x.safetensors"], "there is no model x.safetensors"),
    (train, ["--resume", "--variant", "linguistic"], "has variant vega, not linguistic"),
    (train, ["--variant", "threshold"], "invalid choice: 'threshold' (choose from"),
    (train, ["--image-size", "130"], "--image-size is 130, but must be a multiple of 4 and at least 32"),
    (train, ["--attention-heads", "5"], "must be multiples of 5 heads"),
    (train, ["--swin-heads", "4"], "these sizes make no model"),
    (train, ["--bert-config", '{"hiden_size": 3}'], "BERT's config has no hiden_size"),
    (evaluate, ["--split", "tetsB"], "no split 'tetsB'; it has train, val, testA, testB"),
    (evaluate, ["--json", "nowhere/x.json"], "there is no folder nowhere"),
    (evaluate, ["--checkpoint", str(HERE / "README.md")], "holds no model of this program, or was cut short"),
    (evaluate, ["--checkpoint", "nowhere"], "there is no model nowhere: give a file, a run's folder, or a name"),
    (evaluate, ["--image", "absent.jpg", "--expression", "red"], "absent.jpg can't be read as an image (FileNotFound"),
    (evaluate, ["--image", str(HERE / "README.md"), "--expression", "red"], "can't be read as an image"),
    (evaluate, ["--image", str(HERE / "assets/shapes.png"), "--expression", " "], "expression is empty"),
    (evaluate, ["--image", "a.jpg", "b/a.jpg", "--expression", "red"], "two images have the same name"),
]


@pytest.mark.parametrize("script, flags, message", WRONG_INPUTS)
def test_a_wrong_input_gets_one_clear_message(script, flags, message, trained, small, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    before = sorted(trained.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        script.main([*flags, "--data", str(small)])
    assert stopped.value.code not in (0, None)
    assert message in str(stopped.value.code) + capsys.readouterr().err
    assert sorted(trained.rglob("*")) == before


@pytest.mark.parametrize("has_bf16", [False, True])
def test_bf16_is_the_default_where_a_card_has_it(has_bf16, monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or has_bf16)
    assert evaluate.resolve_precision(None, cuda) == ("bf16" if has_bf16 else "fp32")
    assert evaluate.resolve_precision(None, cpu) == "fp32" and evaluate.resolve_precision("bf16", cpu) == "bf16"


def test_each_process_touches_its_own_gpu_alone(monkeypatch):
    """Two pretended GPUs that only note what is asked of them."""
    noted, zeros = [], torch.zeros
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: noted.append(f"current {device}"))
    monkeypatch.setattr(torch, "zeros", lambda *a, device=None: (noted.append(f"zeros {device}"), zeros(*a))[1])
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert evaluate.start_processes(None) == torch.device("cuda:1")
    assert noted == ["current cuda:1", "zeros cuda:1"] and not torch.backends.cudnn.allow_tf32

@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
@pytest.mark.parametrize("precision, points", [("fp32", 1), ("bf16", 5)])
def test_cuda_trains_and_scores_as_the_cpu_does(precision, points, train_here, small, tmp_path):
    scores = train_here("--max-steps", 4, "--precision", precision, "--device", "cuda")
    flags = ["--data", str(small), "--checkpoint", str(tmp_path / "run"), "--device", "cpu"]
    assert scores["val"]["mIoU"] == pytest.approx(evaluate.main(flags)["val"]["mIoU"], abs=points)


def test_under_bf16_normalisation_and_selection_stay_in_fp32():
    model, seen = small_model("vega"), []
    real = F.instance_norm
    with mock.patch.object(F, "instance_norm", lambda x: (seen.append(x.dtype), real(x))[1]):
        with evaluate.autocast(torch.device("cpu"), "bf16"):
            output = model(*random_batch(model.config))
    assert set(seen) == {output["F_v"].dtype, output["selection"].S.dtype, output["logits"].dtype} == {torch.float32}


class Reads(TorchDispatchMode):
    """Counts the values that Python reads from tensors, for each of which it would wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", VARIANTS)
def test_no_step_reads_a_value(name):
    model = small_model(name)
    image, ids, mask = random_batch(model.config)
    batch = {"image": image, "input_ids": ids, "attention_mask": mask, "mask": image[:, 0] > 200}
    settings = train.Settings(**{**train.PRESETS["tiny"], "dropout": 0.1})
    optimizer = train.make_optimizer(model, settings)
    with Reads() as reads:
        train.take_step(model, model, optimizer, batch, 1, settings)
    assert reads.count == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_step_waits_for_the_gpu(precision, small):
    settings = train.Settings(**{**train.PRESETS["tiny"], "data": str(small), "precision": precision})
    model, tokenizer = train.build_model(settings, None)
    model.cuda()
    optimizer = train.make_optimizer(model, settings)
    dataset = data.RefDataset("shapes", "train", small, None, tokenizer, 21, 128, training=True)
    order = train.training_batches(len(dataset), 4, 0, 12, 0)
    for step, batch in enumerate(list(evaluate.load_batches(dataset, order, 0, torch.device("cuda")))):
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
        train.take_step(model, model, optimizer, batch, 2, settings)
    torch.cuda.set_sync_debug_mode("default")


def test_gates_start_small_where_swin_is_pretrained(small, monkeypatch):
    """As LAVT's; the demo's start is another."""
    monkeypatch.setattr(train, "load_swin", mock.Mock(return_value=""))
    for swin, expected in ((None, False), ("a file", True)):
        settings = train.Settings(**{**train.PRESETS["tiny"], "data": str(small), "swin": swin})
        gate = train.build_model(settings, None)[0].vision.fusions[1].gate
        assert all((0.018 < layer.weight.std() < 0.022) == expected for layer in (gate[0], gate[2]))


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


def test_the_papers_row_stands_under_a_base_models_scores(best, tmp_path, capsys):
    paper = [row.split() for row in PAPERS_TABLE_5.strip().split("\n")]
    assert [[*key, *(f"{score:.2f}" for score in row)] for key, row in evaluate.TABLE_5.items()] == paper
    file, folder = tmp_path / "x.safetensors", write_refer(tmp_path, "refcoco", COCO_PLACES[0], 2)
    about, weights = read_about(best), safetensors.torch.load_file(best)
    command = ["--checkpoint", str(file), "--dataset", "refcoco", "--data", str(folder)]

    def printed(*flags, model="base", variant="vega", ratio=0.3) -> tuple[dict, list]:
        """The scores, and the lines below the heading; no base model is at hand, so a tiny one says that it is."""
        about["settings"]["model"] = model
        about["config"].update(variant=variant, ratio=ratio)
        safetensors.torch.save_file(weights, file, {key: json.dumps(value) for key, value in about.items()})
        capsys.readouterr()
        scores = evaluate.main([*command, "--split", "val", "testA", *flags])
        return scores, [line.split() for line in capsys.readouterr().out.splitlines()[2:]]

    scores, lines = printed()
    assert [line[0] for line in lines] == ["refcoco", "paper", "difference"] * 2
    assert lines[1][1:] == paper[0][2:] and lines[4][1:] == paper[1][2:]
    assert float(lines[2][-1]) == pytest.approx(scores["val"]["oIoU"] - 75.35, abs=0.006)
    assert float(lines[5][1]) == pytest.approx(scores["testA"]["P@0.5"] - 89.00, abs=0.006)
    for settings in ({"variant": "unmasked-softmax"}, {"ratio": 0.5}):  # Table 4d and Table 6, of val alone
        _, lines = printed(**settings)
        assert lines[1] == ["paper", "76.22", "75.14"] and [line[0] for line in lines[2:]] == ["difference", "refcoco"]
    for flags in (["--shuffle-expressions"], ["--resolution", "original"]):
        assert [line[0] for line in printed(*flags)[1]] == ["refcoco"] * 2
    assert [line[0] for line in printed(model="tiny")[1]] == ["refcoco"] * 2
    for settings in ({"variant": "unmasked-softmax", "ratio": 0.5}, {"ratio": 0.35}, {"variant": "sharp"}):
        assert evaluate.paper_scores(VEGAConfig(**settings), "refcoco", "val") == {}


@pytest.mark.parametrize("split", ["val", *(pytest.param(test, marks=pytest.mark.slow) for test in ("testA", "testB"))])
def test_the_demos_model_scores_as_the_readme_says(split, all_shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # where there is no run
    scores = evaluate.main(["--split", split, "--data", str(all_shapes)])[split]
    assert "there is no run here yet: this is the demo's model" in capsys.readouterr().out
    row = re.search(rf"^\| {split} \|(.*)\|$", (HERE / "README.md").read_text(), re.MULTILINE)[1]
    stated = [float(cell) for cell in row.split("|")[:5]]
    columns = ("P@0.5", "P@0.7", "P@0.9", "mIoU", "oIoU")
    assert [scores[column] for column in columns] == pytest.approx(stated, abs=0.1 + 100 / 800)  # and one sentence
    assert scores["mIoU"] == pytest.approx(stated[3], abs=0.1)


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the Hugging Face Hub does; it keeps what was uploaded with the right token."""

    files = {}  # "me/vega/model.safetensors" -> content

    def answer(self, content=b"", status=200, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content if self.command != "HEAD" else b"")

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Authorization"] != "Bearer secret":
            return self.answer(b'{"error": "Invalid username or password."}', 401)
        if "/preupload/" in self.path:
            found = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            return self.answer(json.dumps({"files": [{**file, "shouldIgnore": False} for file in found]}).encode())
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[f"me/vega/{line['value']['path']}"] = base64.b64decode(line["value"]["content"])
        commit = f"http://{self.headers['Host']}/me/vega/commit/1"
        answer = {"url": "me/vega", "commitUrl": commit, "commitOid": "1", "errors": [], "warnings": []}
        self.answer(json.dumps(answer).encode())

    def do_GET(self):
        content = self.files.get(self.path[1:].replace("/resolve/main", ""))
        if content is None:
            return self.answer(status=404)
        self.answer(content, ETag=f'"{hash(content)}"', X_Repo_Commit="1" * 40)

    do_HEAD = do_GET


@pytest.mark.slow
def test_a_model_goes_to_the_hub_and_comes_back(tmp_path, monkeypatch):
    """Uploaded, loaded by name, loaded again without the server: the same masks. A wrong token uploads nothing."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "wrong")
    process = start(sys.executable, HERE / "evaluate.py", "--push", "me/vega", cwd=tmp_path)
    printed = process.communicate(timeout=900)[0]
    assert process.returncode == 1 and "not uploaded" in printed and "401" in printed and not Hub.files
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert "/me/vega/commit/1" in printed_by(HERE / "evaluate.py", "--push", "me/vega", cwd=tmp_path)
    assert Hub.files["me/vega/model.safetensors"] == model_module.DEMO.read_bytes()
    assert json.loads(Hub.files["me/vega/config.json"]) == read_about(model_module.DEMO)["config"]
    card = Hub.files["me/vega/README.md"].decode()
    assert "| val | 80.42 |" in card and 'evaluate.load("me/vega")' in card and "data/shapes" not in card

    scene = [HERE / "assets/scene.jpg", "--expression", "left star", "yellow thing above the purple cross"]
    masks = []
    for name, offline in (("demo", "0"), ("me/vega", "0"), ("me/vega@main", "1")):
        monkeypatch.setenv("HF_HUB_OFFLINE", offline)
        if offline == "1":
            server.shutdown()
        source = [] if name == "demo" else ["--checkpoint", name]
        printed_by(HERE / "evaluate.py", *source, "--image", *scene, cwd=tmp_path)
        files = sorted((tmp_path / "runs" / Path(name).name / "masks").glob("*.mask.png"))
        masks.append([file.read_bytes() for file in files])
    assert len(masks[0]) == 2 and masks[0] == masks[1] == masks[2]


# studies/


def test_the_table_of_a_study_is_right():
    """By hand. vega has oIoU 64, 65, 67, 66, 68."""
    found = {
        "vega": (64, 65, 67, 66, 68), "no-cues": (63, 63, 66, 63, 69), "ratio=0.1": (65, 60), "vega,weight=0.5": (60,),
        "contrastive-only,weight=0.5": (62,),
    }  # fmt: skip
    runs = [
        {"name": name, "seed": seed, "val": {"oIoU": oIoU, "mIoU": oIoU + 10}, "testA": {}}
        for name, scores in found.items() for seed, oIoU in enumerate(scores)
    ]  # fmt: skip
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in study.table(runs).splitlines()[2:]]
    assert rows == [
        ["2", "`vega`", "5", "66.00 (1.58)", "", "", "", "76.00 (1.58)", "", "", ""],
        # differences -1, -2, -1, -3, 1: a sum as large as theirs, 6, has one sign but for at most a 1, so 8 of 32 ways
        ["3b", "`no-cues`", "5", "64.80 (2.68)", "-1.20 (-3.00 to +1.00)", "0.250", "-1.51",
         "74.80 (2.68)", "-1.20 (-3.00 to +1.00)", "0.250", "-0.45"],
        ["6", "`ratio=0.1`", "2", "62.50 (3.54)", "-2.00 (-5.00 to +1.00)", "", "-0.53",
         "72.50 (3.54)", "-2.00 (-5.00 to +1.00)", "", "-0.16"],
        ["ours", "`vega,weight=0.5`", "1", "60.00", "-4.00", "", "", "70.00", "-4.00", "", ""],
        ["ours", "`contrastive-only,weight=0.5`", "1", "62.00", "+2.00", "", "", "72.00", "+2.00", "", ""],
    ]  # fmt: skip
    assert study.pairs(runs, "ratio=0.1", "vega").splitlines()[2:] == [
        "| 0 | 65.00 | 64.00 | +1.00 | 75.00 | 74.00 | +1.00 |",
        "| 1 | 60.00 | 65.00 | -5.00 | 70.00 | 75.00 | -5.00 |",
        "| mean | 62.50 | 64.50 | -2.00 | 72.50 | 74.50 | -2.00 |",
    ]
    more = {"all-pixels": 63, "global-only": 64}
    runs += [{"name": name, "seed": 0, "val": {"oIoU": oIoU}} for name, oIoU in more.items()]
    assert study.claims(runs).splitlines()[2:] == [
        "| 3a | `vega` | `all-pixels` | the better | +1.19 | 1 | +1.00 (+1.00 to +1.00) | shows |",
        "| 3b | `vega` | `no-cues` | the better | +1.51 | 5 | +1.20 (-1.00 to +3.00) | cannot be seen |",
        "| 3b | `vega` | `global-only` | both | +0.42 | 1 | +0.00 (+0.00 to +0.00) | does not show |",
        "| 6 | `vega` | `ratio=0.1` | both | +0.53 | 2 | +2.00 (-1.00 to +5.00) | cannot be seen |",
    ]


def test_the_tables_of_the_study_are_those_of_its_results():
    text, groups = (HERE / "docs" / "study.md").read_text(), study.groups(study.read_results())
    for title, runs in groups.items():
        assert study.table(runs) in text, f"docs/study.md lacks the present table of {title}"
        assert study.pairs(runs, "contrastive-only", "vega") in text  # "" where the control has no run
        assert study.claims(runs) in text
    for task, page in itertools.product(("shapes", "things"), ("README.md", "docs/study.md")):
        # the sentence that gives the differences seed by seed
        lines = study.pairs(groups[f"{task}; AMD EPYC; 1 thread"], "contrastive-only", "vega").splitlines()[2:-1]
        *others, last = [line.split("|")[4].strip() for line in lines]
        assert f"{', '.join(others)} and {last}" in " ".join((HERE / page).read_text().split())
    for split in ("val", "testA", "testB"):  # the README's last column, of the demo's processor
        mIoU = study.table(groups["shapes; AMD EPYC; 1 thread"], split).splitlines()[2].split("|")[8]
        assert re.search(rf"^\| {split} \|.*\|{re.escape(mIoU)}\|$", (HERE / "README.md").read_text(), re.MULTILINE)


def test_a_folder_of_things_is_what_its_sentences_say(tmp_path, capsys):
    """Discs, each kind of a colour of its own; from the written files alone."""
    colors, stamps = {}, tmp_path / "stamps"
    for number in range(26):
        folder = stamps / ("animals/birds" if number else "animals/cartoon")
        folder.mkdir(parents=True, exist_ok=True)
        kind, color = f"grey bird{chr(97 + number)}", (60 * (number % 5), 50 * (number // 5), 120)
        colors[kind] = color
        picture = Image.new("RGBA", (60, 50))
        ImageDraw.Draw(picture).ellipse((5, 5, 45, 45), fill=color)
        picture.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"A {kind}.\nde.utf8=Ein Vogel.\n")
    folder = tmp_path / "things"
    things.make_things(folder, stamps, {"train": 30, "val": 5, "test": 5, "unseen": 5})
    assert data.check(str(folder))
    capsys.readouterr()

    place, relation = "(?:(left|right|upper|lower) )?", "(?: (left of|right of|above|below) the (.+))?"
    sentence = re.compile(f"(?:the )?{place}(grey bird.){relation}")
    ways = {"left": (-1, 0), "right": (1, 0), "upper": (0, -1), "lower": (0, 1)}
    ways |= {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
    scenes, kinds, forms = collections.defaultdict(list), collections.defaultdict(set), collections.Counter()
    for ref in json.loads((folder / "refs.json").read_text()):
        mask = data.rasterize(ref["segmentation"], 192, 192)
        ys, xs = mask.nonzero()
        assert mask.sum() == pytest.approx(math.pi / 4 * (np.ptp(xs) + 1) * (np.ptp(ys) + 1), rel=0.05)
        found = [sentence.fullmatch(text).groups() for text in ref["sentences"]]
        (kind,) = {words[1] for words in found}
        pixels = np.asarray(Image.open(folder / "images" / f"{ref['image_id']:04d}.jpg"))[mask]
        assert np.abs(np.median(pixels, axis=0) - colors[kind]).max() < 20
        kinds[ref["split"]].add(kind)
        scenes[ref["image_id"]].append((kind, np.array([xs.mean(), ys.mean()]), found))
    assert len(scenes) == 45 and not kinds["unseen"] & (kinds["train"] | kinds["val"] | kinds["test"])
    assert "grey birda" not in set.union(*kinds.values())  # a drawing
    for scene in scenes.values():
        for kind, center, found in scene:
            like = [other for name, other, _ in scene if name == kind and other is not center]
            for place, _, relation, mark in found:
                forms[place or relation] += 1
                if place:
                    assert all((center - other) @ ways[place] > 10 for other in like)
                elif relation:
                    ((_, there, _),) = [one for one in scene if one[0] == mark]
                    assert (center - there) @ ways[relation] > 10
                    assert all((other - there) @ ways[relation] < 5 for other in like)
                else:
                    assert not like
    assert {*forms} == {None, *ways}
    for argv, message in (
        ([tmp_path / "new", "--stamps", tmp_path], "apt-get install tuxpaint-stamps-default"),
        ([folder, "--stamps", stamps], "is there already"),
    ):
        with pytest.raises(SystemExit, match=message):
            things.main([*map(str, argv)])
