"""One small neural-field block, its inputs, and its entry in a report."""

import foreign
import torch

FIELD = "neural_field_mlp_packed"


def block(cls=foreign.NerfBlock, *arguments, dtype=torch.float32, **options):
    torch.manual_seed(7)
    return cls(*(arguments or (24, 8, 2)), **options).to(dtype)


def made(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    x, s = torch.randn(4, 9, 8, generator=generator), torch.randn(4, 24, generator=generator)
    return x.to(dtype), s.to(dtype)


def call(module, dtype=torch.float32):
    return module(*made(dtype)).detach()


def call_double(module, dtype):
    """In float64, on the values that `call` takes."""
    return module(*(tensor.double() for tensor in made(dtype))).detach()


def fields(report):
    return [entry for entry in report.entries if entry.op == FIELD]


def the_field(report):
    (entry,) = fields(report)
    return entry
