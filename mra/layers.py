"""The transformer parts that every encoder is made of: one attention, one MLP, one block for each norm order.

Read next: encoders.py, which stacks these blocks into image, text and fusion encoders.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017): self-attention, or cross-attention to given keys and values."""

    def __init__(self, dim: int, heads: int, context_dim: int | None = None, bias: bool = True):
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} heads do not divide a width of {dim}")
        self.heads = heads
        self.to_query = nn.Linear(dim, dim, bias)
        self.to_keys_values = nn.Linear(context_dim or dim, 2 * dim, bias)
        self.to_out = nn.Linear(dim, dim)

    def keys_values(self, context: Tensor) -> Tensor:
        """Keys and values (B, 2, heads, S, D / heads) of a context (B, S, D), which several passes may share."""
        return self.to_keys_values(context).unflatten(2, (2, self.heads, -1)).permute(0, 2, 3, 1, 4)

    def forward(self, x: Tensor, keys_values: Tensor | None = None, keep: Tensor | None = None,
                causal: bool = False, counts: list[int] | None = None) -> Tensor:
        """Attend from x (B, T, D) to itself, or to `keys_values` of S tokens; keep (B, S).

        With `causal`, which excludes `keep`, each token attends to itself and to the tokens before it. With `counts`
        x (1, L, D) is one sequence: the first counts[0] tokens attend to the first keys and values, and so on.
        """
        if keys_values is None:
            keys_values = self.keys_values(x)
        query = self.to_query(x).unflatten(2, (self.heads, -1)).transpose(1, 2)        # (B, heads, T, D/heads)
        key, value = keys_values.unbind(1)                                             # (B, heads, S, D/heads)
        mask = None if keep is None else keep[:, None, None, :]                        # (B, 1, 1, S)
        if counts is None:
            mixed = attend(query, key, value, mask, causal)                            # (B, heads, T, D/heads)
        else:
            parts = zip(query.split(counts, 2), key.split(1), value.split(1))
            mixed = torch.cat([attend(own_query, own_key, own_value, None) for own_query, own_key, own_value in parts
                               if own_query.shape[2]], 2)      # without those that have no tokens
        return self.to_out(mixed.transpose(1, 2).flatten(2))                           # (B, T, D)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
    """PyTorch's attention; on the CPU in float32, since its bfloat16 backward pass takes five times as long there."""
    if query.device.type != "cpu" or query.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(query.float(), key.float(), value.float(), mask, is_causal=causal)


def mlp(dim: int, activation: type[nn.Module] = nn.GELU) -> nn.Sequential:
    """Two linear maps with an exact GELU, or another activation, between them."""
    return nn.Sequential(nn.Linear(dim, 4 * dim), activation(), nn.Linear(4 * dim, dim))


class QuickGELU(nn.Module):
    """CLIP's approximation of a GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class GEGLU(nn.Module):
    """An MLP whose hidden layer is multiplied by the GELU of a second one (Shazeer 2020)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.to_hidden, self.to_out = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        hidden, gate = self.to_hidden(x).chunk(2, -1)
        return self.to_out(hidden * F.gelu(gate))


class PreNormBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): the block of a vision transformer, and of CLIP's text encoder."""

    def __init__(self, dim: int, heads: int, dropout: float, eps: float = 1e-6, causal: bool = False,
                 activation: type[nn.Module] = nn.GELU):
        super().__init__()
        self.causal = causal
        self.attention_norm, self.attention = nn.LayerNorm(dim, eps), Attention(dim, heads)
        self.mlp_norm, self.mlp = nn.LayerNorm(dim, eps), mlp(dim, activation)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), causal=self.causal))      # (B, T, D)
        return x + self.dropout(self.mlp(self.mlp_norm(x)))                                   # (B, T, D)


class PostNormBlock(nn.Module):
    """BERT's block: self-attention, with `context_dim` cross-attention, MLP; after each, norm(x + its output)."""

    def __init__(self, dim: int, heads: int, dropout: float, context_dim: int | None = None):
        super().__init__()
        self.attention, self.attention_norm = Attention(dim, heads), nn.LayerNorm(dim, 1e-12)
        if context_dim:
            self.cross, self.cross_norm = Attention(dim, heads, context_dim), nn.LayerNorm(dim, 1e-12)
        self.mlp, self.mlp_norm = mlp(dim), nn.LayerNorm(dim, 1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        """Tokens x (B, T, D), keep (B, T) -> (B, T, D), without a context."""
        return self.attend_context(self.attend_self(x, keep))

    def attend_self(self, x: Tensor, keep: Tensor, at: Tensor | None = None) -> Tensor:
        """The first third of the block: the words attend to each other. With `at` (B, M) only for these positions."""
        keys_values = self.attention.keys_values(x)
        x = x if at is None else pick(x, at)
        return self.attention_norm(x + self.dropout(self.attention(x, keys_values, keep)))

    def attend_context(self, x: Tensor, context: Tensor | None = None, context_keep: Tensor | None = None,
                       counts: list[int] | None = None) -> Tensor:
        """The rest: the words attend to the keys and values of a context, where there is one; then the MLP."""
        if context is not None:
            x = self.cross_norm(x + self.dropout(self.cross(x, context, context_keep, counts=counts)))
        return self.mlp_norm(x + self.dropout(self.mlp(x)))


def pick(x: Tensor, at: Tensor) -> Tensor:
    """The tokens of x (B, T, D) at the positions `at` (B, M): (B, M, D)."""
    return x.gather(1, at[..., None].expand(-1, -1, x.shape[-1]))


def initialise(module: nn.Module) -> None:
    """Normal weights with standard deviation 0.02 sqrt(768 / fan-in), that of BERT and ViT at width 768; zero bias."""
    if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02 * (768 / module.weight[0].numel()) ** 0.5)
    if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
        nn.init.zeros_(module.bias)
