"""Small tools that every part shares: files that are never half-written, words for people, facts about the machine."""
