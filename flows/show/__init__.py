"""Tables, figures, the report and the progress of a run."""
