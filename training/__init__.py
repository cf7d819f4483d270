"""How the model in hasten/demo was made: text from packages, a tokenizer, a training run, an export."""
