"""What a model can do, measured: suites of tasks over any model that transformers or this package loads."""
