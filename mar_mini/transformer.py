"""Attention, MLP and block of the transformer (Vaswani et al. 2017, pre-norm as in ViT)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

LAYER_NORM_EPS = 1e-6


def attend(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for each head, by the library's fused kernel.

    q, k, v  (B, H, N, d) float
    returns  (B, H, N, d)

    While training on a CPU the product is written out: there the fused kernel's backward pass is
    several times slower than the three operations it fuses.
    """
    if q.device.type == "cpu" and torch.is_grad_enabled() and q.requires_grad:
        weights = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1)     # (B, H, N, N)
        return F.dropout(weights, dropout) @ v                         # (B, H, N, d)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)  # (B, H, N, d)


class Attention(nn.Module):
    """Multi-head self-attention with one matrix for queries, keys and values."""

    def __init__(
        self, dim: int, num_heads: int, attn_dropout: float = 0.0, proj_dropout: float = 0.0
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(
                f"width {dim} is not a multiple of {num_heads} heads; change one of the two"
            )
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn_drop = nn.Dropout(attn_dropout)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_dropout)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))   # (B, N, 3, H, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                       # 3 x (B, H, N, d)
        dropout = self.attn_drop.p if self.training else 0.0
        x = attend(q, k, v, dropout).transpose(1, 2).flatten(2)    # (B, N, D)
        return self.proj_drop(self.proj(x))                        # (B, N, D)


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
        x = self.drop1(self.act(self.fc1(x)))                      # (B, N, hidden_dim)
        return self.drop2(self.fc2(x))                             # (B, N, D)


class Block(nn.Module):
    """Attention, then MLP, each on a normalised copy and added to the residual stream."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        attn_dropout: float = 0.0,
        proj_dropout: float = 0.0,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(dim, num_heads, attn_dropout, proj_dropout)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), proj_dropout)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        x = x + self.attn(self.norm1(x))                           # (B, N, D)
        return x + self.mlp(self.norm2(x))                         # (B, N, D)
