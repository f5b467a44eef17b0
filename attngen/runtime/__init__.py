"""From a spec to something to call."""
