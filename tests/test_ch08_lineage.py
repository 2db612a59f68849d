"""The experiment over the whole lineage: equal parameters, one budget, honest counts."""

import json
from pathlib import Path

import pytest
import torch

from ch08_full_models import lineage
from ch08_full_models.lineage import CHAPTERS, GPU, LAPTOP, SMOKE, Size

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("size", [LAPTOP, GPU], ids=["laptop", "gpu"])
def test_equal_parameters(size: Size) -> None:
    """Guards the budget: within 2 percent of chapter 1's, counted on the models themselves."""
    counts = {
        chapter: lineage.count(lineage.config(chapter, size), module)
        for chapter, (module, _) in CHAPTERS.items()
    }
    for chapter, n in counts.items():
        assert abs(n / counts[1] - 1) < 0.02, chapter


def test_one_change_at_a_time() -> None:
    """Guards the lineage: a chapter's config has what its parent's has, and its own."""
    before: dict[str, object] = {}
    for chapter in CHAPTERS:
        given = lineage.fields(chapter, LAPTOP)
        given.pop("max_seq_len", None)
        assert before.items() <= given.items(), chapter
        before = given


def test_active_parameters_by_hooks() -> None:
    """Guards the count of what works on one token: parameters of the modules that ran."""
    for chapter in (5, 6, 7):
        model = lineage.build(chapter, SMOKE, seed=0).eval()
        ran: set[torch.nn.Module] = set()
        for module in model.modules():
            module.register_forward_hook(lambda module, *_, ran=ran: ran.add(module))
        with torch.no_grad():
            model(torch.zeros(1, 1, dtype=torch.long))
        idle = [
            expert
            for moe in model.modules()
            if hasattr(moe, "experts")
            for expert in moe.experts
            if expert not in ran
        ]
        expected = lineage.n_parameters(model) - sum(map(lineage.n_parameters, idle))
        assert lineage.n_active_parameters(model) == expected
        assert (len(idle) > 0) == (chapter > 5)


def test_smoke_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the command: a record with every chapter, a table and a picture."""
    out = tmp_path / "lineage.json"
    arguments = ["lineage", "--size", "smoke", "--out", str(out), "--device", "cpu", "--jobs", "1"]
    monkeypatch.setattr("sys.argv", arguments)
    lineage.main()
    record = json.loads(out.read_text(encoding="utf-8"))
    assert [run["chapter"] for run in record["runs"]] == list(CHAPTERS)
    for chapter in record["chapters"].values():  # the best rate is not at the search's end
        rates = [float(lr) for lr in chapter["search"]]
        assert min(rates) < chapter["lr"] < max(rates)
        assert chapter["lr"] == lineage.best({float(k): v for k, v in chapter["search"].items()})
    rows = lineage.summary(record)
    assert [row["chapter"] for row in rows] == list(CHAPTERS)
    by_chapter = {row["chapter"]: row for row in rows}
    bytes_of = {chapter: row["cache_bytes_per_token"] for chapter, row in by_chapter.items()}
    assert bytes_of[1] == bytes_of[2] > bytes_of[3] > bytes_of[4] == bytes_of[7]
    assert out.with_suffix(".png").stat().st_size > 10_000
    for row in rows:  # what the file says, not what a table might make of it
        losses = [
            run["final_val_loss"] for run in record["runs"] if run["chapter"] == row["chapter"]
        ]
        assert row["losses"] == losses

    monkeypatch.setattr("sys.argv", [*arguments, "--speeds"])
    lineage.main()
    again = json.loads(out.read_text(encoding="utf-8"))
    assert again["runs"] == record["runs"]  # only the speeds are new
    timed = ("train_tokens_per_s", "decode_tokens_per_s")
    for key, chapter in record["chapters"].items():
        assert all(again["chapters"][key][name] > 0 for name in timed)
        assert (
            chapter | {name: again["chapters"][key][name] for name in timed}
            == (again["chapters"][key])
        )

    monkeypatch.setattr("sys.argv", [*arguments, "--quiet"])
    lineage.main()
    with_quiet = json.loads(out.read_text(encoding="utf-8"))
    assert with_quiet["runs"] == record["runs"]
    *before, loud, quiet = lineage.summary(with_quiet)
    assert [row["chapter"] for row in (*before, loud)] == list(CHAPTERS)
    assert quiet["name"] == loud["name"] + ", quiet"
    assert quiet["losses"] == [run["final_val_loss"] for run in with_quiet["quiet"]["runs"]]
    assert quiet["losses"] != loud["losses"]


def test_quiet_is_the_start_of_the_output_norms() -> None:
    """Guards the variant: chapter 7 starts elsewhere, and a model without these norms does not."""
    losses = {
        (chapter, gain): lineage.fit(lineage.Job(SMOKE, chapter, 2, 1e-3, 0, "cpu", gain))
        for chapter in (6, 7)
        for gain in (1.0, lineage.QUIET)
    }
    assert losses[6, 1.0] == losses[6, lineage.QUIET]
    assert losses[7, 1.0]["val_losses"][0] != losses[7, lineage.QUIET]["val_losses"][0]


def test_a_training_is_repeatable() -> None:
    """Guards the record: the same job gives the same losses, whatever ran between."""
    job = lineage.Job(SMOKE, 6, 3, 2e-3, 0, "cpu")
    first = lineage.fit(job)
    lineage.fit(lineage.Job(SMOKE, 7, 3, 2e-3, 1, "cpu"))
    assert lineage.fit(job) == first
    other = lineage.fit(lineage.Job(SMOKE, 6, 3, 2e-3, 1, "cpu"))
    assert other["final_val_loss"] != first["final_val_loss"]


def test_plot_without_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Guards the message: one line that names the file, exit code 2."""
    monkeypatch.setattr("sys.argv", ["lineage", "--plot", "--out", str(tmp_path / "no.json")])
    with pytest.raises(SystemExit) as stop:
        lineage.main()
    assert stop.value.code == 2
    assert "no.json: not there, expected the record" in capsys.readouterr().err


def test_search_goes_on_past_its_end() -> None:
    """Guards the search: a best rate at the end of what was tried is not taken for the best."""
    assert lineage.beyond({1e-3: 3.0, 2e-3: 2.5, 4e-3: None}) == []
    assert lineage.beyond({1e-3: 3.0, 2e-3: 2.5, 4e-3: 2.4}) == [8e-3]
    assert lineage.beyond({1e-3: 2.0, 2e-3: 2.5}) == [5e-4]
    assert lineage.beyond({1e-3: 2.0}) == [2e-3, 5e-4]


def test_best_rate() -> None:
    """Guards the search: the lowest loss, among those that did not diverge."""
    assert lineage.best({1e-3: 3.0, 2e-3: 2.5, 4e-3: None}) == 2e-3
    with pytest.raises(ValueError, match="does not diverge"):
        lineage.best({1.0: None})
