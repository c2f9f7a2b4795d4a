"""Pools of plain workers, in this process or as Ray actors."""
