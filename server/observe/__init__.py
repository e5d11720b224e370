"""The information for operators: metrics, logs and traces."""
