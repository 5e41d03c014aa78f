"""Train a bundled model from scratch: `python tests/benchmarks/train_digits.py digits-cnn` writes its weights.

The seed, the split and the number of threads are fixed, so the same machine and torch give the same weights.
"""

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from shrinkkit.tasks.bundled import digits
from shrinkkit.tasks.bundled.digits import MODELS, WEIGHTS
from shrinkkit.tasks.task import batches

SEED = 0
BATCH_SIZE = 64
EPOCHS = {"digits-cnn": 30, "digits-lstm": 120, "digits-transformer": 100}
LEARNING_RATE = {"digits-cnn": 3e-3, "digits-lstm": 3e-3, "digits-transformer": 1e-3}


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return `images`, (n, 1, H, W) on a background of 0, each shifted, rotated and scaled slightly at random."""

    def uniform(most: float) -> Tensor:
        return (torch.rand(len(images), generator=generator) * 2 - 1) * most

    angle, scale, across, down = uniform(math.radians(12)), 1 + uniform(0.12), uniform(0.14), uniform(0.14)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    matrix = torch.stack([torch.stack([cos, -sin, across], 1), torch.stack([sin, cos, down], 1)], 1)
    grid = functional.affine_grid(matrix, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


def fit(name: str, *, epochs: int) -> nn.Module:
    """Return a model of a bundled task trained from scratch, in eval mode: the moving average of its weights."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    model_type, prepare = MODELS[name]
    model = model_type()
    moving = get_ema_multi_avg_fn(0.98)  # type: ignore[no-untyped-call]
    average = AveragedModel(model, multi_avg_fn=moving, use_buffers=True)
    images, labels = digits.splits()["train"]
    images = digits.enlarge(images)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE[name], weight_decay=0.05)
    steps = math.ceil(len(images) / BATCH_SIZE) * epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.05 * steps), (1 + math.cos(math.pi * step / steps)) / 2)
    )
    started = time.perf_counter()
    for epoch in range(epochs):
        model.train()
        for chosen in torch.randperm(len(images), generator=generator).split(BATCH_SIZE):  # type: ignore[no-untyped-call]
            output = model(prepare(augment(images[chosen], generator)))
            loss = functional.cross_entropy(output, labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            average.update_parameters(model)
        print(f"epoch {epoch + 1}/{epochs}  loss {loss.item():.3f}  {time.perf_counter() - started:.0f} s", flush=True)
    trained: nn.Module = average.module
    return trained.eval()


def accuracy(name: str, model: nn.Module, split: str) -> float:
    """Return the accuracy of `model` on `split`, in [0, 1]."""
    task = digits.untrained(name, model, MODELS[name][1])
    with torch.inference_mode():
        scores = [task.score(model(*inputs), target) for inputs, target in batches(getattr(task, split), 50)]
    return torch.cat(scores).mean().item()


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the task named on the command line and write its weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=MODELS)
    parser.add_argument("--epochs", type=int, help="passes over the training split (default: the task's own)")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder of the weights (default: the package's)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(2)
    epochs = options.epochs or EPOCHS[options.task]
    model = fit(options.task, epochs=epochs)
    metadata = {
        "task": options.task,
        "seed": str(SEED),
        "epochs": str(epochs),
        "validation_accuracy": f"{accuracy(options.task, model, 'validation'):.4f}",
        "test_accuracy": f"{accuracy(options.task, model, 'test'):.4f}",
        "torch": torch.__version__,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    path = options.out / f"{options.task}.safetensors"
    save_file(weights, path, metadata)
    path.chmod(0o644)  # safetensors makes it readable by its owner only, and a wheel would keep that
    print(metadata)


if __name__ == "__main__":
    main()
