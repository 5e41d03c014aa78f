"""A planted weakness is found, an identical copy is not called different, and what cannot be tried is said."""

from dataclasses import replace

import pytest
import tiny
import torch
from torch import nn
from torch.utils.data import TensorDataset

from shrinkkit import Task
from shrinkkit.core import robustness as core
from shrinkkit.core import store
from shrinkkit.core.robustness import CLEAN, RobustnessRecord
from shrinkkit.core.target import Target
from shrinkkit.measure import calibration, robustness, session
from shrinkkit.measure.scoring import Scored
from shrinkkit.transforms import variants

NAMES = ("baseline", "copy", "fragile")


class Fragile(nn.Module):
    """Answers as the model does, unless an image is brighter than images are."""

    def __init__(self, model, limit):
        super().__init__()
        self.model, self.limit = model, limit

    def forward(self, x):
        bright = (x.mean((1, 2, 3), keepdim=True) > self.limit).flatten(1).float()
        return self.model(x) * (1 - 2 * bright)


class Placed(nn.Module):
    """Its answer depends on the place in the batch."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x) + torch.arange(len(x)).unsqueeze(1) * torch.tensor([3.0, -3.0, 0.0, 0.0])


@pytest.fixture(scope="module")
def task():
    made, noise = tiny.task(), torch.Generator().manual_seed(6)
    x, y = tiny.corners(160, 5).tensors
    # Harder than what it was trained on, so that it errs now and then.
    return replace(made, test=TensorDataset(x + 0.9 * torch.randn(x.shape, generator=noise), y))


@pytest.fixture(scope="module")
def record(task, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    settings = session.Settings(Target("cpu", "torch"), task, 1, effort="quick")
    session.write_missing_baseline(run, settings)
    means = task.test.tensors[0].mean((1, 2, 3))
    for name, model in {"copy": task.model, "fragile": Fragile(task.model, float(means.max()) + 0.01)}.items():
        variants.write(run / "variants" / name, task, model.eval(), runtimes=["torch"])
    loaded = session.load(run, NAMES, settings)
    measured = robustness.measure(run, loaded, settings)
    path = robustness.write(run, measured)
    assert core.derive(store.read(path, RobustnessRecord)) == measured
    return measured


def test_a_planted_weakness_is_found_and_nothing_else(record):
    assert core.damaged(record)["fragile"].get("brightness") == -1
    assert "blur" not in core.damaged(record)["fragile"]
    assert set(record.classes) == set(tiny.task().class_names)
    fragile, baseline = (record.by_name()[name] for name in ("fragile", "baseline"))
    assert fragile.scores(CLEAN, baseline=baseline).difference.value == 0


def test_an_identical_copy_is_called_the_same_everywhere(record):
    assert core.damaged(record)["copy"] == {}
    own, baseline = (record.by_name()[name] for name in ("copy", "baseline"))
    for one, other in zip(own.conditions, baseline.conditions, strict=True):
        if not one.is_attack:
            assert one.scores.scores == other.scores.scores


def test_the_budget_for_robustness_is_kept_by_the_copy_alone(record):
    assert core.verdicts(record, 0.05) == {"copy": "within budget", "fragile": "over budget"}


def test_scores_fall_with_noise_and_attacks(record):
    baseline = record.by_name()["baseline"]
    clean = baseline.scores(CLEAN).mean.value
    for name in ("Gaussian noise", "PGD"):
        assert baseline.scores(name).mean.value < clean
    assert baseline.attacks() == ("FGSM", "PGD")


def test_arithmetic_that_depends_on_the_place_in_the_batch_is_seen(task, tmp_path, record):
    assert {check.name: check.changed for check in record.by_name()["copy"].checks}["other places in the batch"] == 0
    settings = session.Settings(Target("cpu", "torch"), task, 1, effort="quick")
    session.write_missing_baseline(tmp_path, settings)
    variants.write(tmp_path / "variants" / "placed", task, Placed(task.model).eval(), runtimes=["torch"])
    loaded = session.load(tmp_path, ["placed"], settings)["placed"].loaded
    here = robustness._Session(tmp_path, settings, task.test, [])
    checks = {check.name: check for check in robustness._checks(here, loaded, None)}
    assert checks["other places in the batch"].error > 0.01
    assert checks["a NaN"].finite is False
    assert checks["zeros"].finite is True


def test_an_attack_stays_within_its_radius_and_raises_the_loss(task):
    x, y = task.test.tensors
    radius = torch.full((1, 1, 1, 1), 0.1)
    before, slopes = task.loss(task.model(x), y), [p.grad.clone() for p in task.model.parameters()]
    for steps in (1, 7):
        (changed,) = robustness.attacked(task.model, task.loss, (x,), y, 0, radius, steps=steps)
        assert (changed - x).abs().max() <= 0.1 + 1e-6
        assert task.loss(task.model(changed), y) > before
    for slope, parameter in zip(slopes, task.model.parameters(), strict=True):
        assert parameter.requires_grad
        assert torch.equal(slope, parameter.grad)


def test_overconfidence_is_measured_and_mended_by_a_temperature():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (4000,), generator=generator)
    logits = 2.0 * nn.functional.one_hot(labels, 4) + torch.randn(4000, 4, generator=generator)
    scored = Scored((), {}, logits, (0,), tuple(labels.tolist()), None, None)
    log, best = calibration.log_probabilities(scored), calibration.temperature(scored)

    def error(temperature):
        scaled = calibration.scaled(log, temperature)
        return calibration.error(*calibration.confidence(scaled, labels.numpy()))

    assert error(best) < 0.03
    assert error(best / 4) > error(best) + 0.05
    sharper = replace(scored, outputs=torch.from_numpy(calibration.scaled(log, best / 4)))
    assert calibration.temperature(sharper) == pytest.approx(4, rel=0.01)


def test_probabilities_count_as_they_are():
    p = torch.tensor([[0.7, 0.2, 0.1]])
    scored = Scored((), {}, p, (0,), (0,), None, None)
    assert calibration.log_probabilities(scored)[0].tolist() == pytest.approx(p.log()[0].tolist(), abs=1e-5)


def test_tokens_without_labels_are_compared_with_the_original_and_not_attacked(tmp_path):
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(0, 50, (60, 12), generator=generator)
    model = nn.Sequential(nn.Embedding(50, 8), nn.Flatten(), nn.Linear(96, 3)).eval()
    task = Task(model, texts[:4], "words", inputs=list(texts))
    settings = session.Settings(Target("cpu", "torch"), task, 1, effort="quick")
    session.write_missing_baseline(tmp_path, settings)
    measured = robustness.measure(tmp_path, session.load(tmp_path, ["baseline"], settings), settings)
    (baseline,) = measured.variants
    assert (baseline.attacks(), baseline.calibration) == ((), None)
    assert baseline.scores(CLEAN).mean.value == pytest.approx(1)
    assert baseline.scores("dropped tokens").mean.value < 1
    assert any("nothing has a gradient" in note for note in measured.notes)
    assert any("agreement with the original model on the clean input" in note for note in measured.notes)
