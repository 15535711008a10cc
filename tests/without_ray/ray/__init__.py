"""Put this folder's parent in front of ``sys.path``, and Ray is not installed."""

raise ModuleNotFoundError("No module named 'ray'", name="ray")
