#!/usr/bin/env python3
"""The bare minimum of PyTorch: a tensor, a derivative, a line fitted by gradient descent.

Run `poetry run src/pytorch-hello.py`. Nearly all of its time goes into importing PyTorch.
"""

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def fit_line(x: Tensor, y: Tensor, steps: int, lr: float) -> tuple[float, float]:
    """Fit y ≈ w·x + b, x and y (N,), by gradient descent on the mean squared error; give w, b."""
    model = nn.Linear(1, 1, device=x.device, dtype=x.dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(steps):
        prediction = model(x.unsqueeze(1)).squeeze(1)  # (N, 1) -> (N,)
        loss = nn.functional.mse_loss(prediction, y)
        optimizer.zero_grad()  # gradients add up, so each step starts from none
        loss.backward()
        optimizer.step()
    return model.weight.item(), model.bias.item()


def main(argv: Sequence[str] | None = None) -> int:
    """Print the versions, one product, one derivative and one fitted line."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=formatter)
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    parser.add_argument("--device", default=device, help="where to compute")
    args = parser.parse_args(argv)
    try:
        torch.manual_seed(args.seed)
        A = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=args.device)
        product = (A @ A).tolist()
    except (RuntimeError, AssertionError, ValueError):
        parser.error(f"--device {args.device} or --seed {args.seed} can't be used here")
    print(f"PyTorch {torch.__version__} on {A.device}\n")
    print(f"A matrix times itself\n  A       {A.tolist()}\n  A @ A   {product}\n")

    x = torch.tensor(2.0, device=args.device, requires_grad=True)
    (x**3).backward()
    print(f"The derivative of x**3 at 2\n  autograd   {x.grad}\n  3 * x**2   {3 * 2.0**2}\n")

    x = torch.linspace(-1, 1, 100)
    y = 3 * x - 2 + 0.3 * torch.randn(100)
    w, b = fit_line(x.to(args.device), y.to(args.device), steps=200, lr=0.2)
    best = torch.linalg.lstsq(torch.stack((x, torch.ones(100)), dim=1), y).solution
    print("A line through 100 noisy points   slope  intercept")
    print(f"  the line under the noise      {3:7.4f}    {-2:7.4f}")
    print(f"  200 steps of gradient descent {w:7.4f}    {b:7.4f}")
    print(f"  least squares, in one go      {best[0]:7.4f}    {best[1]:7.4f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
