from collections import namedtuple

import torch

from shrinkkit.tasks import outputs

Pair = namedtuple("Pair", "a b")


def test_tensors_are_found_in_nested_structures_in_order():
    a, b, c = torch.zeros(1), torch.ones(2), torch.ones(3)
    assert [t.numel() for t in outputs.tensors({"x": (a, [b]), "y": c, "z": None})] == [1, 2, 3]


def test_convert_keeps_the_structure():
    converted = outputs.convert({"x": (torch.zeros(1),), "n": 3, "p": Pair(torch.ones(1), [])}, lambda t: t + 1)
    assert converted["x"][0].item() == 1
    assert converted["n"] == 3
    assert isinstance(converted["p"], Pair)
    assert converted["p"].a.item() == 2


def test_restore_puts_a_flat_list_into_a_structure():
    like = {"logits": torch.zeros(2), "hidden": (torch.zeros(1), torch.zeros(1))}
    found = outputs.restore([torch.full((2,), 5.0), torch.tensor([6.0]), torch.tensor([7.0])], like)
    assert found["logits"].tolist() == [5.0, 5.0]
    assert [t.item() for t in found["hidden"]] == [6.0, 7.0]
