"""`patch` where three code bases want it: the official repository, the diffusers port, and ComfyUI."""
