"""What a router keeps across restarts: deployed models and learned estimates."""
