"""Language models to measure: their families, attention and tokenizers, and how to load them."""
