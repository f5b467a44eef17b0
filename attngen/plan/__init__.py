"""Everything a call will do, as data."""
