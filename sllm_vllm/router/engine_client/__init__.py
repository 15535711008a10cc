"""How the router talks to engines: connections, headers, and vLLM's routes."""
