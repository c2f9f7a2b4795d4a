"""A local server that shows runs: their tables and reports, and every neuron and row behind them. It only reads."""
