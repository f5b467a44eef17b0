"""What is computed: expressions, specs, patterns, key sets' declarations, and what a call gives them."""
