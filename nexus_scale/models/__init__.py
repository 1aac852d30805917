"""Networks: nn.Modules only. They know nothing of losses, optimizers, ranks or files."""
