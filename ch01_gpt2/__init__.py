"""Chapter 1: GPT-2, and the text, batches and tokenizer that every later chapter uses."""
