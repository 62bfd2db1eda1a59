"""The page that shows the life of a run: its documents, who may read them, and the thread that serves them."""
