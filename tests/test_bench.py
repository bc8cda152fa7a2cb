"""``gunn bench``: verified before it is timed, rows and files as promised, mistakes in one line; no time asserted."""

import csv
import importlib.util
import json
import math
import os
import re
import sys
from pathlib import Path

import pytest
import torch

from gunn_ext import cli
from gunn_ext.analysis.performance import LayerSizes
from gunn_ext.bench import environment, memory, networks
from gunn_ext.bench.cases import LAYERS, build, divisors
from gunn_ext.bench.others import OTHERS
from gunn_ext.bench.peers import CUDA_PEERS, DRIVER, asking_for, peers_of
from gunn_ext.bench.rows import FIELDS, mark_best, read_json, write_json
from gunn_ext.bench.timing import summary, take_turns
from gunn_ext.bench.verify import Yardstick, initial_state
from gunn_ext.layers import GunnLayer
from gunn_ext.models import list_models

CLONE = Path(__file__).resolve().parent.parent
QUICK = ("--reduced", "--threads=1")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def bench(capsys, *arguments):
    """Status, standard output and standard error."""
    status = cli.main(["bench", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def assert_refused(outcome, *parts):
    status, out, err = outcome
    assert status == 2
    assert err.startswith("gunn: error: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err
    assert " ms [" not in out  # nothing was timed


# layers -------------------------------------------------------------------------------------------------------------


def test_a_layer_is_verified_timed_and_written(capsys, tmp_path):
    files = {name: tmp_path / "made" / name for name in ("rows.json", "rows.csv", "pictures", "stages.txt")}
    status, out, err = bench(
        capsys, "layer", "gunn15-8", *QUICK, "--peers=ours*;sunn;eager;eager checkpointed",
        "--json", files["rows.json"], "--csv", files["rows.csv"], "--plot", files["pictures"],
        "--profile", files["stages.txt"],
    )  # fmt: skip
    assert (status, err) == (0, "")
    facts, rows = read_json(files["rows.json"])
    assert {"device", "torch", "commit", "sources", "date", "threads", "peak_float32"} <= set(facts)
    assert facts["reduced"] is True
    peers = ["ours", "ours, recompute=False", "sunn", "eager", "eager checkpointed"]
    cells = [(row["pass"], row["peer"], row["format"]) for row in rows]
    assert cells == [
        *(("training", peer, layout) for peer in peers for layout in ("nhwc", "nchw")),
        *(("evaluation", peer, layout) for peer in ("ours", "sunn", "eager") for layout in ("nhwc", "nchw")),
    ]
    for row in rows:
        assert set(row) <= set(FIELDS)
        assert "error" not in row
        assert 0 < row["ms_20"] <= row["ms"] <= row["ms_80"]
        assert row["repeats"] == 2
        assert min(row["gflops"], row["share_of_peak"], row["gbps"], row["peak_bytes"]) > 0
        assert row["share_of_tolerance"] <= 1
        assert ("saved_bytes" in row) == (row["pass"] == "training")
        assert ("predicted_ms" in row) == ("driver" in row) == row["peer"].startswith("ours")
        assert row["peer"] in out
    assert sum(row["best_format"] for row in rows) == len(rows) / 2
    lines = list(csv.DictReader(files["rows.csv"].open()))
    assert list(lines[0]) == [*FIELDS, "device", "torch", "commit", "date"]
    assert [line["peer"] for line in lines] == [row["peer"] for row in rows]
    assert float(lines[0]["ms"]) == rows[0]["ms"]
    pictures = sorted(files["pictures"].iterdir())
    assert [path.name for path in pictures] == ["peers.png", "roofline.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    stages = files["stages.txt"].read_text()
    assert all(stage in stages for stage in ("forward reduce", "forward project", "backward spatial", "backward input"))


def wrong_value(layer, x, y):
    return y * 1.001 if layer.gradual else y


def wrong_gradient(layer, x, y):
    return y + 0.1 * (x - x.detach()) if layer.gradual else y


@pytest.mark.parametrize("wrong", [wrong_value, wrong_gradient])
def test_a_wrong_layer_is_refused_and_not_timed(capsys, tmp_path, monkeypatch, wrong):
    right = GunnLayer.update
    monkeypatch.setattr(GunnLayer, "update", lambda layer, x: wrong(layer, x, right(layer, x)))
    status, out, err = bench(
        capsys, "layer", "gunn15-8", *QUICK, "--pass=training", "--peers=ours;sunn", "--format=nchw",
        "--json", tmp_path / "rows.json",
    )  # fmt: skip
    assert status == 2
    name = "y" if wrong is wrong_value else "grad x"
    assert f"ours, gunn15-8 reduced, float32, training: wrong result, not timed: {name} has relative error" in err
    assert "allowed" in err
    _, (ours, sunn) = read_json(tmp_path / "rows.json")
    assert "ms" not in ours
    assert "wrong result" in ours["error"]
    assert "ms" in sunn  # and nobody is taken down with it


def test_a_peer_that_fails_has_an_error_in_its_row(capsys, tmp_path, monkeypatch):
    def no_compiler(*_, **__):
        raise RuntimeError("no C++ compiler\nfound")

    monkeypatch.setattr(torch, "compile", no_compiler)
    status, out, _ = bench(
        capsys, "layer", *QUICK, "--pass=evaluation", "--peers=ours;sunn*", "--format=nchw",
        "--json", tmp_path / "r.json", "--channels=6", "--segments=2", "--size=4",
    )  # fmt: skip
    assert status == 0
    _, rows = read_json(tmp_path / "r.json")
    assert {row["peer"]: row.get("error") for row in rows} == {
        "ours": None,
        "sunn": None,
        "sunn compiled": "RuntimeError: no C++ compiler found",
    }
    assert "no C++ compiler found" in out


def test_narrow_and_wide_dtypes_are_held_to_their_own_rounding(capsys, tmp_path):
    status, _, _ = bench(
        capsys, "layer", "gunn18-4", *QUICK, "--dtype=bfloat16,float64", "--peers=ours;sunn", "--format=nhwc",
        "--json", tmp_path / "r.json",
    )  # fmt: skip
    assert status == 0
    _, rows = read_json(tmp_path / "r.json")
    assert [row.get("error") for row in rows] == [None] * 8
    errors = {dtype: max(r["relative_error"] for r in rows if r["dtype"] == dtype) for dtype in ("bfloat16", "float64")}
    assert errors["float64"] < 1e-12 < 1e-4 < errors["bfloat16"] < 0.1
    ours = [row for row in rows if row["dtype"] == "bfloat16" and row["peer"] == "ours"]
    assert {(row["driver"], row["large_tiles"]) for row in ours} == {("fused", "")}


def test_running_statistics_keep_hundreds_of_segments_finite():
    sizes = LayerSizes(96, 96, 4, shortcut=True)
    x = torch.randn(2, 96, 4, 4)
    state = initial_state(sizes, x)
    yardstick = Yardstick(sizes, state, x, x, training=False, gradual=True)
    assert yardstick.expected["y"].abs().max() < 1000
    layer = build(GunnLayer, sizes)
    layer.load_state_dict(state)
    with torch.no_grad():
        error, share = yardstick.hold({"y": layer.eval()(x)})
    assert 0 <= share <= 1
    assert error < 1e-5
    with pytest.raises(ValueError, match="y of the reference is not finite"):
        Yardstick(sizes, state, x / 0, x, training=False, gradual=True)


def test_nothing_is_begun_after_the_time_is_over(capsys, tmp_path):
    status, out, _ = bench(
        capsys, "layer", *QUICK, "--minutes=1e-9", "--peers=ours", "--pass=evaluation", "--json", tmp_path / "r.json"
    )  # fmt: skip
    assert status == 0
    assert "cells were not reached" in out
    assert " ms [" not in out


# sweeps and networks ------------------------------------------------------------------------------------------------


def test_a_sweep_goes_over_every_divisor(capsys, tmp_path):
    common = ("sweep", "gunn15-8", *QUICK, "--peers=ours", "--pass=evaluation", "--format=nchw")
    status, out, _ = bench(capsys, *common, "--json", tmp_path / "r.json", "--plot", tmp_path)
    assert status == 0
    _, rows = read_json(tmp_path / "r.json")
    assert [row["segments"] for row in rows] == divisors(rows[0]["channels"]) == [1, 2, 3, 6]
    assert (tmp_path / "sweep-segments.png").exists()
    status, out, _ = bench(capsys, *common, "--over=batch", "--batch=4", "--json", tmp_path / "r.json")
    assert [row["batch"] for row in read_json(tmp_path / "r.json")[1]] == [1, 2, 4]


def test_a_network_is_timed_against_its_simultaneous_twin(capsys, tmp_path):
    status, _, _ = bench(
        capsys, "model", "gunn_tiny", *QUICK, "--size=8", "--peers=ours;sunn;eager", "--json", tmp_path / "r.json"
    )
    assert status == 0
    _, rows = read_json(tmp_path / "r.json")
    assert len(rows) == 12
    assert [row.get("error") for row in rows] == [None] * 12
    assert {row["peer"] for row in rows} == {"ours", "sunn", "eager"}
    assert all(set(row) <= set(FIELDS) for row in rows)


def test_a_wrong_network_is_refused(capsys, monkeypatch):
    right = GunnLayer.update
    monkeypatch.setattr(GunnLayer, "update", lambda layer, x: right(layer, x) + 0.01 * layer.gradual)
    outcome = bench(capsys, "model", "gunn_tiny", *QUICK, "--size=8", "--peers=ours", "--pass=evaluation")
    assert_refused(outcome, "wrong result, not timed: logits have relative error")


@pytest.mark.parametrize(
    ("name", "parameters"),
    # As the papers have them: 68.1, 25.6, 36.5 and 25.6 million.
    [("resnext29-16x64d", 68.155e6), ("densenet-bc-190-k40", 25.624e6), ("wideresnet-28-10", 36.479e6),
     ("resnet50", 25.557e6)],
)  # fmt: skip
def test_nets_of_others_have_the_size_of_their_papers(name, parameters):
    classes, size = networks.input_of(name)
    with torch.device("meta"):
        model, image = OTHERS[name][0](), torch.empty(2, 3, size, size)
    assert round(sum(p.numel() for p in model.parameters()), -3) == pytest.approx(parameters, abs=1000)
    assert model(image).shape == (2, classes)


def test_batches_of_data_sets_are_counted(capsys, tmp_path):
    status, out, err = bench(
        capsys, "data", "digits", "fake", "--batch=100", "--batches=3", "--repeats=2", "--json", tmp_path / "d.json"
    )
    assert (status, err) == (0, "")
    facts, rows = read_json(tmp_path / "d.json")
    assert [row["data"] for row in rows] == ["digits", "fake"]
    assert [(row["images"], row["shape"], row["batch"], row["batches"]) for row in rows] == [
        (1437, "1x16x16", 100, 3),
        (512, "3x32x32", 100, 3),
    ]
    for row in rows:
        assert row["images_per_second_least"] <= row["images_per_second"] <= row["images_per_second_most"]
    assert out.count(" images/s [") == 2
    assert facts["torch"] == torch.__version__


def test_memory_is_measured_in_a_process_of_its_own(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "VARIANTS", ("ours",))
    assert bench(capsys, "memory", "gunn_tiny", "--batch=2", "--json", tmp_path / "m.json")[0] == 0
    facts, (row,) = read_json(tmp_path / "m.json")
    assert 0 < row["parameter_bytes"] < row["saved_bytes"]
    assert row["resident_bytes"] >= 0
    assert {"commit", "torch"} <= set(facts)


# predictions and tables ---------------------------------------------------------------------------------------------


def test_predictions_say_that_they_are_predictions(capsys, tmp_path):
    status, out, _ = bench(capsys, "predict", "--json", tmp_path / "p.json")
    assert status == 0
    assert out.startswith("Predictions for H200, bfloat16, in µs; none of this is measured.")
    assert [line.split()[0] for line in out.splitlines()[2:]] == list(LAYERS)
    assert json.loads((tmp_path / "p.json").read_text())["predicted"] is True
    _, out, _ = bench(capsys, "predict", "--channels=12", "--segments=3", "--parts", "--markdown")
    for line in out.splitlines()[3:]:
        *parts, total = map(int, line.strip("| ").split(" | ")[2:])
        assert sum(parts) == pytest.approx(total, abs=3)  # rounded one by one


def test_named_layers_are_those_of_the_paper():
    assert {name: (s.channels, s.segments, s.size) for name, s in LAYERS.items()} == {
        "gunn15-32": (240, 20, 32), "gunn15-16": (300, 25, 16), "gunn15-8": (360, 30, 8),
        "gunn18-1": (400, 10, 56), "gunn18-2": (800, 20, 28), "gunn18-3": (1600, 40, 14), "gunn18-4": (2000, 50, 7),
        "gunn24-1": (720, 20, 32), "gunn24-2": (900, 25, 16), "gunn24-3": (1080, 30, 8),
        "p-equals-n": (240, 240, 32),
    }  # fmt: skip
    options = {name.split("-")[0]: (s.expansion, s.units, s.shortcut) for name, s in LAYERS.items()}
    assert options == {"gunn15": (2, 1, True), "gunn18": (2, 1, False), "gunn24": (3, 2, True), "p": (2, 1, True)}


@pytest.mark.parametrize("name", ["README.md", "docs/performance.md"])
def test_tables_are_those_of_the_committed_results(name):
    found = importlib.util.spec_from_file_location("tables", CLONE / "benchmarks" / "tables.py")
    tables = importlib.util.module_from_spec(found)
    found.loader.exec_module(tables)
    text = (CLONE / name).read_text()
    assert "<!-- begin measured layers -->" in text
    assert tables.updated(text) == text, "run python benchmarks/tables.py"


# mistakes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["race"], ["unknown command 'race'", "expected layer, sweep, model, step, memory, data, predict"]),
        (["layer", "gunn15-33"], ["unknown layer 'gunn15-33'", "Did you mean gunn15-3", "--channels"]),
        (["layer", "--channels=250", "--segments=20"], ["channels (250)", "segments (20)", "240 or 260"]),
        (["layer", "--channels=250"], ["needs both --channels and --segments"]),
        (["layer", "gunn15-8", "--channels=8", "--segments=2"], ["leave the names out"]),
        (["layer", "--channels=8", "--segments=2", "--size=0"], ["--size must be at least 1, got 0"]),
        (["layer", "--repeats=1"], ["--repeats must be at least 2, got 1"]),
        (["layer", "--batch=0"], ["--batch must be at least 1, got 0"]),
        (["layer", "--batch=many"], ["--batch", "'many'", "gunn bench layer --help"]),
        (["layer", "--threads=0"], ["--threads must be at least 1, got 0"]),
        (["layer", "--minutes=0"], ["--minutes must be above 0, got 0"]),
        (["layer", "--device=tpu"], ["unknown device 'tpu'", "expected cpu or cuda"]),
        (["layer", "--dtype=int8"], ["unknown dtype 'int8'", "expected bfloat16, float32"]),
        (["layer", "--pass=both"], ["unknown pass 'both'", "expected training, evaluation"]),
        (["layer", "--format=chwn"], ["unknown format 'chwn'", "expected nhwc, nchw"]),
        (["layer", "--peers=theirs"], ["no peer on cpu matches 'theirs'", "eager checkpointed"]),
        (["layer", "--colour"], ["unrecognized arguments: --colour"]),
        (["sweep", "gunn15-8", "gunn15-16"], ["takes one layer"]),
        (["sweep", "--values=3,x"], ["expected whole numbers", "'3,x'"]),
        (["sweep", "gunn15-8", "--values=7"], ["channels (360)", "segments (7)"]),
        (["sweep", "--over=batch", "--values=0,1"], ["at least 1, got 0"]),
        (["model", "gunn16"], ["unknown model 'gunn16'", "gunn15", "resnet50"]),
        (["model", "--size=0"], ["--size must be at least 1, got 0"]),
        (["memory", "resnet50"], ["resnet50 has none"]),
        (["data", "mnist"], ["data must be one of digits, shapes, cifar10"]),
        (["data", "digits", "--batches=1"], ["--batches must be at least 2, got 1"]),
        (["data", "digits", "--batch=1000"], ["1437 training images make fewer than two batches of 1000"]),
        (["memory", "--batch=0"], ["--batch must be at least 1, got 0"]),
        (["predict", "gunn99"], ["unknown layer 'gunn99'"]),
        (["predict", "--dtype=float64"], ["float64", "bfloat16"]),
        (["predict", "--batch=0"], ["--batch must be at least 1, got 0"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line_with_value_and_way_out(capsys, arguments, parts):
    assert_refused(bench(capsys, *arguments), *parts)


@no_gpu
def test_without_a_gpu_cuda_is_refused_with_what_to_do(capsys):
    outcome = bench(capsys, "layer", "--device=cuda")
    assert_refused(outcome, "--device cuda", "no GPU", "--device cpu", "gunn bench predict")


def test_without_matplotlib_a_plot_is_refused_before_anything_is_timed(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    outcome = bench(capsys, "layer", "gunn15-8", *QUICK, "--plot", tmp_path / "pictures")
    assert_refused(outcome, "a plot needs matplotlib", 'pip install "gunn-ext[plot]"')
    assert not (tmp_path / "pictures").exists()


def test_help_lists_commands_and_options(capsys):
    for arguments in (["--help"], ["layer", "--help"], ["predict", "--help"]):
        status, out, _ = bench(capsys, *arguments)
        assert status == 0
        assert "usage: gunn bench" in out
    assert bench(capsys)[0] == 2


# parts --------------------------------------------------------------------------------------------------------------


def test_all_take_turns_and_one_that_fails_does_not_stop_the_others():
    order = []

    def third():
        order.append("c")
        if order.count("c") == 3:
            raise RuntimeError("broken")

    works = [lambda: order.append("a"), lambda: order.append("b"), third]
    first, second, failed = take_turns(works, lambda work: work() or 1.0, repeats=3)
    assert order == [*"abc", *"abc", *"abc", *"ab", *"ab"]
    assert first == second == [1.0] * 3  # the first two rounds do not count
    assert str(failed) == "broken"


def test_quantiles_are_those_of_the_repetitions():
    found = summary([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert found == {"ms": 3.5, "ms_20": 2.0, "ms_80": 5.0, "repeats": 6}


def test_the_best_format_is_marked_and_what_is_not_finite_left_out(tmp_path):
    rows = [
        {"peer": "a", "ms": 2.0},
        {"peer": "a", "ms": 1.0},
        {"peer": "b", "error": "none"},
        {"peer": "c", "ms": 3.0},
    ]
    mark_best(rows)
    assert [row["best_format"] for row in rows] == [False, True, False, True]
    write_json(tmp_path / "r.json", {}, [{"gbps": math.inf, "ms": 1.23456789}])
    assert read_json(tmp_path / "r.json")[1] == [{"gbps": None, "ms": 1.2346}]
    (tmp_path / "old.json").write_text("[]")
    with pytest.raises(ValueError, match="no result of gunn bench"):
        read_json(tmp_path / "old.json")


def test_a_driver_is_asked_for_only_inside(monkeypatch):
    monkeypatch.delenv(DRIVER, raising=False)
    with asking_for("persistent"):
        assert os.environ[DRIVER] == "persistent"
    assert DRIVER not in os.environ
    monkeypatch.setenv(DRIVER, "staged")
    with asking_for(None):
        assert os.environ[DRIVER] == "staged"
    with asking_for("persistent"):
        pass
    assert os.environ[DRIVER] == "staged"


def test_the_commit_can_be_given_and_sources_have_a_digest(monkeypatch):
    monkeypatch.setenv("GUNN_COMMIT", "given-1")
    assert environment.environment("cpu")["commit"] == "given-1"
    assert re.fullmatch(r"[0-9a-f]{12}", environment.sources())


def test_the_check_on_a_gpu_asks_for_peers_that_exist():
    script = (CLONE / "benchmarks" / "gpu_check.sh").read_text()
    asked = re.findall(r"(?:--peers |everyone=)'([^']+)'", script)
    assert len(asked) == 3
    for patterns in asked:
        assert {peer.name for peer in peers_of("cuda", patterns.split(";"))} >= {"ours staged, graphed", "sunn graphed"}
    assert "python" in script
    assert "-m gunn_ext bench layer --device cuda" in script
    assert len({peer.name for peer in CUDA_PEERS}) == len(CUDA_PEERS)


def test_every_registered_model_says_its_input():
    for name in list_models():
        classes, size = networks.input_of(name)
        assert classes > 0
        assert size >= 32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_layer_on_a_gpu(capsys, tmp_path):
    status, out, _ = bench(
        capsys, "layer", "gunn15-8", "--reduced", "--device=cuda", "--peers=ours staged*;sunn*graphed;eager*graphed",
        "--json", tmp_path / "r.json", "--profile", tmp_path / "kernels.txt",
    )  # fmt: skip
    assert status == 0, out
    _, rows = read_json(tmp_path / "r.json")
    assert [row["error"] for row in rows if "error" in row] == []
    assert "reduce" in (tmp_path / "kernels.txt").read_text()
