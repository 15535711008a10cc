"""The router's HTTP side: what clients send, how it is bounded, and how answers are proxied."""
