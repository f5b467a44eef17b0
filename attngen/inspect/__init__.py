"""Looking inside: explanations, pictures, bytes, machine code."""
