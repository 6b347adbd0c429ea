"""A manifest as text for people."""

from __future__ import annotations

from mohd_train.data.manifest import SPLITS, Manifest


def describe(manifest: Manifest) -> str:
    """Tokenizer, shape, and documents, tokens and samples of each domain and split; then the notes."""
    t = manifest.tokenizer
    lines = [
        f"tokenizer {t.name} ({t.vocab_size:,} tokens, sha256 {t.sha256[:12]}), samples of {manifest.seq_len} {manifest.dtype}"
    ]
    lines.append(
        f"{'domain':<16}{'split':<7}{'documents':>12}{'tokens':>16}{'samples':>12}{'shards':>8}{'held out':>10}"
    )
    for domain, splits in sorted(manifest.domains.items()):
        for name in SPLITS:
            s = splits[name]
            lines.append(
                f"{domain:<16}{name:<7}{s.documents:>12,}{s.tokens:>16,}{s.samples:>12,}{len(s.shards):>8,}{s.held_out:>10,}"
            )
    total = {name: sum(splits[name].tokens for splits in manifest.domains.values()) for name in SPLITS}
    lines.append(
        f"total: {total['train']:,} tokens to train on, {total['val']:,} to validate, {manifest.bad_rows:,} bad rows"
    )
    return "\n".join(lines + [f"note: {note}" for note in manifest.notes])
