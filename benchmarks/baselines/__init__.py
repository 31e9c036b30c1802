"""The models that PixNerd is compared with, at their published sizes and with random weights."""
