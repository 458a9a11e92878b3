# SPDX-License-Identifier: MIT
"""The study: the README's table is what the recorded runs give; runs are skipped and go on."""

import csv
import subprocess
import xml.etree.ElementTree

import study

README = (study.ROOT / "README.md").read_text()


def recorded():
    return list(csv.DictReader(study.RECORD.read_text().splitlines()))


def test_the_readmes_table_is_what_the_recorded_runs_give():
    accuracy = {row["run"]: float(row["test_accuracy"]) for row in recorded()}
    assert study.table(accuracy) in README


def test_the_record_holds_runs_of_the_study_alone():
    runs = [row["run"] for row in recorded()]
    assert runs and set(runs) <= set(study.all_runs()) and len(runs) == len(set(runs))
    for row in recorded():
        assert 1 / 7 < float(row["test_accuracy"]) < 1


def test_table_by_hand(monkeypatch):
    """Means and deviations of the seeds of which both runs are there."""
    rows = [study.Row("N-pair", 8, 40, 3), study.Row("BYOL", 8, 40, 2),
            study.Row("MoCo", 8, 40, 1, "0.2 -> 0", without="--n-plus-k")]
    monkeypatch.setattr(study, "STUDY", rows)
    accuracy = {
        "npair_tabular.py --width 8 --epochs 40 --alpha 0 --seed 0": 0.50,
        "npair_tabular.py --width 8 --epochs 40 --alpha 0 --seed 1": 0.52,
        "npair_tabular.py --width 8 --epochs 40 --alpha 0 --seed 2": 0.9,
        "npair_tabular.py --width 8 --epochs 40 --seed 0": 0.61,
        "npair_tabular.py --width 8 --epochs 40 --seed 1": 0.61,
        "moco_imix.py --dataset covtype --width 8 --epochs 40 --alpha 0 --n-plus-k --seed 0": 0.6,
        "moco_imix.py --dataset covtype --width 8 --epochs 40 --seed 0": 0.5875,
        "byol_imix.py --dataset covtype --width 8 --epochs 40 --seed 0": 0.7}
    assert set(accuracy) <= set(study.all_runs())
    assert study.table(accuracy).splitlines()[2:] == [
        "| N-pair | 40 | 0.2 | 2 | 51.0\u00b11.4 | 61.0\u00b10.0 | +10.0\u00b11.4 |",
        "| MoCo | 40 | 0.2 -> 0 | 1 | 60.0 | 58.8 | -1.2 |"]


def test_a_picture_by_hand(monkeypatch):
    monkeypatch.setattr(study, "STUDY", [study.Row("MoCo", 8, 40, 2)])
    runs = study.STUDY[0].runs(0) + study.STUDY[0].runs(1)
    root = xml.etree.ElementTree.fromstring(study.picture(dict(zip(runs, (0.4, 0.5, 0.3, 0.8)))))
    dots = [(dot.get("cx"), dot.get("cy")) for dot in root.iter() if dot.tag.endswith("circle")]
    texts = [(text.get("x"), text.text) for text in root.iter() if text.tag.endswith("text")]
    assert dots == [("420.0", "30"), ("480.0", "30"), ("360.0", "30"), ("660.0", "30")]
    assert ("420", "40 %") in texts and ("345", "MoCo, 40 epochs, masking 0.2") in texts


def test_finished_runs_are_skipped_and_stopped_ones_go_on(monkeypatch, tmp_path, capfd):
    small = "npair_tabular.py --dataset digits --batch-size 128 --device cpu"
    monkeypatch.setattr(study, "SCRIPTS", {"N-pair": small})
    monkeypatch.setattr(study, "ON_CARD", [])
    monkeypatch.setattr(study, "STUDY", [study.Row("N-pair", 8, 2, 1)])
    monkeypatch.setattr(study, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(study, "RECORD", tmp_path / "study.csv")
    monkeypatch.setattr(study, "PICTURE", tmp_path / "results.svg")
    monkeypatch.setattr("sys.argv", ["study.py"])
    study.main()
    shown = capfd.readouterr().out
    assert shown.count("left") == 2 and "| N-pair | 2 | 0.2 | 1 |" in shown
    assert len(recorded()) == 2 and {row["date"] for row in recorded()} != {""}
    assert "<circle" in study.PICTURE.read_text()

    without, _ = study.all_runs()
    (study.folder(without) / "result.json").unlink()
    called, inner = [], subprocess.call
    monkeypatch.setattr(subprocess, "call", lambda command, **rest: called.append(command) or
                        inner(command, **rest))
    first = recorded()
    study.main()
    assert len(called) == 1 and study.folder(without) in called[0]
    assert recorded() == first
    study.main()
    assert len(called) == 1


def test_a_run_that_fails_is_named(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(study, "SCRIPTS", {"N-pair": "npair_tabular.py --dataset none.csv"})
    monkeypatch.setattr(study, "ON_CARD", [])
    monkeypatch.setattr(study, "STUDY", [study.Row("N-pair", 1, 2, 1)])
    monkeypatch.setattr(study, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(study, "RECORD", tmp_path / "study.csv")
    study.work(study.all_runs())
    shown = capfd.readouterr().out
    assert shown.count("ended with 2") == 2 and str(tmp_path / "runs") in shown
