"""Attention, MLP and block of the transformer (Vaswani et al. 2017, pre-norm as in ViT)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mar_mini.tokens import take

LAYER_NORM_EPS = 1e-6


def attend(q: Tensor, k: Tensor, v: Tensor, dropout: nn.Dropout | None = None) -> Tensor:
    """Compute softmax(q k^T / sqrt(d)) v for each head, with dropout of the attention weights.

    q (B, H, K, d) asks, k and v (B, H, N, d) answer. While training on a CPU the product is written
    out: there the fused kernel's backward pass is several times slower than what it fuses.
    """
    if q.device.type == "cpu" and torch.is_grad_enabled() and q.requires_grad:
        weights = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1)  # (B, H, K, N)
        return (weights if dropout is None else dropout(weights)) @ v  # (B, H, K, d)
    p = dropout.p if dropout is not None and dropout.training else 0.0
    return F.scaled_dot_product_attention(q, k, v, dropout_p=p)  # (B, H, K, d)


class Attention(nn.Module):
    """Multi-head self-attention with one matrix for queries, keys and values."""

    def __init__(self, dim: int, num_heads: int, attn_dropout=0.0, proj_dropout=0.0):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} is not a multiple of {num_heads} heads; change one")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn_drop = nn.Dropout(attn_dropout)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_dropout)

    def forward(
        self, x: Float[Tensor, "B N D"], rows: Int[Tensor, "B K"] | None = None
    ) -> Float[Tensor, "B K D"]:
        """Compute all rows, or the given ones only: those ask, all others still answer."""
        q, k, v = self.project(x, rows)  # (B, H, K, d), 2 x (B, H, N, d)
        x = attend(q, k, v, self.attn_drop).transpose(1, 2).flatten(2)  # (B, K, D)
        return self.proj_drop(self.proj(x))  # (B, K, D)

    def project(self, x: Tensor, rows: Tensor | None) -> tuple[Tensor, ...]:
        """Give queries of the given rows (of all if None), keys and values of all, by heads."""
        if rows is None:
            return self.heads(self.qkv(x), 3)  # 3 x (B, H, N, d)
        width = x.shape[-1]
        q_weight, kv_weight = self.qkv.weight.split([width, 2 * width])
        q_bias, kv_bias = self.qkv.bias.split([width, 2 * width])
        q = self.heads(F.linear(take(x, rows), q_weight, q_bias), 1)  # 1 x (B, H, K, d)
        return *q, *self.heads(F.linear(x, kv_weight, kv_bias), 2)  # 2 x (B, H, N, d)

    def heads(self, x: Float[Tensor, "B N D"], parts: int) -> tuple[Tensor, ...]:
        """Cut the last axis into parts, each of them into heads: parts x (B, H, N, d)."""
        return x.unflatten(-1, (parts, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop2 = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        x = self.drop1(self.act(self.fc1(x)))  # (B, N, hidden_dim)
        return self.drop2(self.fc2(x))  # (B, N, D)


class Block(nn.Module):
    """Attention, then MLP, each on a normalised copy and added to the residual stream."""

    def __init__(self, dim, num_heads, mlp_ratio=4.0, attn_dropout=0.0, proj_dropout=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(dim, num_heads, attn_dropout, proj_dropout)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), proj_dropout)

    def forward(
        self, x: Float[Tensor, "B N D"], rows: Int[Tensor, "B K"] | None = None
    ) -> Float[Tensor, "B K D"]:
        """Compute all rows, or the given ones only: of a last block few may be needed."""
        h = self.attn(self.norm1(x), rows)  # (B, K, D)
        x = h + (x if rows is None else take(x, rows))  # (B, K, D)
        return x + self.mlp(self.norm2(x))  # (B, K, D)
