"""Lowering: from a spec, its facts and a schedule to the Triton source of each kernel."""

from attngen.lowering.captures import Site, collect, sites
from attngen.lowering.render import render
from attngen.lowering.signature import Arg
from attngen.lowering.source import Grid, Source

__all__ = ["Arg", "Grid", "Site", "Source", "collect", "render", "sites"]
