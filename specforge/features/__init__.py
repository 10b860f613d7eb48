"""Features of every token: on disk, live from the engine, and packed into rows."""
