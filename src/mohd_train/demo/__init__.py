"""The demo: a corpus and a tokenizer made from what any Python installation contains, and the whole path run on them."""
