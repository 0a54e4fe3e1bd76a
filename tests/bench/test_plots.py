"""Pictures: the numbers behind them, what they say, that no words overlap, what is missing."""

from __future__ import annotations

import itertools
import json
import sys

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from aqua_jax.bench import frontier, plots
from aqua_jax.bench.open_loop import Run, Sample, Served
from aqua_jax.bench.traces import TraceRequest
from aqua_jax.cli.main import main
from aqua_jax.errors import ConfigError, DependencyError
from tests.tiny import write_config

PICTURES = ("requests", "cdf", "pool", "service", "frontier")


def make_run(shift=0.0, users=2, tokens=3, paged=False, step=0.5):
    served = [
        Served(
            TraceRequest(float(at), 4, tokens, f"user-{at % users}"), float(at),
            [at + 1 + shift + step * number for number in range(tokens)],
        )
        for at in range(2 * users)
    ]
    samples = [
        Sample(at / 2, at % 3, at % 4, at % 9, stores={"peer": at % 5} if paged else {},
               bytes_out=paged * at * 2**20, bytes_in=paged * at * 2**19)
        for at in range(10)
    ]
    return Run(served, samples, 8, {"peer": 5} if paged else {})


def test_the_numbers_behind_the_pictures():
    run = make_run()
    run.served[3].tokens, run.served[3].error = [], "broken"
    data = plots.plot_data({"fcfs": run})["fcfs"]
    assert data["requests"][0] == {
        "due_s": 0, "user": "user-0", "ttft_s": 1, "mean_tbt_ms": 500, "worst_gap_ms": 500,
    }
    assert data["requests"][3]["ttft_s"] is None and data["gaps_ms"] == [500.0] * 6
    assert data["samples"]["waiting"] == [at % 3 for at in range(10)]
    assert data["pages_total"] == 8 and data["service_window_s"] == (1, 3)
    assert data["service_tokens"] == {"user-0": 7, "user-1": 7}
    assert data["ttft_p99_s"] == 1 and data["tbt_p99_ms"] == data["tbt_max_ms"] == 500
    assert "peer_pages" not in data["samples"]
    paged = plots.plot_data({"fair": make_run(paged=True)})["fair"]
    assert paged["stores_total"] == {"peer": 5} and paged["samples"]["bytes_in"][2] == 2**20
    assert paged["samples"]["peer_pages"] == [at % 5 for at in range(10)]


def test_files_are_written_and_are_pictures(tmp_path):
    runs = {"fcfs": make_run(), "fair": make_run(0.5)}
    files = plots.save_plots(runs, plots.prepare_folder(str(tmp_path / "a" / "b")), "a title")
    assert [file.name for file in files] == ["data.json", *(f"{one}.png" for one in PICTURES)]
    fair = json.loads(files[0].read_text())["policies"]["fair"]
    assert fair["requests"][0]["ttft_s"] == 1.5 and fair["ttft_p99_s"] == 1.5
    for file in files[1:]:
        assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 10_000


def test_the_frontier_shows_medians_over_repeats(tmp_path):
    runs = {"fcfs": make_run(), "fair": make_run(0.5)}
    over = {"fair": {"ttft_p99_s": 7.0, "tbt_p99_ms": 8.0, "tbt_max_ms": 9.0, "steps": 4}}
    files = plots.save_plots(runs, tmp_path, "t", over)
    data = json.loads(files[0].read_text())["policies"]
    assert frontier.points(data) == [
        ("fcfs", 1.0, 500.0, 500.0), ("fair", 7.0, 8.0, 9.0),
    ]


def words_of(monkeypatch, tmp_path, runs):
    """Draws; for each picture its shown texts with their boxes in pixels."""
    found = []

    def keep(figure, path):
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw(renderer)
        hidden = [
            label for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)
            for tick in axis.get_major_ticks() for label in (tick.label1, tick.label2)
            if sorted([*axis.get_view_interval(), tick.get_loc()])[1] != tick.get_loc()
        ]
        texts = [
            text for text in figure.findobj(Text)
            if text.get_visible() and text.get_text().strip() and text not in hidden
        ]
        # Of a label with a line to its point, the words.
        inside = [(text.get_text(), Text.get_window_extent(text, renderer)) for text in texts]
        found.append([
            (words, box) for words, box in inside
            if figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and box.width > 0
        ])

    monkeypatch.setattr(Figure, "savefig", keep)
    plots.save_plots(runs, tmp_path, "model, burst of 64 requests")
    return found


def check_words(texts):
    for (one, box), (other, beside) in itertools.combinations(texts, 2):
        assert not box.overlaps(beside), (one, other)


def test_labels_say_what_and_do_not_overlap(monkeypatch, tmp_path):
    runs = {"fcfs": make_run(users=30), "fair": make_run(0.5, users=30)}
    pictures = words_of(monkeypatch, tmp_path, runs)
    wanted = (
        "seconds", "percent", "requests", "prompt and output tokens",
        "TTFT p99, seconds, log scale",
    )
    for texts, expected in zip(pictures, wanted, strict=True):
        words = [text for text, _ in texts]
        assert expected in words and any(word.startswith("fair") for word in words)
        check_words(texts)
    service = [text for text, _ in pictures[3]]
    assert sum(text.startswith("user-") for text in service) == 20
    assert any("the 20 with most of 30" in text for text in service)


def test_tiers_paging_and_a_crowded_frontier(monkeypatch, tmp_path):
    """Seven settings, three of them nearly alike, and the runs that they are measured by."""
    runs = {"fcfs": make_run(8.0, paged=False)}
    for index, steps in enumerate((5, 10, 20, 40)):
        runs[f"fair/{steps}"] = make_run(0.01 * index, paged=True, step=0.5 + 0.001 * index)
    runs |= {"ideal": make_run(4.0), "floor": make_run(0.0, tokens=1)}
    pictures = words_of(monkeypatch, tmp_path, runs)
    words = [[text for text, _ in texts] for texts in pictures]
    assert len(pictures) == 6
    for texts in pictures:
        check_words(texts)
    assert "Store in use: peer" in words[2] and "KV pool in use" in words[2]
    assert "floor" in words[1] and "floor" not in words[0]
    assert any("Paged out of the pool" in text for text in words[4])
    for name in ("fcfs", "fair/5", "fair/10", "fair/20", "fair/40", "ideal"):
        assert words[5].count(name) == 2  # against the p99 and the longest gap
    assert "floor" not in words[5] and any("the floor" in text for text in words[5])


def test_one_user_and_requests_of_one_token(tmp_path):
    files = plots.save_plots({"fair": make_run(users=1, tokens=1)}, tmp_path, "t")
    data = json.loads(files[0].read_text())["policies"]["fair"]
    assert data["service_window_s"] is None and data["gaps_ms"] == []
    assert data["tbt_p99_ms"] is None and len(files) == 5  # no frontier


def test_what_is_missing_is_said_before_anything_runs(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="plots: got"):
        plots.prepare_folder(str(tmp_path / "file"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DependencyError, match="pip install matplotlib"):
        plots.require_matplotlib()


def test_the_command_draws_a_burst(tmp_path, capsys):
    model = write_config(tmp_path / "model", vocab_size=131)
    status = main([
        "bench", f"--model={model}", "--load_format=dummy", "--dtype=float32", "--warmup=none",
        "--deterministic", "--max_step_tokens=64", "--max_num_seqs=8", "--workload=burst",
        "--num_requests=12", "--prompt_tokens=12", "--output_tokens=8", "--reps=1",
        f"--plots={tmp_path / 'out'}", "--arrivals=poisson", "--request_rate=500", "--json",
        "--policies=fcfs", "--slices=5", "--users=2", "--with_floor", "--with_ideal",
    ])
    out, err = capsys.readouterr()
    assert status == 0, err
    report = json.loads(out)
    assert list(report["policies"]) == ["fcfs", "fair/5", "ideal", "floor"]
    assert report["policies"]["fcfs"]["metrics"]["tokens"]["median"] == 96
    assert report["policies"]["floor"]["metrics"]["tokens"]["median"] == 12
    assert report["policies"]["fair/5"]["metrics"]["bound_violations"]["max"] == 0
    assert set(report["ratios"]["fair/5"]) == {
        "ttft_p99_gain", "output_tok_s_share", "ttft_p99_over_floor", "output_tok_s_of_ideal",
    }
    assert str(tmp_path / "out" / "cdf.png") in err
    drawn = {path.stem for path in (tmp_path / "out").glob("*.png")}
    assert drawn - {"paging"} == set(PICTURES)
