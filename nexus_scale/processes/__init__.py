"""What is done to a clean sample; shared by objectives and samplers."""
