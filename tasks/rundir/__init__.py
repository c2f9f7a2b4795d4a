"""Run directories: what they hold, who works in them, how far a run is."""
