"""Visual information selection (VIS): Algorithm 1 of the paper in its own symbols, and Eq. 1-5.

    B  samples of a batch
    T  tokens of an expression: [CLS], its words (BERT may cut one into pieces), [SEP], padding; at most 21
    N  pixels of F_v. Ours: the map of the last vision stage, 15 x 15 = 225 at the paper's input size
    D  channels, 768
    K  pixels that each token selects, int(N * ratio), so 67 of 225
    R  any other number of tokens or pixels

Each token selects the K pixels that are most similar to it and gathers them into one token of the *visual expression*.
As in the paper, a "pixel" of the VIS block is one of the N places of F_v, not a pixel of the image.

In all files, "ours" marks what this code chose itself: the paper is silent, or we differ from it or add to it. A name
such as "LAVT" or "CLIP" marks a choice that was taken from that work. What has no mark is the paper's, or no matter of
method. Your own variant: see `Stepwise`. Your own decoder: in the place of Decoder in VEGA (model.py).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


MAX_TOKENS = 21  # of an expression; a longer one is cut. Ours: [SEP] and pieces of words count. The paper: 21 words


class Selection(NamedTuple):
    """What a VIS block returns. The shapes are VEGA's; an ablation says where its own differ."""

    G: Tensor  # [B, 2T, D] the guidance set: linguistic tokens, then the visual expression
    mask_G: Tensor  # [B, 2T] 0 for tokens of padding
    S: Tensor | None  # [B, T, N] cosine similarities, the first row [CLS]'s; None in a variant without any
    M: Tensor | None  # [B, T, N] 1 at the K pixels that each token selects, else 0; None if nothing is selected


def padding_bias(mask: Tensor) -> Tensor:
    """mask [B, R], 1 for real tokens -> [B, 1, R] to add to attention scores: 0 for real tokens, -1e4 for padding."""
    return (mask[:, None].float() - 1) * 1e4


class AttentionLayer(nn.Module):
    """Cross- or self-attention, of which the paper gives only query, key-value and mask.

    Ours: several heads, a residual, then LayerNorm; no feed-forward layer and no positional encoding.
    """

    def __init__(self, dim: int, num_heads: int = 8, kv_dim: int | None = None, dropout: float = 0.0):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(kv_dim or dim, dim)
        self.value = nn.Linear(kv_dim or dim, dim)
        self.out = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, q: Tensor, kv: Tensor, bias: Tensor | None = None) -> Tensor:
        """q [B, R_q, dim], kv [B, R, kv_dim] -> [B, R_q, dim]. bias [B, 1 or R_q, R], as M_hat, is added to scores."""
        query = self.query(q).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, heads, R_q, dim / heads]
        key = self.key(kv).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, heads, R, dim / heads]
        value = self.value(kv).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        if bias is not None:
            bias = bias[:, None].to(query.dtype)  # [B, 1, 1 or R_q, R]
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, bias, dropout)
        attended = self.out(attended.transpose(1, 2).flatten(2))  # [B, R_q, dim]
        return self.norm(q + F.dropout(attended, self.dropout, self.training))


class VISBlock(nn.Module):
    """Algorithm 1, line by line: in `forward` the comment lines without a mark are the algorithm's own.

    One step is written another way: the weighted sum is a matrix product, so that nothing is expanded to [B, T, N, D].
    The ablations, and a variant of your own, derive from Stepwise below.

    Two things in the paper weaken E. They are kept as printed; `sum-once` and `sharp` change them:

    * S_norm sums to one over the K selected pixels, and E divides the sum by K once more (Eq. 4). So E, which is query
      and residual of the cross-attention, is small beside what the attention adds: about 1/30 of it at the start. The
      visual tokens differ from each other almost only because M_hat lets each attend to pixels of its own.
    * The cosine similarities in S lie in [-1, 1], and the softmax has no temperature. No selected pixel can weigh more
      than e^2 = 7.4 times another.
    """

    selectors = "all"  # whose rows of M there are: pictures and Stepwise read it, VISBlock does not. See SELECTORS

    def __init__(self, dim: int, num_heads: int = 8, ratio: float = 0.3, dropout: float = 0.0):
        super().__init__()
        self.ratio = ratio  # the share of the pixels that each token selects, in (0, 1]; 0.3 in the paper (Table 6)
        self.proj_v = nn.Linear(dim, dim)  # phi_v of Eq. 1; the pseudocode writes proj for both layers
        self.proj_l = nn.Linear(dim, dim)  # phi_l
        self.cross_attention = AttentionLayer(dim, num_heads, dropout=dropout)  # ours: the heads and the dropout
        self.self_attention = AttentionLayer(dim, num_heads, dropout=dropout)

    def forward(self, F_v: Tensor, Q_l: Tensor, mask_l: Tensor) -> Selection:
        """Select pixels for each token, and make the guidance set of them.

        No gradient flows through the choice of pixels. S learns in two ways: the row of [CLS] from Eq. 5, and the rows
        of all real tokens, weakly, through S_norm. proj_v and proj_l learn through S alone.

        Args:
            F_v: [B, N, D] vision features.
            Q_l: [B, T, D] linguistic features. In Sec. 3 they come straight from the language encoder. In `vega` they
                first attend to F_v ("enhanced", Table 2, rows 2 and 3).
            mask_l: [B, T] 1 for real tokens, 0 for padding. [SEP] and padding select pixels like any word, but nothing
                looks at padding: it is masked as a key in BERT, early fusion, the self-attention and the decoder.
        """
        # ours: in fp32 also under autocast, since similarities rounded to bf16 can select other pixels
        with torch.autocast(F_v.device.type, enabled=False):
            F_v, Q_l = F_v.float(), Q_l.float()
            K = max(1, int(F_v.shape[1] * self.ratio))  # ours: at least one

            # joint multimodal embedding
            X = F.normalize(self.proj_v(F_v), dim=-1)  # [B, N, D], Eq. 1
            Y = F.normalize(self.proj_l(Q_l), dim=-1)  # [B, T, D]

            # calculate cosine similarities
            S = Y @ X.mT  # [B, T, N]

            # top-k ranking of similarity scores
            rank_index = S.topk(K, dim=-1).indices  # [B, T, K]

            # top-k mask generation
            M = torch.zeros_like(S).scatter(-1, rank_index, 1.0)  # [B, T, N], Eq. 2 and 3

            # non top-k similarity scores masking
            # & top-k ranked similarities normalization
            M_hat = M * 1e4 - 1e4  # [B, T, N]; -1e4 as in the pseudocode; Eq. 2 has minus infinity
            S_norm = torch.softmax(S + M_hat, dim=-1)  # [B, T, N], Eq. 4

            # weighted average summation
            # ours: one matrix product gives the same E. M changes nothing, for S_norm is zero outside it
            E = (M * S_norm) @ F_v / K  # [B, T, D]

        # the visual expression extracted by the cross-attention with
        # top-k pixels
        Q_v = self.cross_attention(E, F_v, M_hat)  # [B, T, D]; M_hat leaves a token its own K pixels, F_topk of Eq. 4

        # considering the visual contexts via the self-attention
        Q_v = self.self_attention(Q_v, Q_v, padding_bias(mask_l))  # [B, T, D]

        # new guidance set
        G = torch.cat([Q_l, Q_v], dim=1)  # [B, 2T, D]
        mask_G = torch.cat([mask_l, mask_l], dim=1)  # ours: [B, 2T], for the decoder
        return Selection(G, mask_G, S, M)  # ours: S for Eq. 5, M for pictures


INITIAL_LOG_TAU = math.log(0.07)  # ours: tau starts at CLIP's 0.07; the model learns log tau, so tau stays positive


def pixel_contrastive_loss(s: Tensor, target: Tensor, tau: Tensor | float) -> Tensor:
    """Eq. 5, in fp32. Ours: s is enlarged to the mask's size; the loss is the mean over its pixels, Z+ and Z- together.

    Args:
        s: [B, h, w] the row of [CLS] in S, as a map. The paper calls it the map "for the global visual token v_1" (Sec.
            3.2) and "obtained by the global context token" (Sec. 4.3.5). Ours: both mean this row; it selects for v_1.
        target: [B, H, W] the ground-truth masks, 1 (or True) in Z+ and 0 in Z-.
        tau: temperature, positive.
    """
    logits = F.interpolate((s.float() / tau)[:, None], target.shape[-2:], mode="bilinear")[:, 0]  # [B, H, W]
    # -log(sigmoid(x)) on Z+, -log(1 - sigmoid(x)) on Z-
    return F.binary_cross_entropy_with_logits(logits, target.float())


# The ablations

# Positions of the tokens that select; "words" are all but [CLS], so [SEP] and padding, too
SELECTORS = {"all": slice(None), "words": slice(1, None), "[CLS]": slice(0, 1), "none": slice(0, 0)}


class Stepwise(nn.Module):
    """Algorithm 1 cut into methods, so that an ablation can replace one. `vega` runs VISBlock, the one to read.

    With no step overridden both return the same, bit for bit, as a test checks. To add your own:
    1. Derive a class and override a step, or `visual_expression` if the steps do not fit.
    2. List in `layers` what it uses: a parameter without a gradient stops torchrun.
    3. No M: `selectors = "none"`. No S, or one without [CLS]'s row first: eq5=False in its row of VARIANTS.
    4. Add a row to VARIANTS, `"mine": Variant("ours", "what differs", block=Mine)`; train with --variant mine.
    To change VEGA itself, change the step here and in VISBlock, so that each ablation differs from it in one thing.
    """

    layers = ("proj_v", "proj_l", "cross_attention", "self_attention")
    selectors = "all"

    def __init__(self, dim: int, num_heads: int = 8, ratio: float = 0.3, dropout: float = 0.0):
        super().__init__()
        self.ratio = ratio
        for name in self.layers:
            attention = name.endswith("attention")
            self.add_module(name, AttentionLayer(dim, num_heads, dropout=dropout) if attention else nn.Linear(dim, dim))

    def forward(self, F_v: Tensor, Q_l: Tensor, mask_l: Tensor) -> Selection:
        Q_v, mask_v, S, M = self.visual_expression(F_v, Q_l, mask_l)
        return Selection(torch.cat([Q_l, Q_v], dim=1), torch.cat([mask_l, mask_v], dim=1), S, M)

    def visual_expression(self, F_v: Tensor, Q_l: Tensor, mask_l: Tensor) -> tuple:
        """Q_v [B, R, D], its mask [B, R], and S and M, each [B, R, N] or None."""
        selecting = SELECTORS[self.selectors]  # R tokens select
        with torch.autocast(F_v.device.type, enabled=False):
            F_v, Q_l = F_v.float(), Q_l.float()
            S = self.similarities(F_v, Q_l[:, selecting])
            M = self.select(S)
            M_hat = M.detach() * 1e4 - 1e4  # an M of your own may carry a gradient; 1e4 times that would be too much
            S_norm = self.normalise(S, M_hat)
            E = self.pool(M, S_norm, F_v)
        Q_v = self.cross_attend(E, F_v, M_hat)
        return self.self_attend(Q_v, mask_l[:, selecting]), mask_l[:, selecting], S, M

    def similarities(self, F_v: Tensor, tokens: Tensor) -> Tensor:  # Eq. 1 -> S [B, R, N]
        return F.normalize(self.proj_l(tokens), dim=-1) @ F.normalize(self.proj_v(F_v), dim=-1).mT

    def rank(self, S: Tensor) -> Tensor:  # -> rank_index [B, R, K]
        return S.topk(max(1, int(S.shape[-1] * self.ratio)), dim=-1).indices

    def select(self, S: Tensor) -> Tensor:  # Eq. 2 -> M [B, R, N], 0 or 1
        return torch.zeros_like(S).scatter(-1, self.rank(S), 1.0)

    def normalise(self, S: Tensor, M_hat: Tensor) -> Tensor:  # Eq. 4 -> S_norm [B, R, N]
        return torch.softmax(S + M_hat, dim=-1)

    def pool(self, M: Tensor, S_norm: Tensor, F_v: Tensor) -> Tensor:  # Eq. 4 -> E [B, R, D]
        return (M * S_norm) @ F_v / M.sum(-1, keepdim=True).clamp(min=1)  # M.sum is K; see also SigmoidThreshold

    def cross_attend(self, E: Tensor, F_v: Tensor, M_hat: Tensor) -> Tensor:  # Eq. 4 -> Q_v [B, R, D]
        return self.cross_attention(E, F_v, M_hat)

    def self_attend(self, Q_v: Tensor, mask: Tensor) -> Tensor:  # -> Q_v [B, R, D]
        return self.self_attention(Q_v, Q_v, padding_bias(mask))


class LinguisticGuidance(Stepwise):
    """Table 2, rows 1 and 2: G is the linguistic tokens; in row 2 VEGA.forward has enhanced them before.

    We take row 2 for Figure 5's "w/o visual expression".
    """

    layers, selectors = (), "none"

    def visual_expression(self, F_v: Tensor | None, Q_l: Tensor, mask_l: Tensor) -> tuple:
        return Q_l[:, :0], mask_l[:, :0], None, None  # no visual token: G [B, T, D]


class AllPixels(Stepwise):
    """Table 3a, row 1: every pixel token of F_v enters G, [B, T + N, D]."""

    layers, selectors = (), "none"

    def visual_expression(self, F_v: Tensor, Q_l: Tensor, mask_l: Tensor) -> tuple:
        return F_v, mask_l.new_ones(F_v.shape[:2]), None, None


class TopKPixels(Stepwise):
    """Table 3a, row 2: the K pixel tokens that [CLS] selects enter G as they are, [B, T + K, D]. S and M are [B, 1, N].

    Only Eq. 5 trains the projections.
    """

    layers, selectors = ("proj_v", "proj_l"), "[CLS]"

    def visual_expression(self, F_v: Tensor, Q_l: Tensor, mask_l: Tensor) -> tuple:
        with torch.autocast(F_v.device.type, enabled=False):
            F_v, Q_l = F_v.float(), Q_l.float()
            S = self.similarities(F_v, Q_l[:, :1])  # [B, 1, N]
        rank_index = self.rank(S).sort().values  # [B, 1, K] in the map's order
        F_topk = F_v.take_along_dim(rank_index.mT, dim=1)  # [B, K, D]
        return F_topk, mask_l.new_ones(F_topk.shape[:2]), S, self.select(S)


class NoCues(Stepwise):
    """Table 3b, row 1: neither [CLS] nor the words select; learned queries gather from all pixels.

    Ours: MAX_TOKENS learned queries, so G is [B, T + MAX_TOKENS, D]. The paper says only that both cues are gone. Some
    visual tokens must remain: without any it would be Table 2, row 2, whose scores differ.
    """

    layers, selectors = ("cross_attention", "self_attention"), "none"

    def __init__(self, dim: int, num_heads: int = 8, ratio: float = 0.3, dropout: float = 0.0):
        super().__init__(dim, num_heads, ratio, dropout)
        self.queries = nn.Parameter(0.02 * torch.randn(MAX_TOKENS, dim))

    def visual_expression(self, F_v: Tensor, Q_l: Tensor, mask_l: Tensor) -> tuple:
        E = self.queries.expand(len(F_v), -1, -1)  # [B, MAX_TOKENS, D]
        Q_v = self.cross_attention(E, F_v)  # no pixel and no query is hidden
        return self.self_attention(Q_v, Q_v), mask_l.new_ones(E.shape[:2]), None, None


class LocalOnly(Stepwise):
    """Table 3b, row 2: all tokens but [CLS] select, [SEP] too. [CLS]'s row is zero in S and in M. G is [B, 2T - 1, D].

    Without Eq. 5, which needs [CLS], little trains what the words select.
    """

    selectors = "words"

    def visual_expression(self, F_v: Tensor, Q_l: Tensor, mask_l: Tensor) -> tuple:
        Q_v, mask_v, S, M = super().visual_expression(F_v, Q_l, mask_l)  # S and M [B, T - 1, N]
        return Q_v, mask_v, F.pad(S, (0, 0, 1, 0)), F.pad(M, (0, 0, 1, 0))


class GlobalOnly(Stepwise):
    """Table 3b, row 3: [CLS] selects, the words do not: S and M have its row alone. G is [B, T + 1, D].

    The table as printed ticks both cues in this row. But Sec. 4.3.3 gives a drop of 0.42 oIoU without local
    cues: 75.35 - 74.93, this row. Ours: no self-attention, since the one visual token has no other to look at.
    """

    layers, selectors = ("proj_v", "proj_l", "cross_attention"), "[CLS]"

    def self_attend(self, Q_v: Tensor, mask: Tensor) -> Tensor:
        return Q_v


class SigmoidThreshold(Stepwise):
    """Table 4a, row 1: a pixel is selected if sigmoid(similarity) > 0.5, so if the cosine is above 0. No ratio.

    Ours: E is divided by the number of pixels that the token selects. A token that selects none has an E of zero and
    attends to all pixels.
    """

    def select(self, S: Tensor) -> Tensor:
        return (S.sigmoid() > 0.5).to(S.dtype)


class NoSimilarityWeights(Stepwise):
    """Table 4c, row 1: E is the plain mean of the selected pixels. Only Eq. 5 trains the projections.

    So this row changes two things. All selected pixels weigh the same, and E is K times as large, since each weighs 1
    where the weights of S_norm sum to 1. `sum-once` changes only the factor.
    """

    def normalise(self, S: Tensor, M_hat: Tensor) -> Tensor:
        return torch.ones_like(S)


class NoNormalisation(Stepwise):
    """Table 4d, row 1: the similarities weigh as they are, also negative ones. Ours: M still selects.

    The weights do not sum to one, so the size of E changes, too.
    """

    def normalise(self, S: Tensor, M_hat: Tensor) -> Tensor:
        return S


class UnmaskedSoftmax(Stepwise):
    """Table 4d, row 2: the softmax runs over all pixels. Ours: M still selects, after the softmax."""

    def normalise(self, S: Tensor, M_hat: Tensor) -> Tensor:
        return torch.softmax(S, dim=-1)


class NoCrossAttention(Stepwise):
    """Table 4e, row 1: the intermediate tokens E, small as they are, go straight to the self-attention."""

    layers = ("proj_v", "proj_l", "self_attention")

    def cross_attend(self, E: Tensor, F_v: Tensor, M_hat: Tensor) -> Tensor:
        return E


class ContrastiveOnly(Stepwise):
    """Ours, a control: G is the enhanced linguistic tokens alone (Table 2, row 2), but Eq. 5 is as in `vega`.

    Its gradient reaches F_v and [CLS] through the projections. Nothing is selected. S is [B, 1, N], [CLS]'s row.
    """

    layers, selectors = ("proj_v", "proj_l"), "none"

    def visual_expression(self, F_v: Tensor, Q_l: Tensor, mask_l: Tensor) -> tuple:
        with torch.autocast(F_v.device.type, enabled=False):
            S = self.similarities(F_v.float(), Q_l[:, :1].float())
        return Q_l[:, :0], mask_l[:, :0], S, None


class LocalOnlyEq5(LocalOnly):
    """Ours, a control: `local-only`, but Eq. 5 still teaches [CLS]'s row of S, which selects nothing."""

    def visual_expression(self, F_v: Tensor, Q_l: Tensor, mask_l: Tensor) -> tuple:
        Q_v, mask_v, S, M = super().visual_expression(F_v, Q_l, mask_l)
        with torch.autocast(F_v.device.type, enabled=False):
            S_cls = self.similarities(F_v.float(), Q_l[:, :1].float())  # [B, 1, N]
        return Q_v, mask_v, torch.cat([S_cls, S[:, 1:]], dim=1), M


class SumOnce(Stepwise):
    """Ours, beyond the paper: E is the weighted mean, without Eq. 4's 1 / K."""

    def pool(self, M: Tensor, S_norm: Tensor, F_v: Tensor) -> Tensor:
        return (M * S_norm) @ F_v


class Sharp(Stepwise):
    """Ours, beyond the paper: the softmax runs over S / tau, so that a token's most similar pixels weigh far more."""

    def __init__(self, dim: int, num_heads: int = 8, ratio: float = 0.3, dropout: float = 0.0):
        super().__init__(dim, num_heads, ratio, dropout)
        self.log_tau = nn.Parameter(torch.tensor(INITIAL_LOG_TAU))  # VEGA.__init__ replaces it by Eq. 5's

    def normalise(self, S: Tensor, M_hat: Tensor) -> Tensor:
        return super().normalise(S / self.log_tau.exp(), M_hat)


class SumOnceSharp(SumOnce, Sharp):
    """Ours, beyond the paper: both changes."""


class Variant(NamedTuple):
    """A row of the paper's ablations, and how the model is built for it."""

    table: str
    row: str
    mIoU: float | None = None  # the paper's, per cent, RefCOCO val. vega's is 76.28 in Tables 2 and 3, 76.27 in 4 to 6
    oIoU: float | None = None
    block: type[nn.Module] = VISBlock
    # The tokens attend to F_v before the block, as in Table 2, rows 2 and 3; ours: in Tables 3 and 4, too.
    # False in Table 2, row 1, which has no F_v.
    enhanced: bool = True
    eq5: bool = True  # Eq. 5 is in the loss. Ours: left out also where [CLS] has no similarities
    shares_tau: bool = False  # the block has a log_tau, which is to be that of Eq. 5


VARIANTS = {
    "vega": Variant("2", "enhanced linguistic expression + visual expression (Ours)", 76.28, 75.35),
    "linguistic": Variant("2", "linguistic expression", 75.16, 73.31, LinguisticGuidance,
                          enhanced=False, eq5=False),
    "enhanced-linguistic": Variant("2", "enhanced linguistic expression", 76.06, 73.91, LinguisticGuidance,
                                   eq5=False),
    "all-pixels": Variant("3a", "total visual pixel tokens", 76.02, 74.16, AllPixels, eq5=False),
    "topk-pixels": Variant("3a", "top-k visual pixel tokens", 76.04, 74.58, TopKPixels),
    "no-cues": Variant("3b", "neither global nor local", 75.83, 73.84, NoCues, eq5=False),
    "local-only": Variant("3b", "local, not global", 76.10, 74.86, LocalOnly, eq5=False),
    "global-only": Variant("3b", "global, not local", 76.13, 74.93, GlobalOnly),
    "sigmoid-threshold": Variant("4a", "sigmoid (> 0.5)", 76.15, 74.81, SigmoidThreshold),
    "no-contrastive": Variant("4b", "no contrastive loss", 76.24, 74.92, eq5=False),
    "no-similarity-weights": Variant("4c", "similarity scores not multiplied", 76.23, 75.05, NoSimilarityWeights),
    "no-normalisation": Variant("4d", "similarities as they are for weights", 76.18, 74.97, NoNormalisation),
    "unmasked-softmax": Variant("4d", "normalization without top-k mask", 76.22, 75.14, UnmaskedSoftmax),
    "no-cross-attention": Variant("4e", "no top-k cross-attention", 76.11, 74.23, NoCrossAttention),
    "contrastive-only": Variant("ours", "enhanced linguistic expression, with Eq. 5", block=ContrastiveOnly),
    "local-only-eq5": Variant("ours", "local, not global, with Eq. 5", block=LocalOnlyEq5),
    "sum-once": Variant("ours", "E without the 1 / K of Eq. 4", block=SumOnce),
    "sharp": Variant("ours", "softmax over S / tau, with the tau of Eq. 5", block=Sharp, shares_tau=True),
    "sum-once-sharp": Variant("ours", "both", block=SumOnceSharp, shares_tau=True),
}  # fmt: skip
RATIOS = {  # Table 6, --ratio: mIoU, oIoU. In oIoU 0.3 beats 0.1 by 0.53 and 0.8 by 0.55; Sec. 4.3.4 says 0.46 and 0.48
    0.1: (76.11, 74.82), 0.2: (76.08, 75.02), 0.3: (76.27, 75.35), 0.4: (76.24, 75.28), 0.5: (76.22, 75.14),
    0.6: (76.16, 75.12), 0.7: (76.08, 74.97), 0.8: (76.03, 74.80),
}  # fmt: skip
