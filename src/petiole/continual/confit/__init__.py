"""Fine-tuning one network on experience after experience, and what protects the earlier ones: ConFiT and baselines."""
