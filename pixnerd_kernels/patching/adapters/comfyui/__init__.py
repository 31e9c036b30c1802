"""ComfyUI: `pixnerd_radiance` is a folder to copy into custom_nodes."""
