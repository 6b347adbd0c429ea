"""The way in: a corpus and a tokenizer made of what any Python installation carries, and the whole path run on them."""
