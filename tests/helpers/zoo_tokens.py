"""Networks of tokens, sequences and rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.classifier import CLASSES


class Attention(nn.Module):
    """`scaled_dot_product_attention` as networks call it."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0.0)
        return self.out(y.transpose(1, 2).reshape(b, t, d))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int = 2) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Patches, a class token, positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 8) * 0.3)
        self.positions = nn.Parameter(torch.randn(1, 10, 8) * 0.3)
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


class Windows(nn.Module):
    """Attention within windows of maps whose channels come last, every second time shifted."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2, 2)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(4))
        self.attentions = nn.ModuleList(Attention(8, 2) for _ in range(2))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(2)
        )
        self.merge, self.head = nn.Linear(32, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).permute(0, 2, 3, 1)
        for i in range(2):
            y = torch.roll(self.norms[2 * i](x), (-i, -i), (1, 2))
            n, h, w, c = y.shape
            y = y.view(n, h // 3, 3, w // 3, 3, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 9, c)
            y = self.attentions[i](y).view(n, h // 3, w // 3, 3, 3, c)
            y = y.permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
            x = x + torch.roll(y, (i, i), (1, 2))
            x = x + self.mlps[i](self.norms[2 * i + 1](x))
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.head(self.merge(x).mean((1, 2)))


class EncoderLayers(nn.Module):
    """PyTorch's own transformer layers, norm first and norm last."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.first = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        self.last = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.first(self.embed(x))).mean(1))


class EncoderStack(EncoderLayers):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        self.first, self.last = (
            nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
            nn.Identity(),
        )


class CrossAttention(nn.Module):
    """MultiheadAttention between two sequences, with a mask, and its weights returned."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv1d(3, 8, 3, padding=1)
        self.own = nn.MultiheadAttention(8, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(8, 2, kdim=6, vdim=6)
        self.norm1, self.norm2, self.head = nn.LayerNorm(8), nn.LayerNorm(8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor, context: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(x).transpose(1, 2)
        y = self.norm1(x)
        x = x + self.own(y, y, y, need_weights=False)[0]
        query, context = self.norm2(x).transpose(0, 1), context.transpose(0, 1)
        y, weights = self.cross(query, context, context, key_padding_mask=padding)
        return self.head((x + y.transpose(0, 1)).mean(1)), weights


class Recurrent(nn.Module):
    """A convolution before an LSTM and a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(3, 6, 3, padding=1), nn.BatchNorm1d(6)
        self.lstm = nn.LSTM(6, 5, batch_first=True, bidirectional=True)
        self.gru, self.fc = nn.GRU(10, 5, num_layers=2, batch_first=True), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu().transpose(1, 2)
        x, _ = self.lstm(x)
        _, state = self.gru(x)
        return self.fc(state[-1])


class RecurrentAlone(nn.Module):
    """An LSTM, and a Linear before the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.hidden, self.fc = nn.LSTM(3, 6), nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x, (_, c) = self.lstm(x)
        return self.fc(F.silu(self.hidden(x[-1] + c[0])))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, 8),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(8, 8),
            nn.GELU(),
            nn.Linear(8, 8),
            nn.LayerNorm(8),
            nn.Linear(8, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class MlpMixer(nn.Module):
    """Linear maps over tokens and over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.tokens = nn.Sequential(nn.Linear(9, 12), nn.GELU(), nn.Linear(12, 9))
        self.channels = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(self.norm2(x))
        return self.head(x.mean(1))
