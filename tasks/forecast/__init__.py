"""The needs of a run, known before it starts, beside what this machine has."""
