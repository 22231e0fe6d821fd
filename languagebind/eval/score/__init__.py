"""From features to figures: metrics, intervals, zero-shot, retrieval, probes."""
