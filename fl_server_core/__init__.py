"""What is true: models, rules, states and storage. No HTTP, no queue, no tensors."""
