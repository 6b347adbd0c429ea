"""MoHD's speed against LLaMA of equal activated size, measured side by side."""
