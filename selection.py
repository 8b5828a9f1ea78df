"""Visual information selection (VIS): Algorithm 1 of the paper in its own symbols, and Eq. 1-5.

    B batch, T tokens of the expression (the first is [CLS], the last ones may be padding), N pixels of the
    last vision stage, D channels, K = int(N * ratio), at least one

Each token selects the K pixels that are most similar to it and gathers them into one *visual expression*
token. Two things look odd at first and are the paper's:

* S_norm already sums to one over the K selected pixels, and E divides the sum by K once more (Eq. 4), so
  that E is a small vector. It is the query of the cross-attention, whose values are pixels at full size.
* cosine similarities lie in [-1, 1] and the softmax has no temperature, so no selected pixel can weigh more
  than e^2 = 7.4 times another.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Selection(NamedTuple):
    """What the VIS block returns; the shapes are VEGA's, a variant with others says so."""

    G: Tensor  # [B, 2T, D] the guidance set: linguistic, then visual expression tokens
    mask_G: Tensor  # [B, 2T] 0 where the token belongs to padding
    S: Tensor | None  # [B, T, N] cosine similarities; row 0 is the [CLS] token's; None in a variant without
    M: Tensor | None  # [B, T, N] 1 at the K pixels that each token selected, else 0


class AttentionLayer(nn.Module):
    """The paper's cross- and self-attention layer; ours is multi-head attention, residual, LayerNorm.

    Args:
        dim: channels of the queries and of the output.
        kv_dim: channels of the keys and values, `dim` if not given.
    """

    def __init__(self, dim: int, num_heads: int = 8, kv_dim: int | None = None, dropout: float = 0.0):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{dim} channels do not divide into {num_heads} heads")
        self.num_heads, self.dropout = num_heads, dropout
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(kv_dim or dim, dim)
        self.value = nn.Linear(kv_dim or dim, dim)
        self.out = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, q: Tensor, kv: Tensor, mask: Tensor | None = None) -> Tensor:
        """q [B, Q, dim], kv [B, R, kv_dim] -> [B, Q, dim].

        A mask of three dimensions is additive, [B, Q, R] (0 keeps, -1e4 hides: M_hat); one of two dimensions
        tells which keys are real, [B, R] (1 or 0: mask_l).
        """
        query, key, value = (
            linear(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, heads, Q or R, dim / heads]
            for linear, x in ((self.query, q), (self.key, kv), (self.value, kv))
        )
        if mask is not None:
            if mask.dim() == 2:
                mask = (mask[:, None, :].to(query.dtype) - 1) * 1e4  # [B, 1, R]
            mask = mask[:, None].to(query.dtype)  # the same for every head
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, mask, dropout)
        attended = self.out(attended.transpose(1, 2).flatten(2))  # [B, Q, dim]
        return self.norm(q + F.dropout(attended, self.dropout, self.training))


def binary_mask(rank_index: Tensor, N: int) -> Tensor:
    """Pixel numbers [B, T, K] -> [B, T, N], 1 at those pixels and 0 elsewhere (m_n of Eq. 2)."""
    return torch.zeros(*rank_index.shape[:2], N, device=rank_index.device).scatter(-1, rank_index, 1.0)


class VISBlock(nn.Module):
    """Algorithm 1: `forward` has its comments in its order; a comment with "ours:" is not the pseudocode's.

    The lines that some ablation changes are methods, which follow `forward`.

    Args:
        dim: channels D of both features.
        ratio: K / N, the share of the pixels that each token selects; 0.3 in the paper (Table 6).
    """

    unused: tuple[str, ...] = ()  # ours: layers that a variant has no use for; they are left out of it

    def __init__(self, dim: int, num_heads: int = 8, ratio: float = 0.3, dropout: float = 0.0):
        super().__init__()
        if not 0 < ratio <= 1:
            raise ValueError(f"the ratio of selected pixels is {ratio}, but must lie in (0, 1]")
        self.ratio = ratio
        self.proj_v = nn.Linear(dim, dim)  # phi_v of Eq. 1
        self.proj_l = nn.Linear(dim, dim)  # phi_l
        self.cross_attention = AttentionLayer(dim, num_heads, dropout=dropout)
        self.self_attention = AttentionLayer(dim, num_heads, dropout=dropout)
        for layer in self.unused:
            delattr(self, layer)

    def forward(self, F_v: Tensor, Q_l: Tensor, mask_l: Tensor) -> Selection:
        """F_v [B, N, D] vision features, Q_l [B, T, D] linguistic features, mask_l [B, T] 1 for real words."""
        # ours: in fp32 also under autocast, since similarities rounded to bf16 can select other pixels
        with torch.autocast(F_v.device.type, enabled=False):
            F_v, Q_l = F_v.float(), Q_l.float()

            # joint multimodal embedding
            X = F.normalize(self.proj_v(F_v), dim=-1)  # [B, N, D]
            Y = F.normalize(self.proj_l(Q_l), dim=-1)  # [B, T, D]

            # calculate cosine similarities
            S = Y @ X.mT  # [B, T, N]

            # top-k ranking of similarity scores
            # top-k mask generation
            M = self.select(S)  # [B, T, N]

            # non top-k similarity scores masking
            # & top-k ranked similarities normalization
            M_hat = M * 1e4 - 1e4  # [B, T, N], -1e4 for the minus infinity of Eq. 2
            S_norm = self.normalise(S, M_hat)  # [B, T, N]

            # expand dimension of F_v, M, S_norm
            # weighted average summation
            E = self.weigh(M, S_norm, F_v)  # [B, T, D]

        # the visual expression extracted by the cross-attention with
        # top-k pixels
        # considering the visual contexts via the self-attention
        Q_v = self.attend(E, F_v, M_hat, mask_l)  # [B, T, D]

        # new guidance set
        G = torch.cat([Q_l, Q_v], dim=1)  # [B, 2T, D]
        mask_G = torch.cat([mask_l, mask_l], dim=1)  # ours: the decoder looks at no padding
        return Selection(G, mask_G, S, M)  # ours: S for Eq. 5, M for pictures

    def K(self, N: int) -> int:
        """int(N * ratio); ours: at least one."""
        return max(1, int(N * self.ratio))

    def select(self, S: Tensor) -> Tensor:
        """S -> M, both [B, T, N] (Eq. 1-3)."""
        N = S.shape[-1]
        rank_index = S.topk(self.K(N), dim=-1).indices  # [B, T, K]
        return binary_mask(rank_index, N)

    def normalise(self, S: Tensor, M_hat: Tensor) -> Tensor:
        """S and M_hat -> S_norm, all [B, T, N] (Eq. 4)."""
        return torch.softmax(S + M_hat, dim=-1)

    def weigh(self, M: Tensor, S_norm: Tensor, F_v: Tensor) -> Tensor:
        """M and S_norm [B, T, N], F_v [B, N, D] -> the intermediate visual tokens E [B, T, D] (Eq. 4)."""
        # ours: the pseudocode multiplies all three as [B, T, N, D] and sums over N. That is this matrix product.
        # (VEGA's S_norm is zero outside M already; M stands here because Eq. 4 has it.)
        return (M * S_norm) @ F_v / self.K(F_v.shape[1])

    def attend(self, E: Tensor, F_v: Tensor, M_hat: Tensor, mask_l: Tensor) -> Tensor:
        """E [B, T, D], F_v [B, N, D], M_hat [B, T, N], mask_l [B, T] -> the visual expression Q_v [B, T, D] (Eq. 4)."""
        Q_v = self.cross_attention(E, F_v, M_hat)  # F_topk of Eq. 4 is what M_hat leaves of F_v
        return self.self_attention(Q_v, Q_v, mask_l)


INITIAL_LOG_TAU = math.log(0.07)  # ours: the model learns log tau, from here, so that tau stays positive


def pixel_contrastive_loss(s: Tensor, target: Tensor, tau: Tensor | float) -> Tensor:
    """Eq. 5, computed in fp32. Ours: s is resized to the mask, and the mean is taken over the mask's pixels.

    Args:
        s: [B, h, w] the [CLS] row of S laid out as a map.
        target: [B, H, W] 1 (or True) in Z+, the pixels of the target, 0 in Z-.
        tau: temperature, positive.
    """
    logits = F.interpolate((s.float() / tau)[:, None], target.shape[-2:], mode="bilinear")[:, 0]
    # -log(sigmoid(x)) on Z+, -log(1 - sigmoid(x)) on Z-
    return F.binary_cross_entropy_with_logits(logits, target.float())


# The ablations: a class overrides the step that its row of the paper changes, or `forward` where other tokens select or
# enter G; VARIANTS names every row, also those that only model.py tells apart. Leaving out Eq. 5 where [CLS] has no
# similarities is ours. oIoU is the paper's, on RefCOCO val, where VEGA has 75.35. Table 6 is VISBlock's `ratio`.


class LinguisticGuidance(VISBlock):
    """Table 2: Q_l alone is the guidance set; row 1 (oIoU 73.31) BERT's own tokens, row 2 (73.91) the enhanced ones."""

    unused = ("proj_v", "proj_l", "cross_attention", "self_attention")

    def forward(self, F_v: Tensor, Q_l: Tensor, mask_l: Tensor) -> Selection:
        return Selection(Q_l, mask_l, None, None)  # G [B, T, D]


class AllPixels(VISBlock):
    """Table 3a, row 1 (oIoU 74.16): every pixel token of F_v enters G. Nothing is selected: no S, and no Eq. 5."""

    unused = ("proj_v", "proj_l", "cross_attention", "self_attention")

    def forward(self, F_v: Tensor, Q_l: Tensor, mask_l: Tensor) -> Selection:
        G = torch.cat([Q_l, F_v], dim=1)  # [B, T + N, D]
        return Selection(G, F.pad(mask_l, (0, F_v.shape[1]), value=1), None, None)


class TopKPixels(VISBlock):
    """Table 3a, row 2 (oIoU 74.58): the K pixel tokens that [CLS] selects enter G as they are.

    A choice of pixels has no gradient: Eq. 5 alone teaches the projections.
    """

    unused = ("cross_attention", "self_attention")

    def forward(self, F_v: Tensor, Q_l: Tensor, mask_l: Tensor) -> Selection:
        G, _, S, M = super().forward(F_v, Q_l[:, :1], mask_l[:, :1])  # of [CLS] alone: G [B, 1 + K, D], S, M [B, 1, N]
        G = torch.cat([Q_l, G[:, 1:]], dim=1)  # [B, T + K, D]
        return Selection(G, F.pad(mask_l, (0, G.shape[1] - mask_l.shape[1]), value=1), S, M)

    def attend(self, E: Tensor, F_v: Tensor, M_hat: Tensor, mask_l: Tensor) -> Tensor:
        rank_index = M_hat[:, 0].topk(self.K(F_v.shape[1])).indices.sort().values  # [B, K] pixels that it leaves
        return F_v.take_along_dim(rank_index[..., None], dim=1)  # F_topk [B, K, D]


class NoCues(VISBlock):
    """Table 3b, row 1 (oIoU 73.84): neither cue selects; learned queries gather from all pixels. No S, no Eq. 5.

    The paper says only that both cues are gone; its figure is not the one of G without visual tokens (73.91). Ours are
    the queries, as many as the longest expression has tokens, 21.
    """

    unused = ("proj_v", "proj_l")

    def __init__(self, dim: int, num_heads: int = 8, ratio: float = 0.3, dropout: float = 0.0):
        super().__init__(dim, num_heads, ratio, dropout)
        self.queries = nn.Parameter(0.02 * torch.randn(21, dim))

    def forward(self, F_v: Tensor, Q_l: Tensor, mask_l: Tensor) -> Selection:
        E = self.queries.expand(len(F_v), -1, -1)  # [B, 21, D]
        Q_v = self.cross_attention(E, F_v)  # no pixel and no query is hidden
        Q_v = self.self_attention(Q_v, Q_v)
        G = torch.cat([Q_l, Q_v], dim=1)  # [B, T + 21, D]
        return Selection(G, F.pad(mask_l, (0, E.shape[1]), value=1), None, None)


class LocalOnly(VISBlock):
    """Table 3b, row 2 (oIoU 74.86): the words select, [CLS] does not. Its rows of S and M are zero; no Eq. 5."""

    def forward(self, F_v: Tensor, Q_l: Tensor, mask_l: Tensor) -> Selection:
        G, mask_G, S, M = super().forward(F_v, Q_l[:, 1:], mask_l[:, 1:])
        G = torch.cat([Q_l[:, :1], G], dim=1)  # [B, 2T - 1, D]
        return Selection(G, F.pad(mask_G, (1, 0), value=1), F.pad(S, (0, 0, 1, 0)), F.pad(M, (0, 0, 1, 0)))


class GlobalOnly(TopKPixels):
    """Table 3b, row 3 (oIoU 74.93): [CLS] selects, the words do not; S and M have its row alone, G is [B, T + 1, D].

    (The table as printed ticks both cues in this row; Sec. 4.3.3 tells which figure is which.) Ours: no
    self-attention, since the one visual token has no other to look at.
    """

    unused = ("self_attention",)

    def attend(self, E: Tensor, F_v: Tensor, M_hat: Tensor, mask_l: Tensor) -> Tensor:
        return self.cross_attention(E, F_v, M_hat)


class SigmoidThreshold(VISBlock):
    """Table 4a, row 1 (oIoU 74.81): a pixel is selected where the sigmoid of its similarity exceeds 0.5.

    Ours: the mean divides by the number selected. A token may select nothing: its E is then zero, and M_hat, the
    same for every pixel, hides none from it. There is no ratio.
    """

    def select(self, S: Tensor) -> Tensor:
        return (S.sigmoid() > 0.5).to(S.dtype)

    def weigh(self, M: Tensor, S_norm: Tensor, F_v: Tensor) -> Tensor:
        return (M * S_norm) @ F_v / M.sum(-1, keepdim=True).clamp(min=1)


class NoSimilarityWeights(VISBlock):
    """Table 4c, row 1 (oIoU 75.05): E is the plain mean of the selected pixels: weights that sum to K times VEGA's.

    Eq. 5 alone teaches the projections.
    """

    def weigh(self, M: Tensor, S_norm: Tensor, F_v: Tensor) -> Tensor:
        return M @ F_v / self.K(F_v.shape[1])


class NoNormalisation(VISBlock):
    """Table 4d, row 1 (oIoU 74.97): the similarities weigh as they are, also negative ones. Ours: M still selects."""

    def normalise(self, S: Tensor, M_hat: Tensor) -> Tensor:
        return S


class UnmaskedSoftmax(VISBlock):
    """Table 4d, row 2 (oIoU 75.14): the softmax runs over all pixels. Ours: M still selects, after it."""

    def normalise(self, S: Tensor, M_hat: Tensor) -> Tensor:
        return torch.softmax(S, dim=-1)


class NoCrossAttention(VISBlock):
    """Table 4e, row 1 (oIoU 74.23): the intermediate tokens E go straight to the self-attention."""

    unused = ("cross_attention",)

    def attend(self, E: Tensor, F_v: Tensor, M_hat: Tensor, mask_l: Tensor) -> Tensor:
        return self.self_attention(E, E, mask_l)


class SumOnce(VISBlock):
    """Ours, beyond the paper: E is the weighted mean alone, not divided by K once more."""

    def weigh(self, M: Tensor, S_norm: Tensor, F_v: Tensor) -> Tensor:
        return (M * S_norm) @ F_v


class Sharp(VISBlock):
    """Ours, beyond the paper: the softmax is over S / tau, so that a token's most similar pixels weigh far more."""

    def __init__(self, dim: int, num_heads: int = 8, ratio: float = 0.3, dropout: float = 0.0):
        super().__init__(dim, num_heads, ratio, dropout)
        self.log_tau = nn.Parameter(torch.tensor(INITIAL_LOG_TAU))  # VEGA takes it for Eq. 5 as well

    def normalise(self, S: Tensor, M_hat: Tensor) -> Tensor:
        return torch.softmax(S / self.log_tau.exp() + M_hat, dim=-1)


class SumOnceSharp(SumOnce, Sharp):
    """Ours, beyond the paper: both changes."""


class Variant(NamedTuple):
    """A row of the paper's ablations, and what the model makes of it."""

    table: str
    row: str
    oIoU: float | None  # the paper's, on RefCOCO val, in per cent; None for ours
    block: type[VISBlock] = VISBlock
    enhanced: bool = True  # the linguistic tokens look at F_v before they select and enter G
    contrastive: bool = True  # Eq. 5 is in the loss; it needs the similarities of [CLS]


VARIANTS = {
    "vega": Variant("2", "enhanced linguistic expression + visual expression (Ours)", 75.35),
    "linguistic": Variant("2", "linguistic expression", 73.31, LinguisticGuidance, enhanced=False, contrastive=False),
    "enhanced-linguistic": Variant("2", "enhanced linguistic expression", 73.91, LinguisticGuidance, contrastive=False),
    "all-pixels": Variant("3a", "total visual pixel tokens", 74.16, AllPixels, contrastive=False),
    "topk-pixels": Variant("3a", "top-k visual pixel tokens", 74.58, TopKPixels),
    "no-cues": Variant("3b", "neither global nor local", 73.84, NoCues, contrastive=False),
    "local-only": Variant("3b", "local, not global", 74.86, LocalOnly, contrastive=False),
    "global-only": Variant("3b", "global, not local", 74.93, GlobalOnly),
    "sigmoid-threshold": Variant("4a", "sigmoid (> 0.5)", 74.81, SigmoidThreshold),
    "no-contrastive": Variant("4b", "no contrastive loss", 74.92, contrastive=False),
    "no-similarity-weights": Variant("4c", "similarity scores not multiplied", 75.05, NoSimilarityWeights),
    "no-normalisation": Variant("4d", "no normalization, no top-k mask in it", 74.97, NoNormalisation),
    "unmasked-softmax": Variant("4d", "normalization without top-k mask", 75.14, UnmaskedSoftmax),
    "no-cross-attention": Variant("4e", "no top-k cross-attention", 74.23, NoCrossAttention),
    "sum-once": Variant("ours", "E without the second 1 / K", None, SumOnce),
    "sharp": Variant("ours", "softmax over S / tau, with the tau of Eq. 5", None, Sharp),
    "sum-once-sharp": Variant("ours", "both", None, SumOnceSharp),
}
