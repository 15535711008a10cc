"""The loader's decisions, as pure functions of frozen records."""
