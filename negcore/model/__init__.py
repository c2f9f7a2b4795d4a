"""A language model to measure: its families, its tokenizer, its attention, and how it is loaded."""
