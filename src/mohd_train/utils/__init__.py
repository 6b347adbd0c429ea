"""Small shared tools: atomic files and locks, text for people, facts about the machine, commands and their progress."""
