"""The model that comes with the package: weights, tokenizer, card, sample text, training script. Holds no code that the product runs."""
