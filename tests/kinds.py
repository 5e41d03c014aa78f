"""Small models of the kinds that people bring, each with an example, for the table of what works where."""

import torch
from torch import nn
from torch.nn import functional


class SeveralInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = nn.Linear(16, 32), nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, left, right):
        return self.head(functional.relu(self.left(left) + self.right(right)))


class NestedOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 8), nn.Linear(32, 16)

    def forward(self, x):
        x = functional.relu(self.trunk(x))
        return {"scores": self.first(x), "both": (self.second(x), x)}


class Tied(nn.Module):
    """Embedding and output share their weight."""

    def __init__(self):
        super().__init__()
        self.embed, self.inner = nn.Embedding(32, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(functional.relu(self.inner(self.embed(tokens))))


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 32, 3, padding=1, groups=4)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.head = nn.Linear(32, 8)

    def forward(self, x):
        x = functional.relu(self.first(x))
        x = functional.relu(self.depthwise(functional.relu(self.grouped(x))))
        return self.head(x.mean((2, 3)))


class Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(16, 16, 2, stride=2)
        self.out = nn.Conv2d(16, 3, 1)

    def forward(self, x):
        return self.out(functional.relu(self.up(functional.relu(self.down(x)))))


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.inner, self.head = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x):
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(functional.relu(self.inner(x)).mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.gru = nn.LSTM(8, 32, batch_first=True), nn.GRU(32, 32, batch_first=True)
        self.head = nn.Linear(32, 8)

    def forward(self, x):
        return self.head(self.gru(self.lstm(x)[0])[0][:, -1])


class DataDependent(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        while bool(x.abs().max() > 4):
            x = x * 0.5
        return self.head(functional.relu(self.first(x)))


def bert():
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    return BertModel(BertConfig(vocab_size=50, max_position_embeddings=16, **sizes))


def images():
    return (torch.rand(4, 3, 16, 16),)


def tokens():
    return (torch.randint(0, 32, (4, 12)),)


KINDS = {
    "several inputs": lambda: (SeveralInputs(), (torch.rand(4, 16), torch.rand(4, 8))),
    "dict and tuple outputs": lambda: (NestedOutputs(), (torch.rand(4, 16),)),
    "tied weights": lambda: (Tied(), tokens()),
    "grouped and depthwise convolutions": lambda: (Grouped(), images()),
    "transposed convolutions": lambda: (Transposed(), images()),
    "channels-last": lambda: (
        Grouped().to(memory_format=torch.channels_last),
        tuple(x.contiguous(memory_format=torch.channels_last) for x in images()),
    ),
    "nn.MultiheadAttention": lambda: (Attending(), (torch.rand(4, 6, 16),)),
    "transformers.BertModel": lambda: (bert(), (*tokens(), torch.ones(4, 12, dtype=torch.int64))),
    "LSTM and GRU": lambda: (Recurrent(), (torch.rand(4, 6, 8),)),
    "already in bfloat16": lambda: (
        SeveralInputs().bfloat16(),
        (torch.rand(4, 16).bfloat16(), torch.rand(4, 8).bfloat16()),
    ),
    "data-dependent control flow": lambda: (DataDependent(), (torch.rand(4, 16),)),
}


def make(kind):
    """Return a model of this kind in eval mode, and its example; the same each time."""
    torch.manual_seed(0)
    model, example = KINDS[kind]()
    return model.eval(), example
