"""Why VAE has no export: no other program has a class for it."""

NO_EXPORT = (
    "diffusers has no class for this autoencoder: AutoencoderKL normalises in every block and halves the image step by step, "
    "vae cuts it into patches and has no norms"
)
