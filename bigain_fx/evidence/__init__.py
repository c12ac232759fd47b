"""Evidence: does a compressed denoiser still classify, and does it still generate?"""
