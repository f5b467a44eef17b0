"""What is read from machine code, and the seconds that are modelled from it."""

import json
from dataclasses import replace

import pytest
from triton.tools.disasm import get_sass

import attngen as ag
from attngen.analysis import GPUS
from attngen.backends.triton import latency
from attngen.backends.triton.machine_code import Instruction, Loop
from attngen.backends.triton.modelled import LAUNCH, Resources, Stretch, Work, cycles, seconds
from attngen.schedule import Target

SM_90 = Target.named("sm_90")


@pytest.fixture(scope="module")
def causal():
    """The forward of a causal mask for sm_90."""
    (made,) = ag.cross_compile(ag.Spec(mask=ag.causal()), head_dim=64, passes=("forward",))
    return made


def instruction(text: str, stall: int = 1, result: int = 7, read: int = 7, waits: tuple[int, ...] = ()) -> Instruction:
    control = stall | result << 5 | read << 8 | sum(1 << barrier for barrier in waits) << 11
    return Instruction(text.split()[0].split(".")[0], text, control)


def test_control_bits_are_those_that_triton_decodes(causal):
    """Each line of Triton's listing is "waits:read:result:yield:stall", a tab, the instruction."""
    expected = [line.split("\t")[0] for line in get_sass(causal.cubin).splitlines() if "\t" in line]
    listed = sorted([*(i for loop in causal.loops for i in loop.code), *causal.outside.code], key=lambda i: i.text)
    found = {int(i.text.split("/*")[1].split("*/")[0], 16) // 16: i for i in listed}
    assert len(found) > 1000
    for place, one in found.items():
        waits, read, result, _, stall = expected[place].split(":")
        assert one.waits == (0 if waits == "--" else int(waits))
        assert one.signals == tuple(7 if word == "-" else int(word) for word in (result, read))
        assert one.stall == int(stall, 16)


def test_a_warp_waits_for_results():
    code = [instruction("MUFU.EX2 R0, R0", result=0), instruction("FADD R1, R0, R2", stall=4, waits=(0,))]
    assert latency.once(code) == latency.SPECIAL_LATENCY + 4
    assert latency.once([replace(code[0], control=code[0].control | 7 << 5), instruction("FADD R1, R3, R2", 4)]) == 5


def test_loads_under_way_are_hidden_by_stages():
    """A copy that is waited for an iteration later costs less than one that is waited for at once."""
    work = [instruction("FADD R1, R1, R2", stall=15)] * 10
    copy = [instruction("LDGSTS.E [R1], [R2]"), instruction("LDGDEPBAR")]
    at_once = latency.iteration([*copy, instruction("DEPBAR.LE SB0, 0x0"), *work])
    later = latency.iteration([*copy, instruction("DEPBAR.LE SB0, 0x1"), *work])
    assert at_once >= latency.GLOBAL_LATENCY + 150
    assert 150 < later < at_once - 100


def test_products_run_beside_what_does_not_wait_for_them():
    products = [instruction("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0")] * 4
    work, wait = [instruction("FADD R1, R1, R2", stall=15)] * 20, instruction("WARPGROUP.DEPBAR.LE gsb0, 0x0")
    beside = latency.once([*products, *work, wait])
    behind = latency.once([*products, wait, *work])
    assert beside < behind - 200


def test_programs_hide_each_others_waiting():
    stretch = Stretch(busy=100, alone=300)
    assert [stretch.cycles(programs) for programs in (1, 2, 4)] == [300, 200, 150]
    assert stretch.cycles(1, fetching=400) == 400


def test_a_kernel_is_read_whole(causal):
    used = Resources.of(causal, causal.source.num_warps)
    assert used.partial.busy > used.full.busy > 0 and used.full.alone > used.full.busy
    assert used.outside.alone > 0
    assert Resources.from_json(json.loads(json.dumps(used.to_json()))) == used
    assert sum(loop.instructions for loop in (*causal.loops, causal.outside)) == len(
        [line for line in causal.sass().splitlines() if line.lstrip().startswith("/*")]
    )


def test_programs_that_share_an_output_are_read_as_one():
    tile = ag.Tile(32, 64, 4, 1, separate_sums=True)
    (made,) = ag.cross_compile(ag.Spec(mask=ag.causal()), head_dim=64, schedule=ag.Schedule(dkv=tile), passes=("dkv",))
    (dv_full, dv_partial), (dk_full, dk_partial) = made.walks(2)
    assert dv_partial.count("compare") > dv_full.count("compare") and dk_partial.count("compare") > dk_full.count(
        "compare"
    )
    assert sum(m * n * k for m, n, k, _ in dk_full.products) == 1.5 * sum(m * n * k for m, n, k, _ in dv_full.products)
    used, alone = Resources.of(made, 4, 2), [Stretch.of(loop, 4) for loop in (dv_full, dk_full)]
    assert used.full == alone[0] + alone[1]


def test_amd_code_has_no_cycles():
    (made,) = ag.cross_compile(ag.Spec(), "gfx942", head_dim=64, passes=("forward",))
    assert Resources.of(made, made.source.num_warps).full is None


def test_waves_and_memory_bound_a_launch():
    stretch = Stretch(1000, 1000)
    used = Resources(128, 0, 0, 4, stretch, stretch, Stretch(0, 0))  # four programs a multiprocessor
    assert used.resident(SM_90) == 4
    even, one_more = (Work(full=n, partial=0, programs=n) for n in (4 * 132, 4 * 132 + 1))
    assert cycles(used, even, SM_90, 132) == pytest.approx(4000)
    assert cycles(used, one_more, SM_90, 132) == pytest.approx(8000)
    moved = Work(full=1, partial=0, programs=1, moved=GPUS["H100"].bandwidth)
    assert seconds(used, moved, SM_90, GPUS["H100"], 132) == pytest.approx(1 + LAUNCH)


def test_a_loop_is_counted():
    loop = Loop.of([instruction("FFMA R0, R1, R2, R3"), instruction("MUFU.EX2 R0, R0")])
    assert loop.opcodes == {"FFMA": 1, "MUFU": 1}
    assert loop.pipes(4)["exp"] == 8 and loop.pipes(8)["issue"] == 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [("LDSM.16.M88.4 R84, [R160+0x4400]", 512), ("LDS.64 R44, [R242]", 256), ("STS.128 [R5], R36", 512), ("LDS R1, [R2]", 128),
     ("LDGSTS.E.BYPASS.LTC128B.128 [R1], [R2.64]", 512), ("FFMA R0, R1, R2, R3", 0),
     ("@!PT LDS RZ, [RZ]", 0)],
)  # fmt: skip
def test_what_an_instruction_moves_through_shared_memory(text, expected):
    assert instruction(text).shared_bytes == expected
    assert Loop.of([instruction(text)]).pipes(8)["fetching"] == 8 * expected / 128
