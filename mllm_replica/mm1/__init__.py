"""MM1: what matters in multimodal pre-training."""
