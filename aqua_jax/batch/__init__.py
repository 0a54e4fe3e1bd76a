"""JSONL jobs: files of requests answered line by line, resumable after any interruption."""
