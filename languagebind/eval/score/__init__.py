"""Turn features into numbers: metrics, intervals, zero-shot classification, retrieval and probes."""
