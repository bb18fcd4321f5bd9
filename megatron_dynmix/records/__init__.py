"""What a run tells while it trains: JSONL records, TensorBoard, log lines. Called on one rank only."""
