"""The Prefect tasks, one module a stage. A flow puts them together; what a task does is an undecorated function."""
