"""Programs that draw examples, compiled; loaded when they are first used."""
