"""What stock vLLM lacks for live migration: resuming a request with its output so far on another engine, and routes."""
