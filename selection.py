"""Visual information selection (VIS): Algorithm 1 of the paper in its own symbols, and Eq. 1-5.

    B batch, T tokens of the expression (the first is [CLS], the last ones may be padding), N pixels of the
    last vision stage, D channels, K = int(N * ratio), at least one

Each token selects the K pixels that are most similar to it and gathers them into one *visual expression*
token. Two things look odd at first and are the paper's:

* S_norm already sums to one over the K selected pixels, and E divides the sum by K once more (Eq. 4), so
  that E is a small vector. It is only a query: the cross-attention brings the pixels back at full size.
* cosine similarities lie in [-1, 1] and the softmax has no temperature, so no selected pixel can weigh more
  than e^2 = 7.4 times another.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Selection(NamedTuple):
    """What the VIS block returns."""

    G: Tensor  # [B, 2T, D] the guidance set: linguistic, then visual expression tokens
    mask_G: Tensor  # [B, 2T] 1 where the token belongs to a real word
    S: Tensor  # [B, T, N] cosine similarities; row 0 is the [CLS] token's
    M: Tensor  # [B, T, N] 1 at the K pixels that each word selected, else 0


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
    """Algorithm 1, line by line: a comment that stands alone is the pseudocode's, one with "ours:" is not.

    Args:
        dim: channels D of both features.
        ratio: K / N, the share of the pixels that each token selects; 0.3 in the paper (Table 6).
    """

    def __init__(self, dim: int, num_heads: int = 8, ratio: float = 0.3, dropout: float = 0.0):
        super().__init__()
        if not 0 < ratio <= 1:
            raise ValueError(f"the ratio of selected pixels is {ratio}, but must lie in (0, 1]")
        self.ratio = ratio
        self.proj_v = nn.Linear(dim, dim)  # phi_v of Eq. 1
        self.proj_l = nn.Linear(dim, dim)  # phi_l
        self.cross_attention = AttentionLayer(dim, num_heads, dropout=dropout)
        self.self_attention = AttentionLayer(dim, num_heads, dropout=dropout)

    def forward(self, F_v: Tensor, Q_l: Tensor, mask_l: Tensor) -> Selection:
        """F_v [B, N, D] vision features, Q_l [B, T, D] linguistic features, mask_l [B, T] 1 for real words."""
        N = F_v.shape[1]
        K = max(1, int(N * self.ratio))

        # ours: in fp32 also under autocast, since similarities rounded to bf16 can select other pixels
        with torch.autocast(F_v.device.type, enabled=False):
            F_v, Q_l = F_v.float(), Q_l.float()

            # joint multimodal embedding
            X = F.normalize(self.proj_v(F_v), dim=-1)  # [B, N, D]
            Y = F.normalize(self.proj_l(Q_l), dim=-1)  # [B, T, D]

            # calculate cosine similarities
            S = Y @ X.mT  # [B, T, N]

            # top-k ranking of similarity scores
            rank_index = S.topk(K, dim=-1).indices  # [B, T, K]

            # top-k mask generation
            M = binary_mask(rank_index, N)  # [B, T, N]

            # non top-k similarity scores masking
            # & top-k ranked similarities normalization
            M_hat = M * 1e4 - 1e4  # [B, T, N], -1e4 for the minus infinity of Eq. 2
            S_norm = torch.softmax(S + M_hat, dim=-1)  # [B, T, N]

            # weighted average summation
            # ours: the pseudocode first expands F_v, M and S_norm to [B, T, N, D] and sums their product over N.
            # That is this matrix product. (S_norm is zero outside M already; M stands here because Eq. 4 has it.)
            E = (M * S_norm) @ F_v / K  # [B, T, D]

        # the visual expression extracted by the cross-attention with
        # top-k pixels
        Q_v = self.cross_attention(E, F_v, M_hat)  # [B, T, D], F_topk of Eq. 4 is what M_hat leaves of F_v

        # considering the visual contexts via the self-attention
        Q_v = self.self_attention(Q_v, Q_v, mask_l)  # [B, T, D]

        # new guidance set
        G = torch.cat([Q_l, Q_v], dim=1)  # [B, 2T, D]
        return Selection(G, torch.cat([mask_l, mask_l], dim=1), S, M)


INITIAL_LOG_TAU = math.log(0.07)  # ours: the model learns log tau, so that tau = exp(log tau) stays positive


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
