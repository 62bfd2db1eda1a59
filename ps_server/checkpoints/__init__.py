"""The center on disk: the files, the processes that write them, and when they do."""
