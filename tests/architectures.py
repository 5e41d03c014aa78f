"""Small models of many architectures, each with a function that makes its example, for the tests of pruning."""

import torch
from torch import nn
from torch.nn import functional


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.c1 = nn.Conv2d(1, 16, 3, padding=1)
        self.b1 = nn.BatchNorm2d(16)
        self.c2 = nn.Conv2d(16, 16, 3, padding=1)
        self.fc1 = nn.Linear(16 * 16, 32)
        self.fc2 = nn.Linear(32, 10)

    def forward(self, x):
        x = functional.relu(self.b1(self.c1(x)))
        x = functional.max_pool2d(functional.relu(self.c2(x)), 2)
        return self.fc2(functional.relu(self.fc1(x.flatten(1))))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down1 = nn.Conv2d(1, 8, 3, padding=1)
        self.down2 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(16, 16, 3, padding=1)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.join = nn.Conv2d(16, 8, 3, padding=1)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        skipped = functional.relu(self.down1(x))
        x = self.up(functional.relu(self.middle(functional.relu(self.down2(skipped)))))
        return self.out(functional.relu(self.join(torch.cat([skipped, x], 1))))


class Depthwise(nn.Module):
    def __init__(self):
        super().__init__()
        stages = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6()]
        for narrow, wide in ((8, 16), (16, 16)):
            stages += [nn.Conv2d(narrow, narrow, 3, padding=1, groups=narrow), nn.BatchNorm2d(narrow), nn.ReLU6()]
            stages += [nn.Conv2d(narrow, wide, 1), nn.BatchNorm2d(wide), nn.ReLU6()]
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.stages(x).mean((2, 3)))


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.narrow = nn.Conv2d(16, 16, 1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.wide = nn.Conv2d(16, 16, 1)
        self.norm = nn.GroupNorm(2, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = functional.relu(self.stem(x))
        x = x + self.wide(functional.relu(self.grouped(functional.relu(self.narrow(x)))))
        return self.head(self.norm(x).mean((2, 3)))


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.stages = nn.ModuleList(nn.Conv2d(8 + 8 * i, 8, 3, padding=1) for i in range(3))
        self.norm = nn.BatchNorm2d(32)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = self.stem(x)
        for stage in self.stages:
            x = torch.cat([x, functional.relu(stage(x))], 1)
        return self.head(self.norm(x).mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self, **lstm):
        super().__init__()
        self.inputs = nn.Linear(8, 16)
        self.lstm = nn.LSTM(16, 16, batch_first=True, **lstm)
        self.gru = nn.GRU(32 if self.lstm.bidirectional else 16, 16, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x, _ = self.lstm(functional.relu(self.inputs(x)))
        return self.head(self.gru(x)[1][-1])


class Attention(nn.Module):
    def __init__(self, style):
        super().__init__()
        self.num_heads, self.head_dim, self.style = 4, 4, style
        if style == "separate":
            self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        else:
            self.qkv = nn.Linear(16, 48)
        self.proj = nn.Linear(16, 16)

    def forward(self, x):
        batch, length, _ = x.shape
        if self.style == "separate":
            parts = [f(x).view(batch, length, self.num_heads, self.head_dim) for f in (self.q, self.k, self.v)]
            q, k, v = (part.transpose(1, 2) for part in parts)
        elif self.style == "unbound":
            joint = self.qkv(x).reshape(batch, length, 3, self.num_heads, self.head_dim)
            q, k, v = joint.permute(2, 0, 3, 1, 4).unbind(0)
        else:
            chunks = self.qkv(x).chunk(3, dim=-1)
            q, k, v = (part.view(batch, length, self.num_heads, -1).transpose(1, 2) for part in chunks)
        attended = functional.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).reshape(batch, length, -1))


class Transformer(nn.Module):
    def __init__(self, style):
        super().__init__()
        self.patch = nn.Conv2d(1, 16, 2, stride=2)
        self.start = nn.Parameter(torch.randn(1, 1, 16))
        self.position = nn.Parameter(torch.randn(1, 17, 16))
        self.scale = nn.Parameter(torch.rand(16))
        self.attention = Attention(style)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(16), nn.LayerNorm(16), nn.LayerNorm(16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.start.expand(x.shape[0], -1, -1), x], 1) + self.position
        x = x + self.scale * self.attention(self.norm1(x))
        return self.head(self.norm3(x + self.mlp(self.norm2(x)))[:, 0])


class TorchTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inputs = nn.Linear(8, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.encoder(self.inputs(x)).mean(1))


class UsedTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.body = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = functional.relu(self.body(functional.relu(self.stem(x))))
        return self.head(functional.relu(self.body(x)).mean((2, 3)))


class SqueezeExcite(nn.Module):
    def __init__(self):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.squeeze, self.excite = nn.Linear(16, 8), nn.Linear(8, 16)
        self.out = nn.Conv2d(16, 3, 1)

    def forward(self, x):
        x = functional.relu(self.c2(functional.relu(self.c1(x))))
        gate = torch.sigmoid(self.excite(functional.relu(self.squeeze(x.mean((2, 3))))))
        return self.out(x * gate[:, :, None, None])


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.both = nn.Conv2d(1, 32, 3, padding=1)
        self.body = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        values, gates = self.both(x).chunk(2, 1)
        return self.head(functional.relu(self.body(values * torch.sigmoid(gates))).mean((2, 3)))


class RootMeanSquareNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(16))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class LanguageModel(nn.Module):
    """With its embedding tied to its output layer."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.norm = RootMeanSquareNorm()
        self.gate, self.up = nn.Linear(16, 32, bias=False), nn.Linear(16, 32, bias=False)
        self.down = nn.Linear(32, 16, bias=False)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        y = self.norm(x)
        return self.head(x + self.down(functional.silu(self.gate(y)) * self.up(y)))


class SeveralInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(4, 16)
        self.body, self.head = nn.Linear(16, 32), nn.Linear(32, 3)

    def forward(self, x, y):
        features = functional.relu(self.a(x) + self.b(y))
        return {"logits": self.head(functional.relu(self.body(features))), "features": (features,)}


class LastFlattened(nn.Module):
    """Flattens with channels last, which the dependency graph takes for channels first."""

    def __init__(self):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16 * 64, 3)

    def forward(self, x):
        x = functional.relu(self.c2(functional.relu(self.c1(x))))
        return self.head(x.permute(0, 2, 3, 1).flatten(1))


def sequential(*layers):
    return nn.Sequential(*layers)


def images(channels_in=1):
    return (torch.randn(2, channels_in, 8, 8),)


def audio():
    stages = [nn.Conv1d(1, 8, 5, padding=2), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 16, 5, padding=2), nn.ReLU()]
    return sequential(*stages, nn.Flatten(), nn.Linear(16 * 32, 5))


def volumes():
    return sequential(nn.Conv3d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 8, 3), nn.Flatten(), nn.Linear(64, 4))


def perceptron():
    return sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3))


MODELS = {
    "perceptron": (perceptron, lambda: (torch.randn(2, 8),)),
    "convolutions": (Convolutions, images),
    "u-net": (UNet, images),
    "depthwise": (Depthwise, lambda: images(3)),
    "grouped": (Grouped, lambda: images(3)),
    "dense": (Dense, lambda: images(3)),
    "audio": (audio, lambda: (torch.randn(2, 1, 32),)),
    "volumes": (volumes, lambda: (torch.randn(2, 1, 4, 4, 4),)),
    "recurrent": (Recurrent, lambda: (torch.randn(2, 5, 8),)),
    "bidirectional": (lambda: Recurrent(bidirectional=True, num_layers=2), lambda: (torch.randn(2, 5, 8),)),
    "attention, separate": (lambda: Transformer("separate"), images),
    "attention, unbound": (lambda: Transformer("unbound"), images),
    "attention, chunked": (lambda: Transformer("chunked"), images),
    "torch's transformer": (TorchTransformer, lambda: (torch.randn(2, 6, 8),)),
    "used twice": (UsedTwice, images),
    "squeeze and excite": (SqueezeExcite, images),
    "gated": (Gated, images),
    "language model": (LanguageModel, lambda: (torch.randint(0, 20, (2, 6)),)),
}
