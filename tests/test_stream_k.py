"""The decode schedules' model and its benchmark."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from attngen.balance import balance
from attngen.reductions import even_splits
from benchmarks.stream_k import (
    BANDWIDTH,
    CASES,
    LAUNCH,
    SHARE,
    SMS,
    TILE_BYTES,
    Case,
    main,
    makespan,
    measure,
    model,
)


def test_makespan() -> None:
    assert makespan([]) == 0.0
    assert makespan([SHARE] * SMS) == pytest.approx(1.0)
    assert makespan([SHARE] * (SMS + 1)) == pytest.approx(2.0)  # a second wave for one program
    assert makespan([SHARE, 3 * SHARE, SHARE], slots=2) == pytest.approx(3.0)
    assert makespan([SHARE], sm_rate=2 * SHARE) == pytest.approx(0.5)
    assert makespan([SHARE] * SMS, sm_rate=2 * SHARE) == pytest.approx(
        1.0
    )  # all of them cannot have more than there is


def test_stream_k_uses_its_balance_of_the_bandwidth() -> None:
    for case in CASES:
        found, tiles = model(case, "stream"), sum(case.counts())
        assert found.programs == SMS and found.used == pytest.approx(balance(tiles, SMS))
        assert found.partials <= (SMS + len(case.counts())) * case.group * 130 * 4
        assert tiles * TILE_BYTES / BANDWIDTH < found.seconds
        assert model(case, None).partials == 0


def test_ragged_batches_gain_and_even_ones_do_not() -> None:
    even = Case("even", (8448,) * 33, 32, 4)  # 132 outputs of 132 tiles
    assert (
        model(even, "stream").seconds == pytest.approx(model(even, None).seconds)
        and model(even, "stream").partials == 0
    )
    ragged = CASES[-1]
    chosen = even_splits(len(ragged.counts()), max(ragged.counts()), SMS)
    assert model(ragged, chosen).seconds > 1.5 * model(ragged, "stream").seconds
    assert model(ragged, 4).seconds >= model(ragged, 4).partials / BANDWIDTH + LAUNCH


def test_the_table_says_that_it_is_modelled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, data = tmp_path / "t.md", tmp_path / "t.json"
    assert main(["--markdown", str(page), "--json", str(data)]) == 0
    assert "Modelled for an H200 (no measurement)" in page.read_text() and page.read_text() in capsys.readouterr().out
    assert [record["case"] for record in json.loads(data.read_text())["modelled"]] == [case.name for case in CASES]


def test_measuring_checks_and_times_every_schedule() -> None:
    found = measure(Case("tiny", (100, 3), 4, 2), torch.device("cpu"), 0.01)
    assert not found["failed"]
    assert {"SDPA, padded", "no split", "split-K, 16", "stream-K"} <= found["timings"].keys()
