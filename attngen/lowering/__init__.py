"""Lowering: from a spec, its facts and a schedule to the Triton source of each kernel."""

from attngen.analysis.sites import Site, sites
from attngen.lowering.render import kernels_of, render
from attngen.lowering.signature import Arg
from attngen.lowering.source import Grid, Source

__all__ = ["Arg", "Grid", "Site", "Source", "kernels_of", "render", "sites"]
