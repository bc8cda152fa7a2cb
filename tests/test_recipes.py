"""Recipes: what the paper says, in settings; each trains three steps; reproducing compares and skips what is done."""

import json
import os

import pytest
from test_cli import assert_one_line_error, run

from gunn_ext.commands.settings import parse_train_arguments
from gunn_ext.training import ConfigError, learning_rate, load_checkpoint, train, trainer
from gunn_ext.training.recipes import list_recipes, load_recipe

# Qiao et al. 2018, tables 3, 4 and 5: top-1 and, on ImageNet, top-5 test errors.
PUBLISHED = {
    "table3": {
        "gunn15-cifar10": (4.15, None),
        "gunn15-cifar100": (20.45, None),
        "gunn24-cifar10": (3.21, None),
        "gunn24-cifar100": (16.69, None),
        "gunn24-ensemble-cifar10": (3.02, None),
        "gunn24-ensemble-cifar100": (15.61, None),
    },
    "table4": {
        "sunn18-imagenet": (26.16, 8.48),
        "gunn18-imagenet": (21.65, 5.87),
        "wide-gunn18-imagenet": (20.59, 5.52),
    },
    "table5": {
        "gunn15-nores-cifar100": (21.15, None),
        "gunn15-cifar10": (4.15, None),
        "gunn15-cifar100": (20.45, None),
        "sunn15-cifar10": (5.64, None),
        "sunn15-cifar100": (23.75, None),
        "gunn24-cifar10": (3.21, None),
        "gunn24-cifar100": (16.69, None),
        "sunn24-cifar10": (3.88, None),
        "sunn24-cifar100": (19.60, None),
    },
    "figure3": {"gunn15-cifar10": (4.15, None), "sunn15-cifar10": (5.64, None)},
}
CLASSES = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}


def made(name, *options):
    """Options that train a recipe for three steps at batch 4 on made images; those of large networks are small.

    ImageNet's are not evaluated: after three steps the running statistics are still those of the beginning, and fifty
    segments with no say in their scale, one after another, overflow.
    """
    settings = load_recipe(name).settings
    data = settings["data"]
    size = 8 if settings["model"].endswith("24") else 32
    return [
        f"--recipe={name}",
        "--data=fake",
        f"--fake.shape=[3,{size},{size}]",
        f"--fake.classes={CLASSES[data]}",
        "--fake.train_images=12",
        f"--fake.test_images={0 if data == 'imagenet' else 4}",
        "--batch-size=4",
        "--max-steps=3",
        "--device=cpu",
        *options,
    ]


@pytest.mark.parametrize("table", PUBLISHED)
def test_a_table_is_the_lines_the_paper_prints(table):
    found = {name: load_recipe(name) for name in list_recipes(table)}
    assert {name: (recipe.error, recipe.error5) for name, recipe in found.items()} == PUBLISHED[table]
    assert all("ICML 2018" in recipe.source for recipe in found.values())
    number = table.removeprefix("table").removeprefix("figure")
    assert all(number in recipe.source.partition("ICML 2018")[2] for recipe in found.values())


def test_every_recipe_is_in_a_table_and_names_its_network():
    assert set(list_recipes()) == {name for table in PUBLISHED.values() for name in table}
    for name in list_recipes():
        recipe = load_recipe(name)
        model, _, data = name.replace("-ensemble", "").rpartition("-")
        assert (recipe.settings["model"], recipe.settings["data"]) == (model.replace("-", "_"), data)
        assert recipe.ensemble == ("ensemble" in name)


def test_the_settings_are_those_of_the_paper():
    cifar = parse_train_arguments(made("gunn15-cifar10"))[0]
    options = (cifar.optimizer.name, cifar.optimizer.momentum, cifar.optimizer.nesterov, cifar.optimizer.weight_decay)
    assert (cifar.epochs, cifar.lr, load_recipe("gunn15-cifar10").settings["batch_size"]) == (300, 0.1, 64)
    assert options == ("sgd", 0.9, True, 1e-4)
    rates = [learning_rate(cifar.schedule, cifar.lr, epoch, 1, 300) for epoch in (0, 148, 149, 223, 224, 299)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    assert (cifar.augment.mirror, cifar.augment.crop_padding) == (True, 4)

    imagenet = parse_train_arguments(made("gunn18-imagenet"))[0]
    assert (imagenet.epochs, load_recipe("gunn18-imagenet").settings["batch_size"]) == (120, 256)
    rates = [learning_rate(imagenet.schedule, imagenet.lr, epoch, 1, 120) for epoch in (29, 30, 59, 60, 89, 90)]
    assert rates == pytest.approx([0.1, 0.01, 0.01, 0.001, 0.001, 1e-5])

    ensemble = parse_train_arguments(made("gunn24-ensemble-cifar100"))[0]
    assert (ensemble.schedule.name, ensemble.schedule.cycles, ensemble.epochs) == ("snapshot", 6, 300)


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_trains_three_steps(name, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "save_checkpoint", lambda path, content: None)  # hundreds of megabytes
    config, _ = parse_train_arguments(made(name, f"--output={tmp_path / 'run'}"))
    result = train(config)
    assert (result.steps_taken, result.epochs, result.model) == (3, 1, load_recipe(name).settings["model"])


# the command line ---------------------------------------------------------------------------------------------------


def test_options_beat_a_file_and_that_a_recipe(tmp_path):
    (tmp_path / "c.yaml").write_text("lr: 1e-2\noptimizer: {momentum: 0.5}\ndata: fake\n")
    config, _ = parse_train_arguments(
        ["--recipe=gunn15-cifar10", f"--config={tmp_path}/c.yaml", "--epochs=7", "--seed=3"]
    )
    assert (config.model, config.data, config.lr, config.epochs) == ("gunn15", "fake", 0.01, 7)
    assert (config.optimizer.momentum, config.optimizer.weight_decay) == (0.5, 1e-4)
    assert config.output == "runs/gunn15-cifar10-seed3"


def test_an_unknown_recipe_or_table_is_one_line_and_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, part in (
        (["train", "--recipe", "gunn15-cifar"], "unknown recipe 'gunn15-cifar'. Did you mean gunn15-cifar"),
        (["reproduce", "table6"], "unknown table 'table6'; expected figure3, table3, table4"),
        (["recipes", "table9"], "unknown table 'table9'"),
        (["reproduce", "figure3", "--data=fake", "--seed=3"], "given as --seeds"),
        (["reproduce", "figure3", "--data=fake", "--momentum=3"], "'momentum'. Did you mean"),
    ):
        assert_one_line_error(run(capsys, *arguments), part)
    assert os.listdir(tmp_path) == []


def test_recipes_are_listed_with_their_figures(capsys):
    status, out, _ = run(capsys, "recipes")
    assert status == 0
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
    assert len(rows) == 1 + len(list_recipes())
    assert rows["gunn18-imagenet"] == ["gunn18", "imagenet", "21.65", "5.87", "table4"]
    assert rows["gunn15-cifar10"][3:] == ["figure3,", "table3,", "table5"] or "table3, table5, figure3" in out
    assert len(run(capsys, "recipes", "figure3")[1].splitlines()) == 3


def test_reproduce_compares_skips_what_is_done_and_resumes_what_is_begun(capsys, tmp_path):
    options = [
        *("--model=gunn_tiny", "--data=fake", "--fake.shape=[1,8,8]", "--fake.classes=7", "--fake.train_images=16"),
        *("--fake.test_images=20", "--batch-size=8", "--epochs=6", "--device=cpu"),
    ]
    status, out, err = run(capsys, "reproduce", "figure3", "--seeds=0:2", "--output", tmp_path, *options)
    assert (status, err) == (0, "")
    runs = [f"{name}-cifar10-seed{seed}" for name in ("gunn15", "sunn15") for seed in (0, 1)]
    assert sorted(os.listdir(tmp_path)) == ["figure3.json", "figure3.png", *runs]
    rows = json.loads((tmp_path / "figure3.json").read_text())["rows"]
    errors = [100 * (1 - json.loads((tmp_path / name / "summary.json").read_text())["test_accuracy"]) for name in runs]
    assert rows[0]["error"] == pytest.approx((errors[0] + errors[1]) / 2)
    assert rows[1]["error_std"] == pytest.approx(abs(errors[2] - errors[3]) / 2**0.5)
    assert (rows[0]["published"], rows[1]["published"], rows[0]["finished"]) == (4.15, 5.64, 2)
    assert f"{rows[0]['error']:.2f} ± {rows[0]['error_std']:.2f}" in out

    begun = tmp_path / runs[3]
    whole = load_checkpoint(begun / "last.pt")["model_state"]
    (begun / "summary.json").unlink()
    before = {name: (tmp_path / name / "last.pt").stat().st_mtime_ns for name in runs[:3]}
    assert run(capsys, "reproduce", "figure3", "--seeds=0:2", "--output", tmp_path, *options)[0] == 0
    assert {name: (tmp_path / name / "last.pt").stat().st_mtime_ns for name in runs[:3]} == before
    assert json.loads((begun / "summary.json").read_text())["epochs"] == 6
    assert all(bool((whole[k] == v).all()) for k, v in load_checkpoint(begun / "last.pt")["model_state"].items())
    assert json.loads((tmp_path / "figure3.json").read_text())["rows"] == rows

    outcome = run(capsys, "reproduce", "figure3", "--output", tmp_path, *options, "--lr=0.2")
    assert_one_line_error(outcome, "lr 0.1 there, 0.2 now")


def test_an_ensemble_line_is_measured_as_an_ensemble(capsys, tmp_path):
    from gunn_ext.training import evaluate_run
    from gunn_ext.training.trials import run_trial

    options = ["--model=gunn_tiny", "--data=fake", "--fake.shape=[1,8,8]", "--fake.classes=7", "--device=cpu",
               "--fake.train_images=8", "--fake.test_images=20", "--batch-size=8", "--epochs=6"]  # fmt: skip
    config, _ = parse_train_arguments(["--recipe=gunn24-ensemble-cifar10", *options, f"--output={tmp_path}/run"])
    trial = run_trial(config, ensemble=True)
    found = evaluate_run(tmp_path / "run", ensemble=0)
    assert (trial.error, trial.error5) == (100 * (1 - found.accuracy), 100 * (1 - found.accuracy5))
    assert run_trial(config, ensemble=True) == trial
    with pytest.raises(ConfigError, match=r"epochs \(7\) must be divisible by schedule.cycles \(6\)"):
        parse_train_arguments(["--recipe=gunn24-ensemble-cifar10", *options, "--epochs=7"])
