"""Tiles found by compiling at a first call, on a pretended GPU."""

import os
import sys
import time
from dataclasses import replace

import pytest
import torch

import attngen as ag
from attngen.analysis import facts
from attngen.errors import AttngenWarning, InputError, ScheduleError
from attngen.language.schedule import Schedule, Tile
from attngen.packs.format import MANIFEST
from attngen.runtime import first_tiles
from attngen.runtime.first_tiles import Search, candidates
from attngen.schedule import Target, choice
from attngen.schedule.choice import on_gpu
from attngen.store import StoreWarning, Versions, open_store
from tests.pretend import pretending

SM_90 = Target.named("sm_90")
ODD = ag.Spec(mask="i >= j and i % 3 != j % 5")  # nothing ships for it
ONE, OTHER = Tile(64, 32, 4, 2), Tile(64, 64, 4, 2)


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """A database of its own, time enough on a busy machine, two candidates, nothing said before."""
    monkeypatch.setenv("ATTNGEN_DB", str(tmp_path / "records.db"))
    monkeypatch.setenv(first_tiles.VARIABLE, "120")
    monkeypatch.setattr(first_tiles, "candidates", lambda *_: [ONE, OTHER])
    monkeypatch.setattr(first_tiles, "_said", set())


def call_of(
    spec: ag.Spec = ODD, head_dim: int = 64, grad: bool = False, n_q: int = 256, device: str = "cpu", **captures
):
    q = torch.zeros(1, 2, n_q, head_dim, dtype=torch.bfloat16, device=device, requires_grad=grad)
    k = torch.zeros(1, 2, 256, head_dim, dtype=torch.bfloat16, device=device)
    ((_, call),) = ag.compile(spec).attends(q, k, k, **captures)
    return call


def search(kernels=("forward",), target=SM_90, command=None, head_dim=64, pins=Schedule()) -> Search:  # noqa: B008
    call = call_of(head_dim=head_dim)
    base = on_gpu(call, facts(call.spec), target, 132, pins)
    made = Search(call, facts(call.spec), target, 132, base, pins, kernels)
    return made if command is None else replace(made, command=command)


def decided(spec: ag.Spec = ODD, **options) -> tuple[Schedule, str]:
    """What a new process would choose on a GPU."""
    with pretending(kernels=False):
        found = ag.compile(spec).specialiser.of(call_of(spec, device="cuda", **options))
    return found.schedule, found.origin


def test_the_first_call_searches_and_the_next_process_remembers(monkeypatch):
    schedule, origin = decided()
    chosen = (schedule.forward.block_m, schedule.forward.block_n)
    assert chosen in ((64, 32), (64, 64))
    assert "tile of forward: found by compiling, modelled" in origin and "2 of 2 candidates" in origin
    (record,) = open_store().records()
    assert record.kind == "modelled" and record.source == "search at a first call" and record.seconds > 0
    assert (record.schedule["block_m"], record.schedule["block_n"]) == chosen

    monkeypatch.setattr(Search, "run", lambda *_: pytest.fail("searched again"))
    again, origin = decided()
    assert again == schedule and "found by compiling at an earlier first call" in origin
    longer, _ = decided(n_q=128)  # another size
    assert longer.forward == schedule.forward

    asked = []
    monkeypatch.setattr(Search, "run", lambda self, allowed: (asked.append(self.kernels), ({}, ""))[1])
    monkeypatch.setattr(choice, "generator_versions", lambda backend: Versions(generator="newer", triton="3.9"))
    decided()
    assert asked == [("forward",)]


def test_the_best_of_what_compiles_is_taken(monkeypatch):
    modelled, own = {}, Search._seconds

    def noted(self, kernel, tile, made):
        modelled[tile] = own(self, kernel, tile, made)
        return modelled[tile]

    monkeypatch.setattr(Search, "_seconds", noted)
    found, words = search().run(120)
    assert {*modelled} == {ONE, OTHER} and "2 of 2 candidates compiled" in words
    best = min(modelled, key=modelled.__getitem__)
    assert found == {"forward": (best, modelled[best])} and 0 < modelled[best] < max(modelled.values())


def test_only_what_a_call_needs_is_searched(monkeypatch):
    asked = []
    monkeypatch.setattr(Search, "run", lambda self, allowed: (asked.append(self.kernels), ({}, "nothing"))[1])
    decided()
    decided(grad=True)
    decided(ag.Spec(mask=ag.causal()))  # its tiles ship
    decided(n_q=1)  # decoding has a tile of its own
    assert asked == [("forward",), ("forward", "dq", "dkv")]


def test_pinned_sizes_stay():
    tiles = candidates("forward", 64, SM_90, Tile(block_m=128, num_stages=1), ONE)
    assert tiles and all((tile.block_m, tile.num_stages) == (128, 1) for tile in tiles)
    assert len(set(tiles)) == len(tiles)


def test_what_ships_for_other_specs_is_tried_first():
    from attngen.schedule.shipped import shipped_tiles

    for kernel in ("forward", "dq", "dkv"):
        assert candidates(kernel, 128, SM_90, Tile(), ONE)[0] in shipped_tiles("sm_90", kernel, 128)
        wide = candidates(kernel, 256, Target.named("sm_80"), Tile(), ONE)
        assert len(wide) > 10 and not {Tile(128, 128, 4, 1), Tile(64, 128, 8, 2)} & {*wide}  # sums beyond 255 registers


def test_cpu_and_interpreter_never_search(monkeypatch):
    monkeypatch.setattr(first_tiles, "search", lambda *_: pytest.fail("searched"))
    for backend in ("cpu", "interpret"):
        q = torch.randn(1, 1, 16, 16)
        ag.compile(ODD, backend=backend)(q, q, q)


HANGING = 'import sys, time\nprint(\'{"status": "ok"}\', flush=True)\ntime.sleep(600)'


@pytest.mark.parametrize("script", [HANGING, "import time; time.sleep(600)"], ids=["candidate", "start"])
def test_a_compiler_that_hangs_is_killed(script, monkeypatch):
    monkeypatch.setattr(first_tiles, "COMMAND", [sys.executable, "-S", "-c", script])
    monkeypatch.setenv(first_tiles.VARIABLE, "1")
    begun = time.monotonic()
    said = r"on sm_90: no tile was found within 1 s \(forward [\w=, ]*num_stages=\d: [\w ]*:? ?no answer within 0\.\d s"
    with pytest.warns(AttngenWarning, match=f"forward, head dim 64 {said}"):
        schedule, origin = decided()
    assert time.monotonic() - begun < 60
    assert schedule.forward.whole and "tile of forward: a safe one" in origin
    assert not open_store().records()
    children = os.popen(f"ps --ppid {os.getpid()} -o args").read()
    assert "sleep(600)" not in children


def test_no_tile_without_spills_says_which_and_how_many(monkeypatch):
    spills = iter(((255, 400), (255, 320)))
    monkeypatch.setattr(first_tiles, "nvidia_resources", lambda binary: next(spills))
    monkeypatch.setattr(first_tiles, "MOST_WORKERS", 1)
    with pytest.warns(
        AttngenWarning, match=r"block_m=64, block_n=64.* needs 255 registers a thread and spills 80, the fewest of 2"
    ):
        found, words = search().run(120)
    assert found["forward"][0] == OTHER and "spills 80" in words


def test_a_target_without_shared_memory_is_refused():
    with pytest.raises(
        ScheduleError,
        match=r"forward, head dim 64 on sm_90: no tile fits: the smallest of 2 needs \d+ bytes.*limit of 64",
    ):
        search(target=replace(SM_90, shared_limit=64)).run(120)


def test_a_database_that_cannot_be_written_is_said(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no database" * 500)
    monkeypatch.setenv("ATTNGEN_DB", str(tmp_path / "file"))
    monkeypatch.setattr(Search, "run", lambda *_: ({"forward": (ONE, 1e-3)}, ""))
    with pytest.warns(StoreWarning, match="not remembered"):
        schedule, _ = decided()
    assert schedule.forward.block_n == ONE.block_n


def test_no_search_where_it_is_turned_off_or_nothing_can_be_read(monkeypatch):
    monkeypatch.setattr(Search, "run", lambda *_: pytest.fail("searched"))
    monkeypatch.setenv(first_tiles.VARIABLE, "0")
    _, origin = decided()
    assert "a safe one" in origin
    monkeypatch.setenv(first_tiles.VARIABLE, "2")
    call = call_of()
    amd = Target.named("gfx942")
    assert first_tiles.search(call, facts(ODD), amd, 304, Schedule(), Schedule(), ["forward"]) == ({}, "")


@pytest.mark.parametrize("text", ["soon", "-1", "inf", "nan"])
def test_a_limit_that_is_no_time_is_refused(text, monkeypatch):
    monkeypatch.setenv(first_tiles.VARIABLE, text)
    with pytest.raises(InputError, match="ATTNGEN_SEARCH_SECONDS: expected seconds"):
        first_tiles.limit()


def test_packs_and_cross_compiling_search_too(monkeypatch, tmp_path):
    """For a GPU that is not here. What was found is remembered: the builds behind are equal to the byte."""
    built = [
        ag.save(ODD, tmp_path / name, targets=["H100"], shapes=[(1, 2, 256, 64)], backward=False, search=search)
        for name, search in (("searched", 120.0), ("recalled", 0.0), ("again", 0.0))
    ]
    said = [(folder / MANIFEST).read_text() for folder in built]
    assert "found by compiling, modelled" in said[0] and "2 of 2 candidates compiled" in said[0]
    assert "found by compiling at an earlier first call" in said[1] and said[1] == said[2]

    q = torch.zeros(1, 2, 256, 64, dtype=torch.bfloat16)
    monkeypatch.setattr(Search, "run", lambda *_: pytest.fail("searched again"))
    (found,) = ag.cross_compile_call(ag.compile(ODD), q, q, q, target="H100", passes=("forward",))
    assert "found by compiling" in found.origin and found.schedule.forward.num_warps == 4
