"""Makes data/torch.bin; needs torch: python tests/convert/make_data.py"""

from __future__ import annotations

from pathlib import Path


def main() -> None:
    import torch

    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {
        "base": base, "transposed": base.T, "rows": base[2:], "column": base[:, 3],
        "half": torch.arange(5, dtype=torch.float16), "brain": torch.arange(3, dtype=torch.bfloat16),
        "parameter": torch.nn.Parameter(torch.ones(2, 2)), "integers": torch.arange(3),
    }  # fmt: skip
    torch.save(tensors, Path(__file__).parent / "data" / "torch.bin")


if __name__ == "__main__":
    main()
