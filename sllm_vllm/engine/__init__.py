"""What stock vLLM lacks for live migration: requests that go on elsewhere with their own tokens, and our routes."""
