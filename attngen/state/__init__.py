"""The one idea: partial softmax states of disjoint key sets, and their merge (`softmax`), also of finished results (`merging`)."""
