"""Run files: everything that a run depends on."""
