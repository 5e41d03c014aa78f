"""Tasks of Hugging Face models, timm models and DataLoaders, with models and tokenizers that are made here."""

import functools
import importlib.util
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from small import classifier
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from shrinkkit import cli
from shrinkkit.core import recipe, studies
from shrinkkit.core.run_folder import read_sums
from shrinkkit.errors import InvalidInput, InvalidTask, Unsupported
from shrinkkit.measure import scoring
from shrinkkit.tasks import adapters, checks, hub, loader
from shrinkkit.tasks.task import batches as batches_of
from shrinkkit.transforms import variants

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa".split()
TEXTS = [" ".join(np.random.default_rng(i).choice(WORDS, 2 + i % 5)) for i in range(90)]
TEXTS = list(dict.fromkeys(TEXTS))
SIZES = {"vocab_size": 12, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 16, "max_position_embeddings": 16}
LABELS = {"id2label": {0: "no", 1: "yes", 2: "maybe"}, "label2id": {"no": 0, "yes": 1, "maybe": 2}}
IMAGES = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (20, 24, 3), np.uint8)) for i in range(24)]


def tokenizer(words=WORDS, **options):
    of_words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["[PAD]", "[UNK]", *words])}, unk_token="[UNK]"))
    of_words.pre_tokenizer = pre_tokenizers.Whitespace()
    options = {"unk_token": "[UNK]", "pad_token": "[PAD]"} | options
    return transformers.PreTrainedTokenizerFast(tokenizer_object=of_words, **options)


def bert(kind="BertForSequenceClassification", **options):
    torch.manual_seed(0)
    return varied(getattr(transformers, kind)(transformers.BertConfig(**SIZES, **options)))


def varied(model):
    """Draw weights so large that not all inputs get one class."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.7)
    return model.eval()


def vit():
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 4, "num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2}
    return varied(
        transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, intermediate_size=16, **LABELS))
    )


def processor():
    return transformers.ViTImageProcessorPil(size={"height": 16, "width": 16})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved classifier of three classes with its tokenizer, and texts in a file."""
    place = tmp_path_factory.mktemp("hub") / "small-bert"
    bert(**LABELS).save_pretrained(place)
    tokenizer().save_pretrained(place)
    (place.parent / "texts.txt").write_text("\n".join([*TEXTS, "", TEXTS[0]]))
    return place


def predicted(model, texts):
    with torch.no_grad():
        return [model(**tokenizer()(text, return_tensors="pt")).logits.argmax(-1)[0] for text in texts]


def test_a_folder_and_texts_give_a_task_whose_score_is_fidelity(folder):
    task = adapters.from_transformers(folder, [*TEXTS, TEXTS[0]])
    checks.check(task)
    assert task.name == "small-bert"
    assert task.metric == "top-1 agreement with the original"
    assert task.class_names == ("no", "yes", "maybe")
    assert "1 repeated texts were left out." in task.notes
    assert task.example[0].shape == (8, 6)


def test_labelled_texts_are_scored_by_accuracy_with_labels_as_names_or_numbers(folder):
    labels = [int(label) for label in predicted(bert(**LABELS), TEXTS)]
    assert len(set(labels)) > 1
    names = ["no", "yes", "maybe"]
    for given in (labels, [names[label] for label in labels], list(map(str, labels))):
        rows = [{"stars": label, "sentence": text} for text, label in zip(TEXTS, given, strict=True)]
        task = adapters.from_transformers(folder, rows, columns={"label": "stars"})
        assert task.metric == "accuracy"
        assert all(task.score(task.model(*(x[None] for x in inputs)), target) == 1 for inputs, target in task.test)
    checks.check(task)


def test_inputs_are_what_the_tokenizer_gives_when_it_pads(folder):
    task = adapters.from_transformers(folder, TEXTS, max_length=4)
    expected = tokenizer()(TEXTS[:8], padding="max_length", truncation=True, max_length=4, return_tensors="pt")
    by_name = dict(zip(("input_ids", "attention_mask"), task.example, strict=True))
    assert all(torch.equal(by_name[name], expected[name]) for name in by_name)
    assert any("texts were cut to 4 tokens" in note for note in task.notes)


def test_texts_may_be_padded_by_batch_and_give_the_outputs_of_the_longest_of_all(folder):
    for kind in ("text-classification", "feature-extraction"):
        both = [adapters.from_transformers(folder, TEXTS, task=kind, padding=p) for p in ("max_length", "longest")]
        checks.check(both[1])
        assert both[1].varying == (frozenset({1}),) * len(both[1].example)
        assert [name.split()[0] for name in both[1].workloads] == ["length"] * len(both[1].workloads)
        assert len(both[1].workloads) > 1
        scored = [scoring.scores(one.model, one, one.test) for one in both]
        assert min(scored[1].scores) > 0.999
        if kind == "text-classification":
            assert torch.allclose(*(one.outputs for one in scored), atol=1e-5)
    assert 'padding="longest"' in next(iter(both[1].companions))
    with pytest.raises(InvalidInput, match="`padding` must be 'max_length' or 'longest', got 'batch'"):
        adapters.from_transformers(folder, TEXTS, padding="batch")


def test_token_classification_scores_first_tokens_of_words():
    model = bert("BertForTokenClassification", **LABELS)
    rows = []
    for text in TEXTS:
        labels = model(**tokenizer()(text, return_tensors="pt")).logits.argmax(-1)[0].tolist()
        rows.append({"tokens": text.split(), "ner_tags": [-100, *labels[1:]]})
    task = adapters.from_transformers(model, rows, tokenizer=tokenizer())
    checks.check(task)
    assert task.metric == "accuracy per token"
    for (ids, mask), target in (task.test[i] for i in range(len(task.test))):
        assert target.shape == ids.shape
        assert torch.equal(target != -100, (mask > 0) & (torch.arange(len(ids)) > 0))
    shorter = adapters.from_transformers(model, rows, tokenizer=tokenizer(), padding="longest")
    checks.check(shorter)
    assert sorted(map(len, (shorter.test[i][1] for i in range(9)))) == sorted(
        int((task.test[i][0][1] > 0).sum()) for i in range(9)
    )


def test_a_language_model_is_scored_by_the_log_likelihood_of_its_tokens():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=12, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)
    texts = [" ".join(WORDS[(i + j * (1 + i // 10)) % 10] for j in range(3 + i % 4)) for i in range(60)]
    ids = tokenizer()(texts, padding=True, return_tensors="pt")
    labels = torch.where(ids["attention_mask"] > 0, ids["input_ids"], -100)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        model(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"], labels=labels).loss.backward()
        optimizer.step()
    no_pad = tokenizer(pad_token=None, eos_token="[UNK]")
    task = adapters.from_transformers(model.eval(), texts, tokenizer=no_pad)
    checks.check(task)
    assert no_pad.pad_token is None
    assert task.metric == "log-likelihood per token"
    (inputs, target) = task.test[3]
    one = {"input_ids": inputs[0][None], "attention_mask": inputs[1][None]}
    with torch.no_grad():
        expected = -model(**one, labels=target[None]).loss
        assert torch.allclose(task.score(task.model(*(x[None] for x in inputs)), target[None])[0], expected, atol=1e-5)


def test_features_and_detections_are_compared_by_fidelity():
    task = adapters.from_transformers(bert("BertModel"), TEXTS, tokenizer=tokenizer())
    checks.check(task)
    assert task.metric == "cosine similarity with the original"
    torch.manual_seed(0)
    sizes = {"image_size": [16, 16], "patch_size": 4, "num_hidden_layers": 1, "hidden_size": 16, "num_labels": 2}
    config = transformers.YolosConfig(**sizes, num_attention_heads=2, intermediate_size=16, num_detection_tokens=3)
    model = transformers.YolosForObjectDetection(config).eval()
    task = adapters.from_transformers(model, IMAGES, processor=processor())
    assert task.metric == "top-1 agreement and cosine similarity with the original"


@pytest.mark.parametrize("given", ["images", "arrays", "rows", "pixels"])
def test_images_of_any_kind_go_through_the_processor(given):
    arrays = [np.asarray(image) for image in IMAGES]
    pixels = [processor()(image, return_tensors="pt")["pixel_values"][0] for image in IMAGES]
    model = vit()
    labels = [model(pixels[i][None]).logits.argmax().item() for i in range(len(IMAGES))]
    data = {
        "images": IMAGES,
        "arrays": arrays,
        "rows": [{"img": image, "label": label} for image, label in zip(IMAGES, labels, strict=True)],
        "pixels": [{"pixel_values": x, "label": label} for x, label in zip(pixels, labels, strict=True)],
    }[given]
    task = adapters.from_transformers(model, data, processor=processor())
    assert torch.allclose(task.example[0], torch.stack(pixels[:8]), atol=1e-6)
    assert task.metric == ("accuracy" if given in ("rows", "pixels") else "top-1 agreement with the original")
    if task.metric == "accuracy":
        assert all(task.score(task.model(x[None]), torch.tensor([y])) == 1 for (x,), y in task.test)


def test_the_tokenizer_is_saved_with_the_variant_and_makes_its_inputs(folder, tmp_path):
    task = adapters.from_transformers(folder, TEXTS)
    variants.write(tmp_path / "baseline", task, task.model, runtimes=["torch"])
    (usage, files), *_ = variants.read(tmp_path / "baseline").companions.items()
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(files)
    assert set(files) <= set(read_sums(tmp_path / "baseline"))
    text = (tmp_path / "baseline/README.md").read_text()
    assert usage in text
    code = usage.replace('"."', "folder")
    inputs = eval(code, {"transformers": transformers, "folder": tmp_path / "baseline", "text": TEXTS[:8]})
    assert any((inputs["input_ids"] == x.numpy()).all() for x in task.example)
    assert str(folder) not in "".join((tmp_path / "baseline" / name).read_text() for name in files)


# --- tasks by their text


def test_a_model_and_a_file_are_a_task_in_text_with_their_files_in_the_fingerprint(folder):
    text = f"hf:{folder}?data={folder.parent / 'texts.txt'}"
    task = loader.load(text)
    assert len(task.test) + len(task.train) + len(task.validation) + len(task.calibration) == len(TEXTS)
    before = loader.inspect(text)
    names = {path.rpartition("/")[2] for path in before.files}
    assert {"config.json", "model.safetensors", "tokenizer.json", "texts.txt"} <= names
    with (folder.parent / "texts.txt").open("a") as file:
        file.write("\nkappa kappa kappa kappa kappa kappa")
    assert loader.inspect(text).fingerprint != before.fingerprint


def test_a_model_and_a_folder_of_images_are_a_task_in_text(tmp_path):
    model = vit()
    model.save_pretrained(tmp_path / "vit")
    processor().save_pretrained(tmp_path / "vit")
    for i, image in enumerate(IMAGES):
        label = LABELS["id2label"][model(**processor()(image, return_tensors="pt")).logits.argmax().item()]
        (tmp_path / "images" / label).mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "images" / label / f"{i}.png")
    text = f"hf:{tmp_path / 'vit'}?data={tmp_path / 'images'}"
    task = loader.load(text)
    assert task.metric == "accuracy"
    assert all(task.score(task.model(x[None]), torch.tensor([y])) == 1 for (x,), y in task.test)
    assert len(hub.files(text)) == len(IMAGES) + 3


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("hf:m?data=t.txt", "hf:{0}/m?data={0}/t.txt"),
        ("hf:./m?data=t.txt", "hf:{0}/m?data={0}/t.txt"),
        ("hf:someone/model?data=t.txt", "hf:someone/model?data={0}/t.txt"),
    ],
)
def test_paths_in_a_text_are_those_of_the_study(tmp_path, task, expected):
    (tmp_path / "m").mkdir()
    (tmp_path / "t.txt").write_text("a")
    (tmp_path / "s.yaml").write_text(f"task: {task}\nrecipes: [dynamic-int8]\ntargets: [cpu/torch]")
    assert studies.read_study(tmp_path / "s.yaml").task == expected.format(tmp_path)


def test_paths_in_a_text_move_and_names_on_the_hub_stay():
    up = functools.partial(os.path.join, "..")
    assert recipe.relocated("hf:./m?data=./t.txt", up) == "hf:.././m?data=.././t.txt"
    assert recipe.relocated("hf:someone/model?data=./t.txt", up) == "hf:someone/model?data=.././t.txt"
    assert recipe.relocated("digits-cnn", up) == "digits-cnn"
    assert recipe.title("hf:someone/model-0.5b?data=t.txt") == "model-0.5b"


def test_the_command_line_runs_a_model_with_data_by_paths_relative_to_its_steps(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder.parent)
    options = ["--recipe", "dynamic-int8", "--target", "cpu/torch", "--threads", "1", "--dry-run", "--json"]
    assert cli.main(["run", "hf:small-bert", "--data", "texts.txt", *options]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["run"] == "reports/small-bert"
    made = {step["parameters"]["task"] for step in plan["steps"] if "task" in step["parameters"]}
    assert made == {"hf:../../../small-bert?data=../../../texts.txt"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hf:small-bert"], "names no data"),
        (["hf:small-bert", "--data", "none.txt"], "no none.txt"),
        (["hf:./none", "--data", "texts.txt"], "no ./none"),
        (["digits-cnn", "--data", "texts.txt"], "`--data` goes with a model"),
    ],
)
def test_the_command_line_refuses_incomplete_tasks(folder, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(folder.parent)
    assert cli.main(["run", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_rows_are_read_from_tables_and_folders(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\nalpha beta,yes\n")
    (tmp_path / "a.jsonl").write_text(json.dumps({"tokens": ["alpha"], "tags": [1]}) + "\n")
    np.savez(tmp_path / "a.npz", image=np.zeros((2, 4, 4, 3), np.uint8), label=np.array([0, 2]))
    for name in ("yes", "no"):
        (tmp_path / "images" / name).mkdir(parents=True)
        IMAGES[0].save(tmp_path / "images" / name / "1.png")
    assert hub.read(tmp_path / "a.csv") == [{"text": "alpha beta", "label": "yes"}]
    assert hub.read(tmp_path / "a.jsonl") == [{"tokens": ["alpha"], "tags": [1]}]
    assert [row["label"] for row in hub.read(tmp_path / "a.npz")] == [0, 2]
    assert [row["label"] for row in hub.read(tmp_path / "images")] == ["no", "yes"]
    (tmp_path / "images/metadata.csv").write_text("file_name,label\nyes/1.png,maybe\n")
    (row,) = hub.read(tmp_path / "images")
    assert (row["label"], row["image"].is_file()) == ("maybe", True)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [("a.json", "", r"\.txt, \.csv, \.jsonl or \.npz"), ("a.jsonl", "{", "a.jsonl"), ("a.npz", "no", "a.npz")],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InvalidInput, match=message):
        hub.read(tmp_path / name)


# --- bad input


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "empty"),
        (iter([]), "only once"),
        ({"train": TEXTS, "test": TEXTS}, "one split, got train or test"),
        ([{"title": "alpha", "id": 1}], "columns are title, id"),
        ([{"text": text, "label": 3} for text in TEXTS], "0 to 2, or one of no, yes, maybe, but that of row 0 is 3"),
        ([{"text": text, "label": -1} for text in TEXTS], "is -1"),
        ([{"text": text, "label": "perhaps"} for text in TEXTS], "'perhaps'"),
        ([{"text": text, "label": 0.5} for text in TEXTS], "pass `score`"),
        ([{"text": TEXTS[0], "label": 0}, {"text": TEXTS[1]}], "row 1"),
        (["alpha", ""], "row 1 has none"),
        ([{"text": "alpha"}, {"text": None}], "row 1"),
    ],
)
def test_data_that_do_not_fit_are_named(folder, rows, message):
    with pytest.raises(InvalidTask, match=message):
        adapters.from_transformers(folder, rows)


def test_another_models_tokenizer_is_refused(folder):
    other = tokenizer([f"word{i}" for i in range(20)])
    with pytest.raises(InvalidTask, match="ids from 0 to 11, but row 0 has the id 20"):
        adapters.from_transformers(folder, ["word18 word1"] * 10, tokenizer=other)


def test_a_head_without_weights_is_refused(tmp_path):
    bert("BertModel").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InvalidInput, match="has none for classifier"):
        adapters.from_transformers(tmp_path, TEXTS, task="text-classification")


def test_weights_stored_in_16_bits_are_computed_in_float32_and_a_note_says_so(tmp_path):
    bert(**LABELS).bfloat16().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    task = adapters.from_transformers(tmp_path, TEXTS)
    assert {p.dtype for p in task.model.parameters()} == {torch.float32}
    assert any("stored in bfloat16" in note for note in task.notes)


def test_an_architecture_without_a_task_and_an_unknown_task_are_refused(folder):
    with pytest.raises(Unsupported, match="BertForMaskedLM"):
        adapters.from_transformers(bert("BertForMaskedLM"), TEXTS, tokenizer=tokenizer())
    with pytest.raises(InvalidInput, match="`task`"):
        adapters.from_transformers(folder, TEXTS, task="summarization")
    with pytest.raises(InvalidInput, match="`tokenizer`"):
        adapters.from_transformers(bert(), TEXTS)


def test_a_name_on_the_hub_without_a_network_says_that_a_folder_works(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InvalidInput, match=r"without a network.*local folder"):
        adapters.from_transformers("nobody/no-such-model", TEXTS)


@pytest.mark.parametrize("text", ["hf:model", "hf:./none?data=x.txt"])
def test_an_incomplete_text_is_refused(text):
    with pytest.raises(InvalidInput, match="`task`"):
        loader.load(text)


# --- loaders

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
Y = X[:, :3].argmax(1)


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(X, Y, strict=True)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = classifier()

    def forward(self, left, right):
        return self.layer(left + right)


def batches():
    yield from DataLoader(TensorDataset(X, Y), batch_size=8)


def padded(items):
    x, y = zip(*items, strict=True)
    return torch.stack(x), torch.stack(y)


@pytest.mark.parametrize(
    "given",
    [
        DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True),
        DataLoader(TensorDataset(X, Y), batch_size=8, collate_fn=padded),
        DataLoader(Stream(), batch_size=8),
        DataLoader(TensorDataset(X, Y), batch_size=None),
        batches(),
        [*batches()],
    ],
    ids=["shuffled", "collated", "stream", "single", "generator", "list"],
)
def test_a_loader_of_classes_is_scored_by_accuracy_in_the_datasets_order(given):
    task = adapters.from_loader(classifier(), given)
    checks.check(task)
    assert task.metric == "accuracy"
    assert torch.equal(task.example[0], X[:8])
    assert len(task.test) > 20
    assert all(int(y) == int(x.reshape(-1)[:3].argmax()) for (x,), y in DataLoader(task.test))


def test_a_training_loader_is_minimised_with_cross_entropy():
    train = DataLoader(TensorDataset(X + 7, Y), batch_size=8)
    task = adapters.from_loader(classifier(), DataLoader(TensorDataset(X, Y), batch_size=8), train_loader=train)
    ((x,), y), *_ = batches_of(task.train, 8)
    assert len(task.train) == 64
    assert torch.allclose(task.loss(task.model(x), y), nn.functional.cross_entropy(classifier()(x), y))


@pytest.mark.parametrize("target", [X[:, :3], Y + 1, Y.float(), Y[:, None].expand(-1, 2)])
def test_targets_that_are_no_classes_are_said_to_be_unused(target):
    task = adapters.from_loader(classifier(), DataLoader(TensorDataset(X, target.contiguous()), batch_size=8))
    assert "with the original" in task.metric
    assert any("Targets are not used" in note for note in task.notes)


def test_loaders_of_several_inputs_of_mappings_and_of_inputs_alone():
    checks.check(three := adapters.from_loader(Two().eval(), DataLoader(TensorDataset(X, 0 * X, Y), batch_size=8)))
    assert (three.metric, len(three.example)) == ("accuracy", 2)
    two = adapters.from_loader(Two().eval(), DataLoader(TensorDataset(X, 0 * X), batch_size=8))
    assert ("with the original" in two.metric, len(two.example)) == (True, 2)
    rows = [{"left": x, "right": 0 * x, "labels": y} for x, y in zip(X, Y, strict=True)]
    assert adapters.from_loader(Two().eval(), DataLoader(rows, batch_size=8)).metric == "accuracy"
    alone = adapters.from_loader(classifier(), DataLoader(X, batch_size=8))
    assert "with the original" in alone.metric


def failing(output, target):
    raise RuntimeError("no metric today")


class Random(nn.Module):
    def forward(self, x):
        return x[:, :3] + torch.rand(len(x), 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: adapters.from_loader(classifier(), DataLoader(TensorDataset(X[:0], Y[:0]))), "empty"),
        (lambda: adapters.from_loader(classifier(), iter([])), "only once"),
        (lambda: adapters.from_loader(nn.Linear(7, 3).eval(), DataLoader(TensorDataset(X, Y))), "first batch"),
        (lambda: adapters.from_loader(classifier(), DataLoader(TensorDataset(X, X, X, Y))), "4 parts"),
        (lambda: adapters.from_loader(classifier(), DataLoader(TensorDataset(X, Y)), score=failing), "no metric today"),
        (lambda: adapters.from_loader(Random().eval(), DataLoader(TensorDataset(X, Y))), "same outputs"),
    ],
)
def test_loaders_that_do_not_fit_are_named(make, message):
    with pytest.raises(InvalidTask, match=message):
        checks.check(make())


# --- the snippets of the README


def test_the_short_tasks_of_the_readme_are_tasks(folder, monkeypatch):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    snippets = re.findall(r"```python\n(from shrinkkit import .*?)```", readme, re.DOTALL)
    monkeypatch.chdir(folder.parent)
    names = {"model": classifier(), "example": X[:4], "test_loader": DataLoader(TensorDataset(X, Y), batch_size=8)}
    metrics = []
    for snippet in snippets:
        code = snippet.replace('"my-bert"', '"small-bert"').replace('["A text.", ...]', str(TEXTS))
        exec(code, names)
        checks.check(names["task"])
        metrics.append(names["task"].metric)
    fidelity = "top-1 agreement with the original"
    assert metrics == [fidelity, "accuracy", fidelity]


# --- timm


@pytest.fixture(scope="module")
def timm():
    """timm, with a torchvision that was built for another torch: its operators are declared, and never called."""
    if None in map(importlib.util.find_spec, ("timm", "torchvision")):
        pytest.skip("timm or torchvision is not installed")
    source = Path(importlib.util.find_spec("torchvision").origin).with_name("_meta_registrations.py").read_text()
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in set(re.findall(r'@(?:register_meta|torch.library.register_fake)\("(?:torchvision::)?(\w+)"', source)):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor x) -> Tensor")
    yield pytest.importorskip("timm")
    del library


def test_a_timm_model_reads_images_by_its_own_configuration(timm, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=3).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    task = adapters.from_timm("resnet10t", IMAGES, checkpoint=tmp_path / "weights.pt", num_classes=3)
    config = timm.data.resolve_model_data_config(model)
    assert task.example[0].shape == (8, *config["input_size"])
    assert task.is_fidelity
    assert torch.equal(task.model(task.example[0]), model(task.example[0]))


def test_a_timm_model_with_labelled_tensors_is_scored_by_accuracy(timm):
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=3).eval()
    pixels = torch.randn(24, 3, 32, 32)
    labels = model(pixels).argmax(1).tolist()
    task = adapters.from_timm(model, [*zip(pixels, labels, strict=True)])
    assert task.metric == "accuracy"
    assert all(task.score(task.model(x[None]), torch.tensor([y])) == 1 for (x,), y in task.test)
    with pytest.raises(InvalidTask, match="0 to 2, but that of row 1 is 3"):
        adapters.from_timm(model, [(pixels[0], 0), (pixels[1], 3)])
    with pytest.raises(InvalidInput, match="checkpoint"):
        adapters.from_timm("no-such-model", IMAGES)
