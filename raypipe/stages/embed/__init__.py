"""Stream every sample of the source through the proxies."""
