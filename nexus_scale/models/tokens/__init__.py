"""Transformers over tokens of any kind: streams of codes that are predicted step by step, or all at once where they are hidden."""
