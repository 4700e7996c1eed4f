"""Post-training quantisation of diffusion transformers: one file per step of the method.

quantizer -> linear -> calibrate -> smoothing -> search -> lowrank -> merge -> checkpoint, tied together by pipeline.
"""
