"""The center variables in memory: buffers and arithmetic. No rules of the round, no asyncio."""
