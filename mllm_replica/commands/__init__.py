"""The commands of `mllm-replica`, one module per group; `cli` puts them together."""
