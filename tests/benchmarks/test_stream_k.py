"""The decode schedules' model and its benchmark."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend

from attngen.language.call import bind
from attngen.plan.stream_k import balance
from attngen.schedule import Target, choice
from attngen.schedule.decode import even_splits
from benchmarks import stream_k as benchmark
from benchmarks.stream_k import (
    BANDWIDTH,
    CASES,
    HEAD_DIM,
    LAUNCH,
    LIMITS,
    REPEATED,
    SHARE,
    SMS,
    SPEC,
    TILE_BYTES,
    Batch,
    Case,
    main,
    makespan,
    measure,
    measured_table,
    model,
    pinned,
    schedules,
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
        assert model(case, 1).partials == 0


def test_ragged_batches_gain_and_even_ones_do_not() -> None:
    even = Case("even", (8448,) * 33, 32, 4)  # 132 outputs of 132 tiles
    assert (
        model(even, "stream").seconds == pytest.approx(model(even, 1).seconds) and model(even, "stream").partials == 0
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


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_row_has_the_split_of_its_name_on_a_gpu(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left open, the split of a ragged batch would be the model's, which is stream-K."""
    monkeypatch.setattr("attngen.backends.pick", lambda backend, device: "triton")
    monkeypatch.setattr(choice.Target, "of_device", lambda device: Target.named("sm_90"))
    monkeypatch.setattr(choice, "multiprocessors", lambda device: SMS)
    monkeypatch.setattr(choice, "_records", lambda *given: {})
    meta = torch.empty((), dtype=torch.float16, device="meta")
    q, k, v = (
        meta.expand(len(case.lengths), heads, n, HEAD_DIM)
        for heads, n in ((case.heads, 1), (case.heads_kv, max(case.lengths)), (case.heads_kv, max(case.lengths)))
    )
    length = torch.empty(len(case.lengths), dtype=torch.int32, device="meta")
    call = bind(SPEC, q, k, v, captures={"length": length})
    splits = {name: pinned(split).specialiser.of(call).schedule.split for name, split in schedules(case).items()}
    assert splits == schedules(case)
    assert splits["no split"] == 1 and splits["stream-K"] == "stream" and splits["split-K, 16"] == 16


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("place", range(4))
def test_keys_that_one_program_forgets_are_found(place: int, dtype: torch.dtype) -> None:
    """1/132 of the keys of the longest sequence, for the first or the last kv head, whose values are small."""
    batch = Batch.draw(Case("ragged", (256, 32768), 4, 2), torch.device("cpu"), dtype)
    expected, length = batch.expected(), int(batch.length[-1])
    head, first = place % 2 - 1, (0, length // 2)[place // 2]
    right = pinned(1)(batch.q, batch.k, batch.v, length=batch.length)
    assert batch.error(right, expected) <= LIMITS[dtype] / 3
    kept = torch.arange(length) // (length // SMS) != first // (length // SMS)
    rows = slice(2, None) if head else slice(0, 2)
    q, k, v = batch.q[-1, rows, 0].double(), batch.k[-1, head, kept].double(), batch.v[-1, head, kept].double()
    wrong = right.clone()
    wrong[-1, rows, 0] = (torch.softmax(q @ k.T / HEAD_DIM**0.5, -1) @ v).to(dtype)
    assert not batch.error(wrong, expected) <= 3 * LIMITS[dtype]
    wrong[-1, rows.start or 0] = torch.nan
    assert not batch.error(wrong, expected) <= LIMITS[dtype]


def test_on_a_gpu_sdpa_runs_its_efficient_backend_on_repeated_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list = []

    @contextmanager
    def forced(backend: SDPBackend):
        seen.append(backend)
        yield

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **given: torch.Tensor) -> torch.Tensor:
        assert q.shape[1] == k.shape[1] == v.shape[1] and given.keys() == {"attn_mask"}
        return plain(q, k, v, **given)

    batch = Batch.draw(Case("tiny", (100, 3), 8, 2), torch.device("cpu"), torch.float32)
    plain, elsewhere = torch.nn.functional.scaled_dot_product_attention, benchmark.sdpa(batch)
    monkeypatch.setattr(benchmark, "sdpa_kernel", forced)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(Batch, "on_gpu", True)
    name, run = benchmark.sdpa(batch)
    assert batch.error(run(None), batch.expected()) <= 1e-5 and seen == [SDPBackend.EFFICIENT_ATTENTION]
    assert (name, elsewhere[0]) == ("SDPA efficient, padded", "SDPA, padded")
    assert batch.note == REPEATED


def test_a_note_stands_below_the_table() -> None:
    record = {"case": "a", "timings": {"no split": {"median": 1e-5}}, "failed": {}, "note": REPEATED}
    page = measured_table([record, {**record, "case": "b", "note": ""}, {**record, "case": "c"}], "a test")
    assert page.count(REPEATED) == 1 and page.index("| c | 10 us |") < page.index(REPEATED)


def test_measuring_checks_and_times_every_schedule() -> None:
    case = Case("tiny", (100, 3), 4, 2)
    found = measure(case, torch.device("cpu"), 0.01)
    assert not found["failed"] and found["splits"] == schedules(case)
    assert {"SDPA, padded", "no split", "split-K, 16", "stream-K"} <= found["timings"].keys()
