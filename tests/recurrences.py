"""Small models of recurrent layers, for the tests of pruning; their layers have 16 hidden units."""

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))


class Reader(nn.Module):
    """A model of the layers it is given, whose forward is `forward(model, x)`."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.body = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.body(self, x)


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.inputs = nn.Linear(8, 12)
        self.lstm = nn.LSTM(12, 16, num_layers=2, batch_first=True)
        self.gru = nn.GRU(16, 12, batch_first=True)
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        steps, _ = self.gru(self.lstm(torch.relu(self.inputs(x)))[0])
        return self.head(steps[:, -1])


class Zeros(nn.Module):
    """Makes its initial states from an attribute of its own."""

    def __init__(self):
        super().__init__()
        self.hidden_dim = 16
        self.lstm, self.gru = nn.LSTM(8, 16, batch_first=True), nn.GRU(16, 16, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        state = torch.zeros(1, x.shape[0], self.hidden_dim)
        return self.head(self.gru(self.lstm(x, (state, state))[0], state)[0][:, -1])


def linear(inputs=16):
    return nn.Linear(inputs, 4)


def lstm(inputs=8, **options):
    return nn.LSTM(inputs, 16, **{"batch_first": True, **options})


def gru(inputs=8, **options):
    return nn.GRU(inputs, 16, **{"batch_first": True, **options})


def last(model, x):
    return model.head(model.a(x)[0][:, -1])


def time_first(model, x):
    return model.head(model.a(x.transpose(0, 1))[0][-1])


def packed(model, x):
    steps, _ = model.b(model.a(pack_padded_sequence(x, torch.tensor([5, 4, 2]), batch_first=True))[0])
    return model.head(pad_packed_sequence(steps, batch_first=True)[0].sum(1))


def by_steps(model, x):
    state = None
    for step in range(x.shape[1]):
        steps, state = model.a(x[:, step : step + 1], state)
    return model.head(steps[:, 0])


def from_a_layer(model, x):
    state = torch.tanh(model.start(x[:, 0])).unsqueeze(0)
    return model.head(model.a(x, hx=state)[0][:, -1])


def from_parameters(model, x):
    state = tuple(s.expand(-1, x.shape[0], -1).contiguous() for s in (model.h, model.c))
    return model.head(model.a(x, state)[0][:, -1])


def in_cells(model, x):
    state = hidden = None
    for step in range(x.shape[1]):
        state = model.a(x[:, step], state)
        hidden = model.b(state[0], hidden)
    return model.head(hidden)


MODELS = {
    "lstm": lambda: Reader(last, a=lstm(), head=linear()),
    "gru": lambda: Reader(last, a=gru(), head=linear()),
    "rnn": lambda: Reader(last, a=nn.RNN(8, 16, nonlinearity="relu", batch_first=True), head=linear()),
    "three layers": lambda: Reader(last, a=lstm(num_layers=3, dropout=0.2), head=linear()),
    "without biases": lambda: Reader(last, a=gru(num_layers=2, bias=False), head=linear()),
    "time first": lambda: Reader(time_first, a=lstm(batch_first=False), head=linear()),
    "last state": lambda: Reader(lambda m, x: m.head(m.a(x)[1][0][-1]), a=lstm(num_layers=2), head=linear()),
    "memory": lambda: Reader(lambda m, x: m.head(m.a(x)[1][1][-1]), a=lstm(), head=linear()),
    "lstm, then gru": lambda: Reader(lambda m, x: m.head(m.b(m.a(x)[0])[0][:, -1]), a=lstm(), b=gru(16), head=linear()),
    "gru, then lstm": lambda: Reader(lambda m, x: m.head(m.b(m.a(x)[0])[0][:, -1]), a=gru(), b=lstm(16), head=linear()),
    "bidirectional": lambda: Reader(last, a=lstm(num_layers=2, bidirectional=True), head=linear(32)),
    "bidirectional states": lambda: Reader(
        lambda m, x: m.head(torch.cat([*m.a(x)[1][-2:]], 1)), a=gru(bidirectional=True), head=linear(32)
    ),
    "added to its reader": lambda: Reader(
        lambda m, x: (lambda y: m.head((y + m.b(y)[0])[:, -1]))(m.a(x)[0]), a=lstm(), b=gru(16), head=linear()
    ),
    "convolution": lambda: Reader(
        lambda m, x: m.head(m.conv(m.a(x)[0].transpose(1, 2)).mean(2)),
        a=gru(), conv=nn.Conv1d(16, 12, 3), head=linear(12),
    ),
    "attention over steps": lambda: Reader(
        lambda m, x: (lambda y: m.head((y * m.score(y).softmax(1)).sum(1)))(m.a(x)[0]),
        a=gru(), score=nn.Linear(16, 1), head=linear(),
    ),
    "packed": lambda: Reader(packed, a=lstm(), b=gru(16), head=linear()),
    "by steps": lambda: Reader(by_steps, a=lstm(), head=linear()),
    "cells": lambda: Reader(in_cells, a=nn.LSTMCell(8, 16), b=nn.GRUCell(16, 16), head=linear()),
    "decoder": lambda: Reader(
        lambda m, x: m.head(m.b(x.flip(1), m.a(x)[1])[0]),
        a=lstm(num_layers=2), b=lstm(num_layers=2), head=linear(),
    ),
    "bidirectional decoder": lambda: Reader(
        lambda m, x: m.head(m.b(x.flip(1), m.a(x)[1])[0]),
        a=gru(bidirectional=True), b=gru(bidirectional=True), head=linear(32),
    ),
    "state from a layer": lambda: Reader(from_a_layer, start=nn.Linear(8, 16), a=gru(), head=linear()),
    "state from parameters": lambda: Reader(
        from_parameters, h=nn.Parameter(torch.randn(1, 1, 16)), c=nn.Parameter(torch.randn(1, 1, 16)),
        a=lstm(), head=linear(),
    ),
    "state by the layer's size": lambda: Reader(
        lambda m, x: m.head(m.a(x, x.new_zeros(1, x.shape[0], m.a.hidden_size))[0][:, -1]), a=gru(), head=linear()
    ),
}  # fmt: skip
"""Models in which all recurrent layers lose the same units, each as a function that makes it."""


def buffered():
    model = Reader(lambda m, x: m.head(m.a(m.inputs(x), m.start.expand(1, 3, 16))[0][:, -1]), a=gru(), head=linear())
    model.inputs = nn.Linear(8, 8)
    model.register_buffer("start", torch.randn(1, 1, 16))
    return model


REFUSED = {
    "an initial state that is a buffer": (buffered, r"Expected hidden size \(1, 3, 8\), got \[1, 3, 16\]"),
    "one layer for the states of two directions": (
        lambda: Reader(
            lambda m, x: m.head(m.a(m.inputs(x), m.start(x[:, :2]).transpose(0, 1).contiguous())[0][:, -1]),
            inputs=nn.Linear(8, 8), a=gru(bidirectional=True), start=nn.Linear(8, 16), head=linear(32),
        ),
        "Expected hidden size",
    ),
    "the states of all layers in one row": (
        lambda: Reader(
            lambda m, x: m.head(m.a(m.inputs(x))[1].transpose(0, 1).flatten(1)),
            inputs=nn.Linear(8, 8), a=gru(num_layers=3), head=linear(48),
        ),
        "keeps its channels: cut, the model",
    ),
    "all steps in one row": (
        lambda: Reader(
            lambda m, x: m.head(m.a(m.inputs(x))[0].flatten(1)), inputs=nn.Linear(8, 8), a=gru(), head=linear(80)
        ),
        "keeps its channels: cut, the model",
    ),
    "states among the outputs": (
        lambda: Reader(lambda m, x: m.a(m.inputs(x)), inputs=nn.Linear(8, 8), a=gru()),
        "makes the model's outputs",
    ),
}  # fmt: skip
"""Models whose layer `a` cannot shrink, though `inputs` before it can, each with the reason that is given."""
