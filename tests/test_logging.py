"""Metrics and progress."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from medjax import logging
from medjax.errors import UserError, run_program, warn_once, write_atomic


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rows_past_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    metrics = logging.Metrics(tmp_path, 0)
    for step in range(1, 6):
        metrics.write(step, {"loss": step / 2})
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # a kill in the middle of a line
    metrics = logging.Metrics(tmp_path, 3)
    metrics.write(4, {"loss": float("nan"), "dice": 0.5})
    metrics.close()
    assert rows(tmp_path) == [
        *({"step": s, "loss": s / 2} for s in (1, 2, 3)),
        {"step": 4, "loss": None, "dice": 0.5},
    ]


def test_tensorboard_gets_the_scalars(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing import event_accumulator
    from tensorboard.util.tensor_util import make_ndarray

    metrics = logging.Metrics(tmp_path, 0)
    metrics.write(3, {"train/loss": 1.5})
    metrics.close()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"), {"tensors": 0})
    events.Reload()
    (event,) = events.Tensors("train/loss")
    assert (event.step, float(make_ndarray(event.tensor_proto))) == (3, 1.5)


def test_weights_and_biases_is_asked_for_only_when_configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    logging.Metrics(tmp_path, 0, {"wandb": {"project": "", "entity": ""}}).close()
    with pytest.raises(UserError, match="pip install wandb"):
        logging.Metrics(tmp_path, 0, {"wandb": {"project": "p", "entity": ""}})


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_one_live_line_on_a_terminal_plain_lines_elsewhere() -> None:
    for stream in (Terminal(), io.StringIO()):
        progress = logging.Progress("step", 3, every=0.0, stream=stream)
        for done in (1, 2, 3):
            progress.update(done, "loss 0.5")
        progress.close()
        text = stream.getvalue()
        if stream.isatty():
            assert text.count("\n") == 1
            assert text.rstrip().split("\r")[-1].endswith("step 3/3  loss 0.5  ETA 0:00")
        else:
            assert "\r" not in text
            assert [line.split("  ")[0] for line in text.splitlines()] == ["step 1/3", "step 2/3", "step 3/3"]


@pytest.mark.parametrize(("seconds", "text"), [(4.4, "0:04"), (65, "1:05"), (3723, "1:02:03")])
def test_durations(seconds: float, text: str) -> None:
    assert logging.duration(seconds) == text


def test_a_note_is_said_once(capsys: pytest.CaptureFixture) -> None:
    for _ in range(3):
        warn_once("a test's own note")
    assert capsys.readouterr().err.count("a test's own note") == 1


def test_a_users_error_is_one_message_and_exit_code_2(capsys: pytest.CaptureFixture) -> None:
    def fail() -> None:
        raise UserError("scan.nii.gz: is broken; fetch it again")

    with pytest.raises(SystemExit) as caught:
        run_program(fail)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "\nmedjax: error: scan.nii.gz: is broken; fetch it again\n"


def test_two_writers_of_one_text_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, real = tmp_path / "summary.json", Path.write_text

    def slow(self: Path, text: str) -> None:
        real(self, text)
        if text == "first":
            write_atomic(file, "second")  # of the same process number, on another machine

    monkeypatch.setattr(Path, "write_text", slow)
    write_atomic(file, "first")
    assert file.read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "summary.json"
    write_atomic(file, "old")

    def full(self: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match="summary.json: cannot write: No space left"):
        write_atomic(file, "new")
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]
