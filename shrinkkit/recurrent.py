"""How an LSTM, GRU or RNN loses channels: what goes of its matrices, and which weights a channel is made of.

A channel is a hidden unit, or an output of the projection where `proj_size` gives one. It has the same number
in every layer of a stack and in both directions, since one `hidden_size` holds for all of them, and goes from
all of them at once: from each gate's rows, and from the columns that read it.
"""

from collections.abc import Callable, Sequence

import torch
import torch_pruning as tp
from torch import Tensor, nn


def units(layer: nn.RNNBase) -> int:
    """Return the number of output channels of `layer` in one direction; also those of its first initial state."""
    return layer.proj_size or layer.hidden_size


def width(layer: nn.RNNBase) -> int:
    """Return the number of output channels of `layer`, both directions together."""
    return units(layer) * _directions(layer)


def rows(layer: nn.RNNBase, value: Callable[[Tensor], Tensor]) -> Tensor:
    """Return what makes each output channel of `layer`: its rows in all gates of all matrices.

    Args:
        layer: The layer; `width(layer)` is the number of its output channels.
        value: Applied to each matrix before its rows are taken.

    Returns:
        One row a channel, shape (channels, weights of one). Channels of both directions that go together
        have the same row.
    """
    kind = "weight_hr" if layer.proj_size else "weight"
    weights = [value(layer.get_parameter(name)) for name in layer._flat_weights_names if name.startswith(kind)]
    gates = [w.reshape(-1, units(layer), w.shape[1]).transpose(0, 1).flatten(1) for w in weights]
    return torch.cat(gates, dim=1).repeat(_directions(layer), 1)


def columns(layer: nn.RNNBase, value: Callable[[Tensor], Tensor]) -> Tensor:
    """Return what reads each input channel of `layer`, shape (channels, weights of one); `value` as for `rows`."""
    return torch.cat([value(layer.get_parameter(name)).T for name in _first(layer)], dim=1)


def sizes_kept(model: nn.Module) -> list[tuple[nn.Module, str, list[nn.RNNBase]]]:
    """Return where modules of `model` keep the hidden size of recurrent layers inside them, and of which layers.

    Such an attribute, `hidden_size` or `nhid` for example, is what a forward makes an initial state of zeros by.
    """
    found = []
    for module in model.modules():
        layers = [m for m in module.modules() if isinstance(m, nn.RNNBase) and m is not module]
        for attribute, value in vars(module).items():
            same = [layer for layer in layers if type(value) is int and layer.hidden_size == value]
            if same and "hid" in attribute:
                found.append((module, attribute, same))
    return found


class Pruner(tp.BasePruningFunc):  # type: ignore[misc]
    """Cuts channels out of all layers and directions of a recurrent layer alike, for torch-pruning."""

    def prune_out_channels(self, layer: nn.RNNBase, idxs: Sequence[int]) -> nn.RNNBase:
        """Cut the output channels `idxs` out of `layer` itself, and return it; each direction loses the same."""
        size = units(layer)
        keep = sorted(set(range(size)) - {i % size for i in idxs})
        both = [direction * size + i for direction in range(_directions(layer)) for i in keep]
        first = _first(layer)
        for name in layer._flat_weights_names:
            weight = layer.get_parameter(name)
            if name.startswith("weight_hr") or not layer.proj_size:
                made = [gate * size + i for gate in range(weight.shape[0] // size) for i in keep]
                weight = self._prune_parameter_and_grad(weight, made, 0)
            if name.startswith("weight_hh"):
                weight = self._prune_parameter_and_grad(weight, keep, 1)
            elif name.startswith("weight_ih") and name not in first:
                weight = self._prune_parameter_and_grad(weight, both, 1)
            setattr(layer, name, weight)
        setattr(layer, "proj_size" if layer.proj_size else "hidden_size", len(keep))
        return layer

    def prune_in_channels(self, layer: nn.RNNBase, idxs: Sequence[int]) -> nn.RNNBase:
        """Cut the input channels `idxs` out of `layer` itself, and return it."""
        keep = sorted(set(range(layer.input_size)) - set(idxs))
        for name in _first(layer):
            setattr(layer, name, self._prune_parameter_and_grad(layer.get_parameter(name), keep, 1))
        layer.input_size = len(keep)
        return layer

    def get_out_channels(self, layer: nn.RNNBase) -> int:
        """Return the number of output channels, both directions together."""
        return width(layer)

    def get_in_channels(self, layer: nn.RNNBase) -> int:
        """Return the number of input channels."""
        return layer.input_size

    def get_out_channel_groups(self, layer: nn.RNNBase) -> int:
        """Return how many equal parts of the output channels must lose the same ones."""
        return _directions(layer)


def _directions(layer: nn.RNNBase) -> int:
    return 2 if layer.bidirectional else 1


def _first(layer: nn.RNNBase) -> list[str]:
    """Return the matrices that read the input of `layer`, one a direction."""
    return ["weight_ih_l0", "weight_ih_l0_reverse"][: _directions(layer)]
