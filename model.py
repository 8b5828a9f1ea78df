"""VEGA: Swin-B with early fusion, BERT, the VIS block and the decoder that refers to the guidance set.

    expression --> BERT --> tokens                                                                Sec. 3.1
    image --> Swin stages 1..4, each followed by EarlyFusion with the tokens --> F_1 .. F_4       Sec. 3.1
    tokens --> cross-attention to F_v (F_4 projected to D channels) --> Q_l, enhanced             Table 2, rows 2, 3
    F_v, Q_l --> VISBlock --> guidance set G = {Q_l, Q_v}                                         Sec. 3.2
    F_4 .. F_1, G --> Decoder --> logits                                                          Sec. 3.3

Pixels are [B, N, C] as tokens and [B, H, W, C] as maps; [B, C, H, W] is for images, convolutions and resizing alone.
"""

import contextlib
import json
import os
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Iterator

import safetensors
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, checkpoint_filter_fn
from torch import Tensor, nn
from transformers import BertConfig, BertModel, BertTokenizer

from data import InputError, input_errors
from selection import INITIAL_LOG_TAU, MAX_TOKENS, VARIANTS, AttentionLayer, padding_bias, pixel_contrastive_loss

BERT_BASE = {
    name: getattr(BertConfig(), name)
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                 "hidden_act", "max_position_embeddings", "type_vocab_size", "layer_norm_eps", "pad_token_id")
}  # fmt: skip


def flag(default, help: str, valid=lambda value: True, **options):
    """A field of a dataclass that is also a flag: its help, the test of its value, argparse's options."""
    return field(default=default, metadata={"help": help, "valid": valid, "options": options})


@dataclass
class VEGAConfig:
    """Everything that decides the model's shape and its loss; a model's file carries it. Defaults: the paper's model.

    "ours" and "LAVT": see selection.py. Raises InputError if a value is out of range, or if values don't fit together.
    """

    image_size: int = flag(480, "pixels a side; the image is squeezed to this square (LAVT)")
    embed_dim: int = flag(128, "Swin-B: channels at stage 1; they double at every stage")
    depths: tuple = flag((2, 2, 18, 2), "Swin-B: blocks of each stage", type=int, nargs="+")
    swin_heads: tuple = flag((4, 8, 16, 32), "Swin-B: attention heads of each stage", type=int, nargs="+")
    window_size: int = flag(12, "LAVT: patches a side of a window; 12 as in the Swin-B pretrained at 384 x 384")
    drop_path: float = flag(0.3, "LAVT: drop rate of the last Swin block, rising from 0", lambda p: 0 <= p < 1)
    coordinates: bool = flag(False, "ours: add the image's coordinates to the patch embedding")
    bert_config: dict = flag(None, "JSON: BERT's sizes where they differ from BERT-base's", type=json.loads)
    max_tokens: int = flag(MAX_TOKENS, "ours: most tokens of an expression, with [CLS] and [SEP]", lambda n: n > 2)
    variant: str = flag("vega", "vega or an ablation, listed at the end of --help", metavar="NAME", choices=VARIANTS)
    ratio: float = flag(0.3, "share of the pixels that each token selects, up to 1 (Table 6)", lambda r: 0 < r <= 1)
    attention_heads: int = flag(8, "ours: attention heads in enhancement, VIS block, decoder", lambda n: n > 0)
    decoder_width: int = flag(256, "ours: the decoder's channels, a multiple of 8", lambda n: n >= 8 and n % 8 == 0)
    dropout: float = flag(0.1, "ours: in BERT, enhancement and VIS block; below 1", lambda p: 0 <= p < 1)
    contrastive: float = flag(0.5, "ours: weight of Eq. 5 beside the mask's cross-entropy", lambda w: w >= 0)
    dice: float = flag(0.0, "ours: weight of a Dice term", lambda w: w >= 0)

    def __post_init__(self):
        for one in fields(self):
            value = getattr(self, one.name)
            if value is not None and not one.metadata["valid"](value):
                raise InputError(f"--{one.name.replace('_', '-')} can't be {value}; it is: {one.metadata['help']}")
        if unknown := {*(self.bert_config or {})} - {*BERT_BASE}:
            raise InputError(f"BERT's config has no {', '.join(unknown)}; it has {', '.join(BERT_BASE)}")
        self.bert_config = {**BERT_BASE, **(self.bert_config or {})}
        self.depths, self.swin_heads = tuple(self.depths), tuple(self.swin_heads)
        if any(width % self.attention_heads for width in (self.bert_config["hidden_size"], self.decoder_width)):
            raise InputError(f"BERT's and the decoder's channels must be multiples of {self.attention_heads} heads")
        least = 4 * 2 ** len(self.depths)  # leaves 2 x 2 pixels at the last stage: InstanceNorm needs more than one
        if self.image_size % 4 or self.image_size < least:
            raise InputError(f"--image-size is {self.image_size}, but must be a multiple of 4 and at least {least}")


# Ours, for the generated shapes: three stages turn 128 x 128 pixels into a map of 8 x 8 to select from. The loss has
# a Dice term, and Eq. 5 with weight 5 instead of 0.5. From random weights it finds targets sooner so.
TINY = dict(
    image_size=128, embed_dim=24, depths=(1, 2, 2), swin_heads=(4, 4, 4), window_size=4, drop_path=0.0,
    coordinates=True, attention_heads=2, decoder_width=32, dropout=0.0, contrastive=5.0, dice=1.0,
    bert_config=dict(vocab_size=64, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256),
)  # fmt: skip


class EarlyFusion(nn.Module):
    """After each Swin stage (Sec. 3.1). LAVT: pixel-word attention with one head, and a gated residual.

    The tokens stay as they are.
    """

    def __init__(self, dim: int, language_dim: int, gated: bool = True):
        super().__init__()
        self.project_vision = nn.Linear(dim, dim)
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(language_dim, dim)
        self.value = nn.Linear(language_dim, dim)
        self.project_attended = nn.Linear(dim, dim)
        self.project_fused = nn.Linear(dim, dim)
        self.gate = None  # ours: nothing follows the last stage, and a gate there would never see a gradient
        if gated:
            self.gate = nn.Sequential(
                nn.Linear(dim, dim, bias=False), nn.ReLU(), nn.Linear(dim, dim, bias=False), nn.Tanh()
            )

    def forward(self, x: Tensor, tokens: Tensor, mask_l: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [B, N, C], tokens [B, T, D], mask_l [B, T] -> [B, N, C] twice: `fused` for the decoder, and x plus
        gated `fused` for the next stage (None after the last)."""
        # F.instance_norm: each channel of each sample to mean 0 and variance 1 over the pixels; in fp32 under autocast
        query = F.instance_norm(self.query(x).float().mT).mT  # [B, N, C]
        key, value, bias = self.key(tokens), self.value(tokens), padding_bias(mask_l)  # [B, T, C] twice, [B, 1, T]
        # the one head has an axis of its own, without which torch has no fused attention on GPUs
        query, key, value, bias = (each[:, None].to(key.dtype) for each in (query, key, value, bias))
        attended = F.scaled_dot_product_attention(query, key, value, bias)[:, 0]  # [B, N, C]
        attended = F.instance_norm(self.project_attended(attended).float().mT).mT
        fused = F.gelu(self.project_fused(F.gelu(self.project_vision(x)) * attended))
        return fused, None if self.gate is None else x + self.gate(fused) * fused


class PadThenShiftBlock(SwinTransformerBlock):
    """timm's Swin block for maps whose sides are no multiple of the window. LAVT: pad first, then shift.

    timm shifts first and pads after, so that opposite edges of the image share a window, with no mask between
    them. Here timm gets a map of whole windows, so it pads nothing.
    """

    def _attn(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        window_height, window_width = self.window_size
        # up to the next multiple of the window
        x = F.pad(x, (0, 0, 0, -width % window_width, 0, -height % window_height))
        return super()._attn(x)[:, :height, :width]


@torch.no_grad()
def start_from_scratch(swin: SwinTransformer) -> None:
    """Ours: from these weights Swin learns shapes sooner than from timm's. Pretrained weights, if any, replace them.

    Linear layers start Xavier-uniform; timm's standard deviation, 0.02, suits wider layers. Each attention head
    starts by looking at a random place near the pixel (a Gaussian); timm's heads look at the whole window equally.
    """
    for module in swin.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
        if isinstance(module, SwinTransformerBlock):
            offsets = torch.cartesian_prod(*(torch.arange(1.0 - size, size) for size in module.window_size))
            table = module.attn.relative_position_bias_table  # [offsets, heads]
            table.copy_(-torch.cdist(offsets, 1.5 * torch.randn(table.shape[1], 2)).square() / 2)


class VisionEncoder(nn.Module):
    """timm's Swin Transformer, run stage by stage with an EarlyFusion after each (Sec. 3.1)."""

    def __init__(self, config: VEGAConfig):
        super().__init__()
        self.swin = timm.create_model(
            "swin_base_patch4_window12_384",  # the sizes below take the place of Swin-B's
            num_classes=0, img_size=config.image_size, embed_dim=config.embed_dim, depths=config.depths,
            num_heads=config.swin_heads, window_size=config.window_size, drop_path_rate=config.drop_path,
        )  # fmt: skip
        self.swin.norm = nn.Identity()  # LAVT: each stage has its own below
        for stage in self.swin.layers:
            for block in stage.blocks:
                block.__class__ = PadThenShiftBlock  # the same weights; only _attn differs
                block.attn.fused_attn = True  # ours: torch's fused attention, off in timm: less memory
        start_from_scratch(self.swin)
        self.dims = [config.embed_dim * 2**i for i in range(len(config.depths))]
        self.fusions = nn.ModuleList(
            EarlyFusion(dim, config.bert_config["hidden_size"], gated=stage < len(self.dims))
            for stage, dim in enumerate(self.dims, 1)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for dim in self.dims)
        self.coordinates = nn.Linear(2, config.embed_dim) if config.coordinates else None
        if config.coordinates:
            self.coordinates.weight.data *= 4  # as strong as the patches; torch's scale is too weak for some seeds

    def forward(self, image: Tensor, tokens: Tensor, mask_l: Tensor) -> list[Tensor]:
        """image [B, 3, H, W], tokens [B, T, D], mask_l [B, T] -> F_i [B, H_i, W_i, C_i], fused and normed."""
        x = self.swin.patch_embed(image)  # [B, H / 4, W / 4, C_1]
        if self.coordinates is not None:
            ys, xs = (torch.linspace(-1, 1, n, device=x.device) for n in x.shape[1:3])
            x = x + self.coordinates(torch.stack(torch.meshgrid(xs, ys, indexing="xy"), dim=-1))
        features = []
        for stage, fusion, norm in zip(self.swin.layers, self.fusions, self.norms):
            x = stage(x)  # [B, H_i, W_i, C_i]; timm's stages begin with the downsampling
            size = x.shape[1:3]
            fused, x = fusion(x.flatten(1, 2), tokens, mask_l)
            features.append(norm(fused).unflatten(1, size))
            if x is not None:
                x = x.unflatten(1, size)
        return features


class Decoder(nn.Module):
    """From the last stage to the first: attend to the guidance set, upsample, concatenate the encoder's map (Sec. 3.3).

    Ours: the width; on each concatenation a linear layer, a 3 x 3 convolution and GroupNorm in groups of 8 channels
    (BatchNorm would make several processes differ from one). The linear layer on the concatenation of x and skip is
    computed as a sum, project_x(x) + project_skip(skip).
    """

    def __init__(self, vision_dims: list[int], guidance_dim: int, width: int, num_heads: int):
        super().__init__()
        *skip_dims, last_dim = vision_dims
        self.project = nn.Linear(last_dim, width)
        self.attentions = nn.ModuleList(AttentionLayer(width, num_heads, guidance_dim) for _ in vision_dims)
        self.project_x = nn.ModuleList(nn.Linear(width, width) for _ in skip_dims)
        self.project_skip = nn.ModuleList(nn.Linear(dim, width, bias=False) for dim in reversed(skip_dims))
        self.convolutions = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.GroupNorm(width // 8, width), nn.ReLU())
            for _ in skip_dims
        )
        self.convolutions.to(memory_format=torch.channels_last)  # the maps are channels-last in memory
        self.head = nn.Linear(width, 1)  # one logit for the binary cross-entropy; ours: above 0 is the target

    def forward(self, features: list[Tensor], G: Tensor, mask_G: Tensor) -> Tensor:
        """features [B, H_i, W_i, C_i] with stride 4 first, G [B, R, D], mask_G [B, R] -> logits [B, H / 4, W / 4]."""
        *skips, last = features
        bias = padding_bias(mask_G)  # [B, 1, R]
        x = self.attentions[0](self.project(last).flatten(1, 2), G, bias).unflatten(1, last.shape[1:3])
        # from the last stage to the first: four stages have four attentions, and three joins between them. A turn
        # upsamples x, concatenates the skip, and attends at the new size
        joins = zip(reversed(skips), self.project_x, self.project_skip, self.convolutions, self.attentions[1:])
        for skip, project_x, project_skip, convolution, attention in joins:
            # project_x runs before the upsampling: the same result, on a quarter of the pixels
            x = F.interpolate(project_x(x).permute(0, 3, 1, 2), skip.shape[1:3], mode="bilinear")
            x = convolution(x + project_skip(skip).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # [B, H_i, W_i, width]
            x = attention(x.flatten(1, 2), G, bias).unflatten(1, skip.shape[1:3])
        return self.head(x)[..., 0]


class VEGA(nn.Module):
    """Visual Expression Guidance for Referring Expression Segmentation.

    All weights start at random, most by the libraries' defaults, Swin's by `start_from_scratch`. `train.build_model`
    then loads pretrained BERT and Swin, where the run uses them.
    """

    def __init__(self, config: VEGAConfig):
        super().__init__()
        self.config = config
        heads, dropout = config.attention_heads, config.dropout
        dropouts = dict(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
        bert_config = BertConfig(**config.bert_config, **dropouts)
        self.bert = BertModel(bert_config, add_pooling_layer=False)
        self.vision = VisionEncoder(config)
        D = bert_config.hidden_size
        variant = VARIANTS[config.variant]
        self.project_F_v = nn.Linear(self.vision.dims[-1], D) if variant.enhanced else None
        self.enhance = AttentionLayer(D, heads, dropout=dropout) if variant.enhanced else None
        self.vis = variant.block(D, heads, config.ratio, dropout)
        self.log_tau = nn.Parameter(torch.tensor(INITIAL_LOG_TAU)) if variant.eq5 else None
        if variant.shares_tau:
            self.vis.log_tau = self.log_tau
        self.decoder = Decoder(self.vision.dims, D, config.decoder_width, heads)
        for name, values in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):  # ImageNet's, of RGB
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)  # [3, 1, 1]

    def forward(self, image: Tensor, input_ids: Tensor, attention_mask: Tensor) -> dict:
        """Segment what each expression names.

        Args:
            image: uint8 [B, 3, H, W], H = W = config.image_size.
            input_ids, attention_mask: [B, T] tokens of the expression, [CLS] first, and 1 where they are real.

        Returns a dict:
            "logits": [B, H, W], positive on the target.
            "tokens": [B, T, D] BERT's, which have not looked at the image.
            "F_v": [B, N, D] the vision features that the tokens select from; None in Table 2, row 1.
            "selection": Selection, see selection.py.
            "similarity": [B, h, w] the similarities of [CLS] as a map of the last stage, the s of Eq. 5; zero in
            `local-only`, None in variants without S.
        """
        # a boolean mask of four dimensions; one of two makes transformers ask the GPU whether all are 1, and wait
        bert_mask = attention_mask[:, None, None].bool()  # [B, 1, 1, T]
        tokens = self.bert(input_ids=input_ids, attention_mask=bert_mask).last_hidden_state  # [B, T, D]
        image = (image / 255 - self.mean) / self.std
        features = self.vision(image, tokens, attention_mask)  # [B, H_i, W_i, C_i] of each stage
        F_v, Q_l = None, tokens  # Sec. 3.1: Q_l is BERT's
        if self.enhance is not None:  # not in Table 2, row 1
            with torch.autocast(image.device.type, enabled=False):  # ours: in fp32, for the similarities
                F_v = self.project_F_v(features[-1].float().flatten(1, 2))  # [B, N, D]; ours: the last stage, projected
            # Table 2, rows 2 and 3. Sec. 3 selects with BERT's tokens; ours: from here on the enhanced ones are Q_l
            Q_l = self.enhance(tokens, F_v)  # [B, T, D] each token looks at every pixel
        selection = self.vis(F_v, Q_l, attention_mask)
        logits = self.decoder(features, selection.G, selection.mask_G)  # [B, H / 4, W / 4]
        # ours: enlarged to the input's size, where the loss is taken
        logits = F.interpolate(logits.float()[:, None], image.shape[-2:], mode="bilinear")[:, 0]  # [B, H, W]
        similarity = None if selection.S is None else selection.S[:, 0].unflatten(1, features[-1].shape[1:3])
        return {"logits": logits, "tokens": tokens, "F_v": F_v, "selection": selection, "similarity": similarity}

    def loss(self, output: dict, mask: Tensor) -> dict:
        """output of `forward`, mask [B, H, W] 1 on the target -> "loss" and its terms "bce", "contrastive", "dice".

        A loss of your own over tokens must leave out padding, where output["selection"].mask_G[:, :T] is 0, with
        T = output["tokens"].shape[1].
        """
        logits, mask = output["logits"], mask.float()
        losses = {"bce": F.binary_cross_entropy_with_logits(logits, mask)}
        if self.log_tau is not None:
            losses["contrastive"] = pixel_contrastive_loss(output["similarity"], mask, self.log_tau.exp())
        if self.config.dice:  # 1 - (2 |P Y| + 1) / (|P| + |Y| + 1), P the probabilities, Y the target
            probability, target = logits.sigmoid().flatten(1), mask.flatten(1)  # [B, H * W]
            overlap = 2 * (probability * target).sum(1) + 1  # [B]
            losses["dice"] = (1 - overlap / (probability.sum(1) + target.sum(1) + 1)).mean()
        weights = {"bce": 1.0, "contrastive": self.config.contrastive, "dice": self.config.dice}
        return {"loss": sum(weights[name] * loss for name, loss in losses.items()), **losses}


# Pretrained weights

# The paper: Swin-B pretrained on ImageNet-22K, and BERT-base uncased. LAVT: Swin-B for 384 x 384, with windows of 12
PRETRAINED_SWIN = "swin_base_patch4_window12_384.ms_in22k"  # in timm
PRETRAINED_BERT = "google-bert/bert-base-uncased"  # in transformers


def load_swin(swin: SwinTransformer, source: str, window_size: int) -> str:
    """Start Swin from pretrained weights; returns a line on what was loaded.

    Args:
        source: a file, timm's own (.safetensors or .pth) or Microsoft's (.pth), or a model's name in timm.
        window_size: the config's; on a smaller map timm shrinks the window, and its filter resizes the position tables.

    Raises InputError if the source can't be read, or a tensor is missing or of another shape; then nothing is loaded.
    """
    with input_errors(f"no Swin weights from {source}; give --swin FILE, or --no-pretrained"):
        if Path(source).exists() or Path(source).suffix in (".safetensors", ".pth"):
            weights = timm.models.load_state_dict(source)  # timm's own way to load a file accepts missing tensors
        else:
            weights = timm.create_model(source, pretrained=True, num_classes=0).state_dict()
    own = swin.state_dict()
    for name, table in weights.items():  # the filter would stretch another model's tables to fit
        if name.endswith("relative_position_bias_table"):
            if name not in own or table.shape != ((2 * window_size - 1) ** 2, own[name].shape[1]):
                raise InputError(f"{source} is of another Swin: its {name} is {list(table.shape)}")
    weights = checkpoint_filter_fn(weights, swin)  # Microsoft's names to timm's; stored masks and indices dropped
    weights = {name: value for name, value in weights.items() if not name.startswith(("norm.", "head."))}
    load_weights(swin, weights, source)
    return f"Swin: {len(weights)} tensors from {source}; Swin's own norm and head are not used"


def load_bert(source: str) -> tuple[BertModel, BertTokenizer]:
    """Pretrained BERT without its pooler, and its tokenizer, from a folder or by a model's name in transformers.

    Raises InputError if it can't be read, or if any tensor is missing or of another shape.
    """
    with input_errors(f"no BERT from {source}; give --bert FOLDER, or --no-pretrained"):
        tokenizer = BertTokenizer.from_pretrained(source)
        options = dict(add_pooling_layer=False, dtype=torch.float32, output_loading_info=True)
        bert, report = BertModel.from_pretrained(source, **options)
    words, rows = len(tokenizer), bert.config.vocab_size
    if not 5 < words <= rows:
        raise InputError(f"{source} has a vocabulary of {words} words, but it must be 6 to {rows}, as in BERT's table")
    if missing := report["missing_keys"]:  # these start at random, but a tensor of another shape is an error above
        raise InputError(f"{source} does not fit BERT: {len(missing)} tensors are missing, the first {min(missing)}")
    return bert, tokenizer


def load_weights(module: nn.Module, weights: dict, source: str) -> None:
    """Load all weights. Raises InputError, and loads nothing, if a name or shape differs or a value is not finite."""
    own = module.state_dict()
    for name in [*own, *weights]:
        here, there = (getattr(state.get(name), "shape", "missing") for state in (own, weights))
        if name not in own or here != there:
            raise InputError(f"{source} does not fit the model: {name} is {there} in it, and {here} here")
        if not weights[name].isfinite().all():
            raise InputError(f"{source} is broken: {name} has values that are not finite")
    module.load_state_dict(weights)


# Files

DEMO = Path(__file__).parent / "assets" / "demo.safetensors"  # what `python train.py` leaves


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write to the path that this yields: it replaces `path` at the end, and an error leaves `path` as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        with input_errors(f"can't write {path}; an earlier file there is whole. Free some space, then --resume"):
            yield unfinished
            with open(unfinished, "rb") as file:
                os.fsync(file.fileno())
            unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def save_model(path: Path, model: VEGA, tokenizer: BertTokenizer, **about) -> None:
    """Write one safetensors file: the weights, and as JSON in its header the config, the tokenizer and `about`."""
    header = {"config": asdict(model.config), "tokenizer": tokenizer_rules(tokenizer), **about}
    header = {name: json.dumps(value) for name, value in header.items()}
    weights = {name: value.cpu().contiguous().clone() for name, value in model.state_dict().items()}
    with whole_file(path) as file:
        file.write_bytes(safetensors.torch.save(weights, header))  # save_file would hide the file from other users


def load_model(source: str | Path, **overrides) -> tuple[VEGA, BertTokenizer]:
    """The model on the CPU, ready to evaluate, and its tokenizer. No code in the file is run.

    source: see `model_file`. overrides: fields of VEGAConfig that take the place of the file's, such as ratio.
    Raises InputError if the file can't be read, is cut short or does not fit.
    """
    file, about = model_file(source), read_about(source)
    with input_errors(f"{file} does not fit this program"):
        model = VEGA(VEGAConfig(**{**about["config"], **overrides}))
        load_weights(model, safetensors.torch.load_file(file), str(file))
        return model.eval(), BertTokenizer(**about["tokenizer"])


def read_about(source: str | Path) -> dict:
    """What a model's file holds beside the weights: "config", "tokenizer"; of train.py "settings", "step", "scores"."""
    with input_errors(f"{source} holds no model of this program, or was cut short"):
        with safetensors.safe_open(model_file(source), "pt") as file:
            return {name: json.loads(text) for name, text in file.metadata().items()}


def model_file(source: str | Path | None) -> Path:
    """The file that a model's name means: itself, the best model of a run's folder, or NAME/NAME on the Hugging Face
    Hub (NAME/NAME@REVISION); None: of the newest run, or if there is none the demo's."""
    path = Path(source or newest("best.safetensors") or DEMO)
    path = path / "best.safetensors" if path.is_dir() else path
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", str(source)) and not path.parent.is_dir():
        name, _, revision = str(source).partition("@")
        with input_errors(f"there is no model {source}, neither here nor on the Hugging Face Hub"):
            return Path(hf_hub_download(name, "model.safetensors", revision=revision or None))
    if not path.is_file():
        raise InputError(f"there is no model {path}: give a file, a run's folder, or a name on the Hugging Face Hub")
    return path


def newest(file: str) -> Path | None:
    """The newest runs/*/FILE, if there is one."""
    return max(Path("runs").glob(f"*/{file}"), key=lambda path: path.stat().st_mtime, default=None)


def tokenizer_rules(tokenizer: BertTokenizer) -> dict:
    """The arguments that make the same tokenizer: its words, and how it cuts a text."""
    names = ("do_lower_case", "strip_accents", "tokenize_chinese_chars")
    return {"vocab": tokenizer.get_vocab(), **{name: getattr(tokenizer, name) for name in names}}
