"""One run: its settings, its state, the loop, what it leaves behind."""
