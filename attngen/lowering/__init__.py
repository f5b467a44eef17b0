"""Lowering: from a spec, its facts and a schedule to the Triton source of each kernel."""

from attngen.lowering.captures import Site, collect, sites
from attngen.lowering.render import render
from attngen.lowering.source import Arg, Grid, Source, cache_dir

__all__ = ["Arg", "Grid", "Site", "Source", "cache_dir", "collect", "render", "sites"]
