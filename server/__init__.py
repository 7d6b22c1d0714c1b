"""The server floor: HTTP and text around the engine host. Never imports torch."""
