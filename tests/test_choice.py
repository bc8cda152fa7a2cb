"""The choice between CUDA drivers: nearest measured sizes of the same GPU, dtype and pass; and how rows are made."""

import json
from pathlib import Path

import pytest

from gunn_ext import choice, cli
from gunn_ext.bench.rows import write_json
from gunn_ext.bench.tune import table_rows


def row(driver, **changes):
    facts = {"device": "A", "dtype": "bfloat16", "pass": "training", "batch": 64, "channels": 240}
    return facts | {"pixels": 1024, "segments": 20, "driver": driver} | changes


TABLE = [
    row("persistent"),
    row("staged", pixels=64),
    row("staged", **{"pass": "evaluation"}),
    row("persistent", device="B", batch=1),
]


def chosen(device="A", dtype="bfloat16", training=True, **changes):
    sizes = {"batch": 64, "channels": 240, "pixels": 1024, "segments": 20} | changes
    return choice.choose_driver(device, dtype, training, **sizes, rows=TABLE)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "persistent"),
        ({"batch": 1}, "persistent"),
        ({"pixels": 257}, "persistent"),  # two octaves from 1,024 and from 64 pixels lie 256
        ({"pixels": 255}, "staged"),
        ({"training": False}, "staged"),
        ({"dtype": "float16"}, "staged"),
        ({"device": "B", "pixels": 1}, "persistent"),
        ({"device": "C"}, "staged"),
        ({"batch": 0}, "persistent"),
    ],
    ids=str,
)
def test_the_nearest_measured_layer_decides(changes, expected):
    assert chosen(**changes) == expected


def test_the_committed_table_is_well_formed():
    rows = json.loads(choice.TABLE.read_text())["rows"]
    needed = {"device", "dtype", "pass", "batch", "channels", "pixels", "segments", "driver", "staged_ms"}
    for each in rows:
        assert needed <= each.keys()
        assert each["driver"] in choice.DRIVERS
    assert choice.choose_driver("no such GPU", "bfloat16", True, batch=1, channels=8, pixels=1, segments=2) == "staged"


def measured(peer, ms, **changes):
    facts = {"layer": "gunn15-8", "dtype": "bfloat16", "pass": "training", "batch": 64, "channels": 360, "segments": 30}
    return facts | {"size": 8, "peer": peer, "format": "nhwc", "ms": ms} | changes


ROWS = [
    measured("ours staged, graphed", 3.0),
    measured("ours staged, graphed", 2.0, format="nchw"),
    measured("ours persistent, graphed", 2.5),
    measured("ours persistent, graphed", 1.5, format="nchw"),
    measured("ours persistent", 1.0),  # with the host's launches
    measured("sunn graphed", 0.5),
    measured("ours staged, graphed", 4.0, batch=8),
    measured("ours persistent, graphed", None, batch=8, error="does not take it"),
    measured("ours persistent, graphed", 1.0, batch=1),
]


def test_rows_become_the_faster_driver_of_each_layer():
    first, second = table_rows("A", ROWS)
    assert first == {
        "device": "A", "dtype": "bfloat16", "pass": "training", "layer": "gunn15-8", "batch": 64, "channels": 360,
        "pixels": 64, "segments": 30, "driver": "persistent", "staged_ms": 2.0, "persistent_ms": 1.5,
    }  # fmt: skip
    assert (second["batch"], second["driver"], "persistent_ms" in second) == (8, "staged", False)


def test_tune_replaces_the_rows_of_its_gpu_only(capsys, tmp_path: Path):
    table, rows = tmp_path / "table.json", tmp_path / "rows.json"
    table.write_text(json.dumps({"rows": [row("staged", device="A"), row("staged", device="B")]}))
    write_json(rows, {"device": "A"}, ROWS)
    assert cli.main(["bench", "tune", str(rows), "--table", str(table)]) == 0
    assert "persistent (staged 2.000 ms, persistent 1.500 ms)" in " ".join(capsys.readouterr().out.split())
    found = json.loads(table.read_text())["rows"]
    assert [each["device"] for each in found] == ["B", "A", "A"]


@pytest.mark.parametrize("content", [None, [measured("sunn graphed", 1.0)]])
def test_tune_refuses_what_holds_no_driver(capsys, tmp_path: Path, content):
    rows = tmp_path / "rows.json"
    if content:
        write_json(rows, {"device": "A"}, content)
    before = choice.TABLE.read_text()
    assert cli.main(["bench", "tune", str(rows)]) == 2
    assert ("no such file" if content is None else "no row has a time") in capsys.readouterr().err
    assert choice.TABLE.read_text() == before
