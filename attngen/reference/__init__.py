"""Dense definitions in float64, to check everything else against."""
