"""The three bundled models: convolutions, recurrent layers, attention. Ten classes each."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """Two 3x3 convolutions with BatchNorm, and a shortcut around them.

    Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        """Make one for `inputs` to `outputs` channels; a stride shrinks height and width."""
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of `x`, (batch, inputs, H, W), as (batch, outputs, H / stride, W / stride)."""
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu2(y + self.shortcut(x))  # type: ignore[no-any-return]


class CNN(nn.Module):
    """Residual CNN: 48.5 M MACs an image, 308 k parameters."""

    def __init__(self) -> None:
        """Make one with random weights."""
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.stages = nn.Sequential(Block(32, 32), Block(32, 64, stride=2), Block(64, 128, stride=2))
        self.head = nn.Linear(128, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of `images`, (batch, 1, 32, 32), as (batch, 10)."""
        return self.head(self.stages(self.stem(images)).mean((2, 3)))  # type: ignore[no-any-return]


class LSTM(nn.Module):
    """Two layers of LSTM, one of GRU, and a Linear on the last step."""

    def __init__(self, features: int = 32, hidden: int = 128) -> None:
        """Make one with random weights, for `features` a step."""
        super().__init__()
        self.lstm = nn.LSTM(features, hidden, num_layers=2, batch_first=True)
        self.gru = nn.GRU(hidden, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 10)

    def forward(self, rows: Tensor) -> Tensor:
        """Return the logits of `rows`, (batch, steps, features), as (batch, 10)."""
        steps, _ = self.lstm(rows)
        steps, _ = self.gru(steps)
        return self.head(steps[:, -1])  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Multi-head self-attention with a Linear each for queries, keys and values."""

    def __init__(self, dim: int, heads: int) -> None:
        """Make one for tokens of `dim` features; `heads` divides `dim`."""
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return what each token of `x`, (batch, tokens, dim), gathers from all, in the same shape."""
        q, k, v = (self.split(layer(x)) for layer in (self.q, self.k, self.v))
        return self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def split(self, x: Tensor) -> Tensor:
        """Return `x`, (batch, tokens, heads * width), as (batch, heads, tokens, width)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # type: ignore[no-any-return,no-untyped-call]


class Layer(nn.Module):
    """Attention, then an MLP, each on normalised input and added to it.

    Source: Xiong et al., "On Layer Normalization in the Transformer Architecture", ICML 2020.
    """

    def __init__(self, dim: int, heads: int, mlp: int) -> None:
        """Make one for tokens of `dim` features, with `mlp` hidden ones."""
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp), nn.GELU(), nn.Linear(mlp, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`, (batch, tokens, dim), one layer further, in the same shape."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """Pre-norm transformer over patches, with learned positions and the mean over tokens.

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021.
    """

    def __init__(self, tokens: int = 64, features: int = 16, dim: int = 128, depth: int = 4, heads: int = 4) -> None:
        """Make one with random weights, for `tokens` patches of `features` pixels."""
        super().__init__()
        self.embed = nn.Linear(features, dim)
        self.position = nn.Parameter(torch.randn(1, tokens, dim) * 0.02)
        self.layers = nn.Sequential(*(Layer(dim, heads, 4 * dim) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)

    def forward(self, patches: Tensor) -> Tensor:
        """Return the logits of `patches`, (batch, tokens, features), as (batch, 10)."""
        return self.head(self.norm(self.layers(self.embed(patches) + self.position)).mean(1))  # type: ignore[no-any-return]
