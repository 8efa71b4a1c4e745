"""HTTP around the routes: bodies in OpenAI's format, events, and connections with limits."""
