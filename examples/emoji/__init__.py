"""The test bed to look at: a VAE, a DiT and a PixArt trained on Noto's colour emoji."""
