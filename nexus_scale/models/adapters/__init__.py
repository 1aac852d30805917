"""Small networks that change what a frozen one computes: `contracts.Adapter`."""
