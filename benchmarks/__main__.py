"""Measure attngen against its peers on this machine.

    python -m benchmarks                                every suite, on the GPU if there is one
    python -m benchmarks dense decode --out DIR         some suites, into a folder of one's own
    python -m benchmarks dense --resume                 go on where the time ended
    python -m benchmarks --device cpu --size small      try it without a GPU
    python -m benchmarks gpu_day --out DIR              everything a GPU can show, most valuable first, in turns of minutes

Each suite has --budget seconds, stops before a case that is likely to exceed them, and goes on there with --resume. It
writes SUITE.json as it goes; the tables and charts are made from these files (python -m benchmarks.report_files DIR makes
them again). See benchmarks/results/README.md.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

import torch

from benchmarks import expected, gpu_day, report, report_files
from benchmarks.case import Sizes
from benchmarks.cases import CASES, cases_of
from benchmarks.measure import Context
from benchmarks.peers import PEERS
from benchmarks.prepare import PLANNERS
from benchmarks.suite import DeviceLost, Mixed, Results, run, so_far
from benchmarks.timing import stopwatch_for

RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str] | None = None) -> int:
    """0 when every case has a record, 1 when some are left for --resume, 2 when it cannot start: no GPU, or files of another machine."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["gpu_day"]:
        return gpu_day.main(arguments[1:])
    given = _parser().parse_args(arguments)
    device = torch.device(given.device if given.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            print("--device cuda: torch sees no GPU here")
            return 2
        device = torch.device("cuda", torch.cuda.current_device())
        torch.backends.cuda.matmul.allow_tf32 = False
    size = given.size or ("full" if device.type == "cuda" else "small")
    sizes = Sizes(small=size == "small", cuda=device.type == "cuda")
    setting = {**report.setting(device), "threads": torch.get_num_threads(), "size": size}
    out = given.out or RESULTS / _folder(setting["device"])
    context = Context(device, stopwatch_for(device), time.perf_counter, given.seconds)
    finished = True
    for suite in given.suites or CASES:
        print(f"== {suite} ({size}, {setting['device']})", flush=True)
        try:
            results = Results(out / f"{suite}.json", setting, given.resume)
        except Mixed as error:
            print(error)
            return 2
        cases = cases_of(suite, sizes, given.peers)
        try:
            finished &= run(cases, results, context, given.budget, say=lambda text: print(text, flush=True))
        except DeviceLost as error:
            print(error)
            return 1
        finally:
            report_files.write(out)
        print(so_far(cases, results), flush=True)
    return 0 if finished else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks",
        description=__doc__,
        epilog=expected.text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "suites", nargs="*", metavar="SUITE", help=f"some of: {', '.join(CASES)} (default: all)", type=_suite
    )
    names = dict.fromkeys([*PEERS, *PLANNERS])
    parser.add_argument(
        "--peers", nargs="+", choices=list(names), metavar="PEER", help=f"only these beside attngen: {', '.join(names)}"
    )
    parser.add_argument("--out", type=Path, help="folder for the files (default: benchmarks/results/DEVICE)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--size", choices=("small", "full"), help="small tries the harness (default: full on a GPU)")
    parser.add_argument("--budget", type=float, default=expected.BUDGET, help="seconds for each suite (default 450)")
    parser.add_argument("--seconds", type=float, default=1.0, help="seconds of timing for each case (default 1)")
    parser.add_argument("--resume", action="store_true", help="keep the records that are there, measure the others")
    return parser


def _suite(name: str) -> str:
    if name not in CASES:
        raise argparse.ArgumentTypeError(f"no suite {name!r}; there are {', '.join(CASES)}")
    return name


def _folder(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower().removeprefix("nvidia ")).strip("-")


if __name__ == "__main__":
    sys.exit(main())
